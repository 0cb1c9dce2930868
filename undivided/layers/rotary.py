"""Rotary position embeddings as the layers use them: tables from any base model, both layouts of the pairs."""

from __future__ import annotations

from typing import TypeAlias

import torch

PositionEmbeddings: TypeAlias = tuple[torch.Tensor, torch.Tensor] | torch.Tensor


def rotary_tables(position_embeddings: PositionEmbeddings) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and sin `[batch, length, pairs]` from what a transformers model hands to its attention.

    Llama-like models hand over `(cos, sin)` of twice that width, both halves equal; DeepSeek-V2 one complex tensor.
    """
    if isinstance(position_embeddings, torch.Tensor):
        return position_embeddings.real, position_embeddings.imag
    cos, sin = position_embeddings
    pairs = cos.shape[-1] // 2
    return cos[..., :pairs], sin[..., :pairs]


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotates pair p of `x` by the angle of pair p: `(a, b) -> (a cos - b sin, b cos + a sin)`.

    Args:
        x: `[batch, heads, length, 2 * pairs]`.
        cos, sin: `[batch, length, pairs]`.
        interleaved: pairs are `(x0, x1), (x2, x3), ...` (DeepSeek); otherwise `(x0, x_pairs), ...` (Llama).

    Returns:
        The rotated tensor in the same layout.
    """
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def to_interleaved(pairs: int, device: torch.device | None = None) -> torch.Tensor:
    """Returns the index that reorders half-split rotary dims into interleaved ones: `0, pairs, 1, pairs + 1, ...`."""
    return torch.arange(2 * pairs, device=device).view(2, pairs).T.reshape(-1)
