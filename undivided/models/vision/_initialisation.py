"""The order of initialisation: what holds for all modules first, then what a module wants of its own."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def initialise(model: nn.Module, generic: Callable[[nn.Module], None]) -> None:
    """Applies `generic` to every module, then calls `initialise()` of those that have it.

    A rule for all linear layers, applied last, would overwrite what a layer has set for its own (positions as a
    convolution, small gates, ...); so a layer keeps that in its method `initialise`, and no order of construction
    matters. Children come before their parents, both times.
    """
    model.apply(generic)
    for module in model.modules():
        if module is not model and callable(own := getattr(module, "initialise", None)):
            own()


def truncated_normal(module: nn.Module) -> None:
    """Sets linear layers to a truncated normal distribution of deviation 0.02, norms to the identity, biases to zero.

    Convolutions and batch norms keep the defaults of torch.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        module.reset_parameters()
