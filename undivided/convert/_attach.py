"""Another attention for a model as it is: no weight changes, and what is not exchanged is shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from undivided.convert._host import host_sharing_weights, native_model
from undivided.layers import causal_attention
from undivided.models.masks import leave_out_masks

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from undivided.models.causal_lm import UndividedForCausalLM


def attach(
    model: PreTrainedModel,
    mechanism: str,
    *,
    layers: Sequence[int] | None = None,
    predictor: nn.Module | None = None,
    **options: Any,
) -> UndividedForCausalLM:
    """Returns the model with another attention that takes its weights as they are: "core_context", "dhsa", "sqa", ...

    All weights are shared with the model given, which stays what it is. The result generates, is saved and is trained
    as any model of transformers.

    Args:
        model: a base model with grouped-query attention, or a host of one with no layer exchanged.
        mechanism: name of the attention.
        layers: indices of the layers to exchange; default all.
        predictor: the boundary predictor of "dhsa", a `BoundaryPredictor`.
        options: options of the mechanism, as in a config.

    Raises:
        ValueError: the model is not supported, the mechanism is unknown, has no such option or has weights that the
            model has not, or an index is no layer.

    Source: the mechanism's own.
    """
    native = native_model(model)
    layer_class = causal_attention(mechanism)
    host = host_sharing_weights(native)
    count = len(host.decoder_layers)
    chosen = range(count) if layers is None else sorted(set(layers))
    for layer_idx in chosen:
        if not 0 <= layer_idx < count:
            raise ValueError(f"layers has {layer_idx}, but the model has layers 0 to {count - 1}.")
    if predictor is not None and not hasattr(layer_class, "adopt"):
        raise ValueError(f'mechanism "{mechanism}" takes no predictor; "dhsa" does.')
    for layer_idx in chosen:
        source = host.attention_layers()[layer_idx]
        with torch.device("meta"):
            layer = layer_class.from_config(native.config, layer_idx, **options)
        weights: dict[str, torch.Tensor] = dict(source.named_parameters())
        if predictor is not None:
            weights |= layer.adopt(predictor)
        missing = sorted(set(layer.state_dict()) - set(weights))
        if missing:
            raise ValueError(
                f'mechanism "{mechanism}" has weights that the model has not, such as {missing[0]}; '
                f"{_advice(mechanism, missing[0])}."
            )
        layer.load_state_dict(weights, assign=True)
        layer.train(source.training)
        host.set_attention(layer_idx, layer, **options)
    if all(getattr(layer, "counts_positions", False) for layer in host.attention_layers()):
        leave_out_masks(host)
    return host


def _advice(mechanism: str, name: str) -> str:
    from undivided.convert import CONVERTERS

    if name.startswith("boundary_predictor"):
        return 'give a predictor (undivided convert --to dhsa trains one), or boundaries="fixed"'
    if mechanism in CONVERTERS:
        return f'convert the model with undivided.convert, to="{mechanism}"'
    return "train a model with it"
