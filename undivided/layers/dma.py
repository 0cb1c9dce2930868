"""Dynamic mask attention: a learned function of the values decides which keys a head keeps."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from undivided.layers._base import additive_or_boolean, check_arguments, filled_keys
from undivided.layers.gqa import GQAttention
from undivided.layers.rotary import PositionEmbeddings, apply_rotary, rotary_tables
from undivided.ops import dynamic_mask_attention
from undivided.ops._rules import causal_mask
from undivided.ops.dynamic_mask.reference import kept_keys

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec

VARIANTS = ("paper", "released")
SCORE_FORMS = ("exp", "linear")


class DynamicMaskAttention(GQAttention):
    """Dynamic mask attention (DMA): each query attends the w keys of its prefix with the largest learned bias.

    `b_g,j = exp(A_g * softplus(W_dt concat_g'(v_g',j)))` of a key head g and a token j, from the values of all key
    heads; `y_n = concat_h(softmax_j(scale * q_h,n . k_g,j + b_g,j) v_g,j) W_O` over the w keys `j <= n` of the largest
    `b_g,j`, of equal ones the latest. The heads of a group share their mask. The bias is added however short a text is.
    Gradients reach A, W_dt and, a second way, the values through the bias of the keys that are kept.

    A key that has left the best w never comes back, so that a growing cache keeps w tokens a key head: at most
    `2 G w head_dim` numbers, and w biases and positions, however long the text is. With `keep_all`, and in caches of
    other kinds, all keys and values are kept, `2 G head_dim` numbers a token, and the biases computed anew.

    `A = 0` and a random W_dt, the start of "paper", make the bias constant: a sliding window of w tokens, or the
    attention of a trained model as long as texts are no longer than w. (With both zero no gradient would reach either.)

    Args:
        hidden_size, num_attention_heads, num_key_value_heads, head_dim: as in `GQAttention`.
        keep_window_size: keys w that a query keeps.
        score_form: "exp", or "linear" for `b = A softplus(.)`; default that of the variant.
        variant: "paper", or "released", the authors' later example: the linear form, A drawn from N(0, 0.02^2), and the
            w best keys of the whole text, of which a query attends those before it. What a query keeps then depends on
            later tokens, and decoding, which cannot know them, differs from prefill: not causal, kept to compare.
        qk_norm: RMS-normalise queries and keys before their positions, as the Doge models do.
        norm_eps: added to the mean square.
        score_bias: whether W_dt has a bias.
        keep_all: keep all keys and values in a growing cache, which can then be rolled back (assisted generation).
        query_bias, key_value_bias, output_bias, scale, softcap, layer_idx: as in `GQAttention`; softcap must be None.

    Raises:
        ValueError: `keep_window_size` is less than 1, an option is unknown, a softcap is given, or head counts do not
            divide.
        TypeError: `keep_window_size` is no integer.

    Source: Trainable Dynamic Mask Sparse Attention (arXiv 2508.02124), section 3; the Doge models of transformers.
    """

    mechanism = "dma"
    # Of the weights that a layer of the base model has not.
    STANDARD_DEVIATION = 0.02

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        keep_window_size: int = 2048,
        score_form: str | None = None,
        variant: str = "paper",
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        score_bias: bool = False,
        keep_all: bool = False,
        query_bias: bool = False,
        key_value_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
        if isinstance(keep_window_size, bool) or not isinstance(keep_window_size, int):
            raise TypeError(f"keep_window_size={keep_window_size!r} must be an integer.")
        if keep_window_size < 1:
            raise ValueError(f"keep_window_size={keep_window_size} must be at least 1: a query keeps a key.")
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is not one of {', '.join(map(repr, VARIANTS))}.")
        if score_form is None:
            score_form = "exp" if variant == "paper" else "linear"
        if score_form not in SCORE_FORMS:
            raise ValueError(f"score_form={score_form!r} is not one of {', '.join(map(repr, SCORE_FORMS))}.")
        if softcap is not None:
            raise ValueError(f"softcap={softcap}: dynamic mask attention does not cap its logits; use None.")
        super().__init__(
            hidden_size,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            query_bias=query_bias,
            key_value_bias=key_value_bias,
            output_bias=output_bias,
            scale=scale,
            layer_idx=layer_idx,
        )
        self.keep_window_size = keep_window_size
        self.score_form = score_form
        self.variant = variant
        self.selection = "per_row" if variant == "paper" else "global"
        self.keep_all = keep_all
        self.A = nn.Parameter(torch.zeros(num_key_value_heads))
        self.dt_proj = nn.Linear(num_key_value_heads * head_dim, num_key_value_heads, bias=score_bias)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(head_dim, norm_eps) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.reset_scores()

    def reset_scores(self) -> None:
        """Draws A and W_dt as at the start of training."""
        with torch.no_grad():
            nn.init.normal_(self.dt_proj.weight, std=self.STANDARD_DEVIATION)
            if self.dt_proj.bias is not None:
                nn.init.zeros_(self.dt_proj.bias)
            if self.variant == "paper":
                nn.init.zeros_(self.A)
            else:
                nn.init.normal_(self.A, std=self.STANDARD_DEVIATION)

    def heads(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Under autocast a norm may widen what it gets.
        query, key = (norm(x).to(value.dtype) for norm, x in ((self.q_norm, query), (self.k_norm, key)))
        cos, sin = rotary_tables(position_embeddings)
        query, key = (apply_rotary(x.transpose(1, 2), cos, sin, interleaved=False) for x in (query, key))
        return query, key, value.transpose(1, 2)

    def key_bias(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the bias of each key head and token, `[B, G, M]`, in float32 at least.

        Args:
            value: `[B, G, M, head_dim]`.
        """
        raw = self.dt_proj(value.transpose(1, 2).flatten(2))
        # In half precision scores that differ become equal, and the exponential overflows.
        dtype = torch.promote_types(raw.dtype, torch.float32)
        bias = self.A.to(dtype) * functional.softplus(raw.to(dtype))
        return (bias.exp() if self.score_form == "exp" else bias).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: PositionEmbeddings | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        check_arguments(self.mechanism, **kwargs)
        mask = _boolean(attention_mask)
        query, key, value = self.heads(hidden_states, position_embeddings)
        kept = None
        if past_key_values is not None and not self.keep_all:
            from undivided.layers._kept_cache import kept_layer

            kept = kept_layer(past_key_values, self.layer_idx, self.keep_window_size)
        if kept is not None:
            bias = self.key_bias(value)
            later = bias
            if mask is not None:
                # Later queries see of these tokens what the last one sees.
                later = bias.masked_fill(~mask[:, :, -1, -bias.shape[2] :], float("-inf"))
            key, value, bias, positions = kept.extend(key, value, bias, later)
            if mask is not None:
                shape = (bias.shape[0], bias.shape[1], *mask.shape[2:])
                place = positions[:, :, None].expand(*shape[:3], bias.shape[2])
                mask = mask.expand(shape).gather(-1, place)
        else:
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
                key, value = filled_keys(attention_mask, past_key_values, self.layer_idx, key, value)
            bias = self.key_bias(value)
            mask = additive_or_boolean(mask, key.shape[2])
        out = self.attend_kept(query, key, value, bias, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def attend_kept(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns the outputs of the heads; `mask` is boolean, `[B or 1, G or 1, N, M]`, and causal itself."""
        if mask is not None and query.shape[2] == 1:
            bias, mask = bias.masked_fill(~mask[:, :, 0], float("-inf")), None
        elif mask is not None:
            hidden = only_padding(mask)
            if hidden is not None:
                bias, mask = bias.masked_fill(hidden, float("-inf")), None
        return dynamic_mask_attention(
            query, key, value, bias, self.keep_window_size, attn_mask=mask, is_causal=mask is None,
            scale=self.scale, selection=self.selection,
        )  # fmt: skip

    @property
    def spec(self) -> AttentionSpec:
        from undivided.spec import (
            AttentionSpec,
            Carrier,
            Causal,
            Chart,
            Dot,
            Evidence,
            GivenMask,
            HeadMap,
            KeyBias,
        )

        heads = HeadMap(key_heads=self.num_key_value_heads)
        kept = GivenMask("kept", state_free=False)
        return AttentionSpec(
            carrier=Carrier((Causal(), kept), heads),
            evidence=Evidence(Chart((Dot(scale=self.scale), KeyBias("bias")))),
        )

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        query, key, value = self.heads(hidden_states, position_embeddings)
        bias = self.key_bias(value)
        kept = kept_keys(bias, query.shape[2], self.keep_window_size, None, True, self.selection)
        group = query.shape[1] // key.shape[1]
        return {
            "query": query,
            "key": key,
            "value": value,
            "bias": bias,
            "kept": kept.repeat_interleave(group, dim=1),
        }

    def load_official(self, state_dict: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        """Loads the weights of one `DogeAttention`, of transformers or of the authors' example; needs `qk_norm`.

        Args:
            state_dict: names and weights, of that module or of a model.
            prefix: what stands before the names, such as "model.layers.0.self_attn.".

        Raises:
            ValueError: the layer has no `qk_norm`.
            RuntimeError: a weight is missing or has another shape.
        """
        if isinstance(self.q_norm, nn.Identity):
            raise ValueError("Doge normalises queries and keys; build the layer with qk_norm=True.")
        own = {
            name.removeprefix(prefix): weight
            for name, weight in state_dict.items()
            if name.startswith(prefix)
        }
        self.load_state_dict(own)


def _boolean(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """A 4-D mask of transformers, boolean or additive, as a boolean one."""
    mask = additive_or_boolean(attention_mask, sys.maxsize)
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def only_padding(mask: torch.Tensor) -> torch.Tensor | None:
    """Returns which keys a mask hides from all queries, `[B or 1, G or 1, M]`, if beside these it is causal; else None.

    Only on a GPU, whose kernels take padding and no other mask; there it reads one number from the device. Where a
    number cannot be read (torch.compile, CUDA graphs) the answer is None.

    Args:
        mask: boolean, `[B or 1, G or 1, N, M]`.
    """
    if (
        mask.device.type != "cuda"
        or torch.compiler.is_compiling()
        or torch.cuda.is_current_stream_capturing()
    ):
        return None
    seen = mask.any(dim=2)
    triangle = causal_mask(mask.shape[2], mask.shape[3], mask.device)
    return ~seen if torch.equal(mask, triangle & seen[:, :, None]) else None
