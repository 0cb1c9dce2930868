"""The backward of routed attention in Triton: one pass for queries and gates, one for keys and values.

With `p = exp(s - lse)` recomputed, gate g, and `r = dout . (p v)`, which is the gradient of the gate:
`ds = g p (dout . v - r)`, `dq = scale ds k`, `dk = scale ds^T q`, `dv = (g p)^T dout`. Two passes compute the scores
twice, but nothing is added atomically, so that a gradient has the same bits in every run.
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
    precision,
    rows_contiguous,
    shared_memory,
    store_tile,
)
from undivided.ops.routed.triton import RANK_STEP, RUNTIME, gate_strides, gather, list_tile, visible


# One program: BLOCK_M queries of one list against all keys they see. In registers: the float32 gradient of the queries
# and the scores and their gradient of one block of keys; queries and output gradient stay in shared memory. A program
# whose queries did not choose the head writes their zeros.
@triton.jit(do_not_specialize=RUNTIME)
def _query_kernel(
    query, key, value, gates, index, count, unscaled, dout, lse, row_product, dquery, dgates,
    scale, scale_log2, num_queries, num_keys, heads, key_group,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, gates_stride_b, gates_stride_h, gates_stride_n,
    unscaled_stride_b, unscaled_stride_h, unscaled_stride_n, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_GATES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    list_base = (batch * heads + head) * num_queries
    chosen = tl.load(count + batch * heads + head)
    first_row = list_tile(chosen, BLOCK_M) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_inside = rows < num_queries
    position = tl.load(index + list_base + rows, mask=row_inside, other=0)
    column = tl.arange(0, BLOCK_D)
    dquery_offset = (list_base + position)[:, None] * HEAD_DIM + column[None, :]
    inside = row_inside[:, None] & (column < HEAD_DIM)[None, :]
    if first_row >= chosen:
        tl.store(dquery + dquery_offset, tl.zeros([BLOCK_M, BLOCK_D], dquery.dtype.element_ty), mask=inside)
        if HAS_GATES:
            tl.store(dgates + list_base + position, tl.zeros([BLOCK_M], tl.float32), mask=row_inside)
        return

    is_chosen = rows < chosen
    query += batch * query_stride_b + head * query_stride_h
    unscaled += batch * unscaled_stride_b + head * unscaled_stride_h
    dout += batch * dout_stride_b + head * dout_stride_h
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // key_group) * value_stride_h
    q = gather(query, position, is_chosen, query_stride_n, HEAD_DIM, BLOCK_D, True)
    gradient = gather(dout, position, is_chosen, dout_stride_n, VALUE_DIM, BLOCK_V, True)
    result = gather(unscaled, position, is_chosen, unscaled_stride_n, VALUE_DIM, BLOCK_V, True)
    product = tl.sum(gradient.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(row_product + list_base + rows, product, mask=is_chosen)
    factor = scale + tl.zeros([BLOCK_M], tl.float32)
    if HAS_GATES:
        tl.store(dgates + list_base + position, product, mask=row_inside)
        gates += batch * gates_stride_b + head * gates_stride_h
        factor *= tl.load(gates + position.to(tl.int64) * gates_stride_n, mask=is_chosen, other=0.0)
    log_sum = tl.load(lse + list_base + rows, mask=is_chosen, other=float("inf"))

    limit, common, last = visible(
        index + list_base, position, first_row, chosen, num_queries, num_keys, BLOCK_M, BLOCK_N, IS_CAUSAL
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = add_key_gradients(
        dq, q, gradient, log_sum, product, key, value, 0, common, limit, num_keys, scale_log2, key_stride_m,
        value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    dq = add_key_gradients(
        dq, q, gradient, log_sum, product, key, value, common, last, limit, num_keys, scale_log2, key_stride_m,
        value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    tl.store(dquery + dquery_offset, (dq * factor[:, None]).to(dquery.dtype.element_ty), mask=inside)


# One program: BLOCK_N keys of one key head against the queries that see them, from the lists of all heads of its group.
# In registers: the float32 gradients of keys and values, and the scores and their gradient of one tile of queries.
@triton.jit(do_not_specialize=(*RUNTIME, "key_heads"))
def _key_kernel(
    query, key, value, gates, index, count, rank, dout, lse, row_product, dkey, dvalue,
    scale, scale_log2, num_queries, num_keys, heads, key_heads,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, gates_stride_b, gates_stride_h, gates_stride_n,
    dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_GATES: tl.constexpr,
    RANK_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key_head = tl.program_id(0) % key_heads
    batch = (tl.program_id(0) // key_heads).to(tl.int64)
    # The first keys are seen by the most queries, so they go first.
    first_key = tl.program_id(1) * BLOCK_N
    key += batch * key_stride_b + key_head * key_stride_h
    value += batch * value_stride_b + key_head * value_stride_h
    k = load_tile(key, first_key, key_stride_m, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v = load_tile(value, first_key, value_stride_m, num_keys, VALUE_DIM, BLOCK_N, BLOCK_V, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    query += batch * query_stride_b
    dout += batch * dout_stride_b
    gates += batch * gates_stride_b
    # A query from this position on sees a key of the block; from `common` on it sees them all.
    reaching = first_key - (num_keys - num_queries)
    num_ranks = tl.cdiv(num_queries, RANK_STEP)
    group = heads // key_heads
    for i in range(group):
        head = key_head * group + i
        row = batch * heads + head
        chosen = tl.load(count + row)
        first = 0
        common = 0
        if IS_CAUSAL:
            first = tl.load(rank + row * num_ranks + tl.maximum(reaching, 0) // RANK_STEP)
            first = first // BLOCK_M * BLOCK_M
            step = tl.cdiv(tl.maximum(reaching + BLOCK_N - 1, 0), RANK_STEP)
            common = tl.load(rank + row * num_ranks + step, mask=step < num_ranks, other=chosen)
            common = tl.maximum(tl.cdiv(common, BLOCK_M) * BLOCK_M, first)
        list_base = row * num_queries
        if IS_CAUSAL:
            dk, dv = _add_queries(
                dk, dv, k, v, query + head * query_stride_h, dout + head * dout_stride_h, gates + head * gates_stride_h,
                index + list_base, lse + list_base, row_product + list_base, first, tl.minimum(common, chosen), chosen,
                first_key, num_queries, num_keys, scale_log2, query_stride_n, dout_stride_n, gates_stride_n,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, IS_CAUSAL, HAS_GATES, PRECISION,
            )  # fmt: skip
        dk, dv = _add_queries(
            dk, dv, k, v, query + head * query_stride_h, dout + head * dout_stride_h, gates + head * gates_stride_h,
            index + list_base, lse + list_base, row_product + list_base, common, chosen, chosen,
            first_key, num_queries, num_keys, scale_log2, query_stride_n, dout_stride_n, gates_stride_n,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, False, HAS_GATES, PRECISION,
        )  # fmt: skip
    out_row = batch * key_heads + key_head
    store_tile(dkey, dk * scale, out_row, first_key, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dvalue, dv, out_row, first_key, num_keys, VALUE_DIM, BLOCK_N, BLOCK_V)


@triton.jit
def _add_queries(
    dk, dv, k, v, query, dout, gates, index, lse, row_product, first, last, chosen,
    first_key, num_queries, num_keys, scale_log2, query_stride, dout_stride, gates_stride,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, HAS_GATES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the queries `first .. last - 1` of a list contribute to the gradients of keys and values."""
    key_row = first_key + tl.arange(0, BLOCK_N)
    for start in tl.range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        present = rows < chosen
        # The last one stands in for those that do not exist: their log-sum of +inf makes their weights zero.
        position = tl.load(index + tl.minimum(rows, chosen - 1))
        q = gather(query, position, present, query_stride, HEAD_DIM, BLOCK_D, False)
        gradient = gather(dout, position, present, dout_stride, VALUE_DIM, BLOCK_V, False)
        log_sum = tl.load(lse + rows, mask=present, other=float("inf"))
        product = tl.load(row_product + rows, mask=present, other=0.0)
        weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - log_sum[None, :])
        if MASKED:
            weights = tl.where(key_row[:, None] <= position[None, :] + (num_keys - num_queries), weights, 0.0)
        if HAS_GATES:
            gate = tl.load(gates + position.to(tl.int64) * gates_stride)
            weights *= gate[None, :]
        dv = tl.dot(weights.to(gradient.dtype), gradient, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
        dscores = weights * (dweights - product[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


# Measured on an H100 (the first), then smaller ones for wider heads and devices with less memory. `rows` are queries.
# Narrow heads, up to 64, leave room for two programs on a multiprocessor.
_QUERY_NARROW, _KEY_NARROW = Tiling(64, 64, 4, 3), Tiling(32, 128, 4, 3)
_QUERY = (Tiling(128, 64, 8, 3), Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 1), Tiling(32, 16, 4, 1))
_KEY = (Tiling(32, 128, 8, 3), Tiling(32, 64, 8, 2), Tiling(32, 32, 4, 1))
_QUERY_FLOAT32 = (Tiling(16, 32, 8, 1), Tiling(16, 16, 4, 1))
_KEY_FLOAT32 = (Tiling(16, 16, 8, 1),)


def _by_width(width: int, narrow: Tiling, others: tuple[Tiling, ...]) -> tuple[Tiling, ...]:
    return (narrow, *others) if width <= 128 else others


def query_tiling(head_dim: int, value_dim: int, element_size: int, shared_memory: int) -> Tiling:
    """Returns the tiling of the kernel for the gradient of the queries; arguments as in `forward_tiling`."""
    width = head_dim + value_dim
    return first_fitting(
        _by_width(width, _QUERY_NARROW, _QUERY) if element_size == 2 else _QUERY_FLOAT32,
        lambda t: (t.rows + t.num_stages * t.keys) * width,
        shared_memory // element_size,
    )


def key_tiling(head_dim: int, value_dim: int, element_size: int, shared_memory: int) -> Tiling:
    """Returns the tiling of the kernel for the gradients of keys and values; arguments as in `forward_tiling`."""
    width = head_dim + value_dim
    return first_fitting(
        _by_width(width, _KEY_NARROW, _KEY) if element_size == 2 else _KEY_FLOAT32,
        lambda t: (t.keys + t.num_stages * t.rows) * width,
        shared_memory // element_size,
    )


def backward(
    dout, unscaled, lse, index, count, rank, query, key, value, gates, is_causal, scale, *, tilings=(None, None),
):  # fmt: skip
    """Returns the gradients of query, key, value and gates; `unscaled` is the output before the gates."""
    batch, heads, num_queries, head_dim = query.shape
    key_heads, num_keys, value_dim = value.shape[1:]
    query, key, value, dout = map(rows_contiguous, (query, key, value, dout))
    dquery, dkey, dvalue = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    row_product = torch.empty_like(lse)
    dgates = lse.new_empty(lse.shape if gates is not None else 0)
    widths = block_width(head_dim), block_width(value_dim)
    sizes = *widths, query.element_size(), shared_memory(query.device)
    for_queries, for_keys = tilings[0] or query_tiling(*sizes), tilings[1] or key_tiling(*sizes)
    constants = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": widths[0],
        "BLOCK_V": widths[1],
        "IS_CAUSAL": is_causal,
        "HAS_GATES": gates is not None,
        "PRECISION": precision(query),
    }
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *gate_strides(gates))
    # Without gates no kernel touches them, but a kernel moves the pointer.
    gates = lse if gates is None else gates
    _query_kernel[batch * heads, triton.cdiv(num_queries, for_queries.rows)](
        query, key, value, gates, index, count, unscaled, dout, lse, row_product, dquery, dgates,
        scale, scale * LOG2E, num_queries, num_keys, heads, heads // key_heads,
        *strides, *unscaled.stride()[:3], *dout.stride()[:3],
        BLOCK_M=for_queries.rows, BLOCK_N=for_queries.keys,
        num_warps=for_queries.num_warps, num_stages=for_queries.num_stages, **constants,
    )  # fmt: skip
    _key_kernel[batch * key_heads, triton.cdiv(num_keys, for_keys.keys)](
        query, key, value, gates, index, count, rank, dout, lse, row_product, dkey, dvalue,
        scale, scale * LOG2E, num_queries, num_keys, heads, key_heads, *strides, *dout.stride()[:3],
        BLOCK_M=for_keys.rows, BLOCK_N=for_keys.keys, RANK_STEP=RANK_STEP,
        num_warps=for_keys.num_warps, num_stages=for_keys.num_stages, **constants,
    )  # fmt: skip
    return dquery, dkey, dvalue, dgates
