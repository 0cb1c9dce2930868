"""What the kernels share: how they are cut, and weights by position.

Where a block holds the whole map, weights by position are computed once for all images, pair by pair. Elsewhere keys or
queries are taken in blocks of whole rows of the map, each row padded to a power of two, COLUMNS: a block's scores are
then a tile [own, rows, columns], and its weights by position the product of a tile [own, rows] and a tile
[own, columns], so that an exponential is taken for each place along an axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

RUNTIME = ("height", "width", "heads")


@dataclass(frozen=True)
class Tiling:
    """How a kernel is cut: tokens of a program's own tile, slots of a block of the others, warps, blocks in flight."""

    tokens: int
    slots: int
    num_warps: int
    num_stages: int


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
def _places(token, width):
    """Row and column in float32; a product and a floor, exact for maps of any size here, cost less than a division."""
    token, width = token.to(tl.float32), tl.cast(width, tl.float32)
    row = tl.floor((token + 0.5) * (1.0 / width))
    return row, token - row * width


@triton.jit
def pair_logits(own, other, top, along_x, along_y, squared, width):
    """Logits of tokens `own [M]` for tokens `other [N]` of a map, less the largest of each row, `[M, N]`."""
    own_y, own_x = _places(own, width)
    other_y, other_x = _places(other, width)
    dy, dx = other_y[None, :] - own_y[:, None], other_x[None, :] - own_x[:, None]
    logits = (along_y + squared * dy) * dy + (along_x + squared * dx) * dx - top[:, None]
    # Places outside of the map, which no one sees, could be above the largest logit.
    return tl.minimum(logits, 0.0)


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


def grid_of(size: tuple[int, int], slots: int) -> dict[str, int]:
    """Returns how a block of about so many slots lies in a map: ROWS by COLUMNS, and the padded HEIGHT."""
    columns = triton.next_power_of_2(size[1])
    height = triton.next_power_of_2(size[0])
    # A product needs 16 slots at least; rows below the map are masked like the others.
    rows = max(min(slots // columns, height), 16 // columns, 1)
    return {"ROWS": rows, "COLUMNS": columns, "HEIGHT": height}
