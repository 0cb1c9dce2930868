"""Gated positional attention in Triton: content and position in one pass, positions from their two axes.

Keys are taken in blocks of whole rows of the map, each row padded to a power of two, COLUMNS: a block's scores are then
a tile [queries, rows, columns], and its weights by position the product of a tile [queries, rows] and a tile
[queries, columns]. An exponential is taken for each place along an axis, not for each pair of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from undivided.ops._flash import LOG2E, block_width, load_tile, precision, rows_contiguous

RUNTIME = ("height", "width", "heads")


@dataclass(frozen=True)
class Tiling:
    """How a kernel is cut: tokens of a program's own tile, slots of a block of the others, warps, blocks in flight."""

    tokens: int
    slots: int
    num_warps: int
    num_stages: int


# The first holds the whole map of 14 x 14 tokens: the softmax by content is not computed in steps.
FORWARD, FORWARD_FLOAT32 = Tiling(64, 256, 4, 1), Tiling(16, 32, 4, 1)
FORWARD_LONG = Tiling(64, 64, 4, 2)


@triton.jit
def position_weights(head, position_weight):
    """The weights of a head along x, along y and of squares, for powers of 2."""
    position_weight += head * 3
    return (
        tl.load(position_weight) * 1.4426950408889634,
        tl.load(position_weight + 1) * 1.4426950408889634,
        tl.load(position_weight + 2) * 1.4426950408889634,
    )


@triton.jit
def axis_norm(place, linear, squared, length, BLOCK: tl.constexpr):
    """What normalises the weights of each place along an axis: the largest logit, and one over the sum."""
    other = tl.arange(0, BLOCK)
    offset = (other[None, :] - place[:, None]).to(tl.float32)
    logits = tl.where((other < length)[None, :], (linear + squared * offset) * offset, float("-inf"))
    top = tl.max(logits, 1)
    return top, 1.0 / tl.sum(tl.exp2(logits - top[:, None]), 1)


@triton.jit
def axis_weights(offset, top, factor, linear, squared):
    """The weights at these offsets along an axis; `top` and `factor` are of the place that looks."""
    # Places outside of the map, which no one sees, could be above the largest logit.
    return tl.exp2(tl.minimum((linear + squared * offset) * offset - top, 0.0)) * factor


@triton.jit
def axis_tile(place, other, top, factor, linear, squared, length):
    """The weights of places `[M]` for the places `other [B]` of an axis, `[M, B]`; zero from `length` on."""
    offset = (other[None, :] - place[:, None]).to(tl.float32)
    weights = axis_weights(offset, top[:, None], factor[:, None], linear, squared)
    return tl.where((other < length)[None, :], weights, 0.0)


@triton.jit
def grid_tile(base, token, inside, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of these tokens; those that are not inside and columns from WIDTH on are zero."""
    column = tl.arange(0, BLOCK)
    offset = token[:, None] * stride + column[None, :]
    return tl.load(base + offset, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)


# One program: a tile of queries of one head against all keys. It keeps in registers the scores of a block and one
# accumulator [BLOCK_M, value_dim] if a block holds the whole map, else two, since the sum of the weights by content is
# known at the end only. It moves its queries and its output, and, mostly from the L2 cache, keys and values.
@triton.jit(do_not_specialize=RUNTIME)
def _forward_kernel(
    query, key, value, position_weight, gate, out, lse, scale_log2, height, width, heads,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr,
    ONE_BLOCK: tl.constexpr, WITH_LSE: tl.constexpr, PRECISION: tl.constexpr,
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
        if ONE_BLOCK:
            top = tl.max(scores, 1)
            weights = tl.exp2(scores - top[:, None])
            total = tl.sum(weights, 1)
            weights = tl.reshape(weights * ((1.0 - g) / total)[:, None], [BLOCK_M, ROWS, COLUMNS])
            weights += rows[:, :, None] * columns[:, None, :]
            weights = tl.reshape(weights, [BLOCK_M, ROWS * COLUMNS])
            content = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        else:
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            decay = tl.exp2(top - new_top)
            total = total * decay + tl.sum(weights, 1)
            top = new_top
            content = tl.dot(weights.to(v.dtype), v, content * decay[:, None], input_precision=PRECISION)
            by_position = tl.reshape(rows[:, :, None] * columns[:, None, :], [BLOCK_M, ROWS * COLUMNS])
            position = tl.dot(by_position.to(v.dtype), v, position, input_precision=PRECISION)
    if not ONE_BLOCK:
        content = content * ((1.0 - g) / total)[:, None] + position

    column = tl.arange(0, BLOCK_V)
    # [batch, tokens, heads, value_dim] in memory: the projection that follows reads the heads of a token side by side.
    offset = ((batch * tokens + own) * heads + head)[:, None] * VALUE_DIM + column[None, :]
    mask = (own < tokens)[:, None] & (column < VALUE_DIM)[None, :]
    tl.store(out + offset, content.to(out.dtype.element_ty), mask=mask)
    if WITH_LSE:
        lse += (batch * heads + head) * tokens
        tl.store(lse + own, top + tl.log2(total), mask=own < tokens)


def grid_of(size: tuple[int, int], slots: int) -> dict[str, int]:
    """Returns how a block of about so many slots lies in a map: ROWS by COLUMNS, and the padded HEIGHT."""
    columns = triton.next_power_of_2(size[1])
    height = triton.next_power_of_2(size[0])
    # A product needs 16 slots at least; rows below the map are masked like the others.
    rows = max(min(slots // columns, height), 16 // columns, 1)
    return {"ROWS": rows, "COLUMNS": columns, "HEIGHT": height}


def forward_tiling(size: tuple[int, int], element_size: int) -> Tiling:
    """Returns how the forward kernel is cut for a map."""
    if element_size == 4:
        return FORWARD_FLOAT32
    slots = triton.next_power_of_2(size[0]) * triton.next_power_of_2(size[1])
    return FORWARD if slots <= FORWARD.slots else FORWARD_LONG


def forward(
    query, key, value, position_weight, gate, height, width, scale, *, with_lse=True, tiling=None
):  # fmt: skip
    """Returns the output and the log-sum by content in base 2, `[batch, heads, tokens]` (empty unless `with_lse`)."""
    batch, heads, tokens, head_dim = query.shape
    value_dim = value.shape[3]
    query, key, value = map(rows_contiguous, (query, key, value))
    position_weight, gate = position_weight.float().contiguous(), gate.float().contiguous()
    out = query.new_empty((batch, tokens, heads, value_dim)).transpose(1, 2)
    lse = query.new_empty((batch, heads, tokens) if with_lse else 0, dtype=torch.float32)
    tiling = tiling or forward_tiling((height, width), query.element_size())
    grid = grid_of((height, width), tiling.slots)
    _forward_kernel[batch * heads, triton.cdiv(tokens, tiling.tokens)](
        query, key, value, position_weight, gate, out, lse, scale * LOG2E, height, width, heads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim), BLOCK_V=block_width(value_dim),
        BLOCK_M=tiling.tokens, ONE_BLOCK=grid["ROWS"] >= height, WITH_LSE=with_lse, PRECISION=precision(query),
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **grid,
    )  # fmt: skip
    return out, lse
