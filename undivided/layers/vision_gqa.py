"""Grouped-query attention of image tokens, in the place of timm's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from undivided.layers._vision import ConfiguredAsClass
from undivided.layers.head_maps import uniform_head_map
from undivided.ops import dense_attention
from undivided.ops.dense.head_maps import heads_by_map

if TYPE_CHECKING:
    from undivided.layers.rotary import PositionEmbeddings
    from undivided.spec import AttentionSpec


class VisionGQA(ConfiguredAsClass):
    """Grouped-query attention of image tokens: `y = concat_h(softmax(scale * q_h k_g(h)^T) v_g(h)) W_O`.

    It takes the place of `timm.layers.Attention`: the same first arguments, no mask, no positions. Heads are read by
    the uniform map `g(h) = h // (H // G)`; subclasses choose another.

    Args:
        dim: width C of a token.
        num_heads: query heads H.
        num_key_value_heads: key and value heads G; default `num_heads // 2`.
        qkv_bias, proj_bias: whether the projections have a bias.
        qk_norm: normalise each head of queries and keys with `norm_layer`.
        attn_head_dim: width D of a head; default `dim // num_heads`.
        proj_drop: dropout of the output.
        norm_layer: constructor of the normalisation, `norm_layer(head_dim)`; default LayerNorm.
        attn_drop, scale_norm: refused unless off; timm's blocks pass them.
        device, dtype: of the weights.

    Shape:
        `forward(x [B, N, C], size=None)` gives `[B, N, C]`; `size = (height, width)` of the tokens is not needed.

    Raises:
        ValueError: head counts or widths that do not fit, or an option that this layer does not compute.

    Source: GQA (arXiv 2305.13245), section 2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_key_value_heads: int | None = None,
        *,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_head_dim: int | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = max(num_heads // 2, 1) if num_key_value_heads is None else num_key_value_heads
        if not 1 <= groups <= num_heads:
            raise ValueError(
                f"num_key_value_heads={groups} must be from 1 to num_heads={num_heads}: key heads serve query heads."
            )
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}; give attn_head_dim.")
        if attn_drop:
            raise ValueError(f"attn_drop={attn_drop} is not supported by the layers here; set it to 0.0.")
        if scale_norm:
            raise ValueError(
                "scale_norm=True (a norm of the heads' outputs) is not computed here; leave it off."
            )
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.num_key_value_heads = groups
        self.head_dim = dim // num_heads if attn_head_dim is None else attn_head_dim
        self.scale = self.head_dim**-0.5
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias, **options)
        self.k_proj = nn.Linear(dim, groups * self.head_dim, bias=qkv_bias, **options)
        self.v_proj = nn.Linear(dim, groups * self.head_dim, bias=qkv_bias, **options)
        norm_layer = nn.LayerNorm if norm_layer is None else norm_layer
        self.q_norm, self.k_norm = (
            norm_layer(self.head_dim, **options) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.proj = nn.Linear(num_heads * self.head_dim, dim, bias=proj_bias, **options)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: torch.Tensor,
        size: tuple[int, int] | None = None,
        *,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        if is_causal:
            raise ValueError(f"is_causal=True: {type(self).__name__} reads all tokens of an image.")
        out = self.attend(*self.heads(x), attn_mask)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns query `[B, H, N, D]`, key and value `[B, G, N, D]`."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.q_norm(query), self.k_norm(key), value

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the outputs of the heads, `[B, H, N, D]`."""
        head_map = self.choose_head_map(key)
        return cast(
            torch.Tensor,
            dense_attention(query, key, value, key_head_map=head_map, attn_mask=mask, scale=self.scale),
        )

    def choose_head_map(self, key: torch.Tensor) -> torch.Tensor | None:
        """Returns the head map `[H]` or `[B, H]` for these keys; None is the uniform one."""
        if self.num_heads % self.num_key_value_heads:
            return uniform_head_map(self.num_heads, self.num_key_value_heads).to(key.device)
        return None

    @property
    def spec(self) -> AttentionSpec:
        """The operator between the projections, as a specification."""
        from undivided.spec.systems import kdgqa

        return kdgqa()

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns the tensors that `spec` reads.

        Where images have head maps of their own, keys and values come with the heads that the maps name, and the
        specification's map is the identity.
        """
        query, key, value = self.heads(hidden_states)
        head_map = self.choose_head_map(key)
        if head_map is None:
            head_map = uniform_head_map(self.num_heads, self.num_key_value_heads).to(key.device)
        if head_map.dim() == 2:
            key, value = (heads_by_map(heads, head_map) for heads in (key, value))
            head_map = torch.arange(self.num_heads, device=key.device)
        return {"query": query, "key": key, "value": value, "head_map": head_map}
