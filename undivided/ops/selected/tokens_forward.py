"""Forward over lists of key blocks of single tokens, in Triton, with either loop outside.

Tokens outside: one program a token, whose few heads are padded to a tile of the tensor cores, and which reads every
block anew. Key blocks outside: a block is read once and meets the tokens that list it, gathered into full tiles; each
meeting leaves a partial output with its log-sum-exp, and a second kernel merges those of a token. The first saves the
partial outputs, `heads * tokens * max_blocks * value_dim` elements, the second the padding and the reading.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from undivided.ops._flash import LOG2E, block_width, load_tile, precision, rows_contiguous
from undivided.ops.block_map import block_bounds
from undivided.ops.selected._tiles import block_range, list_parts
from undivided.ops.selected.blocks_forward import add_blocks
from undivided.ops.selected.tokens_index import list_width, segments

# Bytes of partial outputs at a time.
BUFFER_BYTES = 2**30
# Rows of a program, a multiple of every tile: keys and values are loaded once for them.
_SEGMENT_ROWS = 1024


# One program: the heads of one token that share a list, against its blocks.
@triton.jit(do_not_specialize=["num_queries", "num_keys", "max_blocks"])
def _token_kernel(
    query, key, value, index, counts, key_bounds, out, lse,
    scale, num_queries, num_keys, heads, key_group, max_blocks,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
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
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // key_group) * value_stride_h
    q = load_tile(query, 0, query_stride_h, GROUP, HEAD_DIM, BLOCK_M, BLOCK_D, True)
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
    # Finite, so that differences of maxima are never NaN; the exponential of -inf minus it is 0.
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    accumulator, top, total = add_blocks(
        accumulator, top, total, q, key, value, listed, 0, plain, key_bounds, limit, num_keys, scale,
        key_stride_m, value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PACKED, "none", PRECISION,
    )  # fmt: skip
    accumulator, top, total = add_blocks(
        accumulator, top, total, q, key, value, listed, plain, seen, key_bounds, limit, num_keys, scale,
        key_stride_m, value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PACKED, "all", PRECISION,
    )  # fmt: skip
    member = tl.arange(0, BLOCK_M)
    nonempty = total > 0
    total = tl.where(nonempty, total, 1.0)
    result = tl.where(nonempty[:, None], accumulator / total[:, None], 0.0)
    log_sum = tl.where(nonempty, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + (batch * heads + head + member) * num_queries + token, log_sum, mask=member < GROUP)
    column = tl.arange(0, BLOCK_V)
    row = (batch * num_queries + token) * heads + head + member
    tl.store(
        out + row[:, None] * VALUE_DIM + column[None, :], result.to(out.dtype.element_ty),
        mask=(member < GROUP)[:, None] & (column < VALUE_DIM)[None, :],
    )  # fmt: skip


@triton.jit
def gathered_rows(entries, last, row, WIDTH: tl.constexpr, MEMBERS: tl.constexpr):
    """The token, place in its list and member of the heads of rows, of which those before `last` exist."""
    inside = row < last
    entry = tl.load(entries + row // MEMBERS, mask=inside, other=0)
    return entry // WIDTH, entry % WIDTH, (row % MEMBERS).to(tl.int64), inside


@triton.jit
def load_rows(base, offset, inside, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a tensor at int64 offsets."""
    column = tl.arange(0, COLUMNS)
    place = base + offset[:, None] + column[None, :]
    if WIDTH < COLUMNS:
        tile = tl.load(place, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(place, mask=inside[:, None], other=0.0)
    return tile


# One program: one key block against a segment of the rows that list it. Keys and values stay; BLOCK_M rows of queries
# at a time are gathered, 256 bytes each at 128 channels, and as much is written of their partial outputs.
@triton.jit(
    do_not_specialize=["num_queries", "num_keys", "blocks", "max_blocks", "first_list", "first_member"]
)
def _partial_kernel(
    query, key, value, offsets, entries, table, key_bounds, partial, partial_lse,
    scale, num_queries, num_keys, list_heads, key_lists, blocks, max_blocks, first_list, first_member,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, IS_CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(1)
    lists = (first_list + unit).to(tl.int64)
    cell = table + 2 * (unit * tl.num_programs(0) + tl.program_id(0))
    block = tl.load(cell)
    if block >= blocks:
        return
    first_row = tl.load(cell + 1)
    start = tl.load(offsets + lists * (blocks + 1) + block)
    rows = (tl.load(offsets + lists * (blocks + 1) + block + 1) - start) * MEMBERS
    entries += lists * num_queries * max_blocks + start
    batch = lists // list_heads
    list_head = lists % list_heads
    query += batch * query_stride_b + (list_head * GROUP + first_member) * query_stride_h
    key += batch * key_stride_b + (list_head // key_lists) * key_stride_h
    value += batch * value_stride_b + (list_head // key_lists) * value_stride_h
    first, last = block_range(key_bounds, block, num_keys, BLOCK_N, PACKED)
    k = load_tile(key, first, key_stride_m, last, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v = load_tile(value, first, value_stride_m, last, VALUE_DIM, BLOCK_N, BLOCK_V, True)
    column = first + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_V)
    for place in tl.range(first_row, tl.minimum(first_row + SEGMENT, rows), BLOCK_M):
        token, rank, member, inside = gathered_rows(
            entries, rows, place + tl.arange(0, BLOCK_M), WIDTH, MEMBERS
        )
        source = token.to(tl.int64) * query_stride_n + member * query_stride_h
        q = load_rows(query, source, inside, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        seen = (column < last)[None, :]
        if IS_CAUSAL:
            seen = seen & (column[None, :] <= (token + (num_keys - num_queries))[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(tl.max(scores, 1) * scale, -1.0e30)
        weights = tl.exp2(scores * scale - top[:, None])
        total = tl.sum(weights, 1)
        result = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        nonempty = total > 0
        total = tl.where(nonempty, total, 1.0)
        # Divided before it is rounded: the merge is a weighted mean, whose error does not grow with the blocks.
        result *= (1.0 / total)[:, None]
        target = (unit * MEMBERS + member) * num_queries + token
        target = target * max_blocks + rank
        tl.store(partial_lse + target, tl.where(nonempty, top + tl.log2(total), float("-inf")), mask=inside)
        tl.store(
            partial + target[:, None] * VALUE_DIM + channel[None, :], result.to(partial.dtype.element_ty),
            mask=inside[:, None] & (channel < VALUE_DIM)[None, :],
        )  # fmt: skip


# One program: BLOCK_M tokens of one head: the merge of their partial outputs, or with SUM their plain sum. It reads
# each partial output once.
@triton.jit(do_not_specialize=["num_queries", "max_blocks", "first_list", "first_member"])
def _merge_kernel(
    partial, partial_lse, counts, out, lse, factor,
    num_queries, list_heads, max_blocks, first_list, first_member, out_stride_b, out_stride_h, out_stride_n,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(1) // MEMBERS
    member = tl.program_id(1) % MEMBERS
    lists = (first_list + unit).to(tl.int64)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < num_queries
    count = tl.load(counts + lists * num_queries + token, mask=inside, other=0)
    place = (tl.program_id(1).to(tl.int64) * num_queries + token) * max_blocks
    channel = tl.arange(0, BLOCK_V)
    result = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32)
    if not SUM:
        rank = tl.arange(0, WIDTH)
        every = tl.load(
            partial_lse + place[:, None] + rank[None, :],
            mask=rank[None, :] < count[:, None],
            other=float("-inf"),
        )
        top = tl.maximum(tl.max(every, 1), -1.0e30)
        total = tl.sum(tl.exp2(every - top[:, None]), 1)
    for rank in tl.range(0, max_blocks):
        mask = rank < count
        part = tl.load(
            partial + (place + rank)[:, None] * VALUE_DIM + channel[None, :],
            mask=mask[:, None] & (channel < VALUE_DIM)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        if SUM:
            result += part
        else:
            log_sum = tl.load(partial_lse + place + rank, mask=mask, other=float("-inf"))
            result += tl.exp2(log_sum - top)[:, None] * part
    batch = lists // list_heads
    head = (lists % list_heads) * GROUP + first_member + member
    if SUM:
        result *= factor
    else:
        nonempty = total > 0
        total = tl.where(nonempty, total, 1.0)
        result *= tl.where(nonempty, 1.0 / total, 0.0)[:, None]
        log_sum = tl.where(nonempty, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
        row = (batch * list_heads * GROUP + head) * num_queries + token
        tl.store(lse + row, log_sum, mask=inside)
    target = batch * out_stride_b + head * out_stride_h + token.to(tl.int64) * out_stride_n
    tl.store(
        out + target[:, None] + channel[None, :], result.to(out.dtype.element_ty),
        mask=inside[:, None] & (channel < VALUE_DIM)[None, :],
    )  # fmt: skip


def passes(lists: int, group: int, bytes_a_head: int) -> Iterator[tuple[int, int, int, int]]:
    """Cuts the work so that partial results of a pass fit the buffer, a head at least.

    Args:
        lists: lists of blocks, `batch * list heads`.
        group: heads that read a list.
        bytes_a_head: of the partial results of one head.

    Yields:
        First list, number of lists, first head of the group, number of heads of the group.
    """
    heads = max(BUFFER_BYTES // max(bytes_a_head, 1), 1)
    if heads >= group:
        for first in range(0, lists, heads // group):
            yield first, min(heads // group, lists - first), 0, group
        return
    # Equal parts: the kernels are compiled for a number of heads.
    members = max(d for d in range(1, heads + 1) if group % d == 0)
    for first in range(lists):
        for member in range(0, group, members):
            yield first, 1, member, members


def query_launch(element_size: int) -> dict[str, int]:
    """Returns the warps of a program and the blocks in flight of the kernel with tokens outside."""
    return {"num_warps": 4, "num_stages": 1 if element_size == 4 else 2}


def partial_launch(element_size: int, widths: int) -> dict[str, int]:
    """Returns the rows of a tile, the warps of a program and the tiles in flight of the kernel with keys outside.

    Args:
        element_size: bytes of an element.
        widths: of a key and a value together.
    """
    if element_size == 4:
        return {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": 64, "num_warps": 4 if widths <= 256 else 8, "num_stages": 2}


def forward(query, key, value, index, counts, offsets, entries, block_size, scale, is_causal, cu_seqlens):
    """Returns out, a view of `[batch, queries, heads, value_dim]`, and the natural lse.

    With `offsets` and `entries` of `tokens_index.invert` the key blocks are outside, without them the tokens.
    """
    query, key, value = map(rows_contiguous, (query, key, value))
    batch, heads, num_queries, _ = query.shape
    out = query.new_empty((batch, num_queries, heads, value.shape[3])).transpose(1, 2)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if index.shape[3] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    key_bounds = index
    if cu_seqlens is not None:
        key_bounds = block_bounds(key.shape[2], block_size, query.device, cu_seqlens)
    run = _by_tokens if offsets is None else _by_keys
    run(
        query, key, value, index.contiguous(), counts.contiguous(), offsets, entries, key_bounds, out, lse,
        block_size, scale * LOG2E, is_causal, cu_seqlens is not None,
    )  # fmt: skip
    return out, lse


def _by_tokens(
    query, key, value, index, counts, offsets, entries, key_bounds, out, lse, block_size, scale, is_causal, packed
):  # fmt: skip
    batch, heads, num_queries, head_dim = query.shape
    list_heads, value_dim = index.shape[1], value.shape[3]
    group = heads // list_heads
    _token_kernel[num_queries, batch * list_heads](
        query, key, value, index, counts, key_bounds, out, lse,
        scale, num_queries, key.shape[2], heads, heads // key.shape[1], index.shape[3],
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim), BLOCK_V=block_width(value_dim),
        GROUP=group, BLOCK_M=max(16, triton.next_power_of_2(group)), BLOCK_N=block_size,
        WIDTH=list_width(index.shape[3]), IS_CAUSAL=is_causal, PACKED=packed, PRECISION=precision(query),
        **query_launch(query.element_size()),
    )  # fmt: skip


def _by_keys(
    query, key, value, index, counts, offsets, entries, key_bounds, out, lse, block_size, scale, is_causal, packed
):  # fmt: skip
    batch, heads, num_queries, head_dim = query.shape
    key_heads, num_keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    list_heads, max_blocks = index.shape[1], index.shape[3]
    group, lists, blocks = heads // list_heads, batch * list_heads, offsets.shape[2] - 1
    launch = partial_launch(query.element_size(), head_dim + value_dim)
    segment = _SEGMENT_ROWS
    offsets = offsets.view(lists, blocks + 1)
    slots = num_queries * max_blocks
    for first, some, member, members in passes(lists, group, slots * value_dim * query.element_size()):
        partial = query.new_empty((some * members, slots, value_dim))
        partial_lse = lse.new_empty((some * members, slots))
        table, _ = segments(offsets[first : first + some], members, segment, slots)
        _partial_kernel[table.shape[1], some](
            query, key, value, offsets, entries, table, key_bounds, partial, partial_lse,
            scale, num_queries, num_keys, list_heads, list_heads // key_heads, blocks, max_blocks, first, member,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim), BLOCK_V=block_width(value_dim),
            GROUP=group, MEMBERS=members, SEGMENT=segment, BLOCK_N=block_size, WIDTH=list_width(max_blocks),
            IS_CAUSAL=is_causal, PACKED=packed, PRECISION=precision(query), **launch,
        )  # fmt: skip
        merge(partial, partial_lse, counts, out, lse, 1.0, first, some, member, members, False)
        # Else the next buffer would be made beside this one.
        del partial, partial_lse


def merge(partial, partial_lse, counts, out, lse, factor, first, some, member, members, is_sum):
    """Merges the partial results of some heads into `out` and `lse`; or sums them, times a factor."""
    batch, heads, num_queries, width = out.shape
    list_heads, max_blocks = counts.shape[1], partial.shape[1] // num_queries
    rows = 16
    _merge_kernel[triton.cdiv(num_queries, rows), some * members](
        partial, partial_lse, counts, out, lse, factor,
        num_queries, list_heads, max_blocks, first, member, *out.stride()[:3],
        VALUE_DIM=width, BLOCK_V=block_width(width), GROUP=heads // list_heads, MEMBERS=members, BLOCK_M=rows,
        WIDTH=list_width(max_blocks), SUM=is_sum, num_warps=4, num_stages=3,
    )  # fmt: skip
