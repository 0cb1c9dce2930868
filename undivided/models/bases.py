"""The base models that the host can change: which they are, and why some are refused."""

from __future__ import annotations

import functools
import inspect
from typing import Any

SUPPORTED: tuple[str, ...] = ("llama", "qwen2", "mistral", "gemma2", "deepseek_v2", "deepseek_v3")

REFUSED: dict[str, str] = {
    "qwen3": "it normalises query and key after their projections, which no latent form here can absorb",
    "gemma3": "it normalises query and key after their projections, which no latent form here can absorb",
    "gemma3_text": "it normalises query and key after their projections, which no latent form here can absorb",
}


def check_supported(config: Any) -> None:
    """Raises a ValueError with the reason and the supported types, unless `config` is of a supported base model."""
    if config.model_type in SUPPORTED:
        return
    reason = REFUSED.get(config.model_type, "it has not been tried")
    raise ValueError(
        f'model_type "{config.model_type}" is not supported: {reason}. Supported: {", ".join(SUPPORTED)}.'
    )


def attention_layers(model: Any) -> list[Any]:
    """Returns the attention module of every layer of a language model, native or exchanged."""
    return [layer.self_attn for layer in model.get_decoder().layers]


def keep_softcap(model: Any) -> None:
    """Takes "sdpa" from a native model whose logits are capped, where transformers allows it: it leaves the cap out.

    So Gemma-2 in transformers 5.17; 5.23 and 5.24 choose "eager" by themselves.
    """
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    if capped and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


@functools.cache
def cache_argument() -> str:
    """Returns what models of this transformers call their cache: "cache" since 5.24, "past_key_values" before.

    `torch.compile` does not trace this function: what is compiled calls it beforehand.
    """
    from transformers.masking_utils import create_causal_mask

    return "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """Returns the cache in the output of a model, native or host."""
    return getattr(output, cache_argument())
