"""Neighborhood attention through torch's FlexAttention, tokens in the order of tiles, blocks from the tables."""

from __future__ import annotations

import math
from functools import cache

import torch

from undivided.ops.neighborhood._tables import Neighborhood
from undivided.ops.neighborhood.permute import padded_size, permute_tokens, unpermute_tokens

# Tokens of a tile: the block that FlexAttention visits or skips.
_TILE = 128


def reasons(query, key, value, neighborhood, scale, return_lse, relative_bias=None) -> list[str]:
    found = [] if relative_bias is None else ["relative_bias is given"]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.device.type == "cpu" and needs_grad:
        found.append("query is on cpu and needs a gradient (FlexAttention has no backward there)")
    if query.device.type == "cpu" and return_lse:
        found.append("query is on cpu and return_lse is True (FlexAttention returns none there)")
    if query.device.type not in ("cpu", "cuda"):
        found.append(f"query is on {query.device.type}")
    if query.dtype == torch.float64:
        found.append("query is float64")
    for name, dim in (("head_dim", query.shape[-1]), ("value_dim", value.shape[-1])):
        if query.device.type == "cuda" and dim < 16:
            found.append(f"{name} is {dim} (FlexAttention needs at least 16 on cuda)")
    return found


@cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend(query, key, value, neighborhood, scale, return_lse, relative_bias=None):
    from torch.nn.attention.flex_attention import AuxRequest

    size, dilation = neighborhood.size, neighborhood.dilation
    tile = tile_shape(neighborhood)
    blocks = block_mask(neighborhood, tile, query.shape[0], query.device)
    query, key, value = (permute_tokens(x, tile, dilation) for x in (query, key, value))
    out = _compiled()(
        query,
        key,
        value,
        block_mask=blocks,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True) if return_lse else None,
    )
    if not return_lse:
        return unpermute_tokens(out, size, tile, dilation)
    lse = unpermute_tokens(out[1].lse[..., None], size, tile, dilation).squeeze(-1)
    return unpermute_tokens(out[0], size, tile, dilation), lse


def tile_shape(neighborhood: Neighborhood) -> tuple[int, ...]:
    """Returns the tile, 128 tokens, as even as its axes allow, the last axis first."""
    axes = neighborhood.axes
    tile = [1] * len(axes)
    while math.prod(tile) < _TILE:
        open_axes = [a for a in reversed(range(len(axes))) if tile[a] < axes[a].longest]
        grown = min(open_axes, key=lambda a: tile[a]) if open_axes else len(axes) - 1
        tile[grown] *= 2
    return tuple(tile)


def block_mask(neighborhood: Neighborhood, tile: tuple[int, ...], batch: int, device: torch.device):
    """Returns FlexAttention's block mask for permuted tokens; the `tokens x tokens` matrix is never formed."""
    from torch.nn.attention.flex_attention import BlockMask

    dilation = neighborhood.dilation
    classes = math.prod(dilation)
    padded = padded_size(neighborhood.size, tile, dilation)
    visited = torch.ones(1, 1, 1, dtype=torch.bool, device=device)
    whole = visited
    bounds = []
    for place, axis in enumerate(neighborhood.axes):
        start, end = axis.windows(padded[place], device)
        coordinate = torch.arange(padded[place], device=device) // axis.dilation
        bounds.append([_permuted(x, place, padded, tile, dilation) for x in (coordinate, start, end)])
        along, within = _blocks(start, end, tile[place], axis.dilation)
        visited, whole = _outer(visited, along), _outer(whole, within)

    def seen(b, h, q, k):
        dilation_class = b % classes
        allowed = k >= 0
        for coordinate, start, end in bounds:
            position = coordinate[dilation_class, k]
            allowed = allowed & (position >= start[dilation_class, q]) & (position < end[dilation_class, q])
        return allowed

    copies = batch if classes > 1 else 1
    lists = [x for blocks in (visited & ~whole, whole) for x in _lists(blocks.repeat(copies, 1, 1)[:, None])]
    tokens = math.prod(padded) // classes
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=math.prod(tile), mask_mod=seen, seq_lengths=(tokens, tokens)
    )


def _permuted(x: torch.Tensor, place: int, padded: tuple[int, ...], tile, dilation) -> torch.Tensor:
    """Spreads numbers of one axis over the grid, in the order of tiles: int32 `[classes, tokens]`."""
    shape = [1] * (len(padded) + 3)
    shape[2 + place] = padded[place]
    grid = x.int().view(shape).expand(1, 1, *padded, 1)
    return permute_tokens(grid, tile, dilation)[:, 0, :, 0].contiguous()


def _blocks(
    start: torch.Tensor, end: torch.Tensor, tile: int, dilation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tiles of keys a tile of queries touches, and which all of its queries see whole: `[classes, n, n]`."""
    start, end = (x.view(-1, tile, dilation).permute(2, 0, 1) for x in (start, end))
    first = tile * torch.arange(start.shape[1], device=start.device)
    touched = (first + tile > start[..., :1]) & (first < end[..., -1:])
    within = (first >= start[..., -1:]) & (first + tile <= end[..., :1])
    return touched, within


def _outer(blocks: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """Adds an axis: classes, query tiles and key tiles stay row-major."""
    both = blocks[:, None, :, None, :, None] & along[None, :, None, :, None, :]
    return both.flatten(4).flatten(2, 3).flatten(0, 1)


def _lists(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of blocks in each row, and their columns in order, followed by the others."""
    columns = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), columns.to(torch.int32)
