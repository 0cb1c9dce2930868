"""Models with multi-head latent attention as the sources of a conversion."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from undivided.convert._host import host_sharing_weights
from undivided.convert._latent import fold_norm_weight
from undivided.layers.latent import LatentAttention
from undivided.layers.mla import MLAttention
from undivided.models.bases import check_supported
from undivided.models.causal_lm import UndividedForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mla_options(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Returns the options of MLA of every layer, beside what the base config tells.

    Raises:
        ValueError: a layer has another attention.
    """
    if isinstance(model, UndividedForCausalLM):
        entries = model.config.attention
        if model.config.base_config.model_type.startswith("deepseek"):
            entries = [{"mechanism": "mla"} if entry is None else entry for entry in entries]
    else:
        check_supported(model.config)
        latent = hasattr(model.config, "kv_lora_rank")
        entries = [{"mechanism": "mla"} if latent else None] * model.config.num_hidden_layers
    for index, entry in enumerate(entries):
        mechanism = "gqa" if entry is None else entry["mechanism"]
        if mechanism != "mla":
            raise ValueError(
                f'layer {index} has the mechanism "{mechanism}", but only "mla" can be cut; '
                "convert grouped-query attention with convert_transmla before."
            )
    return [{name: value for name, value in entry.items() if name != "mechanism"} for entry in entries]


def mla_sizes(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Returns the sizes of MLA of every layer."""
    config = model.config.base_config if isinstance(model, UndividedForCausalLM) else model.config
    return [MLAttention.native_dimensions(config) | entry for entry in mla_options(model)]


def mla_host(model: PreTrainedModel) -> UndividedForCausalLM:
    """Returns a host with MLA of its own in every layer, the weights of its norms folded, the rest shared.

    Exact: `kv_b <- kv_b diag(w)`, `w <- 1`; the normalisation then commutes with rotations of the latent.

    Raises:
        ValueError: a layer of the model has no MLA.
    """
    entries = mla_options(model)
    native = model.native if isinstance(model, UndividedForCausalLM) else model
    host = host_sharing_weights(native)
    host.generation_config = model.generation_config
    for index, (layer, options) in enumerate(zip(host.attention_layers(), entries, strict=True)):
        weights = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
        own = exchange_layer(host, index, MLAttention, weights, options)
        fold_norm_weight(own)
    return host


def exchange_layer(
    host: UndividedForCausalLM,
    index: int,
    layer_class: type[LatentAttention],
    weights: dict[str, Tensor],
    options: dict[str, Any],
) -> LatentAttention:
    """Puts a layer with the given tensors, not copied, into the host, and returns it."""
    with torch.device("meta"):
        layer = layer_class.from_config(host.config.base_config, index, **options)
    layer.load_state_dict(weights, assign=True)
    layer.train(host.training)
    host.set_attention(index, layer, **options)
    return layer


def latent_fingerprint(model: PreTrainedModel) -> str:
    """Returns a hash of the latents' projections, which every conversion before this one has changed."""
    found = hashlib.sha256()
    native = model.native if isinstance(model, UndividedForCausalLM) else model
    for layer in native.get_decoder().layers:
        for projection in (layer.self_attn.kv_a_proj_with_mqa, layer.self_attn.kv_b_proj):
            found.update(projection.weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()
