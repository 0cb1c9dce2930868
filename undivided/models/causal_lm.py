"""The host: a native transformers model whose attention modules are exchanged, layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from undivided.layers import causal_attention
from undivided.layers._base import CausalAttention, one_cache
from undivided.models.auxiliary import AuxiliaryOutput, collected, mean_losses
from undivided.models.bases import cache_argument, keep_softcap
from undivided.models.configuration import UndividedConfig


class UndividedForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model with exchanged attention.

    `native` is the base model as transformers builds it; where the config names a mechanism for a layer, the layer's
    `self_attn` is that mechanism's module. Norms, MLPs, rotary embeddings, masks, caches and generation are the base
    model's own. Loads and saves as any transformers model, also through `AutoModelForCausalLM` after
    `import undivided`.

    Args:
        config: an `UndividedConfig`.
    """

    config_class = UndividedConfig
    base_model_prefix = "native"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["cache", "past_key_values"]

    def __init__(self, config: UndividedConfig) -> None:
        super().__init__(config)
        self._cache_argument = cache_argument()
        self.native = AutoModelForCausalLM.from_config(config.base_config)
        keep_softcap(self.native)
        self._no_split_modules = list(self.native._no_split_modules or [])
        for layer_idx, entry in enumerate(config.attention or []):
            if entry is not None:
                self._exchange(layer_idx, entry)
        self.post_init()

    @classmethod
    def from_native(cls, model: PreTrainedModel) -> UndividedForCausalLM:
        """Wraps a loaded base model without copying a weight; no layer is exchanged yet.

        Raises:
            ValueError: the base model is not supported.
        """
        config = UndividedConfig(base_config=model.config.to_dict())
        with torch.device("meta"):
            host = cls(config)
        keep_softcap(model)
        config.base_config = model.config
        host.native = model
        host.generation_config = model.generation_config
        host.train(model.training)
        return host

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder layers of the base model."""
        return self.native.get_decoder().layers

    def attention_layers(self) -> list[nn.Module]:
        """Returns the attention module of every layer, native or exchanged."""
        return [layer.self_attn for layer in self.decoder_layers]

    def set_attention(self, layer_idx: int, module: CausalAttention, **options: Any) -> None:
        """Puts `module` where layer `layer_idx` has its attention, and notes mechanism and options in the config."""
        weight = next(self.decoder_layers[layer_idx].mlp.parameters())
        self.decoder_layers[layer_idx].self_attn = module.to(weight.device, weight.dtype)
        self.config.attention[layer_idx] = {"mechanism": module.mechanism, **options}

    def _exchange(self, layer_idx: int, entry: dict[str, Any]) -> None:
        options = {name: value for name, value in entry.items() if name != "mechanism"}
        module = causal_attention(entry["mechanism"]).from_config(
            self.config.base_config, layer_idx, **options
        )
        self.set_attention(layer_idx, module, **options)

    def get_input_embeddings(self) -> nn.Module:
        return self.native.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.native.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.native.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.native.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.native.get_decoder()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the base model; arguments and outputs are those of the native causal language model.

        Its cache may be given as `past_key_values` or as `cache`, whatever transformers calls it.
        Where layers return losses beside their output, which they do when training, the output has `aux_losses`, name
        to mean over layers, and `aux_loss`, their weighted sum, which `loss` includes if there are labels. (With
        `return_dict=False` only the loss tells.)
        """
        arguments = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        arguments[self._cache_argument] = one_cache(type(self).__name__, cache, past_key_values)
        if any(getattr(layer, "shares_in_forward", False) for layer in self.attention_layers()):
            # What one layer finds and others use, for this forward alone.
            arguments["layer_memo"] = {}
        layers = [
            layer
            for layer in self.attention_layers()
            if layer.training and getattr(layer, "has_auxiliary", False)
        ]
        if not layers:
            return self.native(**arguments)
        with collected(layers) as found:
            output = self.native(**arguments)
        means, total = mean_losses(found)
        if not means:
            return output
        if isinstance(output, tuple):
            return output if labels is None else (output[0] + total.to(output[0].device), *output[1:])
        if labels is not None:
            output["loss"] = output["loss"] + total.to(output["loss"].device)
        return AuxiliaryOutput(**output, aux_losses=means, aux_loss=total)


__all__ = ["UndividedForCausalLM"]
