"""Neighborhood attention of the tokens of a line, an image (in the place of timm's attention) or a volume."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from undivided.layers._vision import Size, VisionAttention, map_size
from undivided.ops.neighborhood import Neighborhood, neighborhood_attention, per_axis

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec


class _GridAttention(VisionAttention):
    """What neighborhood attention has in common on grids of any number of axes."""

    axes: int
    # Of `neighborhood_attention`; claims that compare its forms set another.
    backend = "auto"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kernel_size: int | Sequence[int] = 7,
        *,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, attn_drop=attn_drop, qk_norm=qk_norm, scale_norm=scale_norm)
        given = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        numbers = [per_axis(name, value, self.axes, int) for name, value in given.items()]
        for name, entries in zip(given, numbers, strict=True):
            if min(entries) < 1:
                raise ValueError(f"{name}={given[name]} must be at least 1 on every axis.")
        self.kernel_size, self.stride, self.dilation = numbers
        self.is_causal = per_axis("is_causal", causal, self.axes, bool)
        # The smallest grid on which this window is defined has the last word on the stride.
        smallest = [kernel * step for kernel, step in zip(self.kernel_size, self.dilation, strict=True)]
        Neighborhood.of(smallest, self.kernel_size, self.stride, self.dilation, self.is_causal)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpb: nn.Parameter | None = None
        if rel_pos_bias:
            sizes = [2 * kernel - 1 for kernel in self.kernel_size]
            self.rpb = nn.Parameter(torch.empty(num_heads, *sizes, device=device, dtype=dtype))
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def attend(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Returns tokens `[B, N, C]` of a grid after attention and projection."""
        query, key, value = (part.unflatten(2, size) for part in self.heads(x))
        out = cast(
            torch.Tensor,
            neighborhood_attention(
                query,
                key,
                value,
                self.kernel_size,
                stride=self.stride,
                dilation=self.dilation,
                is_causal=self.is_causal,
                scale=self.scale,
                relative_bias=self.rpb,
                backend=self.backend,
            ),
        )
        return self.proj_drop(self.proj(out.flatten(2, -2).transpose(1, 2).flatten(2)))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns query, key and value of tokens `[B, N, C]`, each `[B, H, N, head_dim]`."""
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        return parts.permute(2, 0, 3, 1, 4).unbind(0)

    @property
    def spec(self) -> AttentionSpec:
        """The operator between the projections, as a specification."""
        from undivided.spec.systems import neighborhood

        if self.rpb is not None:
            raise NotImplementedError(
                "neighborhood attention with rel_pos_bias is not written in the specification language."
            )
        return neighborhood()

    def spec_inputs(
        self, hidden_states: torch.Tensor, size: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns the tensors that `spec` reads; `neighborhood` is the mask of the whole grid."""
        size = self.grid_size(hidden_states, size)
        query, key, value = self.heads(hidden_states)
        grid = Neighborhood.of(size, self.kernel_size, self.stride, self.dilation, self.is_causal)
        return {"query": query, "key": key, "value": value, "neighborhood": grid.mask(query.device)}

    def grid_size(self, x: torch.Tensor, size: Sequence[int] | None) -> Sequence[int]:
        """Returns the positions along each axis of the grid of tokens `[B, N, C]`, checked."""
        raise NotImplementedError


class NeighborhoodAttention(_GridAttention):
    """Attention of a token to the window about it: `out_i = sum_{j in N(i)} softmax_j(scale * q_i . k_j) v_j`.

    Windows are shifted inwards at the borders of the map, so that every token sees `kernel_size` tokens on both axes.
    With `stride` above 1 tiles of tokens share a window; `stride = kernel_size` is window attention without shifts, and
    `dilation` spreads a window over the map. Which strides save time on a GPU, `undivided.cost.gna` says. The weights
    have the names and the layout of NATTEN's `NeighborhoodAttention2D`.

    Args:
        dim: width C of a token.
        num_heads: heads H; they divide `dim`.
        kernel_size: `(height, width)` of a window, or one number for both; not larger than the map.
        stride: tokens that share a window.
        dilation: distance between two tokens of a window; times `kernel_size` not larger than the map.
        causal: whether windows end at the token, for both axes or one truth value each.
        rel_pos_bias: whether logits have a bias `rpb [H, 2 w_1 - 1, 2 w_2 - 1]` by the distance of the tokens, as in
            NAT and DiNAT. On a GPU the weights of all windows are then in memory.
        qkv_bias, proj_bias: whether the projections have a bias.
        proj_drop: dropout of the output.
        attn_drop, qk_norm, scale_norm: refused unless off; timm's blocks pass them.
        norm_layer: not used; timm's blocks pass it.
        device, dtype: of the weights.

    Shape:
        `forward(x [B, N, C], size=(height, width))` gives `[B, N, C]`; without `size` the map is square.

    Raises:
        ValueError: sizes that do not fit (the map's in `forward`), or an option that this layer does not compute.

    Source: GNA (arXiv 2504.16922); with `stride = 1` Faster Neighborhood Attention (arXiv 2403.04690).
    """

    axes = 2

    def forward(
        self,
        x: torch.Tensor,
        size: Size | None = None,
        *,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        self.refuse_mask(attn_mask, is_causal)
        return self.attend(x, map_size(x, size))

    def grid_size(self, x: torch.Tensor, size: Sequence[int] | None) -> Sequence[int]:
        return map_size(x, cast("Size | None", size))


class NeighborhoodAttention1D(_GridAttention):
    """Attention of a token of a line to the window about it; as `NeighborhoodAttention`, with numbers for one axis.

    Args:
        dim: width C of a token.
        num_heads: heads H; they divide `dim`.
        kernel_size, stride, dilation: numbers of the one axis.
        causal: whether windows end at the token.
        rel_pos_bias, qkv_bias, proj_bias, proj_drop, device, dtype and the others: as in `NeighborhoodAttention`.

    Shape:
        `forward(x [B, N, C])` gives `[B, N, C]`.

    Raises:
        ValueError: sizes that do not fit (the line's in `forward`).

    Source: GNA (arXiv 2504.16922); with `stride = 1` Faster Neighborhood Attention (arXiv 2403.04690).
    """

    axes = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x, self.grid_size(x, None))

    def grid_size(self, x: torch.Tensor, size: Sequence[int] | None) -> Sequence[int]:
        if x.dim() != 3:
            raise ValueError(f"x has shape {list(x.shape)}; it needs 3 axes, [batch, tokens, dim].")
        return (x.shape[1],)


class NeighborhoodAttention3D(_GridAttention):
    """Attention of a token of a volume, such as a video, to the window about it; as `NeighborhoodAttention`.

    Args:
        dim: width C of a token.
        num_heads: heads H; they divide `dim`.
        kernel_size, stride, dilation: `(time, height, width)`, or one number for all.
        causal: whether windows end at the token, for all axes or one truth value each, such as `(True, False, False)`.
        rel_pos_bias, qkv_bias, proj_bias, proj_drop, device, dtype and the others: as in `NeighborhoodAttention`.

    Shape:
        `forward(x [B, N, C], size=(time, height, width))` gives `[B, N, C]`.

    Raises:
        ValueError: sizes that do not fit (the volume's in `forward`).

    Source: GNA (arXiv 2504.16922); with `stride = 1` Faster Neighborhood Attention (arXiv 2403.04690).
    """

    axes = 3

    def forward(self, x: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
        return self.attend(x, self.grid_size(x, size))

    def grid_size(self, x: torch.Tensor, size: Sequence[int] | None) -> Sequence[int]:
        if x.dim() != 3:
            raise ValueError(f"x has shape {list(x.shape)}; it needs 3 axes, [batch, tokens, dim].")
        if size is None or len(size) != 3 or math.prod(size) != x.shape[1]:
            raise ValueError(f"size={size} must be (time, height, width) of the {x.shape[1]} tokens of x.")
        return size
