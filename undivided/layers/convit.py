"""ConViT's layer: self-attention by content and by position, which starts as a convolution."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from undivided.layers._vision import Size, VisionAttention, map_size
from undivided.ops import gated_positional_attention
from undivided.ops.positional import axis_weights

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec


class GPSA(VisionAttention):
    """Gated positional self-attention: `A_h = (1 - g_h) softmax(scale * Q_h K_h^T) + g_h softmax(w_h . r)`.

    `out = concat_h(A_h V_h) W_O` with `r_ij = (dx, dy, dx^2 + dy^2)` from token i to token j of the map and
    `g_h = sigmoid(gating_param_h)`. The weights by position are the same for all images. There is no class token, and a
    map of any size is taken: what is learned does not depend on the size. The published layer adds a bias to `w_h . r`;
    softmax takes it off again, so it is left out here.

    With `conv_init` values start as the identity, and the first `k * k` heads, `k = floor(sqrt(num_heads))`, each with
    `w . r = -locality_strength * |(dx, dy) - D_h|^2` up to a constant: a head looks at its own tap D_h of a k x k
    kernel, between taps if k is even. Queries and keys start as in other attention.

    Args:
        dim: width C of a token.
        num_heads: heads H; they divide `dim`.
        qkv_bias, proj_bias: whether the projections have a bias.
        locality_strength: how sharply a head starts at its tap.
        conv_init: whether to start as a convolution; if not, all weights start at random.
        gate_init: first value of `gating_param`; 1 gives positions 73 % of a head.
        proj_drop: dropout of the output.
        attn_drop, qk_norm, scale_norm: refused unless off; timm's blocks pass them.
        norm_layer: not used; timm's blocks pass it.
        backend: of `undivided.ops.gated_positional_attention`.
        device, dtype: of the weights.

    Shape:
        `forward(x [B, N, C], size=(height, width))` gives `[B, N, C]`; without `size` the map is square.

    Raises:
        ValueError: sizes that do not fit, or an option that this layer does not compute.

    Source: ConViT (arXiv 2103.10697), section 3, and the authors' code.
    """

    undecayed = ("gating_param",)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        locality_strength: float = 1.0,
        conv_init: bool = True,
        gate_init: float = 1.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, attn_drop=attn_drop, qk_norm=qk_norm, scale_norm=scale_norm)
        self.locality_strength = locality_strength
        self.conv_init = conv_init
        self.gate_init = gate_init
        self.backend = backend
        side = math.isqrt(num_heads)
        if conv_init and side * side != num_heads:
            warnings.warn(
                f"num_heads={num_heads} is no square: the first {side * side} heads start as a {side} x {side} "
                f"convolution, the other {num_heads - side * side} at random positions.",
                stacklevel=2,
            )
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.pos_proj = nn.Linear(3, num_heads, bias=False, device=device, dtype=dtype)
        self.gating_param = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        for linear in (self.qk, self.v, self.pos_proj, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Sets gates, and with `conv_init` values and positions, to what they start from."""
        nn.init.constant_(self.gating_param, self.gate_init)
        if not self.conv_init:
            return
        nn.init.eye_(self.v.weight)
        side = math.isqrt(self.num_heads)
        taps = torch.arange(side, device=self.v.weight.device) - (side - 1) / 2
        dx, dy = taps.repeat_interleave(side), taps.repeat(side)
        # -|delta - tap|^2 = 2 tap . delta - |delta|^2 - |tap|^2, and the last of these cancels.
        weight = self.locality_strength * torch.stack((2 * dx, 2 * dy, -torch.ones_like(dx)), dim=1)
        self.pos_proj.weight[: side * side] = weight.to(self.pos_proj.weight.dtype)

    def init_weights(self) -> None:
        """The name by which timm's vision transformers ask a layer for its own initialisation, after theirs."""
        self.initialise()

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
        out = gated_positional_attention(
            *self.heads(x), self.pos_proj.weight, self.gates, size, scale=self.scale, backend=self.backend
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns query, key and value of tokens `[B, N, C]`, each `[B, H, N, head_dim]`."""
        query, key = self.qk(x).unflatten(-1, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return query, key, self.v(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    @property
    def gates(self) -> torch.Tensor:
        """The part of each head that attends by position, `[H]`."""
        return torch.sigmoid(self.gating_param)

    def attention_map(self, x: torch.Tensor, size: Size | None = None) -> torch.Tensor:
        """Returns the weights `[B, H, N, N]`, query before key; for figures, the forward pass never makes them."""
        size = map_size(x, size)
        query, key, _ = self.heads(x)
        content = torch.softmax(self.scale * (query @ key.transpose(-2, -1)), dim=-1)
        rows, columns = axis_weights(self.pos_proj.weight, size)
        position = torch.einsum("hyv,hxu->hyxvu", rows, columns).flatten(3).flatten(1, 2)
        position, gates = position.to(content.dtype), self.gates.to(content.dtype)
        return torch.lerp(content, position, gates[:, None, None])

    def nonlocality(self, x: torch.Tensor, size: Size | None = None) -> torch.Tensor:
        """Returns how far each head looks, `D_h = mean_i sum_j A_h,ij |delta_ij|` in tokens, mean of the batch, `[H]`.

        Source: ConViT (arXiv 2103.10697), the measure of its analysis of heads.
        """
        size = map_size(x, size)
        places = torch.cartesian_prod(*(torch.arange(n, device=x.device, dtype=x.dtype) for n in size))
        distance = torch.cdist(places, places)
        return (self.attention_map(x, size) * distance).sum(-1).mean((0, 2))

    @property
    def spec(self) -> AttentionSpec:
        """What this layer computes between its projections, in the language of `undivided.spec`."""
        from undivided.spec.systems import convit

        return convit(self.scale)

    def spec_inputs(self, x: torch.Tensor, size: Size | None = None) -> dict[str, torch.Tensor]:
        """Returns the tensors that `spec` reads, from tokens `[B, N, C]`.

        The logits by position are products of rank 3: what depends on the query alone cancels in
        `w . r_ij = (w_0 - 2 w_2 x_i) x_j + (w_1 - 2 w_2 y_i) y_j + w_2 (x_j^2 + y_j^2) + (...)_i`.
        """
        height, width = map_size(x, size)
        query, key, value = self.heads(x)
        weight = self.pos_proj.weight
        along_x, along_y, squared = weight[:, :, None].unbind(1)
        row, column = (torch.arange(n, device=x.device, dtype=weight.dtype) for n in (height, width))
        row, column = row.repeat_interleave(width), column.repeat(height)
        ones = torch.ones_like(row)
        query_position = torch.stack(
            (along_x - 2 * squared * column, along_y - 2 * squared * row, squared * ones), dim=-1
        )
        key_position = torch.stack((column, row, column**2 + row**2), dim=-1)
        batch_heads = (x.shape[0], self.num_heads, -1, -1)
        return {
            "query": query,
            "key": key,
            "value": value,
            "content_gate": 1 - self.gates,
            "query_position": (query_position / self.scale).expand(batch_heads),
            "key_position": key_position.expand(batch_heads),
            "position_gate": self.gates,
        }
