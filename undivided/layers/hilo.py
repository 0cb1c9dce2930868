"""HiLo attention: some heads see the detail of a small window, the others the whole map through pooled keys."""

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
from undivided.ops import dense_attention, grouped_attention
from undivided.ops.grouped import Windows


class HiLoAttention(VisionAttention):
    """Attention whose high-frequency heads see windows and whose low-frequency heads see averages of windows.

    `y = concat(Hi(x), Lo(x))` along the channels. With the windows w of `window_size`:
    `Hi_t = W_h concat_h(sum_(u in w(t)) softmax_u(scale * q_t . k_u) v_u)` and
    `Lo_t = W_l concat_h(sum_w softmax_w(scale * q_t . k_w) v_w)`, where k_w and v_w are projected from the mean of the
    tokens of w. There are no positions and no projection after the concatenation: what follows must mix the two parts.

    A map that windows do not divide is padded with zeros below and on the right; padded tokens are attended to and
    averaged, as in the authors' detection code, and cut off afterwards.

    Args:
        dim: width C of a token.
        num_heads: heads H; they divide `dim`.
        window_size: `(height, width)` of a window, or one number for both; with 1 all heads are low-frequency ones and
            nothing is pooled: plain multi-head attention.
        alpha: share of low-frequency heads, 0 to 1: `int(num_heads * alpha)` of them, a product of floating point that
            is rounded down (`int(100 * 0.29)` is 28). LITv2 has 0.9.
        lofi_heads: number of low-frequency heads, in place of `alpha`.
        qkv_bias: whether queries, keys and values have a bias.
        proj_bias: whether both output projections have one.
        pad: whether maps are padded; without it, a map that windows do not divide is an error.
        proj_drop: dropout of the output.
        attn_drop, qk_norm, scale_norm: refused unless off; timm's blocks pass them.
        norm_layer: not used; timm's blocks pass it.
        device, dtype: of the weights.

    Shape:
        `forward(x [B, N, C], size=(height, width))` gives `[B, N, C]`; without `size` the map is square.

    Raises:
        ValueError: sizes that do not fit, or an option that this layer does not compute.

    Source: Fast Vision Transformers with HiLo Attention (arXiv 2205.13213), section 4, and the authors' code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int | Size = 2,
        *,
        alpha: float = 0.5,
        lofi_heads: int | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        pad: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, attn_drop=attn_drop, qk_norm=qk_norm, scale_norm=scale_norm)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be from 0 (windows alone) to 1 (pooled keys alone).")
        if lofi_heads is not None and not 0 <= lofi_heads <= num_heads:
            raise ValueError(f"lofi_heads={lofi_heads} must be from 0 to num_heads={num_heads}.")
        self.window_size = as_pair("window_size", window_size)
        self.pools = self.window_size != (1, 1)
        if not self.pools:
            lofi_heads = num_heads
        elif lofi_heads is None:
            lofi_heads = int(num_heads * alpha)
        self.lofi_heads, self.hifi_heads = lofi_heads, num_heads - lofi_heads
        self.pad = pad
        low, high = self.lofi_heads * self.head_dim, self.hifi_heads * self.head_dim
        if low:
            self.lofi_q = nn.Linear(dim, low, bias=qkv_bias, device=device, dtype=dtype)
            self.lofi_kv = nn.Linear(dim, 2 * low, bias=qkv_bias, device=device, dtype=dtype)
            self.lofi_proj = nn.Linear(low, low, bias=proj_bias, device=device, dtype=dtype)
        if high:
            self.hifi_qkv = nn.Linear(dim, 3 * high, bias=qkv_bias, device=device, dtype=dtype)
            self.hifi_proj = nn.Linear(high, high, bias=proj_bias, device=device, dtype=dtype)
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
        x, padded = pad_map(x, size, self.window_size) if self.pad else (x, size)
        windows = Windows(padded, self.window_size)
        parts = [self.high(x, windows)] if self.hifi_heads else []
        if self.lofi_heads:
            parts.append(self.low(x, padded))
        return self.proj_drop(crop_map(torch.cat(parts, dim=-1), padded, size))

    def high(self, x: torch.Tensor, windows: Windows) -> torch.Tensor:
        """Returns the part of the high-frequency heads, `[B, N, hifi_heads * head_dim]`."""
        query, key, value = self._heads(self.hifi_qkv(x), 3)
        return self.hifi_proj(self.attend(query, key, value, windows).transpose(1, 2).flatten(2))

    def low(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        """Returns the part of the low-frequency heads, `[B, N, lofi_heads * head_dim]`."""
        (query,) = self._heads(self.lofi_q(x), 1)
        # Tokens as a map are in channels-last order, which pooling keeps: nothing is copied on either side of it.
        pooled = to_tokens(F.avg_pool2d(to_map(x, size), self.window_size))[0] if self.pools else x
        key, value = self._heads(self.lofi_kv(pooled), 2)
        return self.lofi_proj(self.attend(query, key, value).transpose(1, 2).flatten(2))

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, windows: Windows | None = None
    ) -> torch.Tensor:
        """Returns the attention of heads `[B, heads, tokens, head_dim]`: inside windows, or to all keys."""
        if windows is None:
            return dense_attention(query, key, value, scale=self.scale)
        return grouped_attention(query, key, value, windows, scale=self.scale)

    def _heads(self, x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        """Splits `[B, N, count * heads * head_dim]` into `count` tensors `[B, heads, N, head_dim]`."""
        return x.unflatten(-1, (count, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
