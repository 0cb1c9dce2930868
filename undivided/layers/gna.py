"""Neighborhood attention of image tokens, with stride and dilation, in the place of timm's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from undivided.layers._vision import Size, VisionAttention, as_pair, map_size
from undivided.ops.neighborhood import Neighborhood, neighborhood_attention

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec


class NeighborhoodAttention(VisionAttention):
    """Attention of a token to the window about it: `out_i = sum_{j in N(i)} softmax_j(scale * q_i . k_j) v_j`.

    Windows are shifted inwards at the borders of the map, so that every token sees `kernel_size` tokens on both axes.
    With `stride` above 1 tiles of tokens share a window; `stride = kernel_size` is window attention without shifts, and
    `dilation` spreads a window over the map. Which strides save time on a GPU, `undivided.cost.gna` says. There is no
    positional bias. The weights have the names and the layout of NATTEN's `NeighborhoodAttention2D`.

    Args:
        dim: width C of a token.
        num_heads: heads H; they divide `dim`.
        kernel_size: `(height, width)` of a window, or one number for both; not larger than the map.
        stride: tokens that share a window.
        dilation: distance between two tokens of a window; times `kernel_size` not larger than the map.
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

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kernel_size: int | Size = 7,
        *,
        stride: int | Size = 1,
        dilation: int | Size = 1,
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
        self.kernel_size = as_pair("kernel_size", kernel_size)
        self.stride = as_pair("stride", stride)
        self.dilation = as_pair("dilation", dilation)
        # The smallest map on which this window is defined has the last word on the stride.
        smallest = [kernel * step for kernel, step in zip(self.kernel_size, self.dilation, strict=True)]
        Neighborhood.of(smallest, self.kernel_size, self.stride, self.dilation)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: torch.Tensor,
        size: Size | None = None,
        *,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        self.refuse_mask(attn_mask, is_causal)
        size = map_size(x, size)
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
                scale=self.scale,
            ),
        )
        return self.proj_drop(self.proj(out.flatten(2, 3).transpose(1, 2).flatten(2)))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns query, key and value of tokens `[B, N, C]`, each `[B, H, N, head_dim]`."""
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        return parts.permute(2, 0, 3, 1, 4).unbind(0)

    @property
    def spec(self) -> AttentionSpec:
        """The operator between the projections, as a specification."""
        from undivided.spec.systems import neighborhood

        return neighborhood()

    def spec_inputs(self, hidden_states: torch.Tensor, size: Size | None = None) -> dict[str, torch.Tensor]:
        """Returns the tensors that `spec` reads; `neighborhood` is the mask of the whole map."""
        size = map_size(hidden_states, size)
        query, key, value = self.heads(hidden_states)
        mask = Neighborhood.of(size, self.kernel_size, self.stride, self.dilation).mask(query.device)
        return {"query": query, "key": key, "value": value, "neighborhood": mask}
