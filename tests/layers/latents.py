"""Random latent layers, and the mathematics they are held against."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from undivided.layers.latent import LatentAttention
from undivided.layers.rotary import apply_rotary

# In float64, where two orders of the same sums differ by far less and two different functions by far more.
EXACT = {"rtol": 1e-10, "atol": 1e-10}

HIDDEN, HEADS = 24, 4
SIZES = {"latent_dim": 16, "rope_dim": 4, "nope_dim": 6, "value_dim": 5}


def random_layer(layer_class: type[LatentAttention], *, seed: int = 0, **options: Any) -> LatentAttention:
    """A layer in float64 whose logits are far from flat, with every weight drawn afresh."""
    layer = layer_class(HIDDEN, HEADS, **{**SIZES, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "layernorm" in name:
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                parameter.copy_(2.0 * noise * parameter.shape[-1] ** -0.5)
    return layer.double()


def hidden_states(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randn(batch, length, HIDDEN, dtype=torch.float64)


def positions(length: int, pairs: int = 2, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as a Llama model hands them to its attention."""
    frequencies = 100.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = torch.arange(start, start + length, dtype=torch.float64)[None, :, None] * frequencies
    return angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)


def rotated(layer: LatentAttention, x: torch.Tensor) -> torch.Tensor:
    """`[B, heads, N, rope_dim]` at positions 0, 1, ..."""
    cos, sin = (table[..., : layer.rope_dim // 2] for table in positions(x.shape[2], layer.rope_dim // 2))
    return apply_rotary(x, cos, sin, interleaved=layer.rope_interleaved)


def normalised(layer: LatentAttention, hidden: torch.Tensor) -> torch.Tensor:
    """The whole latent `[B, N, latent_dim]`, divided by its root mean square and weighted, as MLA has it."""
    latent = layer.kv_a_proj_with_mqa(hidden)[..., : layer.latent_dim]
    mean_square = latent.pow(2).mean(dim=-1, keepdim=True)
    return layer.kv_a_layernorm.weight * latent / (mean_square + layer.kv_a_layernorm.eps).sqrt()


def logits(
    layer: LatentAttention, hidden: torch.Tensor, head: int, latent: torch.Tensor, up_key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Content and rotary logits `[B, N, N]` of one head on a latent `[B, N, r]`, not scaled."""
    nope, rope = layer.queries(hidden)[:, head].split([layer.nope_dim, layer.rope_dim], dim=-1)
    rope_key = layer.kv_a_proj_with_mqa(hidden)[..., layer.latent_dim :]
    content = (nope @ up_key) @ latent.transpose(1, 2)
    query_rope, rope_key = rotated(layer, rope[:, None])[:, 0], rotated(layer, rope_key[:, None])[:, 0]
    return content, query_rope @ rope_key.transpose(1, 2)


def causal_softmax(scores: torch.Tensor) -> torch.Tensor:
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1)


class _RMSNorm(nn.Module):
    def __init__(self, native: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = native.weight, native.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt()


def in_float64(model: nn.Module) -> nn.Module:
    """The model with norms that compute in float64; those of transformers round to float32 always."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, _RMSNorm(child))
    return model.double()
