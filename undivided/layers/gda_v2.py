"""Grouped differential attention of the second version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from undivided.layers._base import (
    CausalAttention,
    additive_or_boolean,
    check_arguments,
    filled_keys,
    grouped_query_dimensions,
)
from undivided.layers.gda import differential_heads, split_heads
from undivided.layers.rotary import PositionEmbeddings, apply_rotary, rotary_tables
from undivided.ops import differential_attention

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec


class GDAttentionV2(CausalAttention):
    """Differential attention whose two maps read the same keys and values, with a factor of each token and head.

    `O_h = softmax(scale * q_h k^T) v - sigmoid(x w_h) * softmax(scale * q'_j k^T) v`, `j = h // g`,
    `y = concat_h(O_h) W_O`. Against the first version there are no noise keys, values are as wide as keys, outputs are
    not normalised, and the factor of the noise map, between 0 and 1, is projected from the token. With as many noise
    as signal heads this is Differential Transformer V2; with fewer, each noise head serves g signal heads.

    Heads are striped in the weights: queries as `[noise heads, (g signal, 1 noise)]`, so that the two heads of a
    difference belong to one group of a key head. Cached a token: `2 * G * head_dim` numbers, as in grouped-query
    attention.

    Args:
        hidden_size: width C of the model.
        num_attention_heads: signal and noise query heads together.
        num_key_value_heads: key and value heads G, a divisor of `num_noise_heads`.
        head_dim: width of a head.
        num_noise_heads: noise heads. Default: half of the heads.
        num_signal_heads: signal heads g * num_noise_heads. Default: the heads that are not noise heads; given, it
            stands in place of `num_attention_heads`.
        query_bias, key_value_bias, output_bias: whether the projections have a bias.
        scale: factor of the logits; default `head_dim ** -0.5`.
        softcap: bound of the logits; default none.
        layer_idx: index of the layer, which names its place in a cache.

    Raises:
        ValueError: head counts that do not divide each other.

    Source: Differential Transformer V2 (Ye, Dong, Sun and Wei, 2026; microsoft/unilm, Diff-Transformer-V2); several
    signal heads a noise head: Grouped Differential Attention (arXiv 2510.06949).
    """

    mechanism = "gda_v2"

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        num_noise_heads: int | None = None,
        num_signal_heads: int | None = None,
        query_bias: bool = False,
        key_value_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        signal, noise = differential_heads(num_attention_heads, num_signal_heads, num_noise_heads)
        check_groups(noise, num_key_value_heads)
        self.num_signal_heads = signal
        self.num_noise_heads = noise
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.softcap = softcap
        self.layer_idx = layer_idx
        key_width = num_key_value_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, (signal + noise) * head_dim, bias=query_bias)
        self.k_proj = nn.Linear(hidden_size, key_width, bias=key_value_bias)
        self.v_proj = nn.Linear(hidden_size, key_width, bias=key_value_bias)
        self.lambda_proj = nn.Linear(hidden_size, signal, bias=False)
        self.o_proj = nn.Linear(signal * head_dim, hidden_size, bias=output_bias)

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
        check_arguments("gda_v2", **kwargs)
        query, noise_query, key, value = self.heads(hidden_states, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
            key, value = filled_keys(attention_mask, past_key_values, self.layer_idx, key, value)
        mask = additive_or_boolean(attention_mask, key.shape[2])
        out = differential_attention(
            query, noise_query, key, key, value, token_factor(self.lambda_proj, hidden_states),
            attn_mask=mask, is_causal=mask is None, scale=self.scale, softcap=self.softcap,
        )  # fmt: skip
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def heads(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns signal queries, noise queries and keys, rotated, and values: `[B, heads, N, head_dim]` each."""
        cos, sin = rotary_tables(position_embeddings)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (apply_rotary(x, cos, sin, interleaved=False) for x in (query, key))
        return *split_heads(query, self.num_noise_heads), key, value

    @property
    def spec(self) -> AttentionSpec:
        from undivided.spec.systems import gda_v2

        return gda_v2(self.scale, self.softcap)

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        query, noise_query, key, value = self.heads(hidden_states, position_embeddings)
        return {
            "query": query, "query_noise": noise_query, "key": key, "value": value,
            "lambda": token_factor(self.lambda_proj, hidden_states),
        }  # fmt: skip


def token_factor(projection: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
    """Returns the factor of the noise maps for each token and signal head, `[B, heads, N]`, in float32 at least."""
    logits = projection(hidden_states).transpose(1, 2)
    return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def check_groups(noise: int, key_value: int) -> None:
    """Raises a ValueError unless all heads of a difference read one key head."""
    if key_value < 1 or noise % key_value:
        raise ValueError(
            f"num_key_value_heads={key_value} does not divide num_noise_heads={noise}: a noise head and the signal "
            "heads that it serves read the same keys."
        )
