"""Relative convolutional multi-head attention, and the three forms that leave one or both of its parts out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from undivided.layers._base import CausalAttention, additive_or_boolean, check_arguments, filled_keys
from undivided.layers._base import grouped_query_dimensions as dimensions
from undivided.layers._streams import rows_before, stream, streaming_layer
from undivided.layers.rotary import PositionEmbeddings, apply_rotary, rotary_tables
from undivided.ops import dense_attention, relative_attention

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec

# Which parts a form has: convolutions, distances.
VARIANTS = {"mha": (False, False), "mdha": (True, False), "rmha": (False, True), "rcmha": (True, True)}


class HeadConvolution(nn.Module):
    """A causal depthwise convolution along time, of a head's channels, the same for all heads.

    `y_t = sum_k w_k x_{t - K + 1 + k} + b`, zeros before the first token.

    Args:
        head_dim: channels.
        kernel_size: K, the token itself included.

    Source: Primer (arXiv 2109.08668), multi-dconv-head attention.
    """

    def __init__(self, head_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        bound = kernel_size**-0.5
        self.weight = nn.Parameter(torch.empty(head_dim, kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(head_dim).uniform_(-bound, bound))

    def forward(
        self, rows: torch.Tensor, prefix: int = 0, history: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns `[B, N, heads * head_dim]` of the last N of `[B, prefix + N, heads * head_dim]`.

        Args:
            rows: of earlier tokens, then of these.
            prefix: how many are of earlier tokens.
            history: `[B or 1, N]`, how many tokens before it a token may read; None for all that there are.
        """
        length, channels = rows.shape[1] - prefix, rows.shape[2]
        heads = channels // len(self.bias)
        missing = max(self.kernel_size - 1 - prefix, 0)
        padded = nn.functional.pad(rows, (0, 0, missing, 0))[:, -(length + self.kernel_size - 1) :]
        out = self.bias.to(rows.dtype).repeat(heads).expand(rows.shape[0], length, -1)
        for tap in range(self.kernel_size):
            back = self.kernel_size - 1 - tap
            shifted = padded[:, tap : tap + length]
            if history is not None and back:
                shifted = shifted * (history >= back)[..., None]
            out = torch.addcmul(out, shifted, self.weight[:, tap].to(rows.dtype).repeat(heads))
        return out


class RelativeConvAttention(CausalAttention):
    """RCMHA: a short causal convolution on queries, keys and values, then scores that know the distance.

    `q, k, v = conv_q(x W_Q), conv_k(x W_K), conv_v(x W_V)`; `s_ij = scale * ((q_i + u) . k_j + q_i . r_(i-j) +
    b_(i-j))`; `y = concat_h(softmax(s) v) W_O`. "rmha" leaves the convolutions out, "mdha" the distances, "mha" both.
    Convolutions have `3 head_dim (K + 1)` weights, whatever the heads; the table of distances
    `(P + 1) H (head_dim + 1)`, which is most of a small layer.

    Cached a token: keys and values after their convolutions, `2 G head_dim` numbers, and for the convolutions the last
    `K - 1` projected rows.

    Args:
        hidden_size: width C of the model.
        num_attention_heads: heads H.
        num_key_value_heads: key and value heads G; default H, as published.
        head_dim: width of a head; default C / H.
        variant: "rcmha", "rmha", "mdha" or "mha".
        kernel_size: K.
        max_distance: P; keys further back are refused.
        rotary: also rotate queries and keys after the convolution, as the base model does; off as published, on where
            a trained model is converted.
        query_bias, key_bias, value_bias, output_bias: of the projections; published: value and output.
        scale: factor of the logits; default `head_dim ** -0.5`.
        softcap: refused; it is there because base models hand it over.
        layer_idx: index of the layer, which names its place in a cache.

    Raises:
        ValueError: head counts do not divide, a size is less than 1, or the variant is unknown.

    Source: RCMHA (arXiv 2308.03429); the authors' rcmha/attention.py.
    """

    mechanism = "rcmha"

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        *,
        variant: str = "rcmha",
        kernel_size: int = 3,
        max_distance: int = 4096,
        rotary: bool = False,
        query_bias: bool = False,
        key_bias: bool = False,
        value_bias: bool = True,
        output_bias: bool = True,
        scale: float | None = None,
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        key_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        if head_dim is None:
            if hidden_size % num_attention_heads:
                raise ValueError(
                    f"num_attention_heads={num_attention_heads} does not divide hidden_size={hidden_size}."
                )
            head_dim = hidden_size // num_attention_heads
        if num_attention_heads % key_heads:
            raise ValueError(
                f"num_key_value_heads={key_heads} does not divide num_attention_heads={num_attention_heads}."
            )
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is not one of {', '.join(map(repr, VARIANTS))}.")
        if kernel_size < 1 or max_distance < 1:
            raise ValueError(f"kernel_size={kernel_size} and max_distance={max_distance} must be at least 1.")
        if softcap is not None:
            raise ValueError(f"softcap={softcap} is not part of relative attention; leave it None.")
        self.num_heads, self.num_key_value_heads, self.head_dim = num_attention_heads, key_heads, head_dim
        self.variant, self.rotary, self.layer_idx = variant, rotary, layer_idx
        self.max_distance = max_distance
        self.scale = head_dim**-0.5 if scale is None else scale
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=query_bias)
        self.k_proj = nn.Linear(hidden_size, key_heads * head_dim, bias=key_bias)
        self.v_proj = nn.Linear(hidden_size, key_heads * head_dim, bias=value_bias)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=output_bias)
        convolved, self.relative = VARIANTS[variant]
        self.lookback = kernel_size - 1 if convolved else 0
        self.convolutions = nn.ModuleList(
            HeadConvolution(head_dim, kernel_size) for _ in range(3 if convolved else 0)
        )
        if self.relative:
            self.content_bias = nn.Parameter(torch.zeros(num_attention_heads, head_dim))
            self.distance_vectors = nn.Parameter(torch.zeros(max_distance + 1, num_attention_heads, head_dim))
            self.distance_bias = nn.Parameter(torch.zeros(max_distance + 1, num_attention_heads))

    @classmethod
    def native_dimensions(cls, config: Any) -> dict[str, Any]:
        found = dimensions(config)
        return {name: found[name] for name in ("num_key_value_heads", "head_dim", "scale")}

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: PositionEmbeddings | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        check_arguments(self.mechanism, **kwargs)
        cache = None
        if past_key_values is not None and self.lookback:
            cache = streaming_layer(past_key_values, self.layer_idx)
        history = self._history(attention_mask, hidden_states.shape[1], cache)
        query, key, value = self.project(hidden_states, position_embeddings, history, cache)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
            # Also with a mask: distances count from the last key, and a static cache hands over empty places behind it.
            key, value = filled_keys(None, past_key_values, self.layer_idx, key, value)
        out = self.attend(query, key, value, additive_or_boolean(attention_mask, key.shape[2]))
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def with_memory(
        self, hidden_states: torch.Tensor, memory: torch.Tensor | None, halo: bool = False
    ) -> torch.Tensor:
        """Returns `[B, N, C]` for a segment that also sees a memory, as Transformer-XL reads a text.

        Args:
            hidden_states: the segment `[B, N, C]`, normalised.
            memory: inputs of earlier tokens `[B, M, C]`, normalised alike; None for none.
            halo: whether the convolution of the queries reads the memory too, so that segments give what one pass
                gives; the authors' code begins with zeros at every segment.

        Raises:
            ValueError: the memory is of another batch size or width.
        """
        both = hidden_states
        if memory is not None:
            if memory.shape[0] != hidden_states.shape[0] or memory.shape[2] != hidden_states.shape[2]:
                raise ValueError(
                    f"memory {list(memory.shape)} must have the batch and the width of the segment "
                    f"{list(hidden_states.shape)}."
                )
            both = torch.cat([memory, hidden_states], dim=1)
        length = hidden_states.shape[1]
        source = both[:, -(length + self.lookback) :] if halo else hidden_states
        rows = [self.q_proj(source), self.k_proj(both), self.v_proj(both)]
        if self.convolutions:
            prefix = source.shape[1] - length
            rows = [
                module(row, before)
                for module, row, before in zip(self.convolutions, rows, (prefix, 0, 0), strict=True)
            ]
        query, key, value = (row.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for row in rows)
        out = self.attend(query[:, :, -length:], key, value, None)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def project(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: PositionEmbeddings | None,
        history: torch.Tensor | None = None,
        cache: Any | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns query `[B, H, N, D]`, key and value `[B, G, N, D]`, convolved and, with `rotary`, rotated."""
        rows = torch.cat([p(hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        prefix = 0
        if cache is not None:
            rows, prefix = stream(cache, rows, self.lookback)
        widths = [p.out_features for p in (self.q_proj, self.k_proj, self.v_proj)]
        parts = list(rows.split(widths, dim=-1))
        if self.convolutions:
            parts = [c(part, prefix, history) for c, part in zip(self.convolutions, parts, strict=True)]
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        if self.rotary:
            cos, sin = rotary_tables(position_embeddings)
            query, key = (apply_rotary(x, cos, sin, interleaved=False) for x in (query, key))
        return query, key, value

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the heads' outputs `[B, H, N, D]`."""
        if self.relative:
            return relative_attention(
                query, key, value, content_bias=self.content_bias, distance_vectors=self.distance_vectors,
                distance_bias=self.distance_bias, attn_mask=mask, scale=self.scale,
            )  # fmt: skip
        out = dense_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale)
        return cast(torch.Tensor, out)

    def _history(
        self, attention_mask: torch.Tensor | None, length: int, cache: Any | None
    ) -> torch.Tensor | None:
        if not self.lookback or not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4:
            return None
        first: torch.Tensor | int = attention_mask.shape[-1] - length
        if cache is not None and hasattr(cache, "max_cache_len"):
            first = cache.get_seq_length()
        return rows_before(attention_mask, first, length, self.lookback)

    @property
    def spec(self) -> AttentionSpec:
        """As of multi-head attention without distances; vectors of distances are not written in the language."""
        from undivided.spec.systems import gqa

        if self.relative:
            raise NotImplementedError(
                f'mechanism "{self.mechanism}" with distances is not written in the specification language.'
            )
        return gqa(self.num_key_value_heads, self.scale)

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        query, key, value = self.project(hidden_states, position_embeddings)
        return {"query": query, "key": key, "value": value}

    @torch.no_grad()
    def load_official(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Copies the weights of the authors' `RelativeMultiHeadAttention` (rcmha/attention.py).

        Its tables have a row for every distance to both sides, `2 P` of them, of which row `P - d` is distance d.

        Raises:
            ValueError: a name is missing or a shape is another; the layer must have all parts.
        """
        modules = {
            "q_proj": "query.0.linear",
            "k_proj": "key.0.linear",
            "v_proj": "value.0.linear",
            "o_proj": "output",
        }
        modules |= {f"convolutions.{i}": f"{name}.1.conv" for i, name in enumerate(("query", "key", "value"))}
        found = {
            f"{ours}.{kind}": state_dict[f"{theirs}.{kind}"]
            for ours, theirs in modules.items()
            for kind in ("weight", "bias")
            if f"{theirs}.{kind}" in state_dict
        }
        found = {name: x.squeeze(1) if x.dim() == 3 else x for name, x in found.items()}
        if "query_pos_bias" in state_dict:
            found["content_bias"] = state_dict["query_pos_bias"]
        for ours, theirs in (("distance_vectors", "key_pos_embeddings"), ("distance_bias", "key_pos_bias")):
            if theirs in state_dict:
                table = state_dict[theirs]
                half = len(table) // 2
                # Row `half - d` is distance d; there is none for the largest.
                rows = table[: half + 1].flip(0)
                found[ours] = rows[: self.max_distance + 1]
        own = self.state_dict()
        missing = sorted(set(own) - set(found))
        wrong = [name for name in own if name in found and found[name].shape != own[name].shape]
        if missing or wrong:
            raise ValueError(f"the weights do not fit: missing {missing}, of another shape {wrong}.")
        self.load_state_dict(found)
