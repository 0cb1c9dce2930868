"""Backward over lists of key blocks in Triton: one pass by queries, one by keys through the inverse lists.

With `p = exp(s - lse)` recomputed and `delta = dout . out - dlse`: `ds = p (dout . v - delta)`, `dq = scale ds k`,
`dk = scale ds^T q`, `dv = p^T dout`. Nothing is added atomically, so that a gradient has the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import LOG2E, block_width, load_tile, precision, rows_contiguous
from undivided.ops.block_map import invert, num_blocks
from undivided.ops.selected._tiles import block_range, list_parts
from undivided.ops.selected.blocks_forward import bounds


# One program: the delta of BLOCK_M queries of one head.
@triton.jit
def _delta_kernel(
    dout, out, dlse, delta, num_queries, heads,
    dout_stride_b, dout_stride_h, dout_stride_n, out_stride_b, out_stride_h, out_stride_n,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    dout += batch * dout_stride_b + head * dout_stride_h
    out += batch * out_stride_b + head * out_stride_h
    gradient = load_tile(dout, first, dout_stride_n, num_queries, VALUE_DIM, BLOCK_M, BLOCK_V, True)
    result = load_tile(out, first, out_stride_n, num_queries, VALUE_DIM, BLOCK_M, BLOCK_V, True)
    rows = first + tl.arange(0, BLOCK_M)
    position = (batch * heads + head) * num_queries + rows
    total = tl.sum(gradient.to(tl.float32) * result.to(tl.float32), 1)
    if HAS_DLSE:
        total -= tl.load(dlse + position, mask=rows < num_queries, other=0.0)
    tl.store(delta + position, total, mask=rows < num_queries)


def deltas(dout, out, dlse):
    """Returns `dout . out - dlse` of each query, float32 `[batch, heads, queries]`."""
    dout, out = rows_contiguous(dout), rows_contiguous(out)
    batch, heads, num_queries, value_dim = out.shape
    delta = out.new_empty((batch, heads, num_queries), dtype=torch.float32)
    _delta_kernel[triton.cdiv(num_queries, 64), batch * heads](
        dout, out, delta if dlse is None else dlse.contiguous(), delta, num_queries, heads,
        *dout.stride()[:3], *out.stride()[:3],
        VALUE_DIM=value_dim, BLOCK_V=block_width(value_dim), BLOCK_M=64, HAS_DLSE=dlse is not None, num_warps=4,
    )  # fmt: skip
    return delta


@triton.jit
def _add_gradients(
    dq, q, gradient, log_sum, delta, key, value, listed, first_entry, last_entry, bounds, limit, num_keys, scale_log2,
    key_stride, value_stride,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, PACKED: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the listed blocks `first_entry .. last_entry - 1` contribute to the gradient of queries."""
    for entry in tl.range(first_entry, last_entry):
        first, last = block_range(bounds, tl.load(listed + entry), num_keys, BLOCK_N, PACKED)
        k = load_tile(key, first, key_stride, last, HEAD_DIM, BLOCK_N, BLOCK_D, MASK != "none")
        v = load_tile(value, first, value_stride, last, VALUE_DIM, BLOCK_N, BLOCK_V, MASK != "none")
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dweights = tl.dot(gradient, tl.trans(v), input_precision=PRECISION)
        column = first + tl.arange(0, BLOCK_N)
        scores = scores * scale_log2 - log_sum[:, None]
        if MASK == "end":
            scores += tl.where(column < last, 0.0, float("-inf"))[None, :]
        weights = tl.exp2(scores)
        if MASK == "all":
            seen = (column[None, :] < limit[:, None]) & (column < last)[None, :]
            weights = tl.where(seen, weights, 0.0)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _base2(lse, inside):
    """The log-sum-exp of rows in base 2; +inf, and so weights of zero, where a row saw nothing or does not exist."""
    log_sum = tl.load(lse, mask=inside, other=float("inf"))
    return tl.where(log_sum == float("-inf"), float("inf"), log_sum * 1.4426950408889634)


# One program: the queries of one block and head against the key blocks of their list.
@triton.jit
def _query_kernel(
    query, key, value, dout, lse, delta, index, counts, query_bounds, key_bounds, dquery,
    scale, scale_log2, num_queries, num_keys, heads, key_group, list_group, rows, max_blocks,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PACKED: tl.constexpr, EVEN: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    query += batch * query_stride_b + head * query_stride_h
    dout += batch * dout_stride_b + head * dout_stride_h
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // key_group) * value_stride_h
    lists = (batch * (heads // list_group) + head // list_group) * rows + row
    listed = index + lists * max_blocks
    first_row, last_row = block_range(query_bounds, row, num_queries, BLOCK_M, PACKED)
    q = load_tile(query, first_row, query_stride_n, last_row, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    gradient = load_tile(dout, first_row, dout_stride_n, last_row, VALUE_DIM, BLOCK_M, BLOCK_V, True)
    positions = first_row + tl.arange(0, BLOCK_M)
    inside = positions < last_row
    token = (batch * heads + head) * num_queries + positions
    log_sum = _base2(lse + token, inside)
    row_delta = tl.load(delta + token, mask=inside, other=0.0)
    limit = num_keys + tl.zeros([BLOCK_M], tl.int32)
    count = tl.load(counts + lists)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if IS_CAUSAL or PACKED:
        shift = num_keys - num_queries
        plain, seen = list_parts(
            listed, count, key_bounds, first_row, last_row, shift, num_keys, WIDTH, BLOCK_N, IS_CAUSAL, PACKED
        )
        if IS_CAUSAL:
            limit = positions + shift + 1
        dq = _add_gradients(
            dq, q, gradient, log_sum, row_delta, key, value, listed, 0, plain, key_bounds, limit, num_keys, scale_log2,
            key_stride_m, value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PACKED, "none", PRECISION,
        )  # fmt: skip
        dq = _add_gradients(
            dq, q, gradient, log_sum, row_delta, key, value, listed, plain, seen, key_bounds, limit, num_keys,
            scale_log2, key_stride_m, value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PACKED, "all",
            PRECISION,
        )  # fmt: skip
    else:
        dq = _add_gradients(
            dq, q, gradient, log_sum, row_delta, key, value, listed, 0, count, key_bounds, limit, num_keys, scale_log2,
            key_stride_m, value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PACKED,
            "none" if EVEN else "end", PRECISION,
        )  # fmt: skip
    _store_gradient(dquery, dq * scale, token, inside, HEAD_DIM, BLOCK_D, ADD)


@triton.jit
def _store_gradient(base, tile, token, inside, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr):
    """Stores rows of a contiguous `[..., WIDTH]`, added to what is there with ADD."""
    column = tl.arange(0, COLUMNS)
    place = base + token[:, None] * WIDTH + column[None, :]
    mask = inside[:, None] & (column < WIDTH)[None, :]
    if ADD:
        tile += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, tile.to(base.dtype.element_ty), mask=mask)


# One program: the keys of one block and head against all blocks of queries whose lists have it, of all heads that read
# it. In registers: the float32 gradients of keys and values.
@triton.jit
def _key_kernel(
    query, key, value, dout, lse, delta, offsets, inverse, query_bounds, key_bounds, dkey, dvalue,
    scale, scale_log2, num_queries, num_keys, key_heads, key_group, list_group, blocks, entries,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PACKED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    key_head = tl.program_id(1) % key_heads
    batch = (tl.program_id(1) // key_heads).to(tl.int64)
    key += batch * key_stride_b + key_head * key_stride_h
    value += batch * value_stride_b + key_head * value_stride_h
    first_key, last_key = block_range(key_bounds, block, num_keys, BLOCK_N, PACKED)
    k = load_tile(key, first_key, key_stride_m, last_key, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v = load_tile(value, first_key, value_stride_m, last_key, VALUE_DIM, BLOCK_N, BLOCK_V, True)
    column = first_key + tl.arange(0, BLOCK_N)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    heads = key_heads * key_group
    # A block of queries is taken in pieces of STEP.
    pieces: tl.constexpr = BLOCK_M // STEP
    for member in range(key_group):
        head = key_head * key_group + member
        lists = batch * (heads // list_group) + head // list_group
        start = tl.load(offsets + lists * (blocks + 1) + block)
        end = tl.load(offsets + lists * (blocks + 1) + block + 1)
        head_query = query + batch * query_stride_b + head * query_stride_h
        head_dout = dout + batch * dout_stride_b + head * dout_stride_h
        token = (batch * heads + head) * num_queries
        listed = inverse + lists * entries
        for piece in tl.range(start * pieces, end * pieces):
            first_row, last_row = block_range(
                query_bounds, tl.load(listed + piece // pieces), num_queries, BLOCK_M, PACKED
            )
            first_row += (piece % pieces) * STEP
            rows = first_row + tl.arange(0, STEP)
            inside = rows < last_row
            q = load_tile(head_query, first_row, query_stride_n, last_row, HEAD_DIM, STEP, BLOCK_D, True)
            gradient = load_tile(
                head_dout, first_row, dout_stride_n, last_row, VALUE_DIM, STEP, BLOCK_V, True
            )
            log_sum = _base2(lse + token + rows, inside)
            row_delta = tl.load(delta + token + rows, mask=inside, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            dweights = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
            weights = tl.exp2(scores * scale_log2 - log_sum[None, :])
            if IS_CAUSAL:
                weights = tl.where(column[:, None] <= rows[None, :] + (num_keys - num_queries), weights, 0.0)
            dv = tl.dot(weights.to(gradient.dtype), gradient, dv, input_precision=PRECISION)
            dscores = weights * (dweights - row_delta[None, :])
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    token = (batch * key_heads + key_head) * num_keys + column
    inside = column < last_key
    _store_gradient(dkey, dk * scale, token, inside, HEAD_DIM, BLOCK_D, ADD)
    _store_gradient(dvalue, dv, token, inside, VALUE_DIM, BLOCK_V, ADD)


def query_launch(block_m: int, element_size: int) -> dict[str, int]:
    """Returns the warps of a program and the stages of the pass by queries, measured on an H100."""
    if element_size == 4:
        return {"num_warps": 4, "num_stages": 1}
    return {"num_warps": 8 if block_m > 64 else 4, "num_stages": 2}


def key_launch(block_n: int, element_size: int) -> dict[str, int]:
    """Returns the warps of a program and the stages of the pass by keys, measured on an H100."""
    if element_size == 4:
        return {"num_warps": 8, "num_stages": 1}
    return {"num_warps": 8 if block_n > 64 else 4, "num_stages": 1}


def backward(
    dout, delta, query, key, value, index, counts, lse, query_block_size, block_size, scale, is_causal, cu_seqlens,
    into=None,
):  # fmt: skip
    """Returns the gradients of query, key and value; with `into` they are added to those three contiguous tensors."""
    query, key, value, dout = map(rows_contiguous, (query, key, value, dout))
    batch, heads, num_queries, head_dim = query.shape
    key_heads, num_keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    dquery, dkey, dvalue = (x.new_empty(x.shape) for x in (query, key, value)) if into is None else into
    if query.numel() == 0 or key.numel() == 0:
        return dquery.zero_(), dkey.zero_(), dvalue.zero_()
    index, counts, lse = index.contiguous(), counts.contiguous(), lse.contiguous()
    query_bounds, key_bounds = bounds(num_queries, num_keys, query_block_size, block_size, cu_seqlens, index)
    rows, max_blocks = index.shape[2:]
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *dout.stride()[:3])
    shared = {
        "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_D": block_width(head_dim),
        "BLOCK_V": block_width(value_dim), "BLOCK_M": query_block_size, "BLOCK_N": block_size,
        "IS_CAUSAL": is_causal, "PACKED": cu_seqlens is not None,
        "ADD": into is not None, "PRECISION": precision(query),
    }  # fmt: skip
    group, list_group = heads // key_heads, heads // index.shape[1]
    _query_kernel[rows, batch * heads](
        query, key, value, dout, lse, delta, index, counts, query_bounds, key_bounds, dquery,
        scale, scale * LOG2E, num_queries, num_keys, heads, group, list_group, rows, max_blocks, *strides,
        WIDTH=triton.next_power_of_2(max(max_blocks, 1)), EVEN=num_keys % block_size == 0,
        **shared, **query_launch(query_block_size, query.element_size()),
    )  # fmt: skip
    blocks = num_blocks(num_keys, block_size, cu_seqlens)
    offsets, inverse = invert(index, counts, blocks)
    _key_kernel[blocks, batch * key_heads](
        query, key, value, dout, lse, delta, offsets, inverse, query_bounds, key_bounds, dkey, dvalue,
        scale, scale * LOG2E, num_queries, num_keys, key_heads, group, list_group, blocks, inverse.shape[2], *strides,
        STEP=min(query_block_size, 64 if query.element_size() == 2 else 16),
        **shared, **key_launch(block_size, query.element_size()),
    )  # fmt: skip
    return dquery, dkey, dvalue
