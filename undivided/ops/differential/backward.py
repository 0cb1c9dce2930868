"""The backward of both attention maps in Triton: one pass for the queries, one for keys and values.

With `p = exp(s - lse)` recomputed and `delta = dout . out`: `ds = p (dout . v - delta)`, `dq = scale ds k`,
`dk = scale ds^T q`, `dv = p^T dout`. Two passes compute the scores twice, but nothing is added atomically, so that a
gradient has the same bits in every run.
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


# One program: BLOCK_M queries of one head against all keys they see. In registers: the float32 gradient of the queries
# and the scores and their gradient of one block of keys; queries and output gradient stay in shared memory.
@triton.jit
def _query_kernel(
    query, key, value, dout, lse, delta, dquery,
    scale, scale_log2, num_queries, num_keys, heads, key_group, value_group,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_inside = rows < num_queries
    query += batch * query_stride_b + head * query_stride_h
    dout += batch * dout_stride_b + head * dout_stride_h
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // value_group) * value_stride_h
    q = load_tile(query, first_row, query_stride_n, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    gradient = load_tile(dout, first_row, dout_stride_n, num_queries, VALUE_DIM, BLOCK_M, BLOCK_V, True)
    row = (batch * heads + head) * num_queries + rows
    log_sum = tl.load(lse + row, mask=row_inside, other=float("inf"))
    row_delta = tl.load(delta + row, mask=row_inside, other=0.0)

    limit = num_keys + tl.zeros_like(rows)
    common = num_keys
    last = num_keys
    if IS_CAUSAL:
        limit = tl.minimum(rows + (num_keys - num_queries + 1), num_keys)
        common = tl.minimum(tl.maximum(first_row + num_keys - num_queries + 1, 0), num_keys)
        last = tl.minimum(tl.maximum(first_row + BLOCK_M + num_keys - num_queries, 0), num_keys)
    common = common // BLOCK_N * BLOCK_N
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = add_key_gradients(
        dq, q, gradient, log_sum, row_delta, key, value, 0, common, limit, num_keys, scale_log2, key_stride_m,
        value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    dq = add_key_gradients(
        dq, q, gradient, log_sum, row_delta, key, value, common, last, limit, num_keys, scale_log2, key_stride_m,
        value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    column = tl.arange(0, BLOCK_D)
    tl.store(
        dquery + row[:, None] * HEAD_DIM + column[None, :],
        (dq * scale).to(dquery.dtype.element_ty),
        mask=row_inside[:, None] & (column < HEAD_DIM)[None, :],
    )


# One program: BLOCK_N keys of one value head against all queries that see them, of all its signal heads and then of all
# its noise heads. In registers: the float32 gradients of the values and of one key head at a time.
@triton.jit
def _key_kernel(
    query, key, dout, lse, delta, dkey, heads, key_heads,
    noise_query, noise_key, noise_dout, noise_lse, noise_delta, dnoise_key, noise_heads,
    value, dvalue, value_heads, scale, scale_log2, num_queries, num_keys,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    dout_stride_b, dout_stride_h, dout_stride_n,
    noise_query_stride_b, noise_query_stride_h, noise_query_stride_n,
    noise_key_stride_b, noise_key_stride_h, noise_key_stride_m,
    noise_dout_stride_b, noise_dout_stride_h, noise_dout_stride_n,
    value_stride_b, value_stride_h, value_stride_m,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    value_head = tl.program_id(0) % value_heads
    batch = (tl.program_id(0) // value_heads).to(tl.int64)
    # The first keys are seen by the most queries, so they go first.
    first_key = tl.program_id(1) * BLOCK_N
    value += batch * value_stride_b + value_head * value_stride_h
    v = load_tile(value, first_key, value_stride_m, num_keys, VALUE_DIM, BLOCK_N, BLOCK_V, True)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)

    query += batch * query_stride_b
    dout += batch * dout_stride_b
    key += batch * key_stride_b
    keys_per_value = key_heads // value_heads
    heads_per_key = heads // key_heads
    for i in range(keys_per_value):
        key_head = value_head * keys_per_value + i
        k = load_tile(
            key + key_head * key_stride_h, first_key, key_stride_m, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D, True
        )
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for j in range(heads_per_key):
            head = key_head * heads_per_key + j
            row = (batch * heads + head) * num_queries
            dk, dv = _add_queries(
                dk, dv, k, v, query + head * query_stride_h, dout + head * dout_stride_h, lse + row, delta + row,
                first_key, num_queries, num_keys, scale_log2, query_stride_n, dout_stride_n,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, IS_CAUSAL, PRECISION,
            )  # fmt: skip
        store_tile(
            dkey, dk * scale, batch * key_heads + key_head, first_key, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D
        )

    noise_query += batch * noise_query_stride_b
    noise_dout += batch * noise_dout_stride_b
    noise_key += batch * noise_key_stride_b + value_head * noise_key_stride_h
    k = load_tile(noise_key, first_key, noise_key_stride_m, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for j in range(noise_heads // value_heads):
        head = value_head * (noise_heads // value_heads) + j
        row = (batch * noise_heads + head) * num_queries
        dk, dv = _add_queries(
            dk, dv, k, v, noise_query + head * noise_query_stride_h, noise_dout + head * noise_dout_stride_h,
            noise_lse + row, noise_delta + row,
            first_key, num_queries, num_keys, scale_log2, noise_query_stride_n, noise_dout_stride_n,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, IS_CAUSAL, PRECISION,
        )  # fmt: skip
    head = batch * value_heads + value_head
    store_tile(dnoise_key, dk * scale, head, first_key, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dvalue, dv, head, first_key, num_keys, VALUE_DIM, BLOCK_N, BLOCK_V)


@triton.jit
def _add_queries(
    dk, dv, k, v, query, dout, lse, delta, first_key, num_queries, num_keys, scale_log2, query_stride, dout_stride,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what all queries of one head that see these keys contribute to the gradients of keys and values."""
    first = 0
    if IS_CAUSAL:
        first = tl.maximum(first_key - (num_keys - num_queries), 0) // BLOCK_M * BLOCK_M
    key_row = first_key + tl.arange(0, BLOCK_N)
    for start in tl.range(first, num_queries, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < num_queries
        q = load_tile(query, start, query_stride, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D, True)
        gradient = load_tile(dout, start, dout_stride, num_queries, VALUE_DIM, BLOCK_M, BLOCK_V, True)
        # Rows that do not exist get +inf, and so weights of zero.
        log_sum = tl.load(lse + rows, mask=inside, other=float("inf"))
        row_delta = tl.load(delta + rows, mask=inside, other=0.0)
        weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - log_sum[None, :])
        if IS_CAUSAL:
            weights = tl.where(key_row[:, None] <= rows[None, :] + (num_keys - num_queries), weights, 0.0)
        dv = tl.dot(weights.to(gradient.dtype), gradient, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
        dscores = weights * (dweights - row_delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


# Measured on an H100 at head_dim 128 (the first), then smaller ones, as in the forward. `rows` are queries. For the
# gradients of keys few queries meet many keys: what is loaded in the loop is the side of the queries.
_QUERY = (Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 1), Tiling(32, 16, 4, 1))
_KEY = (Tiling(32, 128, 8, 2), Tiling(32, 64, 8, 2), Tiling(32, 32, 4, 1), Tiling(16, 16, 4, 1))
_QUERY_FLOAT32 = (Tiling(16, 32, 8, 1), Tiling(16, 16, 4, 1))
_KEY_FLOAT32 = (Tiling(16, 16, 8, 1),)


def query_tiling(head_dim: int, value_dim: int, element_size: int, shared_memory: int) -> Tiling:
    """Returns the tiling of the kernel for the gradient of the queries; arguments as in `forward_tiling`."""
    candidates = _QUERY if element_size == 2 else _QUERY_FLOAT32
    width = head_dim + value_dim
    return first_fitting(
        candidates, lambda t: (t.rows + t.num_stages * t.keys) * width, shared_memory // element_size
    )


def key_tiling(head_dim: int, value_dim: int, element_size: int, shared_memory: int) -> Tiling:
    """Returns the tiling of the kernel for the gradients of keys and values; arguments as in `forward_tiling`."""
    candidates = _KEY if element_size == 2 else _KEY_FLOAT32
    width = head_dim + value_dim
    return first_fitting(
        candidates, lambda t: (t.keys + t.num_stages * t.rows) * width, shared_memory // element_size
    )


def backward(
    dsignal, dnoise, delta, noise_delta, query, noise_query, key, noise_key, value, lse, noise_lse, is_causal, scale,
):  # fmt: skip
    """Returns the gradients of query, noise_query, key, noise_key and value."""
    batch, heads, num_queries, head_dim = query.shape
    key_heads, num_keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    noise_heads, value_heads = noise_query.shape[1], value.shape[1]
    query, noise_query, key, noise_key, value = map(
        rows_contiguous, (query, noise_query, key, noise_key, value)
    )
    inputs = (query, noise_query, key, noise_key, value)
    if query.numel() == 0:
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    dquery, dnoise_query, dkey, dnoise_key, dvalue = gradients
    constants = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": block_width(head_dim),
        "BLOCK_V": block_width(value_dim),
        "IS_CAUSAL": is_causal,
        "PRECISION": precision(query),
    }
    sizes = block_width(head_dim), block_width(value_dim), query.element_size(), shared_memory(query.device)
    tiling = query_tiling(*sizes)
    for q, k, dout, sums, row_sums, dq in (
        (query, key, dsignal, lse, delta, dquery),
        (noise_query, noise_key, dnoise, noise_lse, noise_delta, dnoise_query),
    ):
        _query_kernel[batch * q.shape[1], triton.cdiv(num_queries, tiling.rows)](
            q, k, value, dout, sums, row_sums, dq,
            scale, scale * LOG2E, num_queries, num_keys, q.shape[1], q.shape[1] // k.shape[1],
            q.shape[1] // value_heads,
            *q.stride()[:3], *k.stride()[:3], *value.stride()[:3], *dout.stride()[:3],
            BLOCK_M=tiling.rows, BLOCK_N=tiling.keys, num_warps=tiling.num_warps, num_stages=tiling.num_stages,
            **constants,
        )  # fmt: skip
    tiling = key_tiling(*sizes)
    _key_kernel[batch * value_heads, triton.cdiv(num_keys, tiling.keys)](
        query, key, dsignal, lse, delta, dkey, heads, key_heads,
        noise_query, noise_key, dnoise, noise_lse, noise_delta, dnoise_key, noise_heads,
        value, dvalue, value_heads, scale, scale * LOG2E, num_queries, num_keys,
        *query.stride()[:3], *key.stride()[:3], *dsignal.stride()[:3],
        *noise_query.stride()[:3], *noise_key.stride()[:3], *dnoise.stride()[:3], *value.stride()[:3],
        BLOCK_M=tiling.rows, BLOCK_N=tiling.keys, num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        **constants,
    )  # fmt: skip
    return gradients
