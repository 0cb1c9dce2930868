"""ConViT: a vision transformer whose first layers start as convolutions, and whose class token comes after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, ClassifierHead, DropPath, Mlp, resample_abs_pos_embed
from torch import nn

from undivided.layers._vision import Size, as_pair, to_map, to_tokens
from undivided.layers.convit import GPSA
from undivided.models.vision._backbone import Stage, VisionBackbone
from undivided.models.vision._official import Renaming
from undivided.models.vision._registration import register_family

# That of the authors' models; torch's own default is another.
_NORM_EPS = 1e-6


class Stem(nn.Module):
    """A convolution from patches to tokens, plus a learned position of each, which other sizes interpolate.

    An image that patches do not divide is padded with zeros below and on the right.
    """

    def __init__(
        self,
        img_size: Size,
        patch_size: Size,
        in_chans: int,
        dim: int,
        *,
        use_pos_embed: bool,
        pos_drop: float,
        **options: Any,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.grid_size = self.map_size(img_size)
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **options)
        count = self.grid_size[0] * self.grid_size[1]
        self.pos_embed = nn.Parameter(torch.empty(1, count, dim, **options)) if use_pos_embed else None
        self.undecayed = ("pos_embed",) if use_pos_embed else ()
        self.pos_drop = nn.Dropout(pos_drop)

    def initialise(self) -> None:
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def map_size(self, image: Size) -> Size:
        """Returns the tokens along each axis of an image of that size."""
        return -(-image[0] // self.patch_size[0]), -(-image[1] // self.patch_size[1])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Size]:
        below, right = (-length % patch for length, patch in zip(x.shape[2:], self.patch_size, strict=True))
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        x, size = to_tokens(self.proj(x))
        if self.pos_embed is not None:
            position = self.pos_embed
            if size != self.grid_size:
                position = resample_abs_pos_embed(
                    position, list(size), list(self.grid_size), num_prefix_tokens=0
                )
            x = x + position
        return self.pos_drop(x), size

    def resized(self, position: torch.Tensor) -> torch.Tensor:
        """Returns learned positions `[1, N, C]` of a square map as those of this one.

        Raises:
            ValueError: N is no square.
        """
        side = round(position.shape[1] ** 0.5)
        if side * side != position.shape[1]:
            raise ValueError(f"pos_embed has {position.shape[1]} positions, which are no square map.")
        return resample_abs_pos_embed(position, list(self.grid_size), [side, side], num_prefix_tokens=0)


class ConViTBlock(nn.Module):
    """`x + attn(norm(x))`, then `x + mlp(norm(x))`, with `GPSA` if `is_local`, else with plain self-attention."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        is_local: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        locality_strength: float,
        conv_init: bool,
        proj_drop: float,
        drop_path: float,
        **options: Any,
    ) -> None:
        super().__init__()
        self.is_local = is_local
        self.norm1 = nn.LayerNorm(dim, eps=_NORM_EPS, **options)
        if is_local:
            self.attn: nn.Module = GPSA(
                dim, num_heads, qkv_bias=qkv_bias, locality_strength=locality_strength, conv_init=conv_init,
                proj_drop=proj_drop, **options,
            )  # fmt: skip
        else:
            self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop, **options)
        self.norm2 = nn.LayerNorm(dim, eps=_NORM_EPS, **options)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **options)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        normalised = self.norm1(x)
        x = x + self.drop_path(self.attn(normalised, size) if self.is_local else self.attn(normalised))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConViTStage(Stage):
    """One block; where the class token joins, it is put in front of the tokens before."""

    def __init__(self, dim: int, block: ConViTBlock, *, has_class_token: bool, **options: Any) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **options)) if has_class_token else None
        self.undecayed = ("cls_token",) if has_class_token else ()
        self.blocks = nn.ModuleList([block])

    def initialise(self) -> None:
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: torch.Tensor, size: Size) -> tuple[torch.Tensor, Size]:
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return self.run(self.blocks[0], x, size), size


class ConViT(VisionBackbone):
    """ConViT, a vision transformer with gated positional self-attention in its first `gpsa_layers` blocks.

    The class token joins after these. Each block is a stage, so that features can be taken of each. As in timm's vision
    transformers, `forward_features` gives tokens `[B, 1 + N, C]`, the class token first; `forward_intermediates` gives
    maps of the others. Images of any size are taken.

    Args:
        img_size: `(height, width)` of images, or one number for both; decides how many positions are learned.
        patch_size: pixels of a patch along each axis, or one number for both.
        in_chans, num_classes, drop_rate: as in `VisionBackbone`.
        global_pool: "token" to classify by the class token, or timm's name of a pooling of the others; "" for none.
        embed_dim: width C of a token, of all heads together.
        depth: blocks.
        num_heads: heads of each block; a square number, for a k x k convolution at the start.
        gpsa_layers: blocks with positions, 0 to `depth`. If all have them there is no class token.
        mlp_ratio: width of the MLPs over that of the tokens.
        qkv_bias: whether queries, keys and values have a bias.
        locality_strength, conv_init: of the start, as in `undivided.layers.convit.GPSA`.
        use_pos_embed: whether to add a learned position to each token.
        pos_drop_rate: dropout after it.
        proj_drop_rate: dropout in projections and MLPs.
        drop_path_rate: of the last block; it grows linearly. The authors train with 0.1.
        device, dtype: of the weights.

    Raises:
        ValueError: sizes that do not fit, or pooling by a class token where there is none.

    Source: ConViT (arXiv 2103.10697) and the authors' code.
    """

    feature_indices = (2, 5, 8, 11)

    def __init__(
        self,
        img_size: int | Size = 224,
        patch_size: int | Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 432,
        depth: int = 12,
        num_heads: int = 9,
        gpsa_layers: int = 10,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        locality_strength: float = 1.0,
        conv_init: bool = True,
        use_pos_embed: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if not 0 <= gpsa_layers <= depth:
            raise ValueError(f"gpsa_layers={gpsa_layers} must be from 0 to depth={depth}.")
        patch = as_pair("patch_size", patch_size)
        # What changes from model to model is where the class token joins.
        self.renamings = {  # type: ignore[misc]
            "the authors' and timm's": Renaming(
                rules=(
                    (r"^patch_embed\.proj", "stem.proj"),
                    (r"^pos_embed$", "stem.pos_embed"),
                    (r"^cls_token$", f"stages.{gpsa_layers}.cls_token"),
                    (r"^blocks\.(\d+)", r"stages.\1.blocks.0"),
                    (r"^head\.", "head.fc."),
                ),
                # It is added to all logits of a row, which softmax does not see.
                ignored=r".*\.pos_proj\.bias$",
            )
        }
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        blocks = [
            ConViTBlock(
                embed_dim,
                num_heads,
                is_local=index < gpsa_layers,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                locality_strength=locality_strength,
                conv_init=conv_init,
                proj_drop=proj_drop_rate,
                drop_path=rate,
                **options,
            )
            for index, rate in enumerate(rates)
        ]
        super().__init__(
            Stem(
                as_pair("img_size", img_size), patch, in_chans, embed_dim, use_pos_embed=use_pos_embed,
                pos_drop=pos_drop_rate, **options,
            ),
            [
                ConViTStage(embed_dim, block, has_class_token=index == gpsa_layers, **options)
                for index, block in enumerate(blocks)
            ],
            nn.LayerNorm(embed_dim, eps=_NORM_EPS, **options),
            channels=[embed_dim] * depth,
            reductions=[max(patch)] * depth,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **options,
        )  # fmt: skip

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of those of the map: 1 with a class token, else 0."""
        return sum(stage.cls_token is not None for stage in self.stages)

    def _new_head(self, num_classes: int, global_pool: str, device: Any, dtype: Any) -> ClassifierHead:
        if global_pool == "token":
            if not self.num_prefix_tokens:
                raise ValueError(
                    'global_pool="token" needs a class token, which joins after the blocks with positions; with '
                    'none after them use "avg".'
                )
            # The mean of one token.
            global_pool = "avg"
        return super()._new_head(num_classes, global_pool, device, dtype)

    def features(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        """Returns the tokens as they are, `[B, 1 + N, C]`: a map has no place for the class token."""
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Returns the logits `[B, num_classes]` of tokens, or with `pre_logits` what the classifier reads."""
        if self.global_pool:
            x = x[:, :1] if self.global_pool == "token" else x[:, self.num_prefix_tokens :]
            # As a map of one row, which all of timm's poolings take.
            x = x.transpose(1, 2)[:, :, None]
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the last tokens, `[B, 1 + N, C]`, and maps without the class token; else as in `VisionBackbone`."""
        size = self.stem.map_size((x.shape[2], x.shape[3]))
        last, tokens = super().forward_intermediates(x, indices, norm, stop_early, output_fmt)
        maps = [to_map(one[:, -size[0] * size[1] :], size) for one in tokens]
        return maps if intermediates_only else (last, maps)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns the groups of parameters by depth; a stage is one block, and has the class token where it joins."""
        return super().group_matcher(coarse=True)


MODELS: dict[str, dict[str, Any]] = {
    "convit_tiny": {"embed_dim": 192, "num_heads": 4},
    "convit_tiny_plus": {"embed_dim": 256, "num_heads": 4},
    "convit_small": {"embed_dim": 432, "num_heads": 9},
    "convit_small_plus": {"embed_dim": 576, "num_heads": 9},
    "convit_base": {"embed_dim": 768, "num_heads": 16},
    "convit_base_plus": {"embed_dim": 1024, "num_heads": 16},
}

register_family(
    __name__, ConViT, MODELS, config={"first_conv": "stem.proj", "pool_size": None, "fixed_input_size": True}
)
