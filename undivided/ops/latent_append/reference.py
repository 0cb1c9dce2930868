"""Normalise, rotate, write: as it is written. It defines what is correct."""

from __future__ import annotations

import torch

FP8_MAX = 448.0


def reasons(**arguments: object) -> list[str]:
    return []


def append(
    row, cos, sin, norm_weight, cache, lengths, eps, interleaved, block_table, counts, shard_scale, latent_scale,
    query_rope,
):  # fmt: skip
    dtype = torch.promote_types(row.dtype, torch.float32)
    rope_dim = 0 if cos is None else 2 * cos.shape[2]
    latent, rope = row.to(dtype).split([row.shape[2] - rope_dim, rope_dim], dim=-1)
    if norm_weight is not None:
        scale = latent.new_ones(1) if shard_scale is None else shard_scale.to(dtype)
        shards = latent.unflatten(-1, (len(scale), -1))
        mean_square = scale[:, None] * shards.pow(2).sum(-1, keepdim=True) / latent.shape[-1]
        latent = norm_weight.to(dtype) * (shards * torch.rsqrt(mean_square + eps)).flatten(-2)
    if cos is not None:
        cos, sin = cos.to(dtype), sin.to(dtype)
        rope = _rotated(rope, cos, sin, interleaved)
    if query_rope is not None:
        query_rope.copy_(_rotated(query_rope.to(dtype), cos[:, None], sin[:, None], interleaved))
    written = torch.cat([latent, rope], dim=-1)

    token = torch.arange(row.shape[1], device=row.device)
    position = lengths[:, None].long() + token
    page_size = cache.shape[1]
    capacity = page_size if block_table is None else page_size * block_table.shape[1]
    keep = (position >= 0) & (position < capacity)
    if counts is not None:
        keep = keep & (token < counts[:, None])
    sequence, token = keep.nonzero(as_tuple=True)
    position = position[sequence, token]
    block = sequence
    if block_table is not None:
        block = block_table[sequence, position // page_size].long()
        position = position % page_size
    written = written[sequence, token]
    if latent_scale is not None:
        factor = written.abs().amax(-1) / FP8_MAX
        factor = torch.where(factor > 0, factor, 1.0)
        latent_scale[block, position] = factor.float()
        written = written / factor[:, None]
    cache[block, position] = written.to(cache.dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    rotated = a * cos - b * sin, b * cos + a * sin
    return torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
