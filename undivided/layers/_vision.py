"""What layers of image tokens share: the 2-D token contract and the place in timm's blocks.

The contract: `forward(x, size)` with tokens `x` `[batch, height * width, dim]` in row-major order and
`size = (height, width)`.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

Size = tuple[int, int]
Layer = TypeVar("Layer", bound="ConfiguredAsClass")


class ConfiguredAsClass(nn.Module):
    """A layer that can be handed over as a class, with its options set."""

    @classmethod
    def with_options(cls: type[Layer], **options: Any) -> type[Layer]:
        """Returns a subclass with other defaults, for places that take a class, such as timm's `attn_layer`."""

        class Configured(cls):  # type: ignore[valid-type, misc]
            __doc__ = cls.__doc__

            def __init__(self, *arguments: Any, **given: Any) -> None:
                super().__init__(*arguments, **{**options, **given})

        Configured.__name__ = Configured.__qualname__ = cls.__name__
        return Configured


class VisionAttention(ConfiguredAsClass):
    """Base of attention layers of image tokens; it checks the constructor's words that all have in common.

    Args:
        dim: width C of a token.
        num_heads: heads H; they divide `dim`.
        attn_drop, qk_norm, scale_norm: refused unless off; timm's blocks pass them.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or an option is on.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        attn_drop: float = 0.0,
        qk_norm: bool = False,
        scale_norm: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}.")
        for name, value in (("attn_drop", attn_drop), ("qk_norm", qk_norm), ("scale_norm", scale_norm)):
            if value:
                raise ValueError(f"{name}={value} is not computed by {type(self).__name__}; leave it off.")
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5

    def refuse_mask(self, attn_mask: torch.Tensor | None, is_causal: bool) -> None:
        """Raises a ValueError if timm's block asks for a mask, which layers of whole images do not take."""
        if attn_mask is not None or is_causal:
            given = "is_causal=True" if is_causal else "attn_mask"
            raise ValueError(f"{given} was given, but {type(self).__name__} takes no mask.")


def map_size(x: torch.Tensor, size: Size | None) -> Size:
    """Returns `size` after checking it against the tokens `[batch, N, C]`; without it, that of a square map.

    Raises:
        ValueError: the tokens are not `height * width`, or without `size` not a square.
    """
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}; it needs 3 axes, [batch, tokens, dim].")
    tokens = x.shape[1]
    if size is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"x has {tokens} tokens, which is no square map; give size=(height, width).")
        return side, side
    if size[0] * size[1] != tokens:
        raise ValueError(
            f"size={tuple(size)} has {size[0] * size[1]} tokens, but x has {tokens}; tokens that are not of the map, "
            "such as a class token, must be taken off."
        )
    return size


def to_map(x: torch.Tensor, size: Size) -> torch.Tensor:
    """Returns tokens `[batch, N, C]` as a map `[batch, C, height, width]`, a view in channels-last order."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def to_tokens(x: torch.Tensor) -> tuple[torch.Tensor, Size]:
    """Returns a map `[batch, C, height, width]` as tokens `[batch, N, C]` and their size."""
    return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


def pad_map(x: torch.Tensor, size: Size, multiple: Size) -> tuple[torch.Tensor, Size]:
    """Returns tokens of the map padded with zeros below and on the right to multiples, and its size."""
    padded = (-(-size[0] // multiple[0]) * multiple[0], -(-size[1] // multiple[1]) * multiple[1])
    if padded == tuple(size):
        return x, size
    x = F.pad(x.unflatten(1, size), (0, 0, 0, padded[1] - size[1], 0, padded[0] - size[0]))
    return x.flatten(1, 2), padded


def crop_map(x: torch.Tensor, padded: Size, size: Size) -> torch.Tensor:
    """Returns the tokens `[batch, N, C]` of the upper left `size` of a padded map."""
    if tuple(padded) == tuple(size):
        return x
    return x.unflatten(1, padded)[:, : size[0], : size[1]].flatten(1, 2)


def as_pair(name: str, value: int | tuple[int, int]) -> Size:
    """Returns `(value, value)` of a number, and a pair as it is.

    Raises:
        ValueError: it is neither, or not positive.
    """
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(item, int) and item > 0 for item in pair):
        raise ValueError(f"{name}={value} must be a positive number, or two: height and width.")
    return pair[0], pair[1]
