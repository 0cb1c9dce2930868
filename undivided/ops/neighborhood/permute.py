"""Tokens of a grid in the order of their tiles, and back: what makes a tile of a grid a run of a sequence.

Dilation is taken out first: the tokens of equal remainder along every axis are a grid of their own. A trunk that treats
all tokens alike may be permuted once before its first block and put back after the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from undivided.ops.neighborhood._tables import per_axis


def permute_tokens(
    x: torch.Tensor, tile: int | Sequence[int], dilation: int | Sequence[int] = 1
) -> torch.Tensor:
    """Puts the tokens of a grid in the order: dilation class, tile, place in the tile; each row-major.

    The grid is padded with zeros at its far ends until classes of equal length divide into tiles. Token
    `(c_1, ..., c_n)` is of class `c_a mod dilation_a`, and there at `c_a div dilation_a`.

    Args:
        x: `[batch, heads, *size, dim]`, 1 to 3 axes of the grid.
        tile: tokens of a tile along each axis.
        dilation: classes along each axis.

    Returns:
        `[batch * classes, heads, padded tokens of a class, dim]`, batch before class.

    Raises:
        ValueError: the grid has not 1 to 3 axes, or a number is not positive or not one an axis.

    Source: GNA (arXiv 2504.16922), token permutation.
    """
    size = _size(x)
    tile, dilation = _checked(tile, dilation, len(size))
    axes = len(size)
    padded = padded_size(size, tile, dilation)
    if padded != size:
        ends = [end for length, whole in zip(size, padded, strict=True) for end in (whole - length, 0)]
        x = F.pad(x, (0, 0, *reversed(ends)))
    parts = [part for axis in range(axes) for part in (-1, tile[axis], dilation[axis])]
    for axis in reversed(range(axes)):
        x = x.unflatten(2 + axis, parts[3 * axis : 3 * axis + 3])
    tiles, places, classes = (range(2 + first, 2 + 3 * axes, 3) for first in (0, 1, 2))
    x = x.permute(0, *classes, 1, *tiles, *places, 2 + 3 * axes)
    return x.flatten(2 + axes, 1 + 3 * axes).flatten(0, axes)


def unpermute_tokens(
    x: torch.Tensor, size: Sequence[int], tile: int | Sequence[int], dilation: int | Sequence[int] = 1
) -> torch.Tensor:
    """Undoes `permute_tokens` and cuts the padding off.

    Args:
        x: `[batch * classes, heads, padded tokens of a class, dim]`, any `dim`.
        size: the grid, 1 to 3 axes.
        tile: tokens of a tile along each axis.
        dilation: classes along each axis.

    Returns:
        `[batch, heads, *size, dim]`.

    Raises:
        ValueError: `x` does not have the tokens or classes of such a grid.
    """
    size = tuple(size)
    axes = len(size)
    tile, dilation = _checked(tile, dilation, axes)
    padded = padded_size(size, tile, dilation)
    classes = math.prod(dilation)
    tokens = math.prod(padded) // classes
    if x.dim() != 4 or x.shape[0] % classes or x.shape[2] != tokens:
        raise ValueError(
            f"x has shape {list(x.shape)}; for size={size}, tile={tile} and dilation={dilation} it must be "
            f"[batch * {classes}, heads, {tokens}, dim]."
        )
    counts = [length // (t * d) for length, t, d in zip(padded, tile, dilation, strict=True)]
    x = x.unflatten(2, (*counts, *tile)).unflatten(0, (x.shape[0] // classes, *dilation))
    order = [place for axis in range(axes) for place in (2 + axes + axis, 2 + 2 * axes + axis, 1 + axis)]
    x = x.permute(0, 1 + axes, *order, 2 + 3 * axes)
    for axis in range(axes):
        x = x.flatten(2 + axis, 4 + axis).narrow(2 + axis, 0, size[axis])
    return x


def padded_size(size: Sequence[int], tile: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Returns the grid whose classes all divide into tiles."""
    return tuple(-(-length // (t * d)) * t * d for length, t, d in zip(size, tile, dilation, strict=True))


def _size(x: torch.Tensor) -> tuple[int, ...]:
    if not 4 <= x.dim() <= 6:
        raise ValueError(
            f"x has shape {list(x.shape)}; it needs [batch, heads, *size, dim] with 1 to 3 axes of the grid."
        )
    return tuple(x.shape[2:-1])


def _checked(tile, dilation, axes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    checked = []
    for name, value in (("tile", tile), ("dilation", dilation)):
        entries = per_axis(name, value, axes, int)
        if min(entries) < 1:
            raise ValueError(f"{name}={value} must be at least 1 on every axis.")
        checked.append(entries)
    return checked[0], checked[1]
