"""GC ViT: windows of their own queries and windows of queries from the whole map, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp
from torch import nn

from undivided.layers._vision import Size, as_pair, to_map, to_tokens
from undivided.layers.gcvit import (
    FusedMBConv,
    GlobalQueryGenerator,
    GlobalWindowAttention,
    WindowAttention,
    poolings_between,
)
from undivided.models.vision._backbone import Stage, VisionBackbone
from undivided.models.vision._official import Renaming
from undivided.models.vision._registration import register_family


class Downsample(nn.Module):
    """LayerNorm, `FusedMBConv`, a 3x3 convolution of stride 2 without bias, LayerNorm.

    Args:
        dim: width of the tokens.
        out_dim: width after it.
        device, dtype: of the weights.
    """

    def __init__(self, dim: int, out_dim: int, **options: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **options)
        self.conv = FusedMBConv(dim, **options)
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False, **options)
        self.norm2 = nn.LayerNorm(out_dim, **options)

    def forward(self, x: torch.Tensor, size: Size) -> tuple[torch.Tensor, Size]:
        x = self.reduction(self.conv(to_map(self.norm1(x), size)))
        x, size = to_tokens(x)
        return self.norm2(x), size


class Stem(nn.Module):
    """A 3x3 convolution of stride 2 and a `Downsample`: a token for 4 x 4 pixels."""

    def __init__(self, in_chans: int, dim: int, **options: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 3, stride=2, padding=1, **options)
        self.downsample = Downsample(dim, dim, **options)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Size]:
        return self.downsample(*to_tokens(self.proj(x)))


class GCViTBlock(nn.Module):
    """`x + g1 * attn(norm(x))`, then `x + g2 * mlp(norm(x))`; with a global query if `is_global`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Size,
        *,
        is_global: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        layer_scale: float | None,
        proj_drop: float,
        drop_path: float,
        **options: Any,
    ) -> None:
        super().__init__()
        self.is_global = is_global
        attention = GlobalWindowAttention if is_global else WindowAttention
        self.norm1 = nn.LayerNorm(dim, **options)
        self.attn = attention(dim, num_heads, window_size, qkv_bias=qkv_bias, proj_drop=proj_drop, **options)
        self.norm2 = nn.LayerNorm(dim, **options)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **options)
        scaled = layer_scale is not None
        self.ls1, self.ls2 = (
            LayerScale(dim, layer_scale, **options) if scaled else nn.Identity() for _ in range(2)
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor, size: Size, global_query: torch.Tensor) -> torch.Tensor:
        normalised = self.norm1(x)
        y = self.attn(normalised, size, global_query) if self.is_global else self.attn(normalised, size)
        x = x + self.drop_path(self.ls1(y))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class GCViTStage(Stage):
    """A `Downsample` but in the first stage, one global query from its output, and blocks, odd ones global."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Size,
        *,
        in_dim: int | None,
        num_poolings: int,
        drop_path: Sequence[float],
        block: dict[str, Any],
        **options: Any,
    ) -> None:
        super().__init__()
        self.downsample = None if in_dim is None else Downsample(in_dim, dim, **options)
        self.query_generator = GlobalQueryGenerator(dim, window_size, num_poolings, **options)
        self.blocks = nn.ModuleList(
            GCViTBlock(
                dim, num_heads, window_size, is_global=index % 2 == 1, drop_path=rate, **block, **options
            )
            for index, rate in enumerate(drop_path)
        )

    def forward(self, x: torch.Tensor, size: Size) -> tuple[torch.Tensor, Size]:
        if self.downsample is not None:
            x, size = self.downsample(x, size)
        global_query = self.query_generator(x, size)
        for block in self.blocks:
            x = self.run(block, x, size, global_query)
        return x, size


class GCViT(VisionBackbone):
    """GC ViT, a backbone of four stages of windows that know the whole map.

    Windows are of `img_size // window_ratio` tokens, and fixed then; images of other sizes are taken too, with maps
    padded to whole windows and queries resized to one window (`undivided.layers.gcvit`). At `img_size` nothing is
    padded if 32 divides it.

    Weight decay leaves out the tables of relative positions. (The authors' list names a keyword that no parameter has.)

    Args:
        img_size: `(height, width)` of images, or one number for both; decides the windows.
        in_chans, num_classes, global_pool, drop_rate: as in `VisionBackbone`.
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        window_ratio: image pixels per window along one axis, of each stage.
        window_size: tokens of a window along each axis, of each stage, in place of `window_ratio`.
        num_poolings: how often each stage's queries are pooled; default as often as a window needs.
        mlp_ratio: width of the MLPs over that of the tokens.
        qkv_bias: whether queries, keys and values have a bias.
        layer_scale: first value of the factors of the residual branches; None for no factors.
        proj_drop_rate: dropout in projections and MLPs.
        drop_path_rate: of the last block; it grows linearly over all blocks. The paper's training rates are in
            `DROP_PATH_RATES`.
        device, dtype: of the weights.

    Source: GC ViT (arXiv 2206.09959) and the authors' code.
    """

    renamings = {
        "the authors'": Renaming(
            rules=(
                (r"^patch_embed\.conv_down", "stem.downsample"),
                (r"^patch_embed", "stem"),
                (r"^levels\.(\d+)\.downsample", lambda match: f"stages.{int(match[1]) + 1}.downsample"),
                (r"^levels", "stages"),
                (r"q_global_gen\.to_q_global", "query_generator.blocks"),
                (r"(downsample|query_generator\.blocks\.\d+)\.conv\.(\d)", r"\1.CONV\2"),
                (r"downsample\.CONV", "downsample.conv.CONV"),
                (r"CONV0", "conv_dw"),
                (r"CONV2\.fc\.0", "squeeze"),
                (r"CONV2\.fc\.2", "excite"),
                (r"CONV3", "conv_pw"),
                (r"relative_position_bias_table", "position_bias.table"),
                (r"gamma([12])$", r"ls\1.gamma"),
                (r"^head\.", "head.fc."),
            ),
            ignored=r".*relative_position_index$",
        ),
        "timm's gcvit": Renaming(
            rules=(
                (r"^stem\.conv1", "stem.proj"),
                (r"^stem\.down\.", "stem.downsample."),
                (r"conv_block", "conv"),
                (
                    r"global_block\.blocks\.conv(\d+)",
                    lambda match: f"query_generator.blocks.{int(match[1]) - 1}",
                ),
                (r"se\.fc1", "squeeze"),
                (r"se\.fc2", "excite"),
                (r"rel_pos\.relative_position_bias_table", "position_bias.table"),
                (r"^stages\.3\.norm\.", "norm."),
            ),
            ignored=r".*relative_position_index$",
        ),
    }

    def __init__(
        self,
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 19, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        window_ratio: Sequence[int] = (32, 32, 16, 32),
        window_size: Sequence[int | Size] | None = None,
        num_poolings: Sequence[int] | None = None,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        image = as_pair("img_size", img_size)
        if window_size is None:
            window_size = [(max(image[0] // r, 1), max(image[1] // r, 1)) for r in window_ratio]
        windows = [as_pair("window_size", window) for window in window_size]
        for name, given in (
            ("num_heads", num_heads),
            ("window_size", windows),
            ("num_poolings", num_poolings),
        ):
            if given is not None and len(given) != len(depths):
                raise ValueError(
                    f"{name} has {len(given)} stages, but depths={tuple(depths)} has {len(depths)}."
                )
        reductions = [4 * 2**index for index in range(len(depths))]
        channels = [embed_dim * 2**index for index in range(len(depths))]
        if num_poolings is None:
            num_poolings = [
                poolings_between((max(image[0] // reduction, 1), max(image[1] // reduction, 1)), window)
                for reduction, window in zip(reductions, windows, strict=True)
            ]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        block = {
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "layer_scale": layer_scale,
            "proj_drop": proj_drop_rate,
        }
        stages = [
            GCViTStage(
                channels[index],
                num_heads[index],
                windows[index],
                in_dim=channels[index - 1] if index else None,
                num_poolings=num_poolings[index],
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
            reductions=reductions,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **options,
        )


_SMALL = {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "layer_scale": 1e-5}
_LARGE = {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0, "layer_scale": 1e-5}
MODELS: dict[str, dict[str, Any]] = {
    "gcvit_xxtiny": {"depths": (2, 2, 6, 2)},
    "gcvit_xtiny": {"depths": (3, 4, 6, 5)},
    "gcvit_tiny": {"depths": (3, 4, 19, 5)},
    "gcvit_tiny2": {"depths": (3, 4, 29, 5)},
    "gcvit_small": {**_SMALL, "mlp_ratio": 2.0},
    "gcvit_small2": {**_SMALL, "depths": (3, 4, 23, 5)},
    "gcvit_base": {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0, "layer_scale": 1e-5},
    "gcvit_large": _LARGE,
    "gcvit_large_384": _LARGE,
    "gcvit_large_512": _LARGE,
}
# What the authors train with; models are built with 0, as timm does.
DROP_PATH_RATES: dict[str, float] = {
    "gcvit_xxtiny": 0.2,
    "gcvit_xtiny": 0.2,
    "gcvit_tiny": 0.2,
    "gcvit_tiny2": 0.25,
    "gcvit_small": 0.3,
    "gcvit_small2": 0.35,
    "gcvit_base": 0.5,
    "gcvit_large": 0.5,
    "gcvit_large_384": 0.1,
    "gcvit_large_512": 0.1,
}

register_family(
    __name__,
    GCViT,
    MODELS,
    config={"first_conv": "stem.proj", "pool_size": (7, 7), "fixed_input_size": True},
    configs={
        f"gcvit_large_{size}": {
            "input_size": (3, size, size),
            "pool_size": (size // 32, size // 32),
            "crop_pct": 1.0,
            "crop_mode": "squash",
        }
        for size in (384, 512)
    },
)
