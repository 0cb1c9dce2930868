"""Losses that layers return beside their output: collected during one forward of a model, and nowhere kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

Found = list[tuple[nn.Module, dict[str, torch.Tensor]]]


@dataclass
class AuxiliaryOutput(CausalLMOutputWithPast):
    """The output of a causal language model, with the losses of its layers.

    Attributes:
        aux_losses: name of a loss to its mean over the layers that return it, before any coefficient.
        aux_loss: what they add to `loss`: the sum of these means, each layer times its coefficient.
    """

    aux_losses: dict[str, torch.Tensor] | None = None
    aux_loss: torch.Tensor | None = None


@contextmanager
def collected(layers: Sequence[nn.Module]) -> Iterator[Found]:
    """Within this context what `layers` return beside their output is listed.

    The hooks only note what a layer returned: an operation in them would be missing when a checkpointed layer is run
    again in the backward pass, which happens after the context has ended.

    Raises:
        ValueError: within the context, if a reentrant checkpoint takes the gradient of a loss away.
    """
    found: Found = []
    with_gradient = torch.is_grad_enabled()
    # The hooks are on shared modules, and other threads may be running them.
    thread = threading.get_ident()

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        if threading.get_ident() != thread or not isinstance(output[1], dict):
            return
        if with_gradient and not torch.is_grad_enabled():
            raise ValueError(
                f"the losses of {type(layer).__name__} have no gradient: checkpoints of activations must not be "
                'reentrant; enable them with {"use_reentrant": False}.'
            )
        found.append((layer, output[1]))

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def mean_losses(found: Found) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns the mean of each loss over its layers, and the sum of these means, each layer times its coefficient."""
    plain: dict[str, list[torch.Tensor]] = {}
    weighted: dict[str, list[torch.Tensor]] = {}
    for layer, losses in found:
        for name, loss in losses.items():
            plain.setdefault(name, []).append(loss)
            weighted.setdefault(name, []).append(layer.auxiliary_coefficients.get(name, 0.0) * loss)
    means = {name: _stack(losses).mean() for name, losses in plain.items()}
    sums = [_stack(losses).mean() for losses in weighted.values()]
    return means, _stack(sums).sum() if sums else torch.zeros(())


def _stack(losses: list[torch.Tensor]) -> torch.Tensor:
    # Layers may lie on different devices.
    return torch.stack([loss.to(losses[0].device) for loss in losses])
