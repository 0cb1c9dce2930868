"""Compressed convolutional attention: the whole of attention in a narrow latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from undivided.layers._base import CausalAttention, additive_or_boolean, check_arguments, filled_keys
from undivided.layers._streams import rows_before, stream, streaming_layer
from undivided.layers.rotary import PositionEmbeddings, rotary_tables
from undivided.ops import dense_attention
from undivided.ops.conv import convolved_heads

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec

VARIANTS = ("paper", "released")
_STANDARD_DEVIATION = 0.02


class CCAttention(CausalAttention):
    """Compressed convolutional attention (CCA), with grouped queries CCGQA.

    `[q, k] = x [W_Q, W_K]`, no wider than the heads, and never widened again; two causal convolutions of them, the
    first depthwise, the second over the channels of a head; the mean of the latents beside them,
    `m_h = (q_h + k_g(h)) / 2`; each head scaled to norm `sqrt(D)`, keys times tau_g too; rotary positions;
    `v_t = [x_t W_V1, x_(t-1) W_V2]`; then `y = concat_h(softmax(q_h k_g^T / sqrt(D)) v_g) W_O`.

    The values lie as `[G, head_dim]`: of two or more heads the first half are of the token itself, the second half of
    the one before. Cached a token: `2 * G * head_dim` numbers; and once a sequence the projections of the last
    `sum(kernel_size - 1)` tokens, the state of a hybrid layer in a cache of transformers. Where a mask hides the token
    before (padding, or another document packed in the same row), convolutions and value shift begin anew.

    Args:
        hidden_size: width C of the model.
        num_attention_heads: query heads H.
        num_key_value_heads: key and value heads G, a divisor of H. With `G = H` this is CCA.
        head_dim: width of a head.
        num_query_heads: query heads; given, it stands in place of `num_attention_heads`, as it must where the latent
            is narrower than the model.
        conv_kernels: kernel sizes of the depthwise and of the grouped convolution; one for the first alone, none for
            no convolution.
        qk_mean: whether to add the mean of the latents.
        value_shift: whether half of the values are of the token before.
        qk_norm: whether to normalise queries and keys; without it there is no temperature.
        rotary_fraction: share of the dims of a head that is rotated, the first ones. Of the base model's frequencies
            those that a head of so many dims would have.
        variant: "paper", `tau = exp(temperature)`, which starts at 0; "released", `tau = temperature`, as in ZAYA1,
            which starts at 1 here (at 0 in the public code, where all keys would be zero).
        softcap: bound of the logits; default none.
        layer_idx: index of the layer, which names its place in a cache.

    Raises:
        ValueError: head counts that do not divide each other, an odd width of the values or of the rotated dims, a
            kernel size under 1, or an unknown variant.

    Source: Compressed Convolutional Attention (arXiv 2510.04476), section 3 and its listing.
    """

    mechanism = "cca"

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        num_query_heads: int | None = None,
        conv_kernels: Sequence[int] = (2, 2),
        qk_mean: bool = True,
        value_shift: bool = True,
        qk_norm: bool = True,
        rotary_fraction: float = 1.0,
        variant: str = "paper",
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        self.num_query_heads = num_attention_heads if num_query_heads is None else num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.rotary_dim = int(rotary_fraction * head_dim)
        self.qk_mean = qk_mean
        self.value_shift = value_shift
        self.qk_norm = qk_norm
        self.variant = variant
        self.softcap = softcap
        self.layer_idx = layer_idx
        self._check(conv_kernels, rotary_fraction)
        heads = self.num_query_heads + num_key_value_heads
        channels = heads * head_dim
        # Columns of W_Q, W_K, W_V1 and W_V2, for one product.
        self.qkv_proj = nn.Linear(hidden_size, channels + num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_query_heads * head_dim, hidden_size, bias=False)
        groups = (channels, heads)
        convolutions = [
            nn.Conv1d(channels, channels, size, groups=count)
            for size, count in zip(conv_kernels, groups, strict=False)
        ]
        self.conv_depthwise, self.conv_grouped = [*convolutions, None, None][:2]
        # Rows that the convolutions look back.
        self.lookback = sum(size - 1 for size in conv_kernels)
        start = float(variant == "released")
        self.temperature = nn.Parameter(torch.full((num_key_value_heads,), start)) if qk_norm else None
        for module in (self.qkv_proj, self.o_proj, *convolutions):
            nn.init.normal_(module.weight, std=_STANDARD_DEVIATION)
        for module in convolutions:
            nn.init.zeros_(cast(nn.Parameter, module.bias))

    def _check(self, conv_kernels: Sequence[int], rotary_fraction: float) -> None:
        heads, groups = self.num_query_heads, self.num_key_value_heads
        if groups < 1 or heads % groups:
            raise ValueError(f"num_key_value_heads={groups} does not divide the {heads} query heads.")
        if self.value_shift and groups * self.head_dim % 2:
            raise ValueError(
                f"num_key_value_heads={groups} times head_dim={self.head_dim} is odd; value_shift halves the values."
            )
        if len(conv_kernels) > 2 or any(size < 1 for size in conv_kernels):
            raise ValueError(f"conv_kernels={list(conv_kernels)} must be at most two sizes of at least 1.")
        if not 0 <= rotary_fraction <= 1 or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_fraction={rotary_fraction} of head_dim={self.head_dim} is {self.rotary_dim} dims; it must be "
                "an even number of at most head_dim."
            )
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r} is not one of {', '.join(map(repr, VARIANTS))}.")

    @classmethod
    def native_dimensions(cls, config: Any) -> dict[str, Any]:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return {"num_key_value_heads": config.num_key_value_heads, "head_dim": head_dim}

    def tau(self) -> torch.Tensor | None:
        """Returns the factor of the keys, `[G]` in float32 at least; None without normalisation."""
        if self.temperature is None:
            return None
        temperature = self.temperature.to(torch.promote_types(self.temperature.dtype, torch.float32))
        return temperature.exp() if self.variant == "paper" else temperature

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: PositionEmbeddings | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        check_arguments("cca", **kwargs)
        cache = None
        if past_key_values is not None and self._rows_kept:
            cache = streaming_layer(past_key_values, self.layer_idx)
        history = self._history(attention_mask, hidden_states.shape[1], cache)
        query, key, value = self.project(hidden_states, position_embeddings, history, cache)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
            key, value = filled_keys(attention_mask, past_key_values, self.layer_idx, key, value)
        mask = additive_or_boolean(attention_mask, key.shape[2])
        out = cast(
            torch.Tensor,
            dense_attention(query, key, value, attn_mask=mask, is_causal=mask is None, softcap=self.softcap),
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    @property
    def _rows_kept(self) -> int:
        """Rows of the projections that the next token reads."""
        return max(self.lookback, int(self.value_shift))

    def _history(
        self, attention_mask: torch.Tensor | None, length: int, cache: Any | None
    ) -> torch.Tensor | None:
        """How many tokens before it each token may read; None for all that there are."""
        if self._rows_kept == 0 or not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4:
            return None
        first: torch.Tensor | int = attention_mask.shape[-1] - length
        if cache is not None and hasattr(cache, "max_cache_len"):
            # The mask of a static cache has a column for each of its places.
            first = cache.get_seq_length()
        return rows_before(attention_mask, first, length, self._rows_kept)

    def project(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: PositionEmbeddings | None,
        history: torch.Tensor | None = None,
        cache: Any | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns query `[B, H, N, D]`, key and value `[B, G, N, D]` as attention reads them.

        Args:
            hidden_states: `[B, N, C]`.
            position_embeddings: as of the base model.
            history: `[B or 1, N]`, how many tokens before it a token may read; None for all that there are.
            cache: a layer of `streaming_layer`, which is read and brought up to date.
        """
        latents = self.qkv_proj(hidden_states)
        values = None
        if not self.value_shift:
            width = self.num_key_value_heads * self.head_dim
            latents, values = latents.split([latents.shape[-1] - width, width], dim=-1)
        prefix = 0
        if cache is not None:
            latents, prefix = stream(cache, latents, self._rows_kept)
        cos, sin = self._tables(position_embeddings)
        query, key, *shifted = self.convolve(latents, cos, sin, prefix, history)
        if values is None:
            return query, key, shifted[0]
        return query, key, values.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def convolve(
        self,
        latents: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        prefix: int,
        history: torch.Tensor | None,
        backend: str = "auto",
    ) -> tuple[torch.Tensor, ...]:
        """Returns query `[B, H, N, D]`, key and, with `value_shift`, value `[B, G, N, D]` of latents side by side."""
        weights = {}
        for name, module in (("depthwise", self.conv_depthwise), ("grouped", self.conv_grouped)):
            if module is not None:
                # Under autocast the latents are of a narrower type than the weights.
                weights[f"{name}_weight"] = module.weight.to(latents.dtype)
                weights[f"{name}_bias"] = module.bias.to(latents.dtype)
        return convolved_heads(
            latents, self.num_query_heads, self.num_key_value_heads, **weights, temperature=self.tau(), cos=cos,
            sin=sin, qk_mean=self.qk_mean, qk_norm=self.qk_norm, value_shift=self.value_shift, prefix=prefix,
            history=history, backend=backend,
        )  # fmt: skip

    def _tables(
        self, position_embeddings: PositionEmbeddings | None
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        if self.rotary_dim == 0:
            return None, None
        if position_embeddings is None:
            raise ValueError(
                "position_embeddings is None; give the tables of the base model, or set rotary_fraction=0."
            )
        cos, sin = rotary_tables(position_embeddings)
        stride, rest = divmod(2 * cos.shape[-1], self.rotary_dim)
        if stride == 0 or rest:
            raise ValueError(
                f"position_embeddings rotate {2 * cos.shape[-1]} dims, of which no even share are the "
                f"{self.rotary_dim} that rotary_fraction asks for."
            )
        return cos[..., ::stride], sin[..., ::stride]

    @property
    def spec(self) -> AttentionSpec:
        """What the layer computes of the tensors of `spec_inputs`."""
        from undivided.spec import AttentionSpec, Carrier, Causal, Chart, Cosine, Dot, Evidence, HeadMap

        term = Cosine(temperature="temperature") if self.qk_norm else Dot()
        return AttentionSpec(
            carrier=Carrier((Causal(),), HeadMap(key_heads=self.num_key_value_heads)),
            evidence=Evidence(Chart((term,), self.softcap)),
        )

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        """Returns the named tensors that `spec` reads."""
        query, key, value = self.project(hidden_states, position_embeddings)
        inputs = {"query": query, "key": key, "value": value}
        tau = self.tau()
        if tau is not None:
            # The sign of tau is in the key already; its size is not in a cosine.
            inputs["temperature"] = tau.abs()
        return inputs

    @torch.no_grad()
    def load_official(self, state_dict: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        """Copies the weights of one attention layer of ZAYA1 as transformers names them; needs `variant="released"`.

        Args:
            state_dict: the weights of a `ZayaAttention`, or of a model with `prefix` before their names, such as
                `"model.layers.0.self_attn."`.
            prefix: what stands before the names.

        Raises:
            ValueError: the layer is of another variant, lacks a part that ZAYA1 has, or differs in shape.
        """
        if self.variant != "released" or None in (self.conv_depthwise, self.conv_grouped, self.temperature):
            raise ValueError(
                'ZAYA1 needs variant="released", two convolutions and qk_norm; '
                f"this layer has variant={self.variant!r}."
            )
        projections = ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")
        given = {
            "qkv_proj.weight": torch.cat(
                [state_dict[f"{prefix}qkv_proj.{name}.weight"] for name in projections]
            ),
            "o_proj.weight": state_dict[f"{prefix}o_proj.weight"],
            "temperature": state_dict[f"{prefix}qk_norm.temp"],
        }
        for ours, theirs in (("conv_depthwise", "conv_qk_depthwise"), ("conv_grouped", "conv_qk_grouped")):
            for part in ("weight", "bias"):
                given[f"{ours}.{part}"] = state_dict[f"{prefix}qkv_proj.{theirs}.{part}"]
        for name, parameter in self.state_dict().items():
            if parameter.shape != given[name].shape:
                raise ValueError(
                    f"{name} has shape {list(parameter.shape)}, but ZAYA1 has {list(given[name].shape)}; build the "
                    "layer with its sizes."
                )
            parameter.copy_(given[name])
