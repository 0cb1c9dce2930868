"""Neighborhood attention by tiles of queries, each beside a copy of the keys it reaches, through torch's kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F

from undivided.ops._rules import masked_softmax
from undivided.ops.neighborhood._tables import Axis
from undivided.ops.neighborhood.permute import padded_size, permute_tokens, unpermute_tokens

# Queries of a tile at least, all axes together: shorter products leave a processor waiting.
_LEAST_TILE = 32
# Elements of the copied keys, of the mask or of the logits that are made at a time.
_CHUNK = 2**24


def reasons(relative_bias=None, **arguments: object) -> list[str]:
    return [] if relative_bias is None else ["relative_bias is given"]


def attend(query, key, value, neighborhood, scale, return_lse, relative_bias=None):
    axes, size, dilation = neighborhood.axes, neighborhood.size, neighborhood.dilation
    batch, heads, key_heads = query.shape[0], query.shape[1], key.shape[1]
    group = heads // key_heads
    tile = tuple(tile_edge(axis, len(axes)) for axis in axes)
    queries = math.prod(tile)
    padded = padded_size(size, tile, dilation)
    sides = [_Side(axis, t, whole, query.device) for axis, t, whole in zip(axes, tile, padded, strict=True)]
    classes = math.prod(dilation)

    # Query heads that share a key head stand as further rows of their tile.
    rows = permute_tokens(query, tile, dilation).unflatten(2, (-1, queries))
    tiles = rows.shape[2]
    rows = rows.unflatten(1, (key_heads, group)).unflatten(0, (batch, classes)).permute(0, 2, 1, 4, 3, 5, 6)
    rows = rows.reshape(batch * key_heads, classes * tiles, group * queries, query.shape[-1])
    key, value = (_before_copies(x.flatten(2, -2).flatten(0, 1)) for x in (key, value))

    reached = math.prod([side.reach for side in sides])
    widest = max(batch * key_heads * max(key.shape[-1], value.shape[-1]), group * queries)
    if return_lse:
        widest = max(widest, batch * heads * queries)
    step = max(_CHUNK // (reached * widest), 1)
    counts = [side.tiles for side in sides]
    outs, lses = [], []
    for first in range(0, classes * tiles, step):
        chosen = torch.arange(first, min(first + step, classes * tiles), device=query.device)
        places = _places(chosen, dilation, counts)
        index = _keys_of(sides, places, size).flatten()
        keys, values = (
            x.index_select(1, index).unflatten(1, (-1, reached)).to(query.dtype) for x in (key, value)
        )
        mask = _mask_of(sides, places, group)
        out, lse = _softmax(rows[:, first : first + step], keys, values, mask, scale, return_lse)
        outs.append(out)
        lses.append(lse)

    def grid(parts: list[torch.Tensor]) -> torch.Tensor:
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        dim = x.shape[-1]
        x = x.reshape(batch, key_heads, classes, tiles, group, queries, dim).permute(0, 2, 1, 4, 3, 5, 6)
        x = x.reshape(batch * classes, heads, tiles * queries, dim)
        return unpermute_tokens(x, size, tile, dilation)

    out = grid(outs)
    return (out, grid([lse[..., None] for lse in lses]).squeeze(-1)) if return_lse else out


def tile_edge(axis: Axis, axes: int) -> int:
    """Returns the edge of a tile of queries along an axis, a multiple of the stride."""
    least = round(_LEAST_TILE ** (1 / axes))
    if axis.stride == axis.kernel_size or (2 * axis.stride > axis.kernel_size and axis.stride >= least):
        # One group of queries has one window: nothing to mask, nothing wasted, and few copies of a key.
        return axis.stride
    wanted = min(max(axis.kernel_size, least), axis.longest)
    return -(-wanted // axis.stride) * axis.stride


class _Side:
    """Keys and masks of the tiles along one axis, one row for each class and tile."""

    def __init__(self, axis: Axis, tile: int, padded: int, device: torch.device) -> None:
        self.tile = tile
        self.tiles = padded // (tile * axis.dilation)
        self.reach = axis.reach(tile)
        by_tile = lambda x: x.view(self.tiles, tile, axis.dilation).permute(2, 0, 1).flatten(0, 1)  # noqa: E731
        start, end = (by_tile(bound) for bound in axis.windows(padded, device))
        key = start[:, :1] + torch.arange(self.reach, device=device)
        residue = torch.arange(axis.dilation, device=device).repeat_interleave(self.tiles)[:, None]
        # Beyond the end of its class a tile is given the last key again, which the mask hides.
        self.keys = torch.minimum(key, axis.last(residue)) * axis.dilation + residue
        self.mask: torch.Tensor | None = None
        if axis.is_causal or self.reach != axis.kernel_size:
            key = key[:, None]
            self.mask = (key >= start[..., None]) & (key < end[..., None])


def _places(chosen: torch.Tensor, dilation: Sequence[int], counts: Sequence[int]) -> list[torch.Tensor]:
    """The row of each side for tiles that are numbered through classes, then tiles, both row-major."""
    digits = []
    for base in reversed((*dilation, *counts)):
        digits.append(chosen % base)
        chosen = chosen // base
    digits.reverse()
    axes = len(counts)
    return [digits[axis] * counts[axis] + digits[axes + axis] for axis in range(axes)]


def _outer(parts: Sequence[torch.Tensor], combine: Callable) -> torch.Tensor:
    """Combines `[tiles, n_1]`, `[tiles, n_2]`, ... to `[tiles, n_1, n_2, ...]`."""
    axes = len(parts)
    spread = [
        part.view(part.shape[0], *(part.shape[1] if place == axis else 1 for place in range(axes)))
        for axis, part in enumerate(parts)
    ]
    return reduce(combine, spread)


def _keys_of(sides: Sequence[_Side], places: Sequence[torch.Tensor], size: Sequence[int]) -> torch.Tensor:
    """Flat indices of the keys, `[tiles, reached]`."""
    steps = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
    parts = [side.keys[place] * step for side, place, step in zip(sides, places, steps, strict=True)]
    return _outer(parts, torch.add).flatten(1)


def _mask_of(sides: Sequence[_Side], places: Sequence[torch.Tensor], group: int) -> torch.Tensor | None:
    """The mask `[tiles, group * queries, reached]`, or None where nothing is hidden."""
    if all(side.mask is None for side in sides):
        return None
    axes = len(sides)
    masks = []
    for axis, (side, place) in enumerate(zip(sides, places, strict=True)):
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = side.tile, side.reach
        whole = torch.ones(shape, dtype=torch.bool, device=place.device)[None]
        masks.append(whole if side.mask is None else side.mask[place].view(-1, *shape))
    seen = reduce(torch.logical_and, masks).flatten(1 + axes).flatten(1, axes)
    return seen if group == 1 else seen.repeat(1, group, 1)


def _before_copies(x: torch.Tensor) -> torch.Tensor:
    """The gradients of a key's copies are summed in the precision that the copies are made from."""
    if torch.is_grad_enabled() and x.requires_grad:
        return x.to(torch.promote_types(x.dtype, torch.float32))
    return x


def _softmax(query, key, value, mask, scale, return_lse):
    if not return_lse:
        mask = None if mask is None else mask[None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale), None
    # Torch's function keeps the log-sum-exp, and has no gradient for it.
    given = query.dtype
    query, key, value = (x.to(torch.promote_types(given, torch.float32)) for x in (query, key, value))
    logits = scale * (query @ key.transpose(-2, -1))
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    weights, lse = masked_softmax(logits)
    return (weights @ value).to(given), lse
