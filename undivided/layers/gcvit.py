"""GC ViT's layers: window attention, with the window's own queries or with queries made from the whole map."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from undivided.layers._vision import (
    Size,
    VisionAttention,
    as_pair,
    crop_map,
    map_size,
    pad_map,
    to_map,
    to_tokens,
)
from undivided.layers.relative_position import RelativePositionBias
from undivided.ops import grouped_attention
from undivided.ops.grouped import Windows


class WindowAttention(VisionAttention):
    """Attention inside windows: `out_t = sum_u softmax_u(scale * q_t . k_u + bias_(t - u)) v_u`, t and u in one window.

    A map that windows do not divide is padded with zeros below and on the right; padded tokens are attended to (their
    keys and values are the biases of the projections), as in the authors' detection code, and cut off afterwards.

    Args:
        dim: width C of a token.
        num_heads: heads H; they divide `dim`.
        window_size: `(height, width)` of a window, or one number for both.
        qkv_bias, proj_bias: whether the projections have a bias.
        proj_drop: dropout of the output.
        attn_drop, qk_norm, scale_norm: refused unless off; timm's blocks pass them.
        norm_layer: not used; timm's blocks pass it.
        device, dtype: of the weights.

    Shape:
        `forward(x [B, N, C], size=(height, width))` gives `[B, N, C]`; without `size` the map is square.

    Raises:
        ValueError: sizes that do not fit, or an option that this layer does not compute.

    Source: GC ViT (arXiv 2206.09959) and the authors' code; Swin Transformer (arXiv 2103.14030), section 3.2.
    """

    # Queries that the layer makes of its own tokens, beside keys and values.
    own_queries = 1

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int | Size = 7,
        *,
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
        self.window_size = as_pair("window_size", window_size)
        self.position_bias = RelativePositionBias(num_heads, self.window_size, device=device, dtype=dtype)
        self.qkv = nn.Linear(dim, (2 + self.own_queries) * dim, bias=qkv_bias, device=device, dtype=dtype)
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
        return self._attend(x, size, None)

    def _attend(self, x: torch.Tensor, size: Size | None, global_query: torch.Tensor | None) -> torch.Tensor:
        size = map_size(x, size)
        x, padded = pad_map(x, size, self.window_size)
        *own, key, value = self.heads(x)
        # Under autocast global queries, sums on a map, are wider than what is projected.
        query = own[0] if global_query is None else global_query.to(key.dtype)
        out = grouped_attention(
            query, key, value, Windows(padded, self.window_size), shared_query=global_query is not None,
            bias=self.position_bias(), scale=self.scale,
        )  # fmt: skip
        out = crop_map(out.transpose(1, 2).flatten(2), padded, size)
        return self.proj_drop(self.proj(out))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns what the layer projects from tokens `[B, N, C]`, each `[B, H, N, head_dim]`."""
        parts = self.qkv(x).unflatten(-1, (2 + self.own_queries, self.num_heads, self.head_dim))
        return parts.permute(2, 0, 3, 1, 4).unbind(0)


class GlobalWindowAttention(WindowAttention):
    """Window attention whose queries come from the whole map and are the same in all windows of an image.

    `out_wt = sum_u softmax_u(scale * q_t . k_wu + bias_(t - u)) v_wu` for window w: output token t of each window is
    that of query t of `GlobalQueryGenerator`. `qkv` projects keys and values alone.

    Args and errors: as in `WindowAttention`.

    Shape:
        `forward(x [B, N, C], size, global_query [B, n, C])` gives `[B, N, C]`, n tokens a window.

    Raises:
        ValueError: as in `WindowAttention`, or queries of another batch, window or width.

    Source: GC ViT (arXiv 2206.09959) and the authors' code.
    """

    own_queries = 0

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, size: Size | None, global_query: torch.Tensor
    ) -> torch.Tensor:
        needed = [x.shape[0], self.window_size[0] * self.window_size[1], self.dim]
        if list(global_query.shape) != needed:
            raise ValueError(
                f"global_query has shape {list(global_query.shape)}; it must be [batch, window tokens, dim] = {needed}."
            )
        query = global_query.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        return self._attend(x, size, query)


class FusedMBConv(nn.Module):
    """`x + Conv1x1(SE(GELU(DWConv3x3(x))))` on maps `[B, C, H, W]`, without norms and biases.

    `SE(y) = y * sigmoid(W_2 GELU(W_1 mean(y)))` with `W_1` from C to C // 4 channels.

    Args:
        dim: channels C.
        device, dtype: of the weights.

    Source: GC ViT (arXiv 2206.09959) and the authors' code.
    """

    def __init__(
        self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, device=device, dtype=dtype)
        self.squeeze = nn.Linear(dim, dim // 4, bias=False, device=device, dtype=dtype)
        self.excite = nn.Linear(dim // 4, dim, bias=False, device=device, dtype=dtype)
        self.conv_pw = nn.Conv2d(dim, dim, 1, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.conv_dw(x))
        gate = torch.sigmoid(self.excite(F.gelu(self.squeeze(y.mean((2, 3))))))
        return x + self.conv_pw(y * gate[:, :, None, None])


class GlobalQueryGenerator(nn.Module):
    """Makes one window of queries from the whole map: `FusedMBConv` and 3x3 max-pooling of stride 2, repeated.

    Queries have neither a norm nor a projection nor positions. If the result is not as large as a window, it is resized
    by bicubic interpolation, as in the authors' detection code.

    Args:
        dim: channels C.
        window_size: `(height, width)` of a window, or one number for both.
        num_poolings: how often it halves the map; with 0 there is one `FusedMBConv` without pooling.
        device, dtype: of the weights.

    Shape:
        `forward(x [B, N, C], size)` gives `[B, n, C]`, n tokens of a window in row-major order.

    Source: GC ViT (arXiv 2206.09959) and the authors' code.
    """

    def __init__(
        self,
        dim: int,
        window_size: int | Size,
        num_poolings: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_poolings < 0:
            raise ValueError(f"num_poolings={num_poolings} must be 0 or more.")
        self.window_size = as_pair("window_size", window_size)
        self.num_poolings = num_poolings
        self.blocks = nn.ModuleList(
            FusedMBConv(dim, device=device, dtype=dtype) for _ in range(max(num_poolings, 1))
        )

    def forward(self, x: torch.Tensor, size: Size | None = None) -> torch.Tensor:
        x = to_map(x, map_size(x, size))
        for block in self.blocks:
            x = block(x)
            if self.num_poolings:
                x = F.max_pool2d(x, 3, stride=2, padding=1)
        if tuple(x.shape[2:]) != self.window_size:
            x = F.interpolate(x, size=self.window_size, mode="bicubic")
        return to_tokens(x)[0]


def poolings_between(size: Size, window_size: Size) -> int:
    """Returns how often a map is halved until it is a window: `floor(log2(min(size) / min(window_size)))`, or 0."""
    return max((min(size) // min(window_size)).bit_length() - 1, 0)
