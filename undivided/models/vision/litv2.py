"""LITv2: two stages of convolutional MLPs, then one of HiLo attention and one of plain attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch.utils.flop_counter import register_flop_formula
from torchvision.ops import deform_conv2d

from undivided.layers._vision import Size, as_pair, to_map, to_tokens
from undivided.layers.hilo import HiLoAttention
from undivided.models.vision._backbone import Stage, VisionBackbone
from undivided.models.vision._official import Renaming
from undivided.models.vision._registration import register_family


class ConvMlp(nn.Module):
    """`W_2 GELU(DWConv3x3(W_1 x))`; the zeros around the map tell tokens where they are.

    Args:
        dim: width of the tokens.
        hidden_dim: width inside.
        drop: dropout after the activation and of the output.
        device, dtype: of the weights.

    Shape:
        `forward(x [B, N, C], size)` gives `[B, N, C]`.

    Source: LITv2 (arXiv 2205.13213), section 4.2.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **options)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **options)
        self.fc2 = nn.Linear(hidden_dim, dim, **options)
        self.drop = nn.Dropout(drop)

    def initialise(self) -> None:
        """Draws the convolution from a normal distribution whose variance is 2 over the nine weights of an output."""
        nn.init.normal_(self.conv.weight, std=math.sqrt(2 / 9))
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        x = to_tokens(self.conv(to_map(self.fc1(x), size)))[0]
        return self.drop(self.fc2(self.drop(F.gelu(x))))


class DeformableConv2d(nn.Conv2d):
    """A convolution that reads between the places of its grid: `y_p = sum_k W_k x(p + k + offset_pk)`.

    Offsets are a convolution of the same input and the same grid, zero at first; x between places is bilinear, and zero
    outside of the map. It is computed in float32 at least, because torchvision's kernel knows no bfloat16 and positions
    want more digits than half precision has.

    Args:
        in_channels, out_channels, kernel_size, stride: as in `torch.nn.Conv2d`.
        device, dtype: of the weights.

    Source: Deformable Convolutional Networks (arXiv 1703.06211), section 2.1.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, **options: Any
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, **options)
        # Vertical and horizontal, for each place of the kernel.
        self.offset = nn.Conv2d(in_channels, 2 * kernel_size**2, kernel_size, stride, **options)
        self.initialise()

    def initialise(self) -> None:
        """Sets the offsets to zero."""
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offset = self.offset(x)
        dtype = torch.promote_types(offset.dtype, torch.float32)
        inputs = (tensor.to(dtype) for tensor in (x, offset, self.weight, self.bias))
        return deform_conv2d(*inputs, stride=self.stride).to(offset.dtype)


@register_flop_formula(torch.ops.torchvision.deform_conv2d)
def _deformable_flops(
    x_shape: Any, weight_shape: Any, *other: Any, out_shape: Any = None, **options: Any
) -> int:
    """The products alone, as for a convolution: interpolation costs a few operations for each of them."""
    return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])


class DeformableMerging(nn.Module):
    """Merges 2 x 2 tokens into one: a deformable convolution of stride 2, BatchNorm, GELU.

    A map of an odd side is padded with zeros below or on the right. (The authors' detection code drops the last row or
    column there; their classification code refuses such maps.)

    Args:
        dim: width of the tokens.
        out_dim: width after it.
        device, dtype: of the weights.

    Shape:
        `forward(x [B, N, C], size)` gives tokens and their size.

    Source: LIT (arXiv 2105.14217), section 3.3.
    """

    def __init__(self, dim: int, out_dim: int, **options: Any) -> None:
        super().__init__()
        self.conv = DeformableConv2d(dim, out_dim, 2, 2, **options)
        self.norm = nn.BatchNorm2d(out_dim, **options)

    def forward(self, x: torch.Tensor, size: Size) -> tuple[torch.Tensor, Size]:
        x = padded_image(to_map(x, size), (2, 2))
        return to_tokens(F.gelu(self.norm(self.conv(x))))


class Stem(nn.Module):
    """A convolution of patches that do not overlap, and LayerNorm; images are padded with zeros to whole patches."""

    def __init__(self, in_chans: int, dim: int, patch_size: Size, **options: Any) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **options)
        self.norm = nn.LayerNorm(dim, **options)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Size]:
        x, size = to_tokens(self.proj(padded_image(x, self.patch_size)))
        return self.norm(x), size


class LITv2Block(nn.Module):
    """`x + attn(norm1(x))` where there is attention, then `x + mlp(norm2(x))`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        *,
        alpha: float,
        mlp_ratio: float,
        qkv_bias: bool,
        proj_drop: float,
        drop_path: float,
        **options: Any,
    ) -> None:
        super().__init__()
        self.has_attention = window_size > 0
        if self.has_attention:
            self.norm1 = nn.LayerNorm(dim, **options)
            self.attn = HiLoAttention(
                dim, num_heads, window_size, alpha=alpha, qkv_bias=qkv_bias, proj_drop=proj_drop, **options
            )
        self.norm2 = nn.LayerNorm(dim, **options)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), proj_drop, **options)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        if self.has_attention:
            x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x), size))


class LITv2Stage(Stage):
    """`DeformableMerging` but in the first stage, and blocks."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        *,
        in_dim: int | None,
        drop_path: Sequence[float],
        block: dict[str, Any],
        **options: Any,
    ) -> None:
        super().__init__()
        self.downsample = None if in_dim is None else DeformableMerging(in_dim, dim, **options)
        self.blocks = nn.ModuleList(
            LITv2Block(dim, num_heads, window_size, drop_path=rate, **block, **options) for rate in drop_path
        )

    def forward(self, x: torch.Tensor, size: Size) -> tuple[torch.Tensor, Size]:
        if self.downsample is not None:
            x, size = self.downsample(x, size)
        for block in self.blocks:
            x = self.run(block, x, size)
        return x, size


class LITv2(VisionBackbone):
    """LITv2, a backbone of four stages; the first two have no attention, and nothing depends on the image's size.

    The authors train the weights of the offsets (`downsample.conv.offset.weight`) with
    `OFFSET_LEARNING_RATE` times the learning rate.

    Args:
        in_chans, num_classes, global_pool, drop_rate: as in `VisionBackbone`.
        patch_size: image pixels of a token of the first stage, one number or two.
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths: blocks of each stage.
        num_heads: heads of each stage; not read where there is no attention.
        window_size: side of HiLo's windows in each stage; 1 for plain attention, 0 for no attention.
        alpha: share of low-frequency heads.
        mlp_ratio: width of the MLPs over that of the tokens.
        qkv_bias: whether queries, keys and values have a bias.
        proj_drop_rate: dropout in MLPs and of the output of attention. (The authors' attention has an argument for it
            and does not use it; they train with 0.)
        drop_path_rate: of the last block; it grows linearly over all blocks. The paper's training rates are in
            `DROP_PATH_RATES`.
        device, dtype: of the weights.

    Source: Fast Vision Transformers with HiLo Attention (arXiv 2205.13213), section 4.2, and the authors' code.
    """

    renamings = {
        "the authors'": Renaming(
            rules=(
                (r"^patch_embed\.", "stem."),
                (r"^layers\.(\d+)\.downsample", lambda match: f"stages.{int(match[1]) + 1}.downsample"),
                (r"^layers\.", "stages."),
                (r"downsample\.dconv\.conv_offset", "downsample.conv.offset"),
                (r"downsample\.dconv", "downsample.conv"),
                (r"downsample\.norm_layer", "downsample.norm"),
                (r"attn\.l_", "attn.lofi_"),
                (r"attn\.h_", "attn.hifi_"),
                (r"mlp\.dwconv\.dwconv", "mlp.conv"),
                (r"^head\.", "head.fc."),
            ),
        ),
    }

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int | Size = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, given in (("num_heads", num_heads), ("window_size", window_size)):
            if len(given) != len(depths):
                raise ValueError(
                    f"{name} has {len(given)} stages, but depths={tuple(depths)} has {len(depths)}."
                )
        if min(window_size) < 0:
            raise ValueError(f"window_size={tuple(window_size)} must not be negative; 0 is no attention.")
        patch = as_pair("patch_size", patch_size)
        channels = [embed_dim * 2**index for index in range(len(depths))]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        block = {"alpha": alpha, "mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "proj_drop": proj_drop_rate}
        stages = [
            LITv2Stage(
                channels[index],
                num_heads[index],
                window_size[index],
                in_dim=channels[index - 1] if index else None,
                drop_path=rates[index].tolist(),
                block=block,
                **options,
            )
            for index in range(len(depths))
        ]
        super().__init__(
            Stem(in_chans, embed_dim, patch, **options),
            stages,
            nn.LayerNorm(channels[-1], **options),
            channels=channels,
            reductions=[patch[0] * 2**index for index in range(len(depths))],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **options,
        )


def padded_image(x: torch.Tensor, multiple: Size) -> torch.Tensor:
    """Returns `[B, C, H, W]` padded with zeros below and on the right to multiples."""
    below, right = -x.shape[2] % multiple[0], -x.shape[3] % multiple[1]
    return F.pad(x, (0, right, 0, below)) if below or right else x


_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
MODELS: dict[str, dict[str, Any]] = {
    "litv2_small": {},
    "litv2_medium": {"depths": (2, 2, 18, 2)},
    "litv2_base": _BASE,
    "litv2_base_384": _BASE,
}
# What the authors train with; models are built with 0, as timm does.
DROP_PATH_RATES: dict[str, float] = {
    "litv2_small": 0.2,
    "litv2_medium": 0.3,
    "litv2_base": 0.5,
    "litv2_base_384": 0.5,
}
OFFSET_LEARNING_RATE = 0.01

register_family(
    __name__,
    LITv2,
    MODELS,
    config={"first_conv": "stem.proj", "pool_size": (7, 7)},
    configs={
        "litv2_base_384": {
            "input_size": (3, 384, 384),
            "pool_size": (12, 12),
            "crop_pct": 1.0,
            "crop_mode": "squash",
        }
    },
)
