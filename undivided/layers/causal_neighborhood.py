"""Neighborhood attention along a text: a sliding window with dilation, as a token mixer of language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from undivided.layers._base import additive_or_boolean, check_arguments
from undivided.layers.gqa import GQAttention
from undivided.layers.rotary import PositionEmbeddings
from undivided.ops import dense_attention, neighborhood_attention

if TYPE_CHECKING:
    from undivided.layers._own_cache import WindowCacheLayer
    from undivided.spec import AttentionSpec


class CausalNeighborhoodAttention(GQAttention):
    """Grouped-query attention of a token to itself and the tokens `dilation, 2 dilation, ...` before it.

    `y = concat_h(softmax(scale * q_h k_g(h)^T + mask) v_g(h)) W_O`; query n sees keys `n - m dilation >= 0`,
    `0 <= m < kernel_size`: causal neighborhood attention on one axis, with a stride of 1. Larger strides have no
    decode: the window of a group of queries ends with the last of them, which is not known before it comes.

    Cached: the keys and values of `(kernel_size - 1) * dilation` tokens, however long the text is. A step of decoding
    reads `kernel_size` of them.

    Args:
        kernel_size: tokens that a query sees, itself included.
        dilation: distance between two of them.
        hidden_size, num_attention_heads, num_key_value_heads, head_dim: as in `GQAttention`, with the other options.

    Raises:
        ValueError: `kernel_size` or `dilation` is less than 1.

    Source: GNA (arXiv 2504.16922), section 3; Faster Neighborhood Attention (arXiv 2403.04690).
    """

    mechanism = "neighborhood"

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        kernel_size: int,
        dilation: int = 1,
        query_bias: bool = False,
        key_value_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
        for name, number in (("kernel_size", kernel_size), ("dilation", dilation)):
            if number < 1:
                raise ValueError(f"{name}={number} must be at least 1.")
        super().__init__(
            hidden_size, num_attention_heads, num_key_value_heads, head_dim, query_bias=query_bias,
            key_value_bias=key_value_bias, output_bias=output_bias, scale=scale, softcap=softcap, layer_idx=layer_idx,
        )  # fmt: skip
        self.kernel_size, self.dilation = kernel_size, dilation

    @property
    def reach(self) -> int:
        """Tokens from a query to the first that it sees, both included."""
        return (self.kernel_size - 1) * self.dilation + 1

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
        length = key.shape[2]
        if past_key_values is not None:
            cache = self._cache_layer(past_key_values)
            key, value = past_key_values.update(key, value, self.layer_idx)
            length = cache.cumulative_length
        mask = additive_or_boolean(attention_mask, length)
        # Keys that no query at hand reaches are gone from the cache, but not from the mask.
        mask = None if mask is None else mask[..., length - key.shape[2] :]
        out = self.attend(query, key, value, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        num_queries, num_keys = query.shape[2], key.shape[2]
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap}
        if mask is None and num_queries == 1:
            # The one query sees every `dilation`-th key back from its own.
            first = max(num_keys - self.reach, (num_keys - 1) % self.dilation)
            key, value = (x[:, :, first :: self.dilation] for x in (key, value))
            return cast(torch.Tensor, dense_attention(query, key, value, **options))
        fits = self.kernel_size * self.dilation <= num_keys == num_queries
        if mask is None and fits and self.softcap is None:
            out = neighborhood_attention(
                query, key, value, self.kernel_size, dilation=self.dilation, is_causal=True, scale=self.scale
            )
            return cast(torch.Tensor, out)
        seen = self.seen(num_queries, num_keys, query.device)
        if mask is None:
            mask = seen
        elif mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = mask.masked_fill(~seen, float("-inf"))
        return cast(torch.Tensor, dense_attention(query, key, value, attn_mask=mask, **options))

    def seen(self, num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
        """Returns the boolean `[num_queries, num_keys]`, True where a query sees a key; both end alike."""
        place = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        distance = place - torch.arange(num_keys, device=device)
        return (distance >= 0) & (distance < self.reach) & (distance % self.dilation == 0)

    def _cache_layer(self, past_key_values: Any) -> WindowCacheLayer:
        from undivided.layers._own_cache import WindowCacheLayer, own_cache_layer

        return own_cache_layer(
            past_key_values, self.layer_idx, WindowCacheLayer, lambda: WindowCacheLayer(self.reach, 0)
        )

    @property
    def spec(self) -> AttentionSpec:
        """The operator between the projections; dilation needs a mask of its own."""
        from undivided.spec.carrier import Carrier, Causal, GivenMask, HeadMap, Mask, Window
        from undivided.spec.specification import AttentionSpec
        from undivided.spec.systems import gqa

        near: Mask = Window(self.kernel_size - 1) if self.dilation == 1 else GivenMask("neighborhood")
        heads = HeadMap(self.q_proj.out_features // self.head_dim, self.num_key_value_heads)
        evidence = gqa(scale=self.scale, softcap=self.softcap).evidence
        return AttentionSpec(carrier=Carrier((Causal(), near), heads), evidence=evidence)

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        inputs = super().spec_inputs(hidden_states, position_embeddings)
        if self.dilation > 1:
            tokens = hidden_states.shape[1]
            inputs["neighborhood"] = self.seen(tokens, tokens, hidden_states.device)
        return inputs
