"""FIT as an encoder of groups of tokens."""

from __future__ import annotations

import torch
from torch import nn

from undivided.layers.fit import glorot
from undivided.models.fit._blocks import EPSILON, FIT


class FITEncoder(FIT):
    """Encodes groups of tokens: local layers in a group, global layers on the latents of all groups.

    Each block runs its local layers in every group, lets the latents of the group read its tokens, runs its global
    layers on all latents, and lets tokens read the latents of their group; the last block ends before that. Positions
    of tokens are those in the group and are the same in all groups; latents alone know which group they are of.

    Args:
        layers: local layers in brackets and global ones, such as "(2)4(2)4(2)"; without a last number, 0.
        num_tokens: L.
        num_groups: T; they divide `num_tokens`.
        latents_per_group: m.
        dim: width C of the tokens.
        latent_dim: width Cz of the latents.
        num_heads, latent_heads: heads of local and of global layers; they divide their widths, and the fewer the
            smaller width.
        in_dim: width of the input.
        extra_dim: width of further tokens, which stand before those of their group; None for none.
        mlp_ratio: width of the MLPs over that of tokens or latents.
        mask: "causal" lets latents see their group and those before it; None all.
        drop: dropout inside the MLPs.
        drop_path: rate at which residual branches of local and global layers are left out.
        positions: "learned", or fixed "sines" or "sines_2d".

    Shape:
        `forward(x [B, T, n, in_dim], y [B, T, k, extra_dim] or None)` gives tokens `[B, T, k + n, C]` and latents
        `[B, T, m, Cz]`, both normalised.

    Raises:
        ValueError: sizes that do not fit, a string of layers that cannot be read, an unknown mask or position.

    Source: FIT (arXiv 2305.12689), section 3, and the authors' code.
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
        extra_dim: int | None = None,
        mlp_ratio: int = 4,
        mask: str | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
        positions: str = "learned",
    ) -> None:
        super().__init__(
            layers, num_tokens, num_groups, latents_per_group, dim, latent_dim, num_heads, latent_heads,
            mlp_ratio=mlp_ratio, drop=drop, drop_path=drop_path, positions=positions,
        )  # fmt: skip
        if mask not in (None, "causal"):
            raise ValueError(f'mask={mask!r} must be "causal" or None.')
        self.mask = mask
        self.stem = nn.Linear(in_dim, dim)
        self.stem_norm = nn.LayerNorm(dim, EPSILON)
        if extra_dim is not None:
            self.extra_stem = nn.Linear(extra_dim, dim)
            self.extra_norm = nn.LayerNorm(dim, EPSILON)
        self.extra_dim = extra_dim
        self.latent_norm = nn.LayerNorm(latent_dim, EPSILON)
        self.apply(glorot)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        self.check("x", x, 4)
        x = self.stem_norm(self.stem(x)) + self.position
        if y is not None:
            if self.extra_dim is None:
                raise ValueError("y is given, but extra_dim is None; build the encoder with its width.")
            x = torch.cat([self.extra_norm(self.extra_stem(y)), x], dim=2)
        mask = self.chunk_mask() if self.mask else None
        x, z = self.run(x, self.latents(len(x)), mask)
        return self.norm(x), self.latent_norm(z)
