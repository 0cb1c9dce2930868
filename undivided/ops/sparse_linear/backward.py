"""Backward of sparse-linear attention in Triton: the linear branch first, then the critical blocks added to it.

With `n_i = phi(Q_i) Z_i`, the map M and `D = rowsum(dO * O)`: `dphi(Q_i) = (dO_i H_i^T - D_i Z_i^T) / n_i`,
`dH_i = (phi(Q_i) / n_i)^T dO_i`, `dZ_i = -(phi(Q_i) / n_i)^T D_i`; for the keys the sums over the rows that saw them
are again a product with the map, `dh_j = sum_i M_ij dH_i`, and `dphi(K_j) = V_j dh_j^T + dz_j`, `dV_j = phi(K_j) dh_j`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import block_width, load_tile, precision, rows_contiguous
from undivided.ops.selected import blocks_backward
from undivided.ops.sparse_linear.triton import load_sums, phi, phi_gradient, store_sums


@triton.jit
def _store_tokens(base, tile, place, inside, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(base + place[:, None] * WIDTH + column[None, :], tile.to(base.dtype.element_ty), mask=mask)


# One program: the queries of one block and head. It reads their sums and writes their gradient and that of the sums.
@triton.jit
def _query_kernel(
    query, dlinear, sums, dquery, dsums, num_queries, heads, rows,
    query_stride_b, query_stride_h, query_stride_n, dlinear_stride_b, dlinear_stride_h, dlinear_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, FEATURE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    place = (batch * heads + head) * rows + row
    first = row * BLOCK_M
    query += batch * query_stride_b + head * query_stride_h
    dlinear += batch * dlinear_stride_b + head * dlinear_stride_h
    q = load_tile(query, first, query_stride_n, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    gradient = load_tile(dlinear, first, dlinear_stride_n, num_queries, VALUE_DIM, BLOCK_M, BLOCK_V, True)
    positions = first + tl.arange(0, BLOCK_M)
    inside = positions < num_queries
    products, norm = load_sums(sums, place, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V)
    features = phi(q, inside, FEATURE, HEAD_DIM, BLOCK_D)
    half = features.to(q.dtype)
    total = tl.sum(half.to(tl.float32) * norm[None, :], 1)
    inverse = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    out = tl.dot(half, products, input_precision=PRECISION)
    delta = tl.sum(out * gradient.to(tl.float32), 1) * inverse
    dfeatures = tl.dot(gradient, tl.trans(products), input_precision=PRECISION)
    dfeatures = (dfeatures - delta[:, None] * norm[None, :]) * inverse[:, None]
    dq = phi_gradient(q, features, dfeatures, FEATURE)
    _store_tokens(dquery, dq, (batch * heads + head) * num_queries + positions, inside, HEAD_DIM, BLOCK_D)
    shares = features * inverse[:, None]
    dproducts = tl.dot(tl.trans(shares.to(q.dtype)), gradient, input_precision=PRECISION)
    store_sums(
        dsums, dproducts, -tl.sum(shares * delta[:, None], 0), place, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V
    )


# One program: the keys and values of one block and head.
@triton.jit
def _key_kernel(
    key, value, dsums, dkey, dvalue, num_keys, heads, blocks,
    key_stride_b, key_stride_h, key_stride_m, value_stride_b, value_stride_h, value_stride_m,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, FEATURE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    first = block * BLOCK_N
    key += batch * key_stride_b + head * key_stride_h
    value += batch * value_stride_b + head * value_stride_h
    k = load_tile(key, first, key_stride_m, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v = load_tile(value, first, value_stride_m, num_keys, VALUE_DIM, BLOCK_N, BLOCK_V, True)
    positions = first + tl.arange(0, BLOCK_N)
    inside = positions < num_keys
    dproducts, dnorm = load_sums(
        dsums, (batch * heads + head) * blocks + block, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V
    )
    features = phi(k, inside, FEATURE, HEAD_DIM, BLOCK_D)
    token = (batch * heads + head) * num_keys + positions
    dv = tl.dot(features.to(k.dtype), dproducts, input_precision=PRECISION)
    _store_tokens(dvalue, dv, token, inside, VALUE_DIM, BLOCK_V)
    dfeatures = tl.dot(v, tl.trans(dproducts), input_precision=PRECISION) + dnorm[None, :]
    dk = phi_gradient(k, features, dfeatures, FEATURE)
    _store_tokens(dkey, dk, token, inside, HEAD_DIM, BLOCK_D)


def backward(
    dsparse, dlinear, dlse, sparse_out, lse, index, counts, shares, row_sums, query, key, value, feature_map,
    query_block_size, block_size, scale,
):  # fmt: skip
    """Returns the gradients of query, key and value, contiguous."""
    query, key, value, dlinear = map(rows_contiguous, (query, key, value, dlinear))
    batch, heads, num_queries, head_dim = query.shape
    num_keys, value_dim = value.shape[2:]
    dquery, dkey, dvalue = (x.new_empty(x.shape) for x in (query, key, value))
    rows, blocks = shares.shape[2:]
    dsums = torch.empty_like(row_sums)
    shared = {
        "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_D": block_width(head_dim),
        "BLOCK_V": block_width(value_dim), "FEATURE": feature_map, "PRECISION": precision(query),
    }  # fmt: skip
    _query_kernel[rows, batch * heads](
        query, dlinear, row_sums, dquery, dsums, num_queries, heads, rows,
        *query.stride()[:3], *dlinear.stride()[:3], BLOCK_M=query_block_size, **shared, num_warps=8,
    )  # fmt: skip
    dsums = torch.matmul(shares.transpose(-2, -1), dsums)
    _key_kernel[blocks, batch * heads](
        key, value, dsums, dkey, dvalue, num_keys, heads, blocks,
        *key.stride()[:3], *value.stride()[:3], BLOCK_N=block_size, **shared, num_warps=8,
    )  # fmt: skip
    delta = blocks_backward.deltas(dsparse, sparse_out, dlse)
    return blocks_backward.backward(
        dsparse, delta, query, key, value, index, counts, lse, query_block_size, block_size, scale, False, None,
        into=(dquery, dkey, dvalue),
    )  # fmt: skip
