"""The gradients of gated positional attention in Triton: weights are computed again, never stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import LOG2E, block_width, load_tile, precision, rows_contiguous
from undivided.ops.positional._axes import (
    RUNTIME,
    Tiling,
    axis_norm,
    axis_tile,
    axis_weights,
    grid_of,
    grid_tile,
    position_weights,
)

QUERY, KEY = Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2)
FLOAT32 = Tiling(16, 16, 4, 1)


# One program: a tile of queries of one head against all keys, twice: first for what each row's gradient has in common
# (`delta`, the product of the output by content and its gradient) and for the sums over pairs that the gate and the
# weights of positions need, then for the gradient of the queries. It writes four sums of its tile.
@triton.jit(do_not_specialize=RUNTIME)
def _query_kernel(
    query, key, value, position_weight, gate, dout, lse, dquery, delta, sums,
    scale, scale_log2, height, width, heads,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    first = tl.program_id(1) * BLOCK_M
    tokens = height * width
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + head * key_stride_h
    value += batch * value_stride_b + head * value_stride_h
    dout += batch * dout_stride_b + head * dout_stride_h
    lse += (batch * heads + head) * tokens
    delta += (batch * heads + head) * tokens
    q = load_tile(query, first, query_stride_n, tokens, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    gradient = load_tile(dout, first, dout_stride_n, tokens, VALUE_DIM, BLOCK_M, BLOCK_V, True)
    own = first + tl.arange(0, BLOCK_M)
    own_y = own // width
    own_x = own % width
    log_sum = tl.load(lse + own, mask=own < tokens, other=float("inf"))
    along_x, along_y, squared = position_weights(head, position_weight)
    g = tl.load(gate + head)
    top_y, factor_y = axis_norm(own_y, along_y, squared, height, HEIGHT)
    top_x, factor_x = axis_norm(own_x, along_x, squared, width, COLUMNS)
    slot = tl.arange(0, ROWS * COLUMNS)
    slot_x = slot % COLUMNS
    other_x = tl.arange(0, COLUMNS)
    columns = axis_tile(own_x, other_x, top_x, factor_x, along_x, squared, width)
    offset_x = (other_x[None, :] - own_x[:, None]).to(tl.float32)
    # Sums over pairs are taken of offsets from their mean, which small differences need.
    every_y = tl.arange(0, HEIGHT)
    every_offset = (every_y[None, :] - own_y[:, None]).to(tl.float32)
    every_row = axis_tile(own_y, every_y, top_y, factor_y, along_y, squared, height)
    mean_y = tl.sum(every_row * every_offset, 1)
    mean_yy = tl.sum(every_row * every_offset * every_offset, 1)

    product = tl.zeros([BLOCK_M], tl.float32)
    pairs_x = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    of_y = tl.zeros([BLOCK_M], tl.float32)
    of_squares = tl.zeros([BLOCK_M], tl.float32)
    for row in tl.range(0, height, ROWS):
        slot_y = row + slot // COLUMNS
        inside = (slot_y < height) & (slot_x < width)
        token = slot_y * width + slot_x
        k = grid_tile(key, token, inside, key_stride_n, HEAD_DIM, BLOCK_D)
        v = grid_tile(value, token, inside, value_stride_n, VALUE_DIM, BLOCK_V)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        weights = tl.where(inside[None, :], tl.exp2(scores * scale_log2 - log_sum[:, None]), 0.0)
        dweights = tl.dot(gradient, tl.trans(v), input_precision=PRECISION)
        product += tl.sum(weights * dweights, 1)
        other_y = row + tl.arange(0, ROWS)
        rows = axis_tile(own_y, other_y, top_y, factor_y, along_y, squared, height)
        pairs = tl.reshape(dweights, [BLOCK_M, ROWS, COLUMNS]) * (rows[:, :, None] * columns[:, None, :])
        pairs_x += tl.sum(pairs, 1)
        pairs_y = tl.sum(pairs, 2)
        offset_y = (other_y[None, :] - own_y[:, None]).to(tl.float32)
        of_y += tl.sum(pairs_y * (offset_y - mean_y[:, None]), 1)
        of_squares += tl.sum(pairs_y * (offset_y * offset_y - mean_yy[:, None]), 1)
    tl.store(delta + own, product, mask=own < tokens)
    by_position = tl.sum(pairs_x, 1)
    mean_x = tl.sum(columns * offset_x, 1)
    mean_xx = tl.sum(columns * offset_x * offset_x, 1)
    of_x = tl.sum(pairs_x * (offset_x - mean_x[:, None]), 1)
    of_squares += tl.sum(pairs_x * (offset_x * offset_x - mean_xx[:, None]), 1)
    sums += ((batch * heads + head) * tl.num_programs(1) + tl.program_id(1)) * 4
    tl.store(sums, tl.sum(of_x, 0) * g)
    tl.store(sums + 1, tl.sum(of_y, 0) * g)
    tl.store(sums + 2, tl.sum(of_squares, 0) * g)
    tl.store(sums + 3, tl.sum(by_position - product, 0))

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for row in tl.range(0, height, ROWS):
        slot_y = row + slot // COLUMNS
        inside = (slot_y < height) & (slot_x < width)
        token = slot_y * width + slot_x
        k = grid_tile(key, token, inside, key_stride_n, HEAD_DIM, BLOCK_D)
        v = grid_tile(value, token, inside, value_stride_n, VALUE_DIM, BLOCK_V)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        weights = tl.where(inside[None, :], tl.exp2(scores * scale_log2 - log_sum[:, None]), 0.0)
        dweights = tl.dot(gradient, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - product[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    column = tl.arange(0, BLOCK_D)
    offset = ((batch * tokens + own) * heads + head)[:, None] * HEAD_DIM + column[None, :]
    mask = (own < tokens)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(dquery + offset, (dq * (scale * (1.0 - g))).to(dquery.dtype.element_ty), mask=mask)


# One program: a tile of keys of one head against all queries, in blocks of whole rows of the map as keys are in the
# forward. In registers: the gradients of its keys and of its values.
@triton.jit(do_not_specialize=RUNTIME)
def _key_kernel(
    query, key, value, position_weight, gate, dout, lse, delta, dkey, dvalue,
    scale, scale_log2, height, width, heads,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    first = tl.program_id(1) * BLOCK_N
    tokens = height * width
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + head * key_stride_h
    value += batch * value_stride_b + head * value_stride_h
    dout += batch * dout_stride_b + head * dout_stride_h
    lse += (batch * heads + head) * tokens
    delta += (batch * heads + head) * tokens
    k = load_tile(key, first, key_stride_n, tokens, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v = load_tile(value, first, value_stride_n, tokens, VALUE_DIM, BLOCK_N, BLOCK_V, True)
    own = first + tl.arange(0, BLOCK_N)
    own_y = own // width
    own_x = own % width
    along_x, along_y, squared = position_weights(head, position_weight)
    g = tl.load(gate + head)
    slot = tl.arange(0, ROWS * COLUMNS)
    slot_x = slot % COLUMNS
    # A key sees itself at minus the offset at which a query sees it.
    other_x = tl.arange(0, COLUMNS)
    top_x, factor_x = axis_norm(other_x, along_x, squared, width, COLUMNS)
    offset_x = (own_x[:, None] - other_x[None, :]).to(tl.float32)
    columns = axis_weights(offset_x, top_x[None, :], g * factor_x[None, :], along_x, squared)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for row in tl.range(0, height, ROWS):
        slot_y = row + slot // COLUMNS
        inside = (slot_y < height) & (slot_x < width)
        token = slot_y * width + slot_x
        q = grid_tile(query, token, inside, query_stride_n, HEAD_DIM, BLOCK_D)
        gradient = grid_tile(dout, token, inside, dout_stride_n, VALUE_DIM, BLOCK_V)
        log_sum = tl.load(lse + token, mask=inside, other=float("inf"))
        product = tl.load(delta + token, mask=inside, other=0.0)
        other_y = row + tl.arange(0, ROWS)
        top_y, factor_y = axis_norm(other_y, along_y, squared, height, HEIGHT)
        offset_y = (own_y[:, None] - other_y[None, :]).to(tl.float32)
        rows = axis_weights(offset_y, top_y[None, :], factor_y[None, :], along_y, squared)
        weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - log_sum[None, :])
        dweights = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
        dscores = weights * (dweights - product[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
        mixed = tl.reshape(weights * (1.0 - g), [BLOCK_N, ROWS, COLUMNS])
        mixed += rows[:, :, None] * columns[:, None, :]
        mixed = tl.where(inside[None, :], tl.reshape(mixed, [BLOCK_N, ROWS * COLUMNS]), 0.0)
        dv = tl.dot(mixed.to(gradient.dtype), gradient, dv, input_precision=PRECISION)
    row_offset = ((batch * tokens + own) * heads + head)[:, None]
    column = tl.arange(0, BLOCK_D)
    mask = (own < tokens)[:, None] & (column < HEAD_DIM)[None, :]
    dk *= scale * (1.0 - g)
    tl.store(dkey + row_offset * HEAD_DIM + column[None, :], dk.to(dkey.dtype.element_ty), mask=mask)
    column = tl.arange(0, BLOCK_V)
    mask = (own < tokens)[:, None] & (column < VALUE_DIM)[None, :]
    tl.store(dvalue + row_offset * VALUE_DIM + column[None, :], dv.to(dvalue.dtype.element_ty), mask=mask)


def backward(
    dout, lse, query, key, value, position_weight, gate, height, width, scale, *, tilings=(None, None),
):  # fmt: skip
    """Returns the gradients of query, key and value, and `[heads, 4]`: of position_weight and gate, in float32."""
    batch, heads, tokens, head_dim = query.shape
    value_dim = value.shape[3]
    query, key, value, dout = map(rows_contiguous, (query, key, value, dout))
    position_weight, gate = position_weight.float().contiguous(), gate.float().contiguous()
    dquery, dkey, dvalue = (
        x.new_empty((batch, tokens, heads, x.shape[3])).transpose(1, 2) for x in (query, key, value)
    )
    is_half = query.element_size() == 2
    for_queries = tilings[0] or (QUERY if is_half else FLOAT32)
    for_keys = tilings[1] or (KEY if is_half else FLOAT32)
    delta = torch.empty_like(lse)
    tiles = triton.cdiv(tokens, for_queries.tokens)
    sums = lse.new_empty((batch, heads, tiles, 4))
    strides = tuple(x.stride(axis) for x in (query, key, value, dout) for axis in range(3))
    constants = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": block_width(head_dim),
        "BLOCK_V": block_width(value_dim),
        "PRECISION": precision(query),
    }
    sizes = scale, scale * LOG2E, height, width, heads
    _query_kernel[batch * heads, tiles](
        query, key, value, position_weight, gate, dout, lse, dquery, delta, sums, *sizes, *strides,
        BLOCK_M=for_queries.tokens, num_warps=for_queries.num_warps, num_stages=for_queries.num_stages,
        **grid_of((height, width), for_queries.slots), **constants,
    )  # fmt: skip
    _key_kernel[batch * heads, triton.cdiv(tokens, for_keys.tokens)](
        query, key, value, position_weight, gate, dout, lse, delta, dkey, dvalue, *sizes, *strides,
        BLOCK_N=for_keys.tokens, num_warps=for_keys.num_warps, num_stages=for_keys.num_stages,
        **grid_of((height, width), for_keys.slots), **constants,
    )  # fmt: skip
    return dquery, dkey, dvalue, sums.sum((0, 2))
