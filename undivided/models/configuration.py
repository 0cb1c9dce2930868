"""The config of a base model whose attention layers have been exchanged."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from undivided.models.bases import check_supported
from undivided.models.registration import register_models


@strict
class UndividedConfig(PreTrainedConfig):
    """Config of `UndividedForCausalLM`: a native config, and for each layer the mechanism that replaces its attention.

    Args:
        base_config: the config of the base model (Llama, Qwen2, Mistral, Gemma-2, DeepSeek-V2 or V3), or its dict.
        attention: one entry a layer: None keeps the native attention; a dict `{"mechanism": name, option: value,
            ...}` replaces it. The mechanisms are those of `undivided.layers.CAUSAL_MECHANISMS`.
        provenance: how the weights came about (source, method, options), as the converters wrote it.

    Raises:
        ValueError: the base model is not supported, or `attention` has not one entry a layer.
    """

    model_type = "undivided"
    sub_configs = {"base_config": AutoConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    base_config: dict | PreTrainedConfig | None = None
    attention: list | None = None
    provenance: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.base_config is None:
            self.base_config = CONFIG_MAPPING["llama"]()
        elif isinstance(self.base_config, dict):
            fields = dict(self.base_config)
            model_type = fields.get("model_type", "llama")
            if model_type in CONFIG_MAPPING:
                self.base_config = CONFIG_MAPPING[model_type](**fields)
            else:
                check_supported(PreTrainedConfig(model_type=model_type))
        check_supported(self.base_config)
        num_layers = self.get_text_config().num_hidden_layers
        if self.attention is None:
            self.attention = [None] * num_layers
        if len(self.attention) != num_layers:
            raise ValueError(
                f"attention has {len(self.attention)} entries, but the base model has {num_layers} layers; "
                "give one entry a layer, None for the native attention."
            )
        for index, entry in enumerate(self.attention):
            if entry is not None and (not isinstance(entry, dict) or "mechanism" not in entry):
                raise ValueError(
                    f'attention[{index}]={entry!r} must be None or a dict with the key "mechanism".'
                )
        # Special tokens and tying are the base model's; the library reads them from the outer config too.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            setattr(self, name, getattr(self.base_config, name, None))
        super().__post_init__(**kwargs)
        register_models()

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Returns the base config, where caches and generation look for sizes."""
        return self.base_config


__all__ = ["UndividedConfig"]
