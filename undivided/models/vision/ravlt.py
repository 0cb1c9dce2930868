"""RAVLT: rank-augmented linear attention where maps are large, softmax attention where they are small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale
from torch import nn

from undivided.layers._vision import Size, to_map, to_tokens
from undivided.layers.rala import (
    ModulatedSoftmaxAttention,
    RankAugmentedLinearAttention,
    Tables,
    axial_rotary,
)
from undivided.models.vision._backbone import Stage, VisionBackbone
from undivided.models.vision._official import Renaming
from undivided.models.vision._registration import register_family

ATTENTIONS = {"linear": RankAugmentedLinearAttention, "softmax": ModulatedSoftmaxAttention}


class Stem(nn.Module):
    """Four 3x3 convolutions of stride 2, 1, 1, 2, each with BatchNorm, GELU between them: a token for 4 x 4 pixels."""

    def __init__(self, in_chans: int, dim: int, **options: Any) -> None:
        super().__init__()
        half = dim // 2
        layers: list[nn.Module] = []
        for before, after, stride in ((in_chans, half, 2), (half, half, 1), (half, half, 1), (half, dim, 2)):
            if layers:
                layers.append(nn.GELU())
            layers += [
                nn.Conv2d(before, after, 3, stride=stride, padding=1, **options),
                nn.BatchNorm2d(after, **options),
            ]
        self.proj = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Size]:
        return to_tokens(self.proj(x))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 and BatchNorm."""

    def __init__(self, dim: int, out_dim: int, **options: Any) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **options)
        self.norm = nn.BatchNorm2d(out_dim, **options)

    def forward(self, x: torch.Tensor, size: Size) -> tuple[torch.Tensor, Size]:
        return to_tokens(self.norm(self.reduction(to_map(x, size))))


class Projection(nn.Module):
    """A linear layer to the width of the classifier, BatchNorm, SiLU, on tokens `[B, N, C]`."""

    def __init__(self, dim: int, out_dim: int, **options: Any) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, out_dim, **options)
        self.norm = nn.BatchNorm1d(out_dim, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Rows of channels: of a transposed [B, C, N, 1] torch 2.14 computes wrong gradients on a CPU.
        rows = self.norm(self.proj(x).flatten(0, 1))
        return F.silu(rows.unflatten(0, x.shape[:2]))


class ConvolutionalMlp(nn.Module):
    """`W_2 (u + DWConv3x3(u))`, `u = GELU(W_1 x)`, on tokens of a map."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **options)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **options)
        self.fc2 = nn.Linear(hidden_dim, dim, **options)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        hidden = to_map(self.drop(F.gelu(self.fc1(x))), size)
        return self.drop(self.fc2(to_tokens(hidden + self.dwconv(hidden))[0]))


class RAVLTBlock(nn.Module):
    """`x + DWConv3x3(x)`, then `x + g1 * attn(norm(x))`, then `x + g2 * mlp(norm(x))`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        attention: str,
        mlp_ratio: float,
        layer_scale: float | None,
        proj_drop: float,
        drop_path: float,
        **options: Any,
    ) -> None:
        super().__init__()
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **options)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **options)
        self.attn = ATTENTIONS[attention](dim, num_heads, proj_drop=proj_drop, **options)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **options)
        self.mlp = ConvolutionalMlp(dim, int(mlp_ratio * dim), proj_drop, **options)
        scaled = layer_scale is not None
        self.ls1, self.ls2 = (
            LayerScale(dim, layer_scale, **options) if scaled else nn.Identity() for _ in range(2)
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor, size: Size, rotary: Tables) -> torch.Tensor:
        x = x + to_tokens(self.pos(to_map(x, size)))[0]
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), size, rotary)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x), size)))


class RAVLTStage(Stage):
    """A `Downsample` but in the first stage, and blocks of one kind of attention."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        in_dim: int | None,
        drop_path: Sequence[float],
        block: dict[str, Any],
        **options: Any,
    ) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.downsample = None if in_dim is None else Downsample(in_dim, dim, **options)
        self.blocks = nn.ModuleList(
            RAVLTBlock(dim, num_heads, drop_path=rate, **block, **options) for rate in drop_path
        )

    def forward(self, x: torch.Tensor, size: Size) -> tuple[torch.Tensor, Size]:
        if self.downsample is not None:
            x, size = self.downsample(x, size)
        rotary = axial_rotary(size, self.head_dim, x.device, x.dtype)
        for block in self.blocks:
            x = self.run(block, x, size, rotary)
        return x, size


def convolutions_alike(module: nn.Module) -> None:
    """Sets linear layers and convolutions to a truncated normal distribution of deviation 0.02, biases to zero."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class RAVLT(VisionBackbone):
    """RAVLT, a backbone of four stages: linear attention in the first two, softmax attention in the last two.

    It is linear in the number of tokens in the first two stages only; of an image of 1024 x 1024 pixels the third has
    4096 tokens and the softmax of all of them. The last norm is a projection to `projection` channels with BatchNorm
    and SiLU, so that `forward_features` is wider than the last stage.

    The authors' table of multiply-adds is 5 to 9 % below the count of their code, whose total is ours; without the
    products of attention the count is theirs but for 2 %.

    Args:
        in_chans, num_classes, global_pool, drop_rate: as in `VisionBackbone`.
        embed_dims: width of each stage.
        depths: blocks of each stage.
        num_heads: heads of each stage; 4 divides the width of a head.
        attention: "linear" or "softmax" of each stage; the authors release this default alone.
        mlp_ratio: width of the MLPs over that of the tokens.
        layer_scale: first value of the factors of the residual branches of each stage; None for no factors.
        projection: channels before the classifier.
        proj_drop_rate: dropout in projections and MLPs.
        drop_path_rate: of the last block; it grows linearly over all blocks. The authors' training rates are in
            `DROP_PATH_RATES`.
        device, dtype: of the weights.

    Raises:
        ValueError: numbers of stages that do not agree, or an attention that does not exist.

    Source: Breaking the Low-Rank Dilemma of Linear Attention (arXiv 2411.07635) and the authors' code.
    """

    renamings = {
        "the authors'": Renaming(
            rules=(
                (r"^patch_embed", "stem"),
                (r"^layers\.(\d+)\.downsample", lambda match: f"stages.{int(match[1]) + 1}.downsample"),
                (r"^layers", "stages"),
                (r"(norm[12])\.norm\.", r"\1."),
                (r"\.ffn\.", ".mlp."),
                (r"gamma_([12])$", r"ls\1.gamma"),
                (r"^(proj|norm)\.", r"norm.\1."),
                (r"^head\.", "head.fc."),
            ),
            ignored=r".*RoPE\.angle$",
        )
    }
    generic_initialisation = staticmethod(convolutions_alike)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        attention: Sequence[str] = ("linear", "linear", "softmax", "softmax"),
        mlp_ratio: float = 3.5,
        layer_scale: Sequence[float] | None = (1.0, 1.0, 1.0, 1.0),
        projection: int = 1024,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, given in (
            ("embed_dims", embed_dims),
            ("num_heads", num_heads),
            ("attention", attention),
            ("layer_scale", layer_scale),
        ):
            if given is not None and len(given) != len(depths):
                raise ValueError(
                    f"{name} has {len(given)} stages, but depths={tuple(depths)} has {len(depths)}."
                )
        for kind in attention:
            if kind not in ATTENTIONS:
                raise ValueError(f"attention has {kind!r}, which is not one of {', '.join(ATTENTIONS)}.")
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        stages = [
            RAVLTStage(
                embed_dims[index],
                num_heads[index],
                in_dim=embed_dims[index - 1] if index else None,
                drop_path=rates[index].tolist(),
                block={
                    "attention": attention[index],
                    "mlp_ratio": mlp_ratio,
                    "layer_scale": None if layer_scale is None else layer_scale[index],
                    "proj_drop": proj_drop_rate,
                },
                **options,
            )
            for index in range(len(depths))
        ]
        super().__init__(
            Stem(in_chans, embed_dims[0], **options),
            stages,
            Projection(embed_dims[-1], projection, **options),
            channels=embed_dims,
            reductions=[4 * 2**index for index in range(len(depths))],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **options,
        )
        # The classifier reads the projection, not the last stage.
        self.num_features = projection
        self.reset_classifier(num_classes)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages after the last one asked for, and what comes after them; returns the indices.

        Without the projection, which `prune_norm` means, there is no classifier either.
        """
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head or prune_norm)
        if isinstance(self.norm, nn.Identity):
            self.num_features = self.feature_info[max(taken)]["num_chs"]
            self.reset_classifier(0, "")
        return taken


MODELS: dict[str, dict[str, Any]] = {
    "ravlt_tiny": {},
    "ravlt_small": {"embed_dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8)},
    "ravlt_base": {
        "embed_dims": (96, 192, 384, 512),
        "depths": (4, 6, 12, 6),
        "num_heads": (1, 2, 6, 8),
        "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
    },
    "ravlt_large": {
        "embed_dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (1, 2, 7, 10),
        "layer_scale": (1e-6, 1e-6, 1e-6, 1e-6),
    },
}
# What the authors train with; models are built with 0, as timm does.
DROP_PATH_RATES: dict[str, float] = {
    "ravlt_tiny": 0.1,
    "ravlt_small": 0.15,
    "ravlt_base": 0.4,
    "ravlt_large": 0.55,
}

register_family(__name__, RAVLT, MODELS, config={"first_conv": "stem.proj.0", "pool_size": (7, 7)})
