"""Sparse query attention: the general attention of head counts, of which MHA, GQA and MQA are cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from undivided.cost.head_counts import sparse_head_counts
from undivided.layers.gqa import GQAttention
from undivided.layers.rotary import PositionEmbeddings, to_interleaved
from undivided.ops import dense_attention

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec


class SQAttention(GQAttention):
    """Sparse query attention: fewer query heads than `hidden_size / head_dim`, and so fewer operations.

    `y = concat_h(softmax(scale * q_h k_g(h)^T) v_g(h)) W_O`, `h < H_q`, `g(h) = h // (H_q // G)`, rotary positions on q
    and k. The width D of a head is that of the base model, C / H, and is not recomputed from H_q: `W_Q [C, H_q D]`,
    `W_K, W_V [C, G D]`, `W_O [H_q D, C]`, `2 C D (H_q + G)` weights. Scores and values take `4 N^2 H_q D` operations,
    `H / H_q` times fewer than multi-head attention.

    Cached a token: `2 G D` numbers, keys and values `[B, G, M, D]`. A step of decoding reads the cache and is no
    faster than grouped-query attention with the same G; "ssqa" caches more than most grouped-query models.

    Args:
        hidden_size: width C of the model.
        num_attention_heads: heads H of the base model, which define the width of a head.
        num_key_value_heads: key and value heads G. Default: the preset's, or H_q. (In a config the base model's.)
        head_dim: width D of a head; default C / H.
        num_query_heads: query heads H_q, at most H. Default: the preset's, or H.
        preset: "sqa" (H_q, G = H/2, H/4), "ssqa" (H/2, H/2), "xsqa" (H/4, H/4), "xsmqa" (H/4, 1) or "lsqa" (3H/4,
            H/4).
        reverse: H_q < G: each query head is compared with G / H_q key heads, and there are G outputs: `W_O [G D, C]`.
            What it costs follows G.
        window: tokens a query sees, itself included; default all before it. The cache keeps all tokens.
        query_bias, key_value_bias, output_bias: whether the projections have a bias. The authors' code has one in the
            output projection alone.
        scale: factor of the logits; default `head_dim ** -0.5`.
        softcap: bound of the logits; default none.
        layer_idx: index of the layer, which names its place in a cache.

    Raises:
        ValueError: H does not divide C and no `head_dim` is given; head counts exceed H, do not divide each other, or
            contradict the preset; `window` is less than 1.

    Source: SQA (arXiv 2510.01817).
    """

    mechanism = "sqa"

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        *,
        num_query_heads: int | None = None,
        preset: str | None = None,
        reverse: bool = False,
        window: int | None = None,
        query_bias: bool = False,
        key_value_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
        if head_dim is None:
            if hidden_size % num_attention_heads:
                raise ValueError(
                    f"num_attention_heads={num_attention_heads} does not divide hidden_size={hidden_size}; give "
                    "head_dim, or a number of heads that does."
                )
            head_dim = hidden_size // num_attention_heads
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1: a query sees itself.")
        query_heads, key_heads = sparse_head_counts(
            num_attention_heads, num_query_heads, num_key_value_heads, preset, reverse
        )
        super().__init__(
            hidden_size,
            max(query_heads, key_heads),
            key_heads,
            head_dim,
            query_bias=query_bias,
            key_value_bias=key_value_bias,
            output_bias=output_bias,
            scale=scale,
            softcap=softcap,
            layer_idx=layer_idx,
        )
        if reverse:
            self.q_proj = torch.nn.Linear(hidden_size, query_heads * head_dim, bias=query_bias)
        self.num_query_heads = query_heads
        self.window = window

    @classmethod
    def native_dimensions(cls, config: Any) -> dict[str, Any]:
        sizes = super().native_dimensions(config)
        # A preset decides it; without one `from_config` takes the base model's.
        del sizes["num_key_value_heads"]
        return sizes

    @classmethod
    def from_config(cls, config: Any, layer_idx: int, **options: Any) -> Self:
        if options.get("preset") is None:
            options = {"num_key_value_heads": config.num_key_value_heads} | options
        return super().from_config(config, layer_idx, **options)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        query = self._repeated(query)
        if self.window is None:
            return super().attend(query, key, value, mask)
        if mask is not None:
            return super().attend(query, key, value, within_window(mask, self.window))
        out = dense_attention(
            query, key, value, is_causal=True, window=self.window, scale=self.scale, softcap=self.softcap
        )
        return cast(torch.Tensor, out)

    def _repeated(self, query: torch.Tensor) -> torch.Tensor:
        """Query heads, each as often as there are key heads for it where there are more of these."""
        return query.repeat_interleave(max(self.num_key_value_heads // self.num_query_heads, 1), dim=1)

    @property
    def spec(self) -> AttentionSpec:
        from undivided.spec.carrier import Carrier, Causal, HeadMap, Window
        from undivided.spec.specification import AttentionSpec
        from undivided.spec.systems import gqa

        masks = (Causal(),) if self.window is None else (Causal(), Window(self.window - 1))
        heads = HeadMap(max(self.num_query_heads, self.num_key_value_heads), self.num_key_value_heads)
        return AttentionSpec(
            carrier=Carrier(masks, heads), evidence=gqa(scale=self.scale, softcap=self.softcap).evidence
        )

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        query, key, value = self.heads(hidden_states, position_embeddings)
        return {"query": self._repeated(query), "key": key, "value": value}

    def load_official(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Loads the weights of one `SparseQueryAttention` of the authors' code (RxNN).

        Its rotary embedding pairs neighbours, `(x0, x1), (x2, x3), ...`, and writes halves; here pairs are halves from
        the start, so that the rows of q_proj and k_proj change places within each head. Its buffers of rotary tables
        are not needed.

        Args:
            state_dict: names and weights of that module.

        Raises:
            RuntimeError: a weight is missing or has another shape.
        """
        names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
        own = {}
        for name, weight in state_dict.items():
            module, _, kind = name.partition(".")
            if module not in names:
                continue
            if module in ("q_proj", "k_proj"):
                order = to_interleaved(self.head_dim // 2, weight.device).argsort()
                weight = weight.unflatten(0, (-1, self.head_dim))[:, order].flatten(0, 1)
            own[f"{names[module]}.{kind}"] = weight
        self.load_state_dict(own)


def within_window(mask: torch.Tensor, window: int) -> torch.Tensor:
    """Returns a mask without the keys that are `window` or more places before the last one that a query sees.

    The last key a query sees is its own, also where a cache is longer than what is filled and where a batch is padded.
    """
    is_bias = mask.dtype != torch.bool
    # Masks of transformers have the lowest finite number where nothing is seen.
    seen = mask > torch.finfo(mask.dtype).min / 2 if is_bias else mask
    column = torch.arange(mask.shape[-1], device=mask.device)
    near = column > (seen * column).amax(-1, keepdim=True) - window
    return mask.masked_fill(~near, float("-inf")) if is_bias else mask & near
