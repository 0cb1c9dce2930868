"""Gated positional attention of maps that one block of keys holds: weights by position once for all images."""

from __future__ import annotations

import triton
import triton.language as tl

from undivided.ops._flash import LOG2E, block_width, load_tile, precision
from undivided.ops.positional._axes import Tiling, axis_norm, pair_logits, position_weights
from undivided.ops.positional.separable import FEW_TOKENS

# Measured on an H100, 14 x 14 tokens: 262 us; of 64 tokens a tile 295 us and more.
TILING = Tiling(32, FEW_TOKENS, 4, 2)
# To so many programs the images are dealt out, about what an H100 runs at once.
_PROGRAMS = 528


# One program: a tile of queries of one head, of every `shares`-th image. Its weights by position `[BLOCK_M, BLOCK_N]`,
# which no image changes, stay in registers, in the precision of the products. For each image it computes the scores of
# all keys at once, so that no softmax is in steps, and one product with the values; it moves queries, keys, values and
# the output once, keys and values of other tiles mostly from the L2 cache, since all programs go through the images
# side by side.
@triton.jit(do_not_specialize=("height", "width", "heads", "images", "shares"))
def _whole_kernel(
    query, key, value, position_weight, gate, out, lse, scale_log2, height, width, heads, images, shares,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    WITH_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    first = (tl.program_id(0) // heads) * BLOCK_M
    tokens = height * width
    query += head * query_stride_h
    key += head * key_stride_h
    value += head * value_stride_h
    own = first + tl.arange(0, BLOCK_M)
    other = tl.arange(0, BLOCK_N)
    along_x, along_y, squared = position_weights(head, position_weight)
    g = tl.load(gate + head)
    top_y, factor_y = axis_norm(own // width, along_y, squared, height, HEIGHT)
    top_x, factor_x = axis_norm(own % width, along_x, squared, width, WIDTH)
    logits = pair_logits(own, other, top_y + top_x, along_x, along_y, squared, width)
    by_position = tl.exp2(logits) * (factor_y * factor_x * g)[:, None]
    by_position = tl.where((other < tokens)[None, :], by_position, 0.0).to(out.dtype.element_ty)

    column = tl.arange(0, BLOCK_V)
    mask = (own < tokens)[:, None] & (column < VALUE_DIM)[None, :]
    for image in tl.range(tl.program_id(1), images, shares, num_stages=STAGES):
        batch = tl.cast(image, tl.int64)
        q = load_tile(
            query + batch * query_stride_b, first, query_stride_n, tokens, HEAD_DIM, BLOCK_M, BLOCK_D, True
        )
        k = load_tile(key + batch * key_stride_b, 0, key_stride_n, tokens, HEAD_DIM, BLOCK_N, BLOCK_D, True)
        v = load_tile(
            value + batch * value_stride_b, 0, value_stride_n, tokens, VALUE_DIM, BLOCK_N, BLOCK_V, True
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where((other < tokens)[None, :], scores * scale_log2, float("-inf"))
        top = tl.max(scores, 1)
        weights = tl.exp2(scores - top[:, None])
        total = tl.sum(weights, 1)
        weights = weights * ((1.0 - g) / total)[:, None] + by_position.to(tl.float32)
        mixed = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        # [batch, tokens, heads, value_dim] in memory: the projection that follows reads the heads of a token side by
        # side.
        offset = ((batch * tokens + own) * heads + head)[:, None] * VALUE_DIM + column[None, :]
        tl.store(out + offset, mixed.to(out.dtype.element_ty), mask=mask)
        if WITH_LSE:
            tl.store(lse + (batch * heads + head) * tokens + own, top + tl.log2(total), mask=own < tokens)


def run(query, key, value, position_weight, gate, out, lse, height, width, scale, tiling=TILING):
    """Writes `out` `[batch, tokens, heads, value_dim]` in memory and, unless it is empty, `lse`."""
    images, heads, tokens, head_dim = query.shape
    value_dim = value.shape[3]
    tiles = heads * triton.cdiv(tokens, tiling.tokens)
    shares = max(1, min(images, _PROGRAMS // tiles))
    _whole_kernel[tiles, shares](
        query, key, value, position_weight, gate, out, lse, scale * LOG2E, height, width, heads, images, shares,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim), BLOCK_V=block_width(value_dim),
        BLOCK_M=tiling.tokens, BLOCK_N=max(16, triton.next_power_of_2(tokens)), HEIGHT=triton.next_power_of_2(height),
        WIDTH=triton.next_power_of_2(width), STAGES=tiling.num_stages, WITH_LSE=lse.numel() > 0,
        PRECISION=precision(query), num_warps=tiling.num_warps,
    )  # fmt: skip
