"""What FIT's three forms share: blocks of local and global layers, positions, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from undivided.layers.fit import (
    CrossLayer,
    TransformerLayer,
    chunk_causal_mask,
    fixed_positions,
    parse_layers,
    shift_groups,
)

EPSILON = 1e-6
_POSITIONS = ("learned", "sines", "sines_2d")


class FITBlock(nn.Module):
    """Local layers; where there are global ones, a read, those, and unless it is the last block a write.

    `condition`, if the block is built for it, is read by the latents before the global layers.
    """

    def __init__(
        self,
        num_local: int,
        num_global: int,
        *,
        dim: int,
        latent_dim: int,
        num_heads: int,
        latent_heads: int,
        mlp_ratio: int,
        drop: float,
        drop_path: float,
        is_last: bool,
        is_conditioned: bool = False,
        self_attention: bool = True,
        cross_mlp_ratio: int = 0,
        source_norm: bool = True,
    ) -> None:
        super().__init__()
        rates: dict[str, Any] = {"mlp_ratio": mlp_ratio, "drop": drop, "drop_path": drop_path}
        cross: dict[str, Any] = {"mlp_ratio": cross_mlp_ratio, "source_norm": source_norm}
        heads = min(num_heads, latent_heads)
        self.local = nn.ModuleList(
            TransformerLayer(dim, num_heads, self_attention=self_attention, **rates) for _ in range(num_local)
        )
        self.read = CrossLayer(latent_dim, dim, heads, **cross) if num_global else None
        self.condition = (
            CrossLayer(latent_dim, latent_dim, latent_heads, source_norm=source_norm)
            if num_global and is_conditioned
            else None
        )
        self.global_layers = nn.ModuleList(
            TransformerLayer(latent_dim, latent_heads, **rates) for _ in range(num_global)
        )
        self.write = None if is_last else CrossLayer(dim, latent_dim, heads, **cross)

    def forward(
        self,
        x: torch.Tensor,
        z: torch.Tensor,
        mask: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns tokens `[B, T, n, C]` and latents `[B, T, m, Cz]` after the block.

        Args:
            x: tokens `[B, T, n, C]`.
            z: latents `[B, T, m, Cz]`.
            mask: which latent sees which, `[T m, T m]`.
            condition: `[B, s, Cz]`.
            is_causal: a token sees those before it in its group, and the latents of the group before.
        """
        batch, groups = x.shape[:2]
        x = x.flatten(0, 1)
        for layer in self.local:
            x = layer(x, is_causal=is_causal)
        if self.read is not None:
            z = self.read(z.flatten(0, 1), x).unflatten(0, (batch, groups)).flatten(1, 2)
            if self.condition is not None and condition is not None:
                z = self.condition(z, condition)
            for layer in self.global_layers:
                z = layer(z, mask=mask)
            z = z.unflatten(1, (groups, -1))
            if self.write is not None:
                # Latents of a token's own group have read the tokens after it.
                source = shift_groups(z) if is_causal else z
                x = self.write(x, source.flatten(0, 1))
        return x.unflatten(0, (batch, groups)), z


class FIT(nn.Module):
    """What the three forms share: blocks, positions of tokens and of latents."""

    def __init__(
        self,
        layers: str,
        num_tokens: int,
        num_groups: int,
        latents_per_group: int,
        dim: int,
        latent_dim: int,
        num_heads: int,
        latent_heads: int,
        *,
        mlp_ratio: int,
        drop: float,
        drop_path: float,
        positions: str,
        **block: Any,
    ) -> None:
        super().__init__()
        for name, value in (("num_groups", num_groups), ("latents_per_group", latents_per_group)):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive.")
        if num_tokens < 1 or num_tokens % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide num_tokens={num_tokens}.")
        heads = min(num_heads, latent_heads)
        for name, value, width, of in (
            ("num_heads", num_heads, dim, "dim"),
            ("latent_heads", latent_heads, latent_dim, "latent_dim"),
            ("min(num_heads, latent_heads)", heads, min(dim, latent_dim), "min(dim, latent_dim)"),
        ):
            if value < 1 or width % value:
                raise ValueError(f"{name}={value} does not divide {of}={width}.")
        if positions not in _POSITIONS:
            raise ValueError(f"positions={positions!r} is not one of {', '.join(map(repr, _POSITIONS))}.")
        self.layers = parse_layers(layers)
        self.num_groups, self.group_size = num_groups, num_tokens // num_groups
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(
            FITBlock(
                num_local, num_global, dim=dim, latent_dim=latent_dim, num_heads=num_heads,
                latent_heads=latent_heads, mlp_ratio=mlp_ratio, drop=drop, drop_path=drop_path,
                is_last=index == len(self.layers) - 1, **block,
            )
            for index, (num_local, num_global) in enumerate(self.layers)
        )  # fmt: skip
        if positions == "learned":
            self.position = nn.Parameter(torch.empty(self.group_size, dim))
            nn.init.trunc_normal_(self.position, std=0.02)
        else:
            rows = math.isqrt(self.group_size) if positions == "sines_2d" else 1
            if positions == "sines_2d" and rows * rows != self.group_size:
                raise ValueError(
                    f'positions="sines_2d" needs a square group, but one has {self.group_size} tokens.'
                )
            table = fixed_positions(rows, self.group_size // rows, dim)
            self.register_buffer("position", table, persistent=False)
        self.latent_position = nn.Parameter(torch.empty(num_groups, latents_per_group, latent_dim))
        nn.init.trunc_normal_(self.latent_position, std=0.02)
        self.norm = nn.LayerNorm(dim, EPSILON)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass."""
        self.grad_checkpointing = enable

    def run(
        self,
        x: torch.Tensor,
        z: torch.Tensor,
        mask: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the blocks on tokens `[B, T, n, C]` and latents `[B, T, m, Cz]`."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, z = checkpoint(block, x, z, mask, condition, is_causal, use_reentrant=False)
            else:
                x, z = block(x, z, mask, condition, is_causal)
        return x, z

    def latents(self, batch: int) -> torch.Tensor:
        """Returns the first latents, `[B, T, m, Cz]`."""
        return self.latent_position.expand(batch, -1, -1, -1)

    def chunk_mask(self) -> torch.Tensor:
        """Returns which latent sees which where groups see themselves and those before."""
        groups, size, _ = self.latent_position.shape
        return chunk_causal_mask(groups, size, self.latent_position.device)

    def check(self, name: str, x: torch.Tensor, rank: int) -> None:
        """Raises a ValueError unless x has so many axes, `[B, T, n, ...]`."""
        if x.dim() != rank or tuple(x.shape[1:3]) != (self.num_groups, self.group_size):
            raise ValueError(
                f"{name} has shape {list(x.shape)}; it needs {rank} axes, [batch, groups, tokens of a group, ...] = "
                f"[batch, {self.num_groups}, {self.group_size}, ...]."
            )


def attention_multiply_adds(model: FIT) -> Iterator[tuple[str, int]]:
    """Yields the multiply-adds of the products of attention of one sample: local, read and write, global."""
    groups, size, latents = model.num_groups, model.group_size, model.latent_position.shape[1]
    dim, latent_dim = model.norm.weight.numel(), model.latent_position.shape[2]
    local = sum(layer.attn is not None for block in model.blocks for layer in block.local)
    cross = sum((block.read is not None) + (block.write is not None) for block in model.blocks)
    yield "local", 2 * groups * size**2 * dim * local
    yield "cross", 2 * groups * size * latents * min(dim, latent_dim) * cross
    yield "global", 2 * (groups * latents) ** 2 * latent_dim * sum(g for _, g in model.layers)
