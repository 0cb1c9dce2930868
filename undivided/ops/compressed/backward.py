"""Backward of attention to compressed blocks in Triton: one pass for the queries, one for the keys and values.

With `p = exp(s - lse)` recomputed and `delta = dout . out - dlse`: `ds = p (dout . v - delta)`, `dq = scale ds k`,
`dk = scale ds^T q`, `dv = p^T dout`. The gradients of keys and values are left for each query head and added up, for
there are few: nothing is added atomically, so that a gradient has the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import (
    LOG2E,
    Tiling,
    add_key_gradients,
    block_width,
    first_fitting,
    load_tile,
    rows_contiguous,
    shared_memory,
    store_tile,
)
from undivided.ops.compressed.triton import RUNTIME, constants, seen_blocks
from undivided.ops.selected.blocks_backward import deltas


@triton.jit
def _statistics(lse, delta, row, inside):
    """The lse in base 2, +inf for rows that see nothing or do not exist, which gives them no weights; and delta."""
    log_sum = tl.load(lse + row, mask=inside, other=float("-inf"))
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * 1.4426950408889634)
    return log_sum, tl.load(delta + row, mask=inside, other=0.0)


# One program: BLOCK_M queries of one head. In registers: their float32 gradient and the scores of one tile of keys.
@triton.jit(do_not_specialize=RUNTIME)
def _query_kernel(
    query, key, value, dout, lse, delta, dquery, scale, scale_log2,
    num_queries, blocks, before, kernel_size, kernel_stride, heads, key_group,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    query += batch * query_stride_b + head * query_stride_h
    dout += batch * dout_stride_b + head * dout_stride_h
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // key_group) * value_stride_h
    q = load_tile(query, first_row, query_stride_n, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    gradient = load_tile(dout, first_row, dout_stride_n, num_queries, VALUE_DIM, BLOCK_M, BLOCK_V, True)
    log_sum, row_delta = _statistics(
        lse, delta, (batch * heads + head) * num_queries + rows, rows < num_queries
    )
    limit = seen_blocks(before + rows, kernel_size, kernel_stride, blocks)
    common = seen_blocks(before + first_row, kernel_size, kernel_stride, blocks) // BLOCK_N * BLOCK_N
    last_row = tl.minimum(first_row + BLOCK_M, num_queries) - 1
    some = seen_blocks(before + last_row, kernel_size, kernel_stride, blocks)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = add_key_gradients(
        dq, q, gradient, log_sum, row_delta, key, value, 0, common, limit, blocks, scale_log2, key_stride_m,
        value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    dq = add_key_gradients(
        dq, q, gradient, log_sum, row_delta, key, value, common, some, limit, blocks, scale_log2, key_stride_m,
        value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    store_tile(dquery, dq * scale, batch * heads + head, first_row, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D)


# One program: BLOCK_N compressed keys against the queries of one head that see them. In registers: the float32
# gradients of keys and values, and the scores the other way round, keys by rows.
@triton.jit(do_not_specialize=RUNTIME)
def _key_kernel(
    query, key, value, dout, lse, delta, dkey, dvalue, scale, scale_log2,
    num_queries, blocks, before, kernel_size, kernel_stride, heads, key_group,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    # The first keys are seen by the most queries, so they go first.
    first_key = tl.program_id(1) * BLOCK_N
    query += batch * query_stride_b + head * query_stride_h
    dout += batch * dout_stride_b + head * dout_stride_h
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // key_group) * value_stride_h
    k = load_tile(key, first_key, key_stride_m, blocks, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v = load_tile(value, first_key, value_stride_m, blocks, VALUE_DIM, BLOCK_N, BLOCK_V, True)
    column = first_key + tl.arange(0, BLOCK_N)
    row_base = (batch * heads + head) * num_queries
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    # The first query that sees the first key.
    first = tl.maximum(first_key * kernel_stride + kernel_size - 1 - before, 0) // BLOCK_M * BLOCK_M
    for start in tl.range(first, num_queries, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_tile(query, start, query_stride_n, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D, True)
        gradient = load_tile(dout, start, dout_stride_n, num_queries, VALUE_DIM, BLOCK_M, BLOCK_V, True)
        log_sum, row_delta = _statistics(lse, delta, row_base + rows, rows < num_queries)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        limit = seen_blocks(before + rows, kernel_size, kernel_stride, blocks)
        weights = tl.exp2(scores * scale_log2 - log_sum[None, :])
        weights = tl.where(column[:, None] < limit[None, :], weights, 0.0)
        dv = tl.dot(weights.to(gradient.dtype), gradient, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
        dscores = weights * (dweights - row_delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    store_tile(dkey, dk * scale, batch * heads + head, first_key, blocks, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dvalue, dv, batch * heads + head, first_key, blocks, VALUE_DIM, BLOCK_N, BLOCK_V)


# `rows` are queries. For the gradients of keys what is loaded in the loop is the side of the queries.
_QUERY = (Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 1), Tiling(32, 16, 4, 1))
# Measured on an H100 with 4 key heads of 128 and 32768 tokens: 7.6 ms for both passes, against 13.6 with 8 warps.
_KEY = (Tiling(64, 64, 4, 2), Tiling(32, 64, 4, 2), Tiling(32, 32, 4, 1), Tiling(16, 16, 4, 1))
# The gradients of wide keys and values need the registers of 8 warps.
_KEY_WIDE = (Tiling(64, 64, 8, 2), *_KEY[1:])
_QUERY_FLOAT32 = (Tiling(16, 32, 8, 1), Tiling(16, 16, 4, 1))
_KEY_FLOAT32 = (Tiling(16, 16, 8, 1),)


def backward(dout, dlse, out, query, key, value, lse, num_keys, kernel_size, kernel_stride, scale):
    """Returns the gradients of query, key and value."""
    query, key, value, dout = map(rows_contiguous, (query, key, value, dout))
    batch, heads, num_queries, head_dim = query.shape
    key_heads, blocks, value_dim = key.shape[1], key.shape[2], value.shape[3]
    dquery = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if dout.numel() == 0 or blocks == 0:
        return dquery.zero_(), torch.zeros_like(key), torch.zeros_like(value)
    delta = deltas(dout, out, dlse)
    half, limit = query.element_size() == 2, shared_memory(query.device) // query.element_size()
    width = block_width(head_dim) + block_width(value_dim)
    arguments = (query, key, value, dout, lse.contiguous(), delta)
    sizes = (
        scale, scale * LOG2E, num_queries, blocks, num_keys - num_queries, kernel_size, kernel_stride, heads,
        heads // key_heads, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *dout.stride()[:3],
    )  # fmt: skip
    cut = first_fitting(
        _QUERY if half else _QUERY_FLOAT32, lambda t: (t.rows + t.num_stages * t.keys) * width, limit
    )
    _query_kernel[batch * heads, triton.cdiv(num_queries, cut.rows)](
        *arguments, dquery, *sizes,
        BLOCK_M=cut.rows, BLOCK_N=cut.keys, num_warps=cut.num_warps, num_stages=cut.num_stages,
        **constants(query, value),
    )  # fmt: skip
    dkey, dvalue = (
        torch.empty((batch, heads, blocks, x.shape[3]), dtype=torch.float32, device=x.device)
        for x in (key, value)
    )
    key_tilings = (_KEY if width <= 256 else _KEY_WIDE) if half else _KEY_FLOAT32
    cut = first_fitting(key_tilings, lambda t: (t.keys + t.num_stages * t.rows) * width, limit)
    _key_kernel[batch * heads, triton.cdiv(blocks, cut.keys)](
        *arguments, dkey, dvalue, *sizes,
        BLOCK_M=cut.rows, BLOCK_N=cut.keys, num_warps=cut.num_warps, num_stages=cut.num_stages,
        **constants(query, value),
    )  # fmt: skip
    dkey, dvalue = (
        x.unflatten(1, (key_heads, heads // key_heads)).sum(2).to(key.dtype) for x in (dkey, dvalue)
    )
    return dquery, dkey, dvalue
