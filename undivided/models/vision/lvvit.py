"""LV-ViT, the second backbone that Sparsifiner is made from, as a vision transformer of timm.

It has a stem of four convolutions, residual branches divided by a constant, and a second classifier of the patches. It
is here for its conversion and is not registered with timm; `undivided.convert.sparsifiner.sparsify` takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

_STEM = 64


class ConvolutionalStem(nn.Module):
    """Three convolutions with batch norm and ReLU at half the size, and one that makes patches of what they give."""

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True, **options: Any
    ) -> None:
        super().__init__()
        if patch_size % 2 or img_size % patch_size:
            raise ValueError(
                f"patch_size={patch_size} must be even and divide img_size={img_size}: the stem halves the image first."
            )
        side = img_size // patch_size
        self.grid_size, self.num_patches = (side, side), side * side
        for number, (width, kernel, stride) in enumerate(((in_chans, 7, 2), (_STEM, 3, 1), (_STEM, 3, 1)), 1):
            conv = nn.Conv2d(width, _STEM, kernel, stride, kernel // 2, bias=False)
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(_STEM))
        self.proj = nn.Conv2d(_STEM, embed_dim, patch_size // 2, patch_size // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in (1, 2, 3):
            x = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x)).relu()
        return self.proj(x).flatten(2).transpose(1, 2)


class ScaledBlock(Block):
    """timm's block with both residual branches divided by `skip`."""

    def __init__(self, *given: Any, skip: float, **options: Any) -> None:
        super().__init__(*given, **options)
        self.skip = skip

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        y = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(y)) / self.skip
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) / self.skip


class LVViT(VisionTransformer):
    """A vision transformer with a class token whose patches are classified too.

    In evaluation the logits are `head(class token) + max over patches of aux_head(patch) / 2`, in training those of the
    class token alone. The defaults are those of LV-ViT-S.

    Args:
        img_size, patch_size, in_chans, num_classes, embed_dim, depth, num_heads, mlp_ratio, drop_path_rate: as in timm.
        skip: what residual branches are divided by.

    Shape:
        `forward(x [B, in_chans, img_size, img_size])` gives `[B, num_classes]`.

    Raises:
        ValueError: an odd patch size, or one that does not divide the image.

    Source: the authors' code of Sparsifiner (arXiv 2303.13755) after LV-ViT (arXiv 2104.10858).
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        skip: float = 2.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            img_size, patch_size, in_chans, num_classes, embed_dim=embed_dim, depth=depth, num_heads=num_heads,
            mlp_ratio=mlp_ratio, qkv_bias=False, drop_path_rate=drop_path_rate, embed_layer=ConvolutionalStem,
            block_fn=partial(ScaledBlock, skip=skip), norm_layer=partial(nn.LayerNorm, eps=1e-5),
        )  # fmt: skip
        self.aux_head = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.aux_head.weight, std=0.02)
        nn.init.zeros_(self.aux_head.bias)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        out = super().forward_head(x, pre_logits)
        if pre_logits or self.training:
            return out
        return out + 0.5 * self.aux_head(x[:, 1:]).amax(1)

    def load_official(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Loads released weights; a checkpoint's names are those here.

        Raises:
            ValueError: other names.
        """
        own = self.state_dict()
        if set(state_dict) != set(own):
            wrong = sorted(set(state_dict) ^ set(own))
            raise ValueError(
                f"state_dict and the model differ in {len(wrong)} names, the first {wrong[0]!r}."
            )
        self.load_state_dict(dict(state_dict))
