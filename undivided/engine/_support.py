"""What the engine can decode, and why not the rest."""

from __future__ import annotations

from typing import Any

from undivided.layers._base import CausalAttention
from undivided.layers.latent import LatentAttention
from undivided.models.bases import attention_layers, check_supported

PAGED = ("mla", "gla", "tpla")
STATIC = ("gqa",)


def has_latent_layers(model: Any) -> bool:
    """Whether a layer caches a latent in a form that the engine pages."""
    return any(getattr(layer, "mechanism", None) in PAGED for layer in attention_layers(model))


def check_model(model: Any, max_tokens: int) -> None:
    """Raises a ValueError with the reason, unless the engine can decode the model."""
    config = model.config.get_text_config()
    check_supported(config)
    layers = attention_layers(model)
    for index, layer in enumerate(layers):
        mechanism = layer.mechanism if isinstance(layer, CausalAttention) else None
        if mechanism is not None and mechanism not in (*PAGED, *STATIC):
            raise ValueError(
                f'layer {index} has mechanism "{mechanism}"; the engine decodes {", ".join((*PAGED, *STATIC))} and '
                "the base models' own attention."
            )
    implementation = getattr(config, "_attn_implementation", None)
    is_static = any(not isinstance(layer, LatentAttention) for layer in layers)
    if is_static and implementation not in ("sdpa", "eager"):
        raise ValueError(
            f'attn_implementation="{implementation}" takes no mask of static keys; load the model with "sdpa".'
        )
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is not None and "sliding_attention" in types and window < max_tokens:
        raise ValueError(
            f"the model attends in windows of {window} tokens, and the engine to all of them; use max_tokens of at "
            f"most {window}, not {max_tokens}."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        raise ValueError(
            f'rope_type "{rope["rope_type"]}" rotates by the longest sequence of the batch; the engine needs positions '
            "that depend on nothing else."
        )
