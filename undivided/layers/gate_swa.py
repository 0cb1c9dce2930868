"""Sliding windows with an output gate: what most layers of a model become when Attention Editing shortens its cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from undivided.layers._base import additive_or_boolean, check_arguments
from undivided.layers.gqa import GQAttention
from undivided.layers.rotary import PositionEmbeddings
from undivided.ops import dense_attention

if TYPE_CHECKING:
    from undivided.layers._own_cache import WindowCacheLayer
    from undivided.spec import AttentionSpec

GATES = ("elementwise", "head")


class GateSWAttention(GQAttention):
    """Grouped-query attention in a sliding window, whose output each token weighs.

    `y = (2 sigmoid(x W_G) * concat_h(softmax(scale * q_h k_g(h)^T + mask) v_g(h))) W_O`; query n sees keys m with
    `n - window < m <= n`, and the first `sinks` ones. With `W_G = 0`, as it is made, the gate is 1. It lets a head fall
    silent where what it looks for lies outside of the window.

    Cached: the keys and values of `sinks + window - 1` tokens, however long the text is. With sinks, a prompt with a
    mask (a padded batch, whose texts begin at different columns) keeps those of all.

    Args:
        window: tokens that a query sees, itself included.
        gate: "elementwise" (`W_G [C, H D]`), "head" (`W_G [C, H]`) or None.
        sinks: first tokens of a text that every query sees besides.
        hidden_size, num_attention_heads, num_key_value_heads, head_dim: as in `GQAttention`, with the other options.

    Raises:
        ValueError: `window` is less than 1, `sinks` is negative, or `gate` is unknown.

    Source: Attention Editing (arXiv 2604.05688), abstract: gated hybrid sliding-window attention. The form of the gate
    and its first value are ours.
    """

    mechanism = "gate_swa"

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        window: int,
        gate: str | None = "elementwise",
        sinks: int = 0,
        query_bias: bool = False,
        key_value_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
        if window < 1 or sinks < 0:
            raise ValueError(
                f"window={window} must be at least 1, a query sees itself; sinks={sinks} at least 0."
            )
        if gate is not None and gate not in GATES:
            raise ValueError(f"gate={gate!r} is not one of {', '.join(map(repr, GATES))} or None.")
        super().__init__(
            hidden_size, num_attention_heads, num_key_value_heads, head_dim, query_bias=query_bias,
            key_value_bias=key_value_bias, output_bias=output_bias, scale=scale, softcap=softcap, layer_idx=layer_idx,
        )  # fmt: skip
        self.window, self.gate, self.sinks = window, gate, sinks
        if gate is not None:
            width = num_attention_heads * (head_dim if gate == "elementwise" else 1)
            self.g_proj = nn.Linear(hidden_size, width, bias=False)
            nn.init.zeros_(self.g_proj.weight)

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
        if past_key_values is None:
            length, columns = key.shape[2], torch.arange(key.shape[2], device=key.device)
        else:
            cache = self._cache_layer(past_key_values)
            if cache.cumulative_length == 0:
                cache.keeps_all = self.sinks > 0 and attention_mask is not None
            key, value = past_key_values.update(key, value, self.layer_idx)
            length, columns = cache.cumulative_length, cache.columns(key.shape[2])
        mask = additive_or_boolean(attention_mask, length)
        out = self.gated(self._attend(query, key, value, mask, columns), hidden_states)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def gated(self, heads: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the heads' outputs `[B, H, N, head_dim]`, weighed."""
        if self.gate is None:
            return heads
        weight = 2 * torch.sigmoid(self.g_proj(hidden_states))
        return heads * weight.unflatten(-1, (heads.shape[1], -1)).transpose(1, 2)

    def _cache_layer(self, past_key_values: Any) -> WindowCacheLayer:
        from undivided.layers._own_cache import WindowCacheLayer, own_cache_layer

        return own_cache_layer(
            past_key_values,
            self.layer_idx,
            WindowCacheLayer,
            lambda: WindowCacheLayer(self.window, self.sinks),
        )

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        columns: torch.Tensor,
    ) -> torch.Tensor:
        num_queries, num_keys = query.shape[2], key.shape[2]
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap}
        # Without sinks the keys at hand follow one another, and a window of them is a window of the text.
        if mask is None and self.sinks == 0:
            options |= {"is_causal": True, "window": self.window}
            return cast(torch.Tensor, dense_attention(query, key, value, **options))
        place = columns[num_keys - num_queries :, None]
        near = columns > place - self.window
        if mask is None:
            seen = (columns <= place) & (near | (columns < self.sinks))
            return cast(
                torch.Tensor, dense_attention(query, key, value, attn_mask=seen[None, None], **options)
            )
        is_bias = mask.dtype != torch.bool
        mask = mask[..., columns]
        # Masks of transformers have the lowest finite number where nothing is seen.
        seen = mask > torch.finfo(mask.dtype).min / 2 if is_bias else mask
        # The first tokens of a text are those that its last one sees first: padding stands before them. Where keys
        # have been dropped there is none, and the sinks come first too.
        first = seen[..., -1:, :].cumsum(-1) <= self.sinks
        seen = seen & (near | first)
        mask = mask.masked_fill(~seen, float("-inf")) if is_bias else seen
        return cast(torch.Tensor, dense_attention(query, key, value, attn_mask=mask, **options))

    @property
    def spec(self) -> AttentionSpec:
        """As of a window; a gate and sinks are not written in the language."""
        from undivided.spec.carrier import Carrier, Causal, HeadMap, Window
        from undivided.spec.specification import AttentionSpec
        from undivided.spec.systems import gqa

        if self.gate is not None or self.sinks:
            raise NotImplementedError(
                f'mechanism "{self.mechanism}" with a gate or sinks is not written in the specification language.'
            )
        heads = HeadMap(self.q_proj.out_features // self.head_dim, self.num_key_value_heads)
        evidence = gqa(scale=self.scale, softcap=self.softcap).evidence
        return AttentionSpec(carrier=Carrier((Causal(), Window(self.window - 1)), heads), evidence=evidence)
