"""The model a conversion starts from, and hosts that share its weights."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from undivided.models.bases import check_supported
from undivided.models.causal_lm import UndividedForCausalLM


def native_model(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the base model of `model`: itself, or what a host holds whose layers were not exchanged yet.

    Raises:
        ValueError: the base model is not supported, or its attention is not the grouped-query attention it
            was made with.
    """
    if isinstance(model, UndividedForCausalLM):
        for layer_idx, entry in enumerate(model.config.attention):
            if entry is not None:
                raise ValueError(
                    f'layer {layer_idx} has the mechanism "{entry["mechanism"]}" already; '
                    "give a model whose attention is that of its base model."
                )
        model = model.native
    check_supported(model.config)
    if hasattr(model.config, "kv_lora_rank"):
        raise ValueError(
            f'model_type "{model.config.model_type}" has latent attention already; '
            "give a model with grouped-query attention."
        )
    return model


def host_sharing_weights(model: PreTrainedModel) -> UndividedForCausalLM:
    """Returns a host of a copy of `model` whose modules are new and whose weights are those of `model`.

    Layers can be exchanged in it while `model` stays what it is; what is not exchanged takes no memory.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return UndividedForCausalLM.from_native(copy.deepcopy(model, shared))
