"""The backward of core context attention and of the pooling in Triton.

With `p = exp(s - lse)` recomputed and `delta = dout . out - dlse`: `ds = p (dout . v - delta)`, `dq = scale ds k`,
`dk = scale ds^T q`, `dv = p^T dout`: one pass for the queries, one for the single keys, one for the core tokens. Of
the pooling, `da_j = dcore_key . k_j + dcore_value . v_j`, and on through the softmax. Nothing is added atomically, so
that a gradient has the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import (
    LOG2E,
    Tiling,
    block_width,
    first_fitting,
    load_tile,
    rows_contiguous,
    shared_memory,
    store_tile,
)
from undivided.ops.core_context.triton import (
    RUNTIME,
    constants,
    load_groups,
    member_weights,
    place,
    pool_tile,
    sizes,
    spans,
)


@triton.jit
def _add_gradients(
    dq, q, gradient, log_sum, delta, key, value, first, last, low, limit, num_keys, scale_log2, bias, key_stride,
    value_stride, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what keys `first .. last - 1` contribute to the gradient of a tile of queries, without the scale."""
    for start in tl.range(first, last, BLOCK_N):
        k = load_tile(key, start, key_stride, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D, True)
        v = load_tile(value, start, value_stride, num_keys, VALUE_DIM, BLOCK_N, BLOCK_V, True)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        weights = tl.exp2(scores * scale_log2 - (log_sum - bias)[:, None])
        column = start + tl.arange(0, BLOCK_N)
        inside = (column[None, :] < limit[:, None]) & (column[None, :] >= low[:, None])
        weights = tl.where(inside, weights, 0.0)
        dweights = tl.dot(gradient, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


# One program: BLOCK_M queries of one head against all they see. In registers: the float32 gradient of the queries and
# the scores and their gradient of one block of keys; queries and output gradient stay in shared memory.
@triton.jit(do_not_specialize=RUNTIME)
def _query_kernel(
    query, key, value, core_key, core_value, dout, lse, delta, dquery,
    scale, scale_log2, bias, num_queries, num_keys, before_queries, before_keys, group_size, window, heads,
    key_group, core_group,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, core_key_stride_b, core_key_stride_h, core_key_stride_m,
    core_value_stride_b, core_value_stride_h, core_value_stride_m, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(num_queries, BLOCK_M)
    batch, head, tile = place(tiles, heads)
    first_row = (tiles - 1 - tile) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    query += batch * query_stride_b + head * query_stride_h
    dout += batch * dout_stride_b + head * dout_stride_h
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // key_group) * value_stride_h
    core_key += batch * core_key_stride_b + (head // core_group) * core_key_stride_h
    core_value += batch * core_value_stride_b + (head // core_group) * core_value_stride_h
    q = load_tile(query, first_row, query_stride_n, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    gradient = load_tile(dout, first_row, dout_stride_n, num_queries, VALUE_DIM, BLOCK_M, BLOCK_V, True)
    row = (batch * heads + head) * num_queries + rows
    # Rows that do not exist get +inf, and so weights of zero.
    log_sum = tl.load(lse + row, mask=rows < num_queries, other=float("inf"))
    row_delta = tl.load(delta + row, mask=rows < num_queries, other=0.0)
    cores, low, limit, first, _, _, last, _, some_cores = spans(
        first_row, before_queries, before_keys, num_queries, group_size, window, BLOCK_M, BLOCK_N
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _add_gradients(
        dq, q, gradient, log_sum, row_delta, key, value, first, last, low, limit, num_keys, scale_log2, 0.0,
        key_stride_m, value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION,
    )  # fmt: skip
    dq = _add_gradients(
        dq, q, gradient, log_sum, row_delta, core_key, core_value, 0, some_cores, tl.zeros_like(cores), cores,
        some_cores, scale_log2, bias, core_key_stride_m, core_value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V,
        BLOCK_N, PRECISION,
    )  # fmt: skip
    store_tile(dquery, dq * scale, batch * heads + head, first_row, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D)


# One program: BLOCK_N keys of one head, single ones or core tokens, against the queries that see them, of all query
# heads that share it. In registers: the float32 gradients of keys and values.
@triton.jit(do_not_specialize=RUNTIME)
def _key_kernel(
    query, key, value, dout, lse, delta, dkey, dvalue,
    scale, scale_log2, bias, num_queries, num_keys, before_queries, before_keys, group_size, window, heads, key_heads,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The first core tokens are seen by the most queries, so they go first.
    batch, key_head, tile = place(tl.cdiv(num_keys, BLOCK_N), key_heads)
    first_key = tile * BLOCK_N
    key += batch * key_stride_b + key_head * key_stride_h
    value += batch * value_stride_b + key_head * value_stride_h
    k = load_tile(key, first_key, key_stride_m, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v = load_tile(value, first_key, value_stride_m, num_keys, VALUE_DIM, BLOCK_N, BLOCK_V, True)
    column = first_key + tl.arange(0, BLOCK_N)
    if IS_CORE:
        # A core token is seen from the query on that has seen its group and a window behind it.
        first = (first_key + 1) * group_size + window - 1 - before_queries
        last = num_queries
    else:
        first = before_keys + first_key - before_queries
        last_key = before_keys + tl.minimum(first_key + BLOCK_N, num_keys) - 1
        # It is out of sight when its group is a core token.
        last = tl.minimum(
            (last_key // group_size + 1) * group_size + window - 1 - before_queries, num_queries
        )
    first = tl.maximum(first, 0) // BLOCK_M * BLOCK_M
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    heads_per_key = heads // key_heads
    for i in range(heads_per_key):
        head = key_head * heads_per_key + i
        row = (batch * heads + head) * num_queries
        own_query = query + batch * query_stride_b + head * query_stride_h
        own_dout = dout + batch * dout_stride_b + head * dout_stride_h
        for start in tl.range(first, last, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            inside = rows < num_queries
            q = load_tile(own_query, start, query_stride_n, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D, True)
            gradient = load_tile(
                own_dout, start, dout_stride_n, num_queries, VALUE_DIM, BLOCK_M, BLOCK_V, True
            )
            log_sum = tl.load(lse + row + rows, mask=inside, other=float("inf"))
            row_delta = tl.load(delta + row + rows, mask=inside, other=0.0)
            weights = tl.exp2(
                tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - (log_sum - bias)[None, :]
            )
            seen = before_queries + rows + 1
            cores = tl.maximum(seen - window, 0) // group_size
            if IS_CORE:
                sees = column[:, None] < cores[None, :]
            else:
                position = before_keys + column
                sees = (position[:, None] >= (cores * group_size)[None, :]) & (
                    position[:, None] < seen[None, :]
                )
            weights = tl.where(sees, weights, 0.0)
            dv = tl.dot(weights.to(gradient.dtype), gradient, dv, input_precision=PRECISION)
            dweights = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
            dscores = weights * (dweights - row_delta[None, :])
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    row = batch * key_heads + key_head
    store_tile(dkey, dk * scale, row, first_key, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dvalue, dv, row, first_key, num_keys, VALUE_DIM, BLOCK_N, BLOCK_V)


# `rows` are queries. For the gradients of keys what is loaded in the loop is the side of the queries.
_QUERY = (Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 1), Tiling(32, 16, 4, 1))
_KEY = (Tiling(32, 128, 8, 2), Tiling(32, 64, 8, 2), Tiling(32, 32, 4, 1), Tiling(16, 16, 4, 1))
_QUERY_FLOAT32 = (Tiling(16, 32, 8, 1), Tiling(16, 16, 4, 1))
_KEY_FLOAT32 = (Tiling(16, 16, 8, 1),)


def backward(
    dout,
    delta,
    query,
    key,
    value,
    core_key,
    core_value,
    lse,
    num_tokens,
    group_size,
    window,
    scale,
    core_logit_bias,
):
    """Returns the gradients of query, key, value, core_key and core_value."""
    batch, heads, num_queries, head_dim = query.shape
    value_dim = value.shape[3]
    query, key, value, core_key, core_value, dout = map(
        rows_contiguous, (query, key, value, core_key, core_value, dout)
    )
    inputs = (query, key, value, core_key, core_value)
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    if dout.numel() == 0:
        return tuple(gradient.zero_() for gradient in gradients)
    dquery, dkey, dvalue, dcore_key, dcore_value = gradients
    width = block_width(head_dim) + block_width(value_dim)
    half, limit = query.element_size() == 2, shared_memory(query.device) // query.element_size()
    tiling = first_fitting(
        _QUERY if half else _QUERY_FLOAT32, lambda t: (t.rows + t.num_stages * t.keys) * width, limit
    )
    counts = sizes(query, key, core_key, num_tokens, group_size, window)
    scales = (scale, scale * LOG2E)
    bias = core_logit_bias * LOG2E
    _query_kernel[(batch * heads * triton.cdiv(num_queries, tiling.rows),)](
        query, key, value, core_key, core_value, dout, lse, delta, dquery, *scales, bias, *counts,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *core_key.stride()[:3],
        *core_value.stride()[:3], *dout.stride()[:3],
        BLOCK_M=tiling.rows, BLOCK_N=tiling.keys, num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        **constants(query, value),
    )  # fmt: skip
    tiling = first_fitting(
        _KEY if half else _KEY_FLOAT32, lambda t: (t.keys + t.num_stages * t.rows) * width, limit
    )
    before_queries, before_keys = num_tokens - num_queries, num_tokens - key.shape[2]
    for is_core, keys, values, dkeys, dvalues in (
        (False, key, value, dkey, dvalue),
        (True, core_key, core_value, dcore_key, dcore_value),
    ):
        if keys.numel() == 0:
            continue
        _key_kernel[(batch * keys.shape[1] * triton.cdiv(keys.shape[2], tiling.keys),)](
            query, keys, values, dout, lse, delta, dkeys, dvalues, *scales, bias if is_core else 0.0,
            num_queries, keys.shape[2], before_queries, before_keys, group_size, window, heads, keys.shape[1],
            *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *dout.stride()[:3],
            BLOCK_M=tiling.rows, BLOCK_N=tiling.keys, num_warps=tiling.num_warps, num_stages=tiling.num_stages,
            IS_CORE=is_core, **constants(query, value),
        )  # fmt: skip
    return gradients


# One program: ROWS groups of one key head, for all core heads that share it. In registers: keys, values and their
# gradients. It reads keys and values once and writes as much.
@triton.jit(do_not_specialize=("num_groups", "core_heads", "key_heads"))
def _pool_backward_kernel(
    dcore_key, dcore_value, query, key, value, dquery, dkey, dvalue, scale, num_groups, num_keys, group_size,
    core_heads, key_heads,
    dcore_key_stride_b, dcore_key_stride_h, dcore_key_stride_n,
    dcore_value_stride_b, dcore_value_stride_h, dcore_value_stride_n,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    key_head = tl.program_id(0) % key_heads
    batch = (tl.program_id(0) // key_heads).to(tl.int64)
    first = tl.program_id(1) * ROWS
    k = load_groups(
        key + batch * key_stride_b + key_head * key_stride_h, first, group_size, key_stride_m, num_groups,
        HEAD_DIM, ROWS, MEMBERS, BLOCK_D,
    )  # fmt: skip
    v = load_groups(
        value + batch * value_stride_b + key_head * value_stride_h, first, group_size, value_stride_m, num_groups,
        VALUE_DIM, ROWS, MEMBERS, BLOCK_V,
    )  # fmt: skip
    dk = tl.zeros_like(k)
    dv = tl.zeros_like(v)
    for i in range(core_heads // key_heads):
        head = key_head * (core_heads // key_heads) + i
        q = load_tile(
            query + batch * query_stride_b + head * query_stride_h, first, query_stride_n, num_groups, HEAD_DIM,
            ROWS, BLOCK_D, True,
        ).to(tl.float32)  # fmt: skip
        dck = load_tile(
            dcore_key + batch * dcore_key_stride_b + head * dcore_key_stride_h, first, dcore_key_stride_n,
            num_groups, HEAD_DIM, ROWS, BLOCK_D, True,
        ).to(tl.float32)  # fmt: skip
        dcv = load_tile(
            dcore_value + batch * dcore_value_stride_b + head * dcore_value_stride_h, first, dcore_value_stride_n,
            num_groups, VALUE_DIM, ROWS, BLOCK_V, True,
        ).to(tl.float32)  # fmt: skip
        weights = member_weights(q, k, scale, group_size, MEMBERS)
        dweights = tl.sum(dck[:, None, :] * k, 2) + tl.sum(dcv[:, None, :] * v, 2)
        dlogits = weights * (dweights - tl.sum(weights * dweights, 1)[:, None]) * scale
        store_tile(
            dquery, tl.sum(dlogits[:, :, None] * k, 1), batch * core_heads + head, first, num_groups, HEAD_DIM, ROWS,
            BLOCK_D,
        )  # fmt: skip
        dk += weights[:, :, None] * dck[:, None, :] + dlogits[:, :, None] * q[:, None, :]
        dv += weights[:, :, None] * dcv[:, None, :]
    row = (batch * key_heads + key_head) * num_keys
    _store_groups(dkey, dk, row, first, group_size, num_groups, HEAD_DIM, ROWS, MEMBERS, BLOCK_D)
    _store_groups(dvalue, dv, row, first, group_size, num_groups, VALUE_DIM, ROWS, MEMBERS, BLOCK_V)


@triton.jit
def _store_groups(
    base, rows, before, first, group_size, num_groups, WIDTH: tl.constexpr, ROWS: tl.constexpr, MEMBERS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    group = first + tl.arange(0, ROWS)
    member = tl.arange(0, MEMBERS)
    column = tl.arange(0, COLUMNS)
    row = before + group[:, None] * group_size + member[None, :]
    inside = ((group < num_groups)[:, None] & (member < group_size)[None, :])[:, :, None]
    tl.store(
        base + row[:, :, None] * WIDTH + column[None, None, :],
        rows.to(base.dtype.element_ty),
        mask=inside & (column < WIDTH)[None, None, :],
    )


def pool_backward(dcore_key, dcore_value, query, key, value, group_size, scale):
    """Returns the gradients of query, key and value."""
    batch, core_heads, num_groups, head_dim = query.shape
    value_dim = value.shape[3]
    tensors = tuple(map(rows_contiguous, (dcore_key, dcore_value, query, key, value)))
    dquery = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # Keys behind the last group have no part in it.
    dkey, dvalue = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
    if dquery.numel():
        tile = pool_tile(group_size, head_dim, value_dim, 4096)
        # Keys, values and both gradients are in registers.
        tile["num_warps"] = min(2 * tile["num_warps"], 8)
        strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
        _pool_backward_kernel[batch * key.shape[1], triton.cdiv(num_groups, tile["ROWS"])](
            *tensors, dquery, dkey, dvalue, scale, num_groups, key.shape[2], group_size, core_heads, key.shape[1],
            *strides, HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim),
            BLOCK_V=block_width(value_dim), **tile,
        )  # fmt: skip
    return dquery, dkey, dvalue
