"""Forward of sparse-linear attention in Triton.

Sums over the keys of each block, `h_j = phi(K_j)^T V_j` and `z_j = sum phi(K_j)`, are made once. What the linear branch
of a row of queries sees is a sum of some of them, `H_i = sum_j M_ij h_j`: with all rows a product of the 0/1 map with
the sums, which tensor cores add in float32, whatever the share of marginal blocks. Nothing is subtracted, so nothing
cancels. The last kernel attends the critical blocks, and ends with `phi(Q_i) H_i / (phi(Q_i) Z_i)` and its projection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import LOG2E, block_width, load_tile, precision, rows_contiguous, shared_memory
from undivided.ops.block_map import score_blocks
from undivided.ops.selected.blocks_forward import attend_blocks, forward_launch, store_rows, store_softmax
from undivided.ops.sparse_linear.classes import lists_and_shares, lists_of, share_map


@triton.jit
def phi(x, inside, FEATURE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Features of a tile of tokens in float32; zero for tokens and channels that do not exist."""
    x = x.to(tl.float32)
    real = (tl.arange(0, COLUMNS) < WIDTH)[None, :]
    if FEATURE == "softmax":
        x = tl.where(real, x, float("-inf"))
        x = tl.exp2((x - tl.max(x, 1)[:, None]) * 1.4426950408889634)
        x = x / tl.sum(x, 1)[:, None]
    elif FEATURE == "elu1":
        x = tl.where(x > 0, x + 1, tl.exp2(tl.minimum(x, 0.0) * 1.4426950408889634))
    else:
        x = tl.maximum(x, 0.0)
    return tl.where(inside[:, None] & real, x, 0.0)


@triton.jit
def phi_gradient(x, features, gradient, FEATURE: tl.constexpr):
    """The gradient of the tokens from that of their features."""
    if FEATURE == "softmax":
        result = features * (gradient - tl.sum(features * gradient, 1)[:, None])
    elif FEATURE == "elu1":
        result = gradient * tl.where(x.to(tl.float32) > 0, 1.0, features)
    else:
        result = tl.where(x.to(tl.float32) > 0, gradient, 0.0)
    return result


# One program: the tokens of GROUP blocks of one head, one block after the other, the next being loaded meanwhile. Of
# keys and values, read once, it writes the mean key and the sums over the keys, HEAD_DIM x VALUE_DIM and then HEAD_DIM
# numbers; with FOLD of values that are projected before. Programs behind those of the keys write mean queries.
@triton.jit
def _sums_kernel(
    query, key, value, weight, query_means, key_means, sums, num_queries, num_keys, heads, rows, key_blocks,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, FEATURE: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    key_programs = tl.cdiv(key_blocks, GROUP)
    if program < key_programs:
        key += batch * key_stride_b + head * key_stride_h
        value += batch * value_stride_b + head * value_stride_h
        place = (batch * heads + head) * key_blocks
        if FOLD:
            w = load_tile(weight, 0, VALUE_DIM, VALUE_DIM, VALUE_DIM, BLOCK_V, BLOCK_V, VALUE_DIM < BLOCK_V)
        for block in tl.range(program * GROUP, tl.minimum(program * GROUP + GROUP, key_blocks)):
            first = block * BLOCK_N
            k = load_tile(key, first, key_stride_m, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D, True)
            if sums is not None:
                v = load_tile(value, first, value_stride_m, num_keys, VALUE_DIM, BLOCK_N, BLOCK_V, True)
                if FOLD:
                    v = tl.dot(v, tl.trans(w), input_precision=PRECISION).to(v.dtype)
                inside = first + tl.arange(0, BLOCK_N) < num_keys
                features = phi(k, inside, FEATURE, HEAD_DIM, BLOCK_D).to(v.dtype)
                products = tl.dot(tl.trans(features), v, input_precision=PRECISION)
                norm = tl.sum(features.to(tl.float32), 0)
                store_sums(sums, products, norm, place + block, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V)
            if key_means is not None:
                store_mean(
                    key_means, k, place + block, tl.minimum(num_keys - first, BLOCK_N), HEAD_DIM, BLOCK_D
                )
    elif query_means is not None:
        query += batch * query_stride_b + head * query_stride_h
        place = (batch * heads + head) * rows
        program -= key_programs
        for block in tl.range(program * GROUP, tl.minimum(program * GROUP + GROUP, rows)):
            first = block * BLOCK_M
            q = load_tile(query, first, query_stride_n, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D, True)
            store_mean(
                query_means, q, place + block, tl.minimum(num_queries - first, BLOCK_M), HEAD_DIM, BLOCK_D
            )


@triton.jit
def store_mean(means, tile, place, count, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores the sum of the rows of a tile over `count` as row `place`."""
    column = tl.arange(0, COLUMNS)
    tl.store(means + place * WIDTH + column, tl.sum(tile.to(tl.float32), 0) / count, mask=column < WIDTH)


@triton.jit
def store_sums(
    sums, products, total, place, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Stores a matrix and a vector, one after the other, as row `place`."""
    sums += place * (HEAD_DIM * VALUE_DIM + HEAD_DIM)
    row = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_V)
    mask = (row < HEAD_DIM)[:, None] & (column < VALUE_DIM)[None, :]
    tl.store(sums + row[:, None] * VALUE_DIM + column[None, :], products.to(sums.dtype.element_ty), mask=mask)
    tl.store(sums + HEAD_DIM * VALUE_DIM + row, total.to(sums.dtype.element_ty), mask=row < HEAD_DIM)


@triton.jit
def load_sums(
    sums, place, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """The matrix and the vector that `store_sums` stored; the vector in float32."""
    sums += place * (HEAD_DIM * VALUE_DIM + HEAD_DIM)
    row = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_V)
    mask = (row < HEAD_DIM)[:, None] & (column < VALUE_DIM)[None, :]
    products = tl.load(sums + row[:, None] * VALUE_DIM + column[None, :], mask=mask, other=0.0)
    total = tl.load(sums + HEAD_DIM * VALUE_DIM + row, mask=row < HEAD_DIM, other=0.0)
    return products, total.to(tl.float32)


# One program: the queries of one block and head. First the critical blocks, as in attention over lists; then one
# product of their features with the sums of the marginal blocks. With JOIN the sums are of projected values, and the
# output is one; otherwise both parts are kept, and with `out` their sum after the projection.
@triton.jit
def _forward_kernel(
    query, key, value, index, counts, sums, weight, bias, out, sparse_out, linear_out, lse,
    scale, num_queries, num_keys, heads, rows, max_blocks,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FEATURE: tl.constexpr, JOIN: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + head * key_stride_h
    value += batch * value_stride_b + head * value_stride_h
    place = (batch * heads + head) * rows + row
    first_row = row * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, num_queries)
    q = load_tile(query, first_row, query_stride_n, last_row, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    accumulator, top, total = attend_blocks(
        q, key, value, index + place * max_blocks, tl.load(counts + place), index, first_row, last_row,
        num_queries, num_keys, scale, key_stride_m, value_stride_m,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, 16, False, False, EVEN, PRECISION,
    )  # fmt: skip
    positions = first_row + tl.arange(0, BLOCK_M)
    inside = positions < last_row
    sparse = store_softmax(
        sparse_out, lse, accumulator, top, total, batch, head, heads, first_row, last_row, num_queries,
        VALUE_DIM, BLOCK_V, BLOCK_M, not JOIN,
    )  # fmt: skip
    # Read again, behind a store, lest it stay in registers through the loop.
    q = load_tile(query, first_row, query_stride_n, last_row, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    products, norm = load_sums(sums, place, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V)
    features = phi(q, inside, FEATURE, HEAD_DIM, BLOCK_D).to(q.dtype)
    total = tl.sum(features.to(tl.float32) * norm[None, :], 1)
    inverse = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    linear = tl.dot(features, products, input_precision=PRECISION) * inverse[:, None]
    column = tl.arange(0, BLOCK_V)
    if JOIN:
        linear += sparse
    else:
        store_rows(linear_out, linear, batch, head, heads, positions, inside, num_queries, VALUE_DIM, BLOCK_V)
        if out is not None:
            w = load_tile(weight, 0, VALUE_DIM, VALUE_DIM, VALUE_DIM, BLOCK_V, BLOCK_V, VALUE_DIM < BLOCK_V)
            linear = tl.dot(linear.to(w.dtype), tl.trans(w), sparse, input_precision=PRECISION)
    if out is not None:
        if bias is not None:
            linear += tl.load(bias + column, mask=column < VALUE_DIM, other=0.0).to(tl.float32)[None, :]
        store_rows(out, linear, batch, head, heads, positions, inside, num_queries, VALUE_DIM, BLOCK_V)


# Blocks of a program: enough that it waits for the first of them alone, and few enough for many programs.
_GROUP = 4


def sums_of(query, key, value, weight, query_block_size, block_size, feature_map, means):
    """Returns the mean queries and keys of each block in float32 if `means`, else None, and the sums over its keys.

    With `weight` the sums are of projected values.
    """
    return _summed(query, key, value, weight, query_block_size, block_size, feature_map, means, True)


def means_of(query, key, query_block_size, block_size):
    """Returns the mean queries and keys of each block alone."""
    return _summed(query, key, key, None, query_block_size, block_size, "relu", True, False)[:2]


def _summed(query, key, value, weight, query_block_size, block_size, feature_map, means, with_sums):
    batch, heads, num_keys, head_dim = key.shape
    num_queries, value_dim = query.shape[2], value.shape[3]
    rows, blocks = triton.cdiv(num_queries, query_block_size), triton.cdiv(num_keys, block_size)
    query_means = key_means = sums = None
    if means:
        query_means = query.new_empty((batch, heads, rows, head_dim), dtype=torch.float32)
        key_means = key.new_empty((batch, heads, blocks, head_dim), dtype=torch.float32)
    if with_sums:
        sums = key.new_empty((batch, heads, blocks, head_dim * (value_dim + 1)))
    is_half = key.element_size() == 2
    is_small = is_half and block_size <= 64
    programs = triton.cdiv(blocks, _GROUP) + (triton.cdiv(rows, _GROUP) if means else 0)
    _sums_kernel[programs, batch * heads](
        query, key, value, weight, query_means, key_means, sums, num_queries, num_keys, heads, rows, blocks,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim), BLOCK_V=block_width(value_dim),
        BLOCK_M=query_block_size, BLOCK_N=block_size, GROUP=_GROUP, FEATURE=feature_map, FOLD=weight is not None,
        PRECISION=precision(key), num_warps=4 if is_small else 8, num_stages=2 if is_half else 1,
    )  # fmt: skip
    return query_means, key_means, sums


def forward(
    query, key, value, weight, bias, classes, critical, negligible, feature_map, query_block_size, block_size,
    linear_scope, scale, keep,
):  # fmt: skip
    """Returns out, sparse and linear output, lse, the lists and their counts, the shares, and the sums by row.

    With a projection and without `keep` only out, and what is left of the rest is not that of `keep`.
    """
    query, key, value = map(rows_contiguous, (query, key, value))
    batch, heads, num_queries, head_dim = query.shape
    num_keys, value_dim = key.shape[2], value.shape[3]
    project, join = weight is not None, weight is not None and not keep
    # The projection's parameters are in float32 in training; products are of the type of the queries.
    w = weight.to(query.dtype).contiguous() if project else None
    query_means, key_means, sums = sums_of(
        query, key, value, w if join else None, query_block_size, block_size, feature_map, classes is None
    )
    if classes is None:
        scores = score_blocks(query_means, key_means)
        lists, shares = lists_and_shares(scores, critical, negligible, linear_scope, query.dtype)
    else:
        lists, shares = lists_of(classes), share_map(classes, linear_scope, query.dtype)
    row_sums = torch.matmul(shares, sums)

    def empty(wanted):
        shape = (batch, num_queries, heads, value_dim) if wanted else (0, 0, 0, value_dim)
        return query.new_empty(shape).transpose(1, 2)

    out, sparse_out, linear_out = empty(project), empty(not join), empty(not join)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    rows, max_blocks = lists.index.shape[2:]
    _forward_kernel[rows, batch * heads](
        query, key, value, lists.index, lists.counts, row_sums, w, bias, out if project else None, sparse_out,
        linear_out, lse, scale * LOG2E, num_queries, num_keys, heads, rows, max_blocks,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim), BLOCK_V=block_width(value_dim),
        BLOCK_M=query_block_size, BLOCK_N=block_size, FEATURE=feature_map, JOIN=join,
        EVEN=num_keys % block_size == 0, PRECISION=precision(query),
        **forward_launch(
            query_block_size, block_size, head_dim + value_dim, query.element_size(), shared_memory(query.device)
        ),
    )  # fmt: skip
    return out, sparse_out, linear_out, lse, lists.index, lists.counts, shares, row_sums
