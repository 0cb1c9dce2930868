"""TiC: a backbone of four stages whose only mixing of tokens is attention with the support of a convolution.

This is a reconstruction. The paper's network was not released, and what is known of its layout is that it is
hierarchical: widths, depths, heads, where dilations grow, how channels are shifted and where maps are pooled are this
library's decisions, and no accuracy of the paper can be expected of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from undivided.layers._vision import Size, to_map, to_tokens
from undivided.layers.tic import InterPool, MSAConv
from undivided.models.vision._backbone import Stage, VisionBackbone
from undivided.models.vision._registration import register_family

INTER_POOL = ("none", "kv", "stage")


class Halving(nn.Module):
    """A 3 x 3 convolution of stride 2 and LayerNorm; it has one token for an odd row or column at the end."""

    def __init__(self, in_dim: int, dim: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **options)
        self.norm = nn.LayerNorm(dim, **options)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Size]:
        """Takes a map `[B, C, H, W]` and returns tokens and their size."""
        x, size = to_tokens(self.conv(x))
        return self.norm(x), size


class Stem(nn.Module):
    """Two halvings with a GELU between them."""

    def __init__(self, in_chans: int, dim: int, **options: Any) -> None:
        super().__init__()
        self.first = Halving(in_chans, max(dim // 2, 1), **options)
        self.second = Halving(max(dim // 2, 1), dim, **options)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Size]:
        x, size = self.first(x)
        return self.second(to_map(F.gelu(x), size))


class TiCBlock(nn.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        attention: dict[str, Any],
        **options: Any,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, **options)
        self.attn = MSAConv(dim, num_heads, proj_drop=proj_drop, **attention, **options)
        self.norm2 = nn.LayerNorm(dim, **options)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden, **options),
            nn.GELU(),
            nn.Dropout(proj_drop),
            nn.Linear(hidden, dim, **options),
            nn.Dropout(proj_drop),
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TiCStage(Stage):
    """A halving but in the first stage, inter-pooling where asked for, and blocks."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        in_dim: int | None,
        kernel_size: int,
        border: str,
        has_shifts: bool,
        inter_pool: str,
        qkv_bias: bool,
        drop_path: Sequence[float],
        block: dict[str, Any],
        **options: Any,
    ) -> None:
        super().__init__()
        self.downsample = None if in_dim is None else Halving(in_dim, dim, **options)
        self.pooled = InterPool(dim, num_heads, kernel_size, **options) if inter_pool == "stage" else None
        blocks = []
        for index, rate in enumerate(drop_path):
            is_last = index == len(drop_path) - 1
            attention = {
                "kernel_size": kernel_size,
                "border": border,
                # Every other block looks at every other token.
                "dilation": 1 + index % 2,
                "shift": ("half" if is_last else kernel_size // 2) if has_shifts else 0,
                "kv_pool": 2 if inter_pool == "kv" and is_last else 1,
                "qkv_bias": qkv_bias,
            }
            blocks.append(TiCBlock(dim, num_heads, drop_path=rate, attention=attention, **block, **options))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, size: Size) -> tuple[torch.Tensor, Size]:
        if self.downsample is not None:
            x, size = self.downsample(to_map(x, size))
        if self.pooled is not None:
            x = self.pooled(x, size)
        for block in self.blocks:
            x = self.run(block, x, size)
        return x, size


class TiC(VisionBackbone):
    """TiC, reconstructed: a stem of stride 4, four stages of MSA-Conv blocks, the mean of the tokens, a classifier.

    No weight and no buffer depends on the size of the image, there are no position embeddings, and cost is linear in
    pixels: `H W (4 C^2 + 2 kernel_size^2 C)` multiply-adds an attention layer.

    Args:
        in_chans, num_classes, global_pool, drop_rate: as in `VisionBackbone`.
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths: blocks of each stage.
        head_dim: width of a head in all stages.
        kernel_size: side of the kernel, odd; every other block has dilation 2.
        border: what lies beyond the map, "zero", "mask" or "circular".
        has_shifts: groups of channels are rolled in four directions, by half a kernel, in the last block of a stage by
            half the map.
        inter_pool: "stage" has a layer on the map of half the side before the blocks of the first three stages, "kv"
            averages keys and values in the last block of these, "none" does neither.
        mlp_ratio: width of the MLPs over that of the tokens.
        qkv_bias: whether queries, keys and values have a bias.
        proj_drop_rate: dropout in MLPs and of the output of attention.
        drop_path_rate: of the last block; it grows linearly over all blocks.
        device, dtype: of the weights.

    Raises:
        ValueError: `head_dim` does not divide `embed_dim`, or an unknown kind of pooling.

    Source: a reconstruction after the abstract of TiC (arXiv 2310.04134).
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 2, 6, 2),
        head_dim: int = 32,
        kernel_size: int = 7,
        border: str = "zero",
        has_shifts: bool = True,
        inter_pool: str = "stage",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if head_dim < 1 or embed_dim % head_dim:
            raise ValueError(f"head_dim={head_dim} does not divide embed_dim={embed_dim}.")
        if inter_pool not in INTER_POOL:
            raise ValueError(f"inter_pool={inter_pool!r} is not one of {', '.join(map(repr, INTER_POOL))}.")
        channels = [embed_dim * 2**index for index in range(len(depths))]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        block = {"mlp_ratio": mlp_ratio, "proj_drop": proj_drop_rate}
        stages = [
            TiCStage(
                channels[index],
                channels[index] // head_dim,
                in_dim=channels[index - 1] if index else None,
                kernel_size=kernel_size,
                border=border,
                has_shifts=has_shifts,
                inter_pool=inter_pool if index < len(depths) - 1 else "none",
                qkv_bias=qkv_bias,
                drop_path=rates[index].tolist(),
                block=block,
                **options,
            )
            for index in range(len(depths))
        ]
        super().__init__(
            Stem(in_chans, embed_dim, **options),
            stages,
            nn.LayerNorm(channels[-1], **options),
            channels=channels,
            reductions=[4 * 2**index for index in range(len(depths))],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **options,
        )


# Sizes are this library's.
MODELS: dict[str, dict[str, Any]] = {"tic_nano": {"embed_dim": 32}, "tic_tiny": {}}

register_family(__name__, TiC, MODELS, config={"first_conv": "stem.first.conv", "pool_size": (7, 7)})
