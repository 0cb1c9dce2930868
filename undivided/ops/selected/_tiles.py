"""What the kernels over lists of blocks share: where a block begins, and which entries of a list need a mask."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_range(bounds, number, length, SIZE: tl.constexpr, PACKED: tl.constexpr):
    """The first token of a block and the one after its last."""
    if PACKED:
        first = tl.load(bounds + 2 * number)
        last = tl.load(bounds + 2 * number + 1)
    else:
        first = number * SIZE
        last = tl.minimum(first + SIZE, length)
    return first, last


@triton.jit
def list_parts(
    listed, count, bounds, first_row, last_row, shift, num_keys,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """How many entries at the head of an ascending list need no mask, and how many have a key that a row may see."""
    entry = tl.arange(0, WIDTH)
    inside = entry < count
    block = tl.load(listed + entry, mask=inside, other=0)
    if PACKED:
        first = tl.load(bounds + 2 * block)
        last = tl.load(bounds + 2 * block + 1)
        plain = last - first == BLOCK_N
    else:
        first = block * BLOCK_N
        last = first + BLOCK_N
        plain = last <= num_keys
    seen = inside
    if IS_CAUSAL:
        plain = plain & (last <= first_row + shift + 1)
        seen = inside & (first < last_row + shift)
    return tl.sum((inside & plain).to(tl.int32)), tl.sum(seen.to(tl.int32))
