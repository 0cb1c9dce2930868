"""What every attention mechanism of a language model is: a module that stands where the native one stood."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from undivided.layers.rotary import PositionEmbeddings

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec

_SET_BY_HOST = ("self", "hidden_size", "num_attention_heads", "softcap", "layer_idx")


class CausalAttention(nn.Module):
    """Base of the attention layers that `models.causal_lm` can put into a base model.

    A subclass names its mechanism, builds itself from a native config with `from_config`, and computes
    `forward(hidden_states [B, N, C], position_embeddings, attention_mask, past_key_values) -> ([B, N, C], None)`,
    the contract of the attention modules of transformers. What it caches it hands to
    `past_key_values.update(keys, values, layer_idx)`; a call may name it `cache`, as transformers 5.24 does. A layer
    with `has_auxiliary` returns, when training, losses in place of None, name to scalar; `auxiliary_coefficients` has
    their factors in a model's loss.

    A mechanism that can be written in the language of `undivided.spec` says so with `spec` and `spec_inputs`:
    `o_proj(merge_heads(interpret(layer.spec, layer.spec_inputs(x, tables)).out))` is then the output of a forward
    without mask and cache, exactly.
    """

    mechanism: ClassVar[str]
    has_auxiliary: ClassVar[bool] = False
    auxiliary_coefficients: dict[str, float]
    layer_idx: int

    @classmethod
    def native_dimensions(cls, config: Any) -> dict[str, Any]:
        """Returns constructor arguments that a native config decides; options override them."""
        return {}

    @classmethod
    def option_names(cls) -> list[str]:
        """Returns the constructor arguments that a config may set for this mechanism."""
        names: list[str] = []
        for owner in cls.__mro__:
            parameters = inspect.signature(owner).parameters.values()
            named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            names += [name for name in named if name not in (*names, *_SET_BY_HOST)]
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
        return names

    @classmethod
    def from_config(cls, config: Any, layer_idx: int, **options: Any) -> Self:
        """Builds the layer for one layer of a base model: sizes from its config, the rest from `options`.

        Raises:
            ValueError: an option is unknown, or a size is missing that this base model cannot tell.
        """
        known = cls.option_names()
        for name in options:
            if name not in known:
                raise ValueError(
                    f'mechanism "{cls.mechanism}" has no option {name!r}; it has {", ".join(known)}.'
                )
        arguments = base_dimensions(config) | cls.native_dimensions(config) | options
        required = [
            p.name
            for p in inspect.signature(cls.__init__).parameters.values()
            if p.default is p.empty
            and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and p.name != "self"
        ]
        missing = [name for name in required if name not in arguments]
        if missing:
            raise ValueError(
                f'mechanism "{cls.mechanism}" needs {", ".join(missing)}: the {config.model_type} config does not tell.'
            )
        return cls(**arguments, layer_idx=layer_idx)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "cache" in kwargs:
            cache = one_cache(type(self).__name__, kwargs.pop("cache"), kwargs.get("past_key_values"))
            kwargs["past_key_values"] = cache
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: PositionEmbeddings | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        raise NotImplementedError

    @property
    def spec(self) -> AttentionSpec:
        """What the layer computes between its projections, with the options it has, in the specification language.

        Raises:
            NotImplementedError: the mechanism is not written in the language.
        """
        raise NotImplementedError(
            f'mechanism "{self.mechanism}" is not written in the specification language.'
        )

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        """Returns the tensors that `spec` reads, by name: after projections and rotary positions, before attention.

        Args:
            hidden_states: `[B, N, C]`, whole texts without padding.
            position_embeddings: as the base model hands them over.

        Raises:
            NotImplementedError: as `spec`.
        """
        raise NotImplementedError(
            f'mechanism "{self.mechanism}" is not written in the specification language.'
        )


def one_cache(callee: str, cache: Any | None, past_key_values: Any | None) -> Any | None:
    """Returns the cache of a call by either of its names: `cache` since transformers 5.24, `past_key_values` before.

    Raises:
        ValueError: it came by both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError(f"{callee} got both cache and past_key_values, two names of one argument; give one.")
    return past_key_values if cache is None else cache


def check_arguments(layer: str, **kwargs: Any) -> None:
    """Refuses forward keywords that would change the result and that no layer here computes."""
    for name in ("s_aux", "position_bias", "cu_seq_lens_q", "cu_seq_lens_k"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{layer} got {name}, which it does not compute; call the model without it.")


def base_dimensions(config: Any) -> dict[str, Any]:
    """Returns the sizes that every mechanism takes from a native config, in the constructor's words.

    Raises:
        ValueError: attention dropout is on; no layer of this library drops attention weights.
    """
    dropout = getattr(config, "attention_dropout", 0.0)
    if dropout:
        raise ValueError(f"attention_dropout={dropout} is not supported by the layers here; set it to 0.0.")
    return {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "softcap": getattr(config, "attn_logit_softcapping", None),
    }


def grouped_query_dimensions(config: Any) -> dict[str, Any]:
    """Returns the sizes of the native grouped-query attention of a base model, in the constructor's words."""
    bias = {"qwen2": True, "mistral": False}.get(config.model_type, getattr(config, "attention_bias", False))
    scalar = getattr(config, "query_pre_attn_scalar", None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "query_bias": bias,
        "key_value_bias": bias,
        "output_bias": bias and config.model_type != "qwen2",
        "scale": (head_dim if scalar is None else scalar) ** -0.5,
    }


def filled_keys(
    attention_mask: torch.Tensor | None, past_key_values: Any, layer_idx: int, *cached: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Returns what a cache handed over, `[B, heads, length, .]` each, without places that are not filled yet.

    A static cache hands over all its places, and a prompt may come without a mask: causality, aligned bottom
    right, would then count from the last place instead of the last key. With a mask nothing is cut.
    """
    length = past_key_values.get_seq_length(layer_idx) if attention_mask is None else None
    # Growing caches count in Python; only a static one counts in a tensor.
    if isinstance(length, torch.Tensor):
        return tuple(tensor[:, :, : int(length)] for tensor in cached)
    return cached


def additive_or_boolean(attention_mask: torch.Tensor | None, num_keys: int) -> torch.Tensor | None:
    """Returns a 4-D mask cut to the keys at hand (static caches hand over longer ones).

    Raises:
        TypeError: the mask is of a kind made for another attention implementation.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4:
        raise TypeError(
            'attention_mask must be 4-D; load the model with attn_implementation="sdpa" or "eager".'
        )
    return attention_mask[..., :num_keys]
