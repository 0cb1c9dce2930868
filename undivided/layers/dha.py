"""Decoupled-head attention: key heads and value heads are shared by different groups of query heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from undivided.layers.gqa import GQAttention
from undivided.ops import dense_attention

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec


# Of one layer: for "k_proj" and for "v_proj" which query heads share a head, `[groups, size]`.
Groups = dict[str, torch.Tensor]


class DecoupledHeadAttention(GQAttention):
    """Decoupled-head attention: `y = concat_h(softmax(scale * q_h k_mk(h)^T) v_mv(h)) W_O`, two maps m of heads.

    Key and value heads are as many as their maps name, `G_k` and `G_v`, which may differ from each other and from
    layer to layer. Identity maps are multi-head attention, and `m(h) = h // (H / G)` for both is grouped-query
    attention. Rotary positions on q and k. Cached a token: `(G_k + G_v) head_dim` numbers.

    Args:
        hidden_size: width C of the model.
        num_attention_heads: query heads H.
        key_head_map: key head of each query head, H numbers from 0 to `G_k - 1`, every one used.
        value_head_map: value head of each query head, from 0 to `G_v - 1`, every one used.
        head_dim: width of a head; default C / H.
        query_bias, key_value_bias, output_bias, scale, softcap, layer_idx: as in `GQAttention`.

    Raises:
        ValueError: a map has another length than H, or leaves out a head below its largest.

    Source: DHA (arXiv 2406.06567), section 3.
    """

    mechanism = "dha"
    key_head_map: torch.Tensor
    value_head_map: torch.Tensor

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        key_head_map: Sequence[int],
        value_head_map: Sequence[int],
        head_dim: int | None = None,
        *,
        query_bias: bool = False,
        key_value_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
        head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        super().__init__(
            hidden_size, num_attention_heads, num_attention_heads, head_dim, query_bias=query_bias,
            key_value_bias=key_value_bias, output_bias=output_bias, scale=scale, softcap=softcap, layer_idx=layer_idx,
        )  # fmt: skip
        for name, head_map in (("key_head_map", key_head_map), ("value_head_map", value_head_map)):
            _check_map(name, head_map, num_attention_heads)
            self.register_buffer(name, torch.tensor(list(head_map), device=self.q_proj.weight.device))
        for name, head_map in (("k_proj", key_head_map), ("v_proj", value_head_map)):
            width = (max(head_map) + 1) * head_dim
            setattr(self, name, nn.Linear(hidden_size, width, bias=key_value_bias))

    @classmethod
    def native_dimensions(cls, config: Any) -> dict[str, Any]:
        sizes = super().native_dimensions(config)
        del sizes["num_key_value_heads"]
        return sizes

    def cached(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        past_key_values: Any,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        # A static cache has one number of heads for both, so the heads of a token are one row.
        rows = [x.transpose(1, 2).flatten(2)[:, None] for x in (key, value)]
        found = super().cached(rows[0], rows[1], past_key_values, attention_mask)
        return tuple(x[:, 0].unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in found)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return cast(
            torch.Tensor,
            dense_attention(
                query, key, value, key_head_map=self.key_head_map, value_head_map=self.value_head_map, attn_mask=mask,
                is_causal=mask is None, scale=self.scale, softcap=self.softcap,
            ),
        )  # fmt: skip

    @property
    def spec(self) -> AttentionSpec:
        from undivided.spec.systems import gqa

        return gqa(len(self.key_head_map), self.scale, self.softcap)

    def spec_inputs(self, hidden_states: torch.Tensor, position_embeddings: Any) -> dict[str, torch.Tensor]:
        query, key, value = self.heads(hidden_states, position_embeddings)
        # The language has one map of heads, for keys and values alike.
        return {"query": query, "key": key[:, self.key_head_map], "value": value[:, self.value_head_map]}


def _check_map(name: str, head_map: Sequence[int], num_heads: int) -> None:
    if len(head_map) != num_heads:
        raise ValueError(f"{name} has {len(head_map)} entries; it needs one a query head, {num_heads}.")
    missing = sorted(set(range(max(head_map) + 1)) - set(head_map))
    if min(head_map) < 0 or missing:
        raise ValueError(
            f"{name}={list(head_map)} must use every head from 0 to its largest; {missing} are not."
        )
