"""ViG: gated linear attention in both directions over the image, plain as a ViT and in four stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, GluMlp, LayerScale
from torch import nn

from undivided.layers._vision import Size, as_pair, to_map, to_tokens
from undivided.layers.vig import GAIN, BidirectionalGatedLinearAttention
from undivided.models.vision._backbone import Stage, VisionBackbone
from undivided.models.vision._official import Renaming
from undivided.models.vision._registration import register_family

PATCH = 16
# Names of the attention in the authors' code.
_ATTENTION_RULES = (
    (r"\bin_proj\.0", "conv"),
    (r"\bqkv_proj", "qkv"),
    (r"\bgk_proj\.0", "decay_down"),
    (r"\bgk_proj\.1", "decay_up"),
    (r"\bo_proj", "proj"),
    (r"\bg_proj", "gate"),
    (r"\bg_norm", "scan_norm"),
    (r"\bl_norm", "local_norm"),
)


class PatchStem(nn.Module):
    """Two convolutions with LayerNorms, a token for 16 x 16 pixels, and learned positions.

    Positions are resized to other maps by bicubic interpolation. Images that 16 does not divide are padded with zeros
    below and on the right; the authors' convolutions leave up to 15 rows and columns unread.

    Args:
        img_size: `(height, width)` of images, or one number for both; decides the number of positions.
        in_chans: channels of an image.
        dim: width of the tokens.
        device, dtype: of the weights.
    """

    undecayed = ("pos_embed",)

    def __init__(self, img_size: int | Size, in_chans: int, dim: int, **options: Any) -> None:
        super().__init__()
        height, width = as_pair("img_size", img_size)
        self.grid = (-(-height // PATCH), -(-width // PATCH))
        self.conv1 = nn.Conv2d(in_chans, dim // 2, PATCH // 2 + 1, stride=PATCH // 2, padding=1, **options)
        self.norm1 = nn.LayerNorm(dim // 2, **options)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **options)
        self.norm2 = nn.LayerNorm(dim, **options)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], dim, **options))

    def initialise(self) -> None:
        """Draws the positions."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Size]:
        x = F.pad(x, (0, -x.shape[3] % PATCH, 0, -x.shape[2] % PATCH))
        x, size = to_tokens(self.conv1(x))
        x, size = to_tokens(self.conv2(to_map(F.silu(self.norm1(x)), size)))
        return self.norm2(x) + self.positions(size), size

    def positions(self, size: Size) -> torch.Tensor:
        """Returns the positions of a map, `[1, N, C]`."""
        if tuple(size) == self.grid:
            return self.pos_embed
        return resized_positions(self.pos_embed, self.grid, size)

    def resized(self, table: torch.Tensor) -> torch.Tensor:
        """Returns positions `[1, N, C]` learned on another square map for this one.

        Raises:
            ValueError: N is no square.
        """
        side = math.isqrt(table.shape[1])
        if side * side != table.shape[1]:
            raise ValueError(f"pos_embed has {table.shape[1]} positions, which is no square map.")
        return resized_positions(table, (side, side), self.grid)


def resized_positions(table: torch.Tensor, old: Size, new: Size) -> torch.Tensor:
    """Returns positions `[1, N, C]` of one map for another, by bicubic interpolation in float32 or wider."""
    wide = to_map(table.to(torch.promote_types(table.dtype, torch.float32)), old)
    resized = F.interpolate(wide, size=tuple(new), mode="bicubic", align_corners=False)
    return to_tokens(resized.to(table.dtype))[0]


class MapStem(nn.Module):
    """Two 3x3 convolutions of stride 2, LayerNorms, GELU between: a token for 4 x 4 pixels."""

    def __init__(self, in_chans: int, dim: int, **options: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **options)
        self.norm1 = nn.LayerNorm(dim // 2, **options)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **options)
        self.norm2 = nn.LayerNorm(dim, **options)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Size]:
        x, size = to_tokens(self.conv1(x))
        x, size = to_tokens(self.conv2(to_map(F.gelu(self.norm1(x)), size)))
        return self.norm2(x), size


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 and a LayerNorm."""

    def __init__(self, dim: int, out_dim: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **options)
        self.norm = nn.LayerNorm(out_dim, **options)

    def forward(self, x: torch.Tensor, size: Size) -> tuple[torch.Tensor, Size]:
        x, size = to_tokens(self.conv(to_map(x, size)))
        return self.norm(x), size


class HierarchicalAttention(BidirectionalGatedLinearAttention):
    """The layer in `ViGHierarchical`, whose linear layers start as all others of the model do."""

    def initialise(self) -> None:
        """Draws the convolution."""
        nn.init.xavier_uniform_(self.conv.weight, gain=GAIN)


class ViGBlock(nn.Module):
    """`x + g1 * attn(norm(x))`, then `x + g2 * mlp(norm(x))` with a SwiGLU of two thirds of `mlp_ratio * dim`.

    Args:
        dim, num_heads: as in `BidirectionalGatedLinearAttention`.
        attention: the class of the layer.
        attention_options: its options.
        norm, norm_eps: class of the norms, and their eps.
        mlp_ratio: see above.
        mlp_multiple: the width in the MLP is rounded up to a multiple of this.
        layer_scale: first value of g1 and g2; None for no factors.
        proj_drop, drop_path: rates.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        attention: type[BidirectionalGatedLinearAttention],
        attention_options: dict[str, Any],
        norm: type[nn.Module],
        norm_eps: float,
        mlp_ratio: float,
        mlp_multiple: int,
        layer_scale: float | None,
        proj_drop: float,
        drop_path: float,
        **options: Any,
    ) -> None:
        super().__init__()
        hidden = -(-int(dim * mlp_ratio * 2 / 3) // mlp_multiple) * mlp_multiple
        self.norm1 = norm(dim, eps=norm_eps, **options)
        self.attn = attention(dim, num_heads, proj_drop=proj_drop, **attention_options, **options)
        self.norm2 = norm(dim, eps=norm_eps, **options)
        self.mlp = GluMlp(
            dim, 2 * hidden, act_layer=nn.SiLU, gate_last=False, bias=False, drop=proj_drop, **options
        )
        scaled = layer_scale is not None
        self.ls1, self.ls2 = (
            LayerScale(dim, layer_scale, **options) if scaled else nn.Identity() for _ in range(2)
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), size)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class ViGStage(Stage):
    """A `Downsample`, if `in_dim` is given, and blocks."""

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
        self.downsample = None if in_dim is None else Downsample(in_dim, dim, **options)
        self.blocks = nn.ModuleList(
            ViGBlock(dim, num_heads, drop_path=rate, **block, **options) for rate in drop_path
        )

    def forward(self, x: torch.Tensor, size: Size) -> tuple[torch.Tensor, Size]:
        if self.downsample is not None:
            x, size = self.downsample(x, size)
        for block in self.blocks:
            x = self.run(block, x, size)
        return x, size


class ViG(VisionBackbone):
    """The plain ViG, a backbone of blocks of one width on a map of 16 x 16 pixels a token, without a class token.

    Each block is a stage of its own: `forward_intermediates` and `features_only` count blocks, as in timm's ViT.
    Weight decay leaves out the positions, also as there; the authors' training decays them.

    Args:
        img_size: `(height, width)` of images, or one number for both; decides the number of positions. Images of other
            sizes are taken too, with positions resized.
        in_chans, num_classes, global_pool, drop_rate: as in `VisionBackbone`.
        embed_dim: width of the tokens.
        depth: number of blocks.
        num_heads: heads of each block.
        expand_k: width of queries and keys over that of the tokens.
        conv_act, out_act: SiLU after the convolution, and before the last projection, of each layer.
        mlp_ratio: the MLPs have two thirds of this times `embed_dim`, rounded up to a multiple of 256.
        layer_scale: first value of the factors of the residual branches; None for no factors.
        attn_variant: "paper", or "released" for what the authors' code does in evaluation: `variant` of
            `BidirectionalGatedLinearAttention`. (timm's factory has a `variant` of its own.)
        proj_drop_rate: dropout in projections and MLPs.
        drop_path_rate: of the last block; it grows linearly over all blocks. The authors' training rates are in
            `DROP_PATH_RATES`.
        device, dtype: of the weights.

    Source: ViG (arXiv 2405.18425) and the authors' code.
    """

    renamings = {
        "the authors'": Renaming(
            rules=(
                (r"^pos_embed", "stem.pos_embed"),
                (r"^patch_embed\.proj\.0", "stem.conv1"),
                (r"^patch_embed\.proj\.1", "stem.norm1"),
                (r"^patch_embed\.proj\.3", "stem.conv2"),
                (r"^patch_embed\.proj\.4", "stem.norm2"),
                (r"^blocks\.(\d+)\.", r"stages.\1.blocks.0."),
                (r"\battn_norm", "norm1"),
                (r"\bmlp_norm", "norm2"),
                (r"mlp\.gate_proj", "mlp.fc1"),
                (r"mlp\.down_proj", "mlp.fc2"),
                (r"gamma([12])$", r"ls\1.gamma"),
                *_ATTENTION_RULES,
                (r"^head\.", "head.fc."),
            )
        ),
    }
    feature_indices = (2, 5, 8, 11)

    def __init__(
        self,
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        expand_k: float = 0.5,
        conv_act: bool = False,
        out_act: bool = False,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        attn_variant: str = "paper",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        block = {
            "attention": BidirectionalGatedLinearAttention,
            "attention_options": {
                "expand_k": expand_k, "conv_act": conv_act, "out_act": out_act, "variant": attn_variant
            },
            "norm": nn.RMSNorm,
            "norm_eps": 1e-6,
            "mlp_ratio": mlp_ratio,
            "mlp_multiple": 256,
            "layer_scale": layer_scale,
            "proj_drop": proj_drop_rate,
        }  # fmt: skip
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        super().__init__(
            PatchStem(img_size, in_chans, embed_dim, **options),
            [
                ViGStage(embed_dim, num_heads, in_dim=None, drop_path=[rate], block=block, **options)
                for rate in rates
            ],
            nn.RMSNorm(embed_dim, eps=1e-6, **options),
            channels=[embed_dim] * depth,
            reductions=[PATCH] * depth,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **options,
        )


class ViGHierarchical(VisionBackbone):
    """ViG-H, a backbone of four stages, 4 to 32 pixels a token, without position embeddings.

    Args:
        in_chans, num_classes, global_pool, drop_rate: as in `VisionBackbone`.
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        expand_k, conv_act, out_act, layer_scale, proj_drop_rate, drop_path_rate: as in `ViG`.
        mlp_ratio: the MLPs have two thirds of this times the width, rounded up to a multiple of 32.
        device, dtype: of the weights.

    Source: ViG (arXiv 2405.18425) and the authors' code.
    """

    renamings = {
        "the authors'": Renaming(
            rules=(
                (r"^patch_embed\.0", "stem.conv1"),
                (r"^patch_embed\.2", "stem.norm1"),
                (r"^patch_embed\.5", "stem.conv2"),
                (r"^patch_embed\.7", "stem.norm2"),
                (
                    r"^layers\.(\d+)\.downsample\.1",
                    lambda match: f"stages.{int(match[1]) + 1}.downsample.conv",
                ),
                (
                    r"^layers\.(\d+)\.downsample\.3",
                    lambda match: f"stages.{int(match[1]) + 1}.downsample.norm",
                ),
                (r"^layers", "stages"),
                (r"(blocks\.\d+)\.norm\.", r"\1.norm1."),
                (r"(blocks\.\d+)\.op\.", r"\1.attn."),
                *_ATTENTION_RULES,
                (r"^classifier\.norm", "norm"),
                (r"^classifier\.head", "head.fc"),
            )
        ),
    }

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 5, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        expand_k: float = 0.5,
        conv_act: bool = False,
        out_act: bool = False,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(num_heads) != len(depths):
            raise ValueError(
                f"num_heads has {len(num_heads)} stages, but depths={tuple(depths)} has {len(depths)}."
            )
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        block = {
            "attention": HierarchicalAttention,
            "attention_options": {"expand_k": expand_k, "conv_act": conv_act, "out_act": out_act},
            "norm": nn.LayerNorm,
            "norm_eps": 1e-5,
            "mlp_ratio": mlp_ratio,
            "mlp_multiple": 32,
            "layer_scale": layer_scale,
            "proj_drop": proj_drop_rate,
        }
        channels = [embed_dim * 2**index for index in range(len(depths))]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        super().__init__(
            MapStem(in_chans, embed_dim, **options),
            [
                ViGStage(
                    channels[index],
                    num_heads[index],
                    in_dim=channels[index - 1] if index else None,
                    drop_path=rates[index].tolist(),
                    block=block,
                    **options,
                )
                for index in range(len(depths))
            ],
            nn.LayerNorm(channels[-1], **options),
            channels=channels,
            reductions=[4 * 2**index for index in range(len(depths))],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **options,
        )


MODELS: dict[str, dict[str, Any]] = {
    "vig_tiny": {"embed_dim": 192, "num_heads": 3, "conv_act": True, "out_act": True},
    "vig_small": {"embed_dim": 384, "num_heads": 6},
    "vig_base": {"embed_dim": 768, "num_heads": 12},
}
HIERARCHICAL_MODELS: dict[str, dict[str, Any]] = {
    "vig_h_tiny": {},
    "vig_h_small": {"depths": (2, 2, 17, 2)},
    "vig_h_base": {"embed_dim": 128, "depths": (2, 2, 17, 2), "num_heads": (4, 8, 16, 32)},
}
# What the authors train with; models are built with 0, as timm does.
DROP_PATH_RATES: dict[str, float] = {
    "vig_tiny": 0.0,
    "vig_small": 0.2,
    "vig_base": 0.5,
    "vig_h_tiny": 0.2,
    "vig_h_small": 0.3,
    "vig_h_base": 0.6,
}

register_family(__name__, ViG, MODELS, config={"first_conv": "stem.conv1", "pool_size": (14, 14)})
register_family(
    __name__, ViGHierarchical, HIERARCHICAL_MODELS, config={"first_conv": "stem.conv1", "pool_size": (7, 7)}
)
