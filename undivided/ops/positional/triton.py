"""Gated positional attention in Triton: content and position in one pass over the keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import LOG2E, block_width, load_tile, precision, rows_contiguous
from undivided.ops.positional import whole
from undivided.ops.positional._axes import (
    RUNTIME,
    Tiling,
    axis_norm,
    axis_tile,
    grid_of,
    grid_tile,
    position_weights,
)
from undivided.ops.positional.separable import FEW_TOKENS

FORWARD, FORWARD_FLOAT32 = Tiling(64, 64, 4, 2), Tiling(16, 32, 4, 1)


# One program: a tile of queries of one head against all keys. It keeps in registers the scores of a block and two
# accumulators [BLOCK_M, value_dim], since the sum of the weights by content is known at the end only. It moves its
# queries and its output, and, mostly from the L2 cache, keys and values.
@triton.jit(do_not_specialize=RUNTIME)
def _forward_kernel(
    query, key, value, position_weight, gate, out, lse, scale_log2, height, width, heads,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr,
    WITH_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    first = tl.program_id(1) * BLOCK_M
    tokens = height * width
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + head * key_stride_h
    value += batch * value_stride_b + head * value_stride_h
    q = load_tile(query, first, query_stride_n, tokens, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    own = first + tl.arange(0, BLOCK_M)
    own_y = own // width
    own_x = own % width
    along_x, along_y, squared = position_weights(head, position_weight)
    g = tl.load(gate + head)
    top_y, factor_y = axis_norm(own_y, along_y, squared, height, HEIGHT)
    top_x, factor_x = axis_norm(own_x, along_x, squared, width, COLUMNS)
    # The gate goes with the columns, which all blocks share.
    columns = axis_tile(own_x, tl.arange(0, COLUMNS), top_x, factor_x * g, along_x, squared, width)
    slot = tl.arange(0, ROWS * COLUMNS)
    slot_x = slot % COLUMNS

    # Finite, so that differences of maxima are never NaN.
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    content = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    position = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for row in tl.range(0, height, ROWS):
        slot_y = row + slot // COLUMNS
        inside = (slot_y < height) & (slot_x < width)
        token = slot_y * width + slot_x
        k = grid_tile(key, token, inside, key_stride_n, HEAD_DIM, BLOCK_D)
        v = grid_tile(value, token, inside, value_stride_n, VALUE_DIM, BLOCK_V)
        rows = axis_tile(own_y, row + tl.arange(0, ROWS), top_y, factor_y, along_y, squared, height)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where(inside[None, :], scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        content = tl.dot(weights.to(v.dtype), v, content * decay[:, None], input_precision=PRECISION)
        by_position = tl.reshape(rows[:, :, None] * columns[:, None, :], [BLOCK_M, ROWS * COLUMNS])
        position = tl.dot(by_position.to(v.dtype), v, position, input_precision=PRECISION)
    content = content * ((1.0 - g) / total)[:, None] + position

    column = tl.arange(0, BLOCK_V)
    # [batch, tokens, heads, value_dim] in memory: the projection that follows reads the heads of a token side by side.
    offset = ((batch * tokens + own) * heads + head)[:, None] * VALUE_DIM + column[None, :]
    mask = (own < tokens)[:, None] & (column < VALUE_DIM)[None, :]
    tl.store(out + offset, content.to(out.dtype.element_ty), mask=mask)
    if WITH_LSE:
        lse += (batch * heads + head) * tokens
        tl.store(lse + own, top + tl.log2(total), mask=own < tokens)


def forward(
    query, key, value, position_weight, gate, height, width, scale, *, with_lse=True, tiling=None, skip=True
):
    """Returns the output and the log-sum by content in base 2, `[batch, heads, tokens]` (empty unless `with_lse`)."""
    batch, heads, tokens, head_dim = query.shape
    value_dim = value.shape[3]
    query, key, value = map(rows_contiguous, (query, key, value))
    position_weight, gate = position_weight.float().contiguous(), gate.float().contiguous()
    out = query.new_empty((batch, tokens, heads, value_dim)).transpose(1, 2)
    lse = query.new_empty((batch, heads, tokens) if with_lse else 0, dtype=torch.float32)
    is_half = query.element_size() == 2
    if is_half and tokens <= FEW_TOKENS and tiling is None:
        whole.run(query, key, value, position_weight, gate, out, lse, height, width, scale)
        return out, lse
    tiling = tiling or (FORWARD if is_half else FORWARD_FLOAT32)
    _forward_kernel[batch * heads, triton.cdiv(tokens, tiling.tokens)](
        query, key, value, position_weight, gate, out, lse, scale * LOG2E, height, width, heads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim), BLOCK_V=block_width(value_dim),
        BLOCK_M=tiling.tokens, WITH_LSE=with_lse, PRECISION=precision(query), num_warps=tiling.num_warps,
        num_stages=tiling.num_stages, **grid_of((height, width), tiling.slots),
    )  # fmt: skip
    return out, lse
