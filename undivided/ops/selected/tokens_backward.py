"""Backward over lists of key blocks of single tokens, in Triton, with either loop outside; nothing is added atomically.

The gradients of keys and values have the key blocks outside: a program takes a segment of the rows that list a block
and leaves a partial sum, and the sums of a block are added in their order. With key blocks outside for the queries too,
the same pass leaves the share of each meeting in the gradient of its query, and a second kernel adds those of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import LOG2E, block_width, load_tile, precision, rows_contiguous
from undivided.ops.block_map import block_bounds
from undivided.ops.selected._tiles import block_range, list_parts
from undivided.ops.selected.blocks_backward import _add_gradients, _base2
from undivided.ops.selected.tokens_forward import gathered_rows, load_rows, merge, passes, query_launch
from undivided.ops.selected.tokens_index import list_width, segments


# One program: the gradients of the heads of one token that share a list.
@triton.jit(do_not_specialize=["num_queries", "num_keys", "max_blocks"])
def _token_gradient_kernel(
    query, key, value, dout, lse, delta, index, counts, key_bounds, dquery,
    scale, scale_log2, num_queries, num_keys, heads, key_group, max_blocks,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    list_heads = heads // GROUP
    # int64: a head's stride times the heads passes 2**31 at a million tokens.
    list_head = (tl.program_id(1) % list_heads).to(tl.int64)
    batch = (tl.program_id(1) // list_heads).to(tl.int64)
    head = list_head * GROUP
    query += batch * query_stride_b + head * query_stride_h + tl.cast(token, tl.int64) * query_stride_n
    dout += batch * dout_stride_b + head * dout_stride_h + tl.cast(token, tl.int64) * dout_stride_n
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // key_group) * value_stride_h
    q = load_tile(query, 0, query_stride_h, GROUP, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    gradient = load_tile(dout, 0, dout_stride_h, GROUP, VALUE_DIM, BLOCK_M, BLOCK_V, True)
    member = tl.arange(0, BLOCK_M)
    row = (batch * heads + head + member) * num_queries + token
    log_sum = _base2(lse + row, member < GROUP)
    row_delta = tl.load(delta + row, mask=member < GROUP, other=0.0)
    lists = (batch * list_heads + list_head) * num_queries + token
    listed = index + lists * max_blocks
    shift = num_keys - num_queries
    plain, seen = list_parts(
        listed, tl.load(counts + lists), key_bounds, token, token + 1, shift, num_keys, WIDTH, BLOCK_N, IS_CAUSAL,
        PACKED,
    )  # fmt: skip
    limit = num_keys + tl.zeros([BLOCK_M], tl.int32)
    if IS_CAUSAL:
        limit = token + shift + 1 + tl.zeros([BLOCK_M], tl.int32)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _add_gradients(
        dq, q, gradient, log_sum, row_delta, key, value, listed, 0, plain, key_bounds, limit, num_keys, scale_log2,
        key_stride_m, value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PACKED, "none", PRECISION,
    )  # fmt: skip
    dq = _add_gradients(
        dq, q, gradient, log_sum, row_delta, key, value, listed, plain, seen, key_bounds, limit, num_keys, scale_log2,
        key_stride_m, value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PACKED, "all", PRECISION,
    )  # fmt: skip
    column = tl.arange(0, BLOCK_D)
    tl.store(
        dquery + row.to(tl.int64)[:, None] * HEAD_DIM + column[None, :], (dq * scale).to(dquery.dtype.element_ty),
        mask=(member < GROUP)[:, None] & (column < HEAD_DIM)[None, :],
    )  # fmt: skip


# One program: one key block against a segment of the rows that list it. In registers: the float32 gradients of its keys
# and values, and the scores the other way round, keys by rows.
@triton.jit(
    do_not_specialize=["num_queries", "num_keys", "blocks", "max_blocks", "first_list", "first_member"]
)
def _partial_gradient_kernel(
    query, key, value, dout, lse, delta, offsets, entries, table, key_bounds, partial, dkeys, dvalues,
    scale_log2, num_queries, num_keys, list_heads, key_lists, blocks, max_blocks, first_list, first_member,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, IS_CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(1)
    lists = (first_list + unit).to(tl.int64)
    number = unit * tl.num_programs(0) + tl.program_id(0)
    block = tl.load(table + 2 * number)
    if block >= blocks:
        return
    first_row = tl.load(table + 2 * number + 1)
    start = tl.load(offsets + lists * (blocks + 1) + block)
    rows = (tl.load(offsets + lists * (blocks + 1) + block + 1) - start) * MEMBERS
    entries += lists * num_queries * max_blocks + start
    batch = lists // list_heads
    list_head = lists % list_heads
    head = list_head * GROUP + first_member
    query += batch * query_stride_b + head * query_stride_h
    dout += batch * dout_stride_b + head * dout_stride_h
    key += batch * key_stride_b + (list_head // key_lists) * key_stride_h
    value += batch * value_stride_b + (list_head // key_lists) * value_stride_h
    statistics = (batch * list_heads * GROUP + head) * num_queries
    first, last = block_range(key_bounds, block, num_keys, BLOCK_N, PACKED)
    k = load_tile(key, first, key_stride_m, last, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v = load_tile(value, first, value_stride_m, last, VALUE_DIM, BLOCK_N, BLOCK_V, True)
    column = first + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for place in tl.range(first_row, tl.minimum(first_row + SEGMENT, rows), BLOCK_M):
        token, rank, member, inside = gathered_rows(
            entries, rows, place + tl.arange(0, BLOCK_M), WIDTH, MEMBERS
        )
        token = token.to(tl.int64)
        q = load_rows(query, token * query_stride_n + member * query_stride_h, inside, HEAD_DIM, BLOCK_D)
        gradient = load_rows(dout, token * dout_stride_n + member * dout_stride_h, inside, VALUE_DIM, BLOCK_V)
        row = statistics + member * num_queries + token
        log_sum = _base2(lse + row, inside)
        row_delta = tl.load(delta + row, mask=inside, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
        seen = (column < last)[:, None]
        if IS_CAUSAL:
            seen = seen & (column[:, None] <= (token + (num_keys - num_queries))[None, :])
        weights = tl.exp2(tl.where(seen, scores * scale_log2 - log_sum[None, :], float("-inf")))
        dv = tl.dot(weights.to(gradient.dtype), gradient, dv, input_precision=PRECISION)
        dscores = (weights * (dweights - row_delta[None, :])).to(q.dtype)
        dk = tl.dot(dscores, q, dk, input_precision=PRECISION)
        if QUERIES:
            dq = tl.dot(tl.trans(dscores), k, input_precision=PRECISION)
            target = (unit * MEMBERS + member) * num_queries + token
            target = target * max_blocks + rank
            tl.store(
                partial + target[:, None] * HEAD_DIM + channel[None, :], dq.to(partial.dtype.element_ty),
                mask=inside[:, None] & (channel < HEAD_DIM)[None, :],
            )  # fmt: skip
    place = number.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    values = tl.arange(0, BLOCK_V)
    tl.store(
        dkeys + place[:, None] * HEAD_DIM + channel[None, :],
        dk,
        mask=(channel < HEAD_DIM)[None, :] & (place >= 0)[:, None],
    )
    tl.store(
        dvalues + place[:, None] * VALUE_DIM + values[None, :],
        dv,
        mask=(values < VALUE_DIM)[None, :] & (place >= 0)[:, None],
    )


# One program: the keys of one block and head: it adds the partial sums of the segments of all lists that read it.
@triton.jit(do_not_specialize=["num_keys", "blocks", "most", "first_key"])
def _sum_kernel(
    partial, ends, key_bounds, gradient, factor,
    num_keys, blocks, most, key_lists, first_key,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    unit = tl.program_id(1)
    first, last = block_range(key_bounds, block, num_keys, BLOCK_N, PACKED)
    row = tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    offset = row[:, None] * DIM + channel[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for lists in range(unit * key_lists, (unit + 1) * key_lists):
        start = tl.load(ends + lists * (blocks + 1) + block)
        end = tl.load(ends + lists * (blocks + 1) + block + 1)
        for piece in tl.range(start, end):
            base = partial + (tl.cast(lists, tl.int64) * most + piece) * BLOCK_N * DIM
            total += tl.load(base + offset, mask=(channel < DIM)[None, :] & (row >= 0)[:, None], other=0.0)
    place = gradient + (tl.cast(first_key + unit, tl.int64) * num_keys + first) * DIM + offset
    mask = (first + row < last)[:, None] & (channel < DIM)[None, :]
    total *= factor
    if ADD:
        total += tl.load(place, mask=mask, other=0.0)
    tl.store(place, total.to(gradient.dtype.element_ty), mask=mask)


def key_launch(element_size: int, block_size: int, widths: int) -> dict[str, int]:
    """Returns the rows of a tile, the warps of a program and the tiles in flight of the kernel with keys outside.

    Args:
        element_size: bytes of an element.
        block_size: keys of a block.
        widths: of a key and a value together.
    """
    if element_size == 4:
        return {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1}
    if widths > 256:
        return {"BLOCK_M": 32, "num_warps": 8, "num_stages": 1}
    return {"BLOCK_M": 64, "num_warps": 8 if block_size > 16 else 4, "num_stages": 2}


def segment_rows(entries: int, members: int, blocks: int) -> int:
    """Returns the rows of a segment, a multiple of every tile: twice a block's share within limits, to cut few."""
    share = triton.next_power_of_2(max(2 * entries * members // max(blocks, 1), 1))
    return min(max(share, 1024), 4096)


def backward(
    dout, delta, query, key, value, index, counts, offsets, entries, lse, block_size, scale, is_causal, cu_seqlens,
    by_keys,
):  # fmt: skip
    """Returns the gradients of query, key and value; `by_keys` puts key blocks outside for the queries too."""
    query, key, value, dout = map(rows_contiguous, (query, key, value, dout))
    batch, heads, num_queries, head_dim = query.shape
    key_heads, num_keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    list_heads, max_blocks = index.shape[1], index.shape[3]
    dquery, dkey, dvalue = (x.new_empty(x.shape) for x in (query, key, value))
    if query.numel() == 0 or key.numel() == 0 or max_blocks == 0:
        return dquery.zero_(), dkey.zero_(), dvalue.zero_()
    index, counts, lse = index.contiguous(), counts.contiguous(), lse.contiguous()
    packed = cu_seqlens is not None
    key_bounds = block_bounds(num_keys, block_size, query.device, cu_seqlens) if packed else index
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *dout.stride()[:3])
    group, lists, blocks = heads // list_heads, batch * list_heads, offsets.shape[2] - 1
    key_lists = list_heads // key_heads
    shared = {
        "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_D": block_width(head_dim),
        "BLOCK_V": block_width(value_dim), "GROUP": group, "BLOCK_N": block_size, "WIDTH": list_width(max_blocks),
        "IS_CAUSAL": is_causal, "PACKED": packed, "PRECISION": precision(query),
    }  # fmt: skip
    if not by_keys:
        _token_gradient_kernel[num_queries, lists](
            query, key, value, dout, lse, delta, index, counts, key_bounds, dquery,
            scale, scale * LOG2E, num_queries, num_keys, heads, heads // key_heads, max_blocks, *strides,
            BLOCK_M=max(16, triton.next_power_of_2(group)), **shared, **query_launch(query.element_size()),
        )  # fmt: skip
    offsets = offsets.view(lists, blocks + 1)
    slots = num_queries * max_blocks
    bytes_a_head = slots * head_dim * query.element_size()
    # Lists of one key head stay in one pass.
    for first, some, member, members in passes(lists // key_lists, group, bytes_a_head * key_lists):
        first, some = first * key_lists, some * key_lists
        is_split = members < group
        if is_split and first == 0 and member == 0:
            dkey, dvalue = (torch.zeros_like(x, dtype=torch.float32) for x in (dkey, dvalue))
        partial = query.new_empty((some * members if by_keys else 0, slots, head_dim))
        rows = segment_rows(slots, members, blocks)
        table, ends = segments(offsets[first : first + some], members, rows, slots)
        most = table.shape[1]
        dkeys = lse.new_empty((some, most, block_size, head_dim))
        dvalues = lse.new_empty((some, most, block_size, value_dim))
        _partial_gradient_kernel[most, some](
            query, key, value, dout, lse, delta, offsets, entries, table, key_bounds, partial, dkeys, dvalues,
            scale * LOG2E, num_queries, num_keys, list_heads, key_lists, blocks, max_blocks, first, member, *strides,
            MEMBERS=members, SEGMENT=rows, QUERIES=by_keys, **shared,
            **key_launch(query.element_size(), block_size, head_dim + value_dim),
        )  # fmt: skip
        for partials, gradient, width, factor in (
            (dkeys, dkey, head_dim, scale),
            (dvalues, dvalue, value_dim, 1.0),
        ):
            _sum_kernel[blocks, some // key_lists](
                partials, ends, key_bounds, gradient, factor,
                num_keys, blocks, most, key_lists, first // key_lists,
                DIM=width, BLOCK_D=block_width(width), BLOCK_N=block_size, PACKED=packed, ADD=is_split, num_warps=4,
            )  # fmt: skip
        if by_keys:
            merge(partial, lse, counts, dquery, lse, scale, first, some, member, members, True)
        # Else the next buffers would be made beside these.
        del partial, dkeys, dvalues, partials
    return dquery, dkey.to(key.dtype), dvalue.to(value.dtype)
