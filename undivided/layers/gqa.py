"""Grouped-query attention: what the base models have, and the neutral element among the mechanisms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from undivided.layers._base import (
    CausalAttention,
    additive_or_boolean,
    check_arguments,
    filled_keys,
    grouped_query_dimensions,
)
from undivided.layers.rotary import PositionEmbeddings, apply_rotary, rotary_tables
from undivided.ops import dense_attention

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec


class GQAttention(CausalAttention):
    """Grouped-query attention: `num_attention_heads` query heads share `num_key_value_heads` keys and values.

    `y = concat_h(softmax(scale * q_h k_g(h)^T) v_g(h)) W_O`, `g(h) = h // (H // G)`, rotary positions on q and k.
    Cached a token: `2 * G * head_dim` numbers.

    Args:
        hidden_size: width C of the model.
        num_attention_heads: query heads H.
        num_key_value_heads: key and value heads G, a divisor of H.
        head_dim: width of a head.
        query_bias, key_value_bias, output_bias: whether the projections have a bias.
        scale: factor of the logits; default `head_dim ** -0.5`.
        softcap: bound of the logits; default none.
        layer_idx: index of the layer, which names its place in a cache.

    Raises:
        ValueError: `num_key_value_heads` does not divide `num_attention_heads`.

    Source: GQA (arXiv 2305.13245), section 2.
    """

    mechanism = "gqa"

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        query_bias: bool = False,
        key_value_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={num_key_value_heads} does not divide num_attention_heads={num_attention_heads}."
            )
        self.head_dim = head_dim
        self.num_key_value_heads = num_key_value_heads
        self.scale = head_dim**-0.5 if scale is None else scale
        self.softcap = softcap
        self.layer_idx = layer_idx
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=query_bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=key_value_bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=key_value_bias)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=output_bias)

    @classmethod
    def native_dimensions(cls, config: Any) -> dict[str, Any]:
        return grouped_query_dimensions(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: PositionEmbeddings | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        check_arguments(self.mechanism, **kwargs)
        query, key, value = self.heads(hidden_states, position_embeddings)
        if past_key_values is not None:
            key, value = self.cached(key, value, past_key_values, attention_mask)
        out = self.attend(query, key, value, additive_or_boolean(attention_mask, key.shape[2]))
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def cached(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        past_key_values: Any,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """Returns keys and values behind those that a cache has, which keeps them."""
        key, value = past_key_values.update(key, value, self.layer_idx)
        return filled_keys(attention_mask, past_key_values, self.layer_idx, key, value)

    def heads(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns query, key and value `[B, heads, N, head_dim]`, with rotary positions."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = rotary_tables(position_embeddings)
        query, key = (apply_rotary(x, cos, sin, interleaved=False) for x in (query, key))
        return query, key, value

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the outputs of the heads, `[B, H, N, head_dim]`; causal where there is no mask."""
        return cast(
            torch.Tensor,
            dense_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scale,
                softcap=self.softcap,
            ),
        )

    @property
    def spec(self) -> AttentionSpec:
        from undivided.spec.systems import gqa

        return gqa(self.num_key_value_heads, self.scale, self.softcap)

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        query, key, value = self.heads(hidden_states, position_embeddings)
        return {"query": query, "key": key, "value": value}
