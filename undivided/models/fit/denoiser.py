"""FIT as the denoiser of a diffusion model."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.layers.fit import MLP, glorot, sines
from undivided.models.fit._blocks import EPSILON, FIT


class FITDenoiser(FIT):
    """Predicts noise, or what is under it: an encoder whose latents read time and condition before global layers.

    With `self_conditioning` the first latents are `position + LN(z_prev + MLP(LN(z_prev)))`, where `z_prev` are the
    latents of the step before; the last norm starts with a scale of 0.

    Args:
        layers, num_tokens, num_groups, latents_per_group, dim, latent_dim, num_heads, latent_heads, in_dim, mlp_ratio,
            drop, drop_path, positions, mask: as in `FITEncoder`.
        out_dim: width of the output; `in_dim` by default.
        condition_dim: width of the tokens of a condition; None for none.
        self_conditioning: read the latents of the step before.
        self_attention: without it local layers are MLPs alone.
        cross_mlp: reads and writes have an MLP of `mlp_ratio`.
        source_norm: reads and writes normalise their source.

    Shape:
        `forward(x [B, T, n, in_dim], time [B], condition [B, s, d] or None, z_prev [B, T, m, Cz] or None)` gives
        `[B, T, n, out_dim]` and latents `[B, T, m, Cz]`. Times are 0 to 1.

    Raises:
        ValueError: as in `FITEncoder`, or a condition or latents that the model is not built for.

    Source: FIT (arXiv 2305.12689) and the authors' code.
    """

    def __init__(
        self,
        layers: str = "(2)4(2)",
        num_tokens: int = 4096,
        num_groups: int = 16,
        latents_per_group: int = 16,
        dim: int = 256,
        latent_dim: int = 768,
        num_heads: int = 8,
        latent_heads: int = 12,
        in_dim: int = 768,
        *,
        out_dim: int | None = None,
        condition_dim: int | None = None,
        self_conditioning: bool = True,
        self_attention: bool = True,
        cross_mlp: bool = False,
        source_norm: bool = True,
        mlp_ratio: int = 4,
        mask: str | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
        positions: str = "learned",
    ) -> None:
        super().__init__(
            layers, num_tokens, num_groups, latents_per_group, dim, latent_dim, num_heads, latent_heads,
            mlp_ratio=mlp_ratio, drop=drop, drop_path=drop_path, positions=positions, is_conditioned=True,
            self_attention=self_attention, cross_mlp_ratio=mlp_ratio if cross_mlp else 0, source_norm=source_norm,
        )  # fmt: skip
        if mask not in (None, "causal"):
            raise ValueError(f'mask={mask!r} must be "causal" or None.')
        if latent_dim % 8:
            raise ValueError(
                f"latent_dim={latent_dim} must be a multiple of 8: a quarter of it holds the sines of time."
            )
        self.mask = mask
        self.time_width = latent_dim // 4
        self.stem = nn.Linear(in_dim, dim)
        self.stem_norm = nn.LayerNorm(dim, EPSILON)
        self.time1 = nn.Linear(self.time_width, latent_dim)
        self.time2 = nn.Linear(latent_dim, latent_dim)
        self.condition_proj = None if condition_dim is None else nn.Linear(condition_dim, latent_dim)
        self.self_conditioning = self_conditioning
        self.out = nn.Linear(dim, in_dim if out_dim is None else out_dim)
        if self_conditioning:
            self.previous_norm1 = nn.LayerNorm(latent_dim, EPSILON)
            self.previous_mlp = MLP(latent_dim, mlp_ratio)
            self.previous_norm2 = nn.LayerNorm(latent_dim, EPSILON)
        self.apply(glorot)
        if self_conditioning:
            nn.init.zeros_(self.previous_norm2.weight)

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        condition: torch.Tensor | None = None,
        z_prev: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.check("x", x, 4)
        if (condition is None) != (self.condition_proj is None):
            raise ValueError(
                f"condition is {'None' if condition is None else 'given'}, but the model was built "
                f"{'with' if condition is None else 'without'} condition_dim."
            )
        if z_prev is not None and not self.self_conditioning:
            raise ValueError("z_prev is given, but the model was built with self_conditioning=False.")
        read = self.embed_time(time)[:, None]
        if condition is not None and self.condition_proj is not None:
            read = torch.cat([read, self.condition_proj(condition)], dim=1)
        z = self.latents(len(x))
        if self.self_conditioning:
            previous = torch.zeros_like(z) if z_prev is None else z_prev
            z = z + self.previous_norm2(previous + self.previous_mlp(self.previous_norm1(previous)))
        mask = self.chunk_mask() if self.mask else None
        x = self.stem_norm(self.stem(x)) + self.position
        x, z = self.run(x, z, mask, read)
        return self.out(self.norm(x)), z

    def embed_time(self, time: torch.Tensor) -> torch.Tensor:
        """Returns `[B, Cz]` of times `[B]` from 0 to 1."""
        wave = sines(time * 1000.0, self.time_width)
        wave = (wave - wave.mean(-1, keepdim=True)) / wave.std(-1, correction=0, keepdim=True)
        return self.time2(F.silu(self.time1(wave.to(self.time1.weight.dtype))))

    def loss(
        self,
        clean: torch.Tensor,
        condition: torch.Tensor | None = None,
        *,
        self_conditioned: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Returns the mean squared error of the predicted noise at times drawn from 0 to 1.

        `x_t = cos(pi t / 2) clean + sin(pi t / 2) noise`. For a share of the samples the model runs first without
        earlier latents and then, without a gradient through them, with those it found.

        Args:
            clean: `[B, T, n, in_dim]`.
            condition: as in `forward`.
            self_conditioned: the share.
            generator: of times, noise and share.

        Raises:
            ValueError: the share is not from 0 to 1.
        """
        if not 0 <= self_conditioned <= 1:
            raise ValueError(f"self_conditioned={self_conditioned} must be from 0 to 1.")
        options: dict[str, Any] = {"generator": generator, "device": clean.device}
        time = torch.rand(len(clean), **options)
        noise = torch.randn(clean.shape, dtype=clean.dtype, **options)
        angle = (time * (math.pi / 2)).to(clean.dtype)[:, None, None, None]
        noisy = angle.cos() * clean + angle.sin() * noise
        previous = None
        if self.self_conditioning and self_conditioned:
            with torch.no_grad():
                previous = self(noisy, time, condition)[1]
            chosen = torch.rand(len(clean), **options) < self_conditioned
            previous = previous * chosen[:, None, None, None]
        return F.mse_loss(self(noisy, time, condition, previous)[0], noise)

    @torch.no_grad()
    def sample(self, noise: torch.Tensor, steps: int, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Returns `[B, T, n, in_dim]` from noise of this shape by deterministic steps, carrying the latents along.

        Args:
            noise: standard normal.
            steps: from time 1 to 0, of equal length.
            condition: as in `forward`.
        """
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1.")
        x, latents = noise, None
        # At time 1 nothing of the clean data is left to divide by.
        times = torch.linspace(0.999, 0.0, steps + 1).tolist()
        for now, after in zip(times[:-1], times[1:], strict=True):
            found, z = self(x, torch.full((len(x),), now, device=x.device), condition, latents)
            latents = z if self.self_conditioning else None
            clean = (x - math.sin(now * math.pi / 2) * found) / math.cos(now * math.pi / 2)
            x = math.cos(after * math.pi / 2) * clean + math.sin(after * math.pi / 2) * found
        return x
