"""Compiled training: attention, MLP and norms of a decoder are compiled once and serve every layer of the same shapes.

A compilation of a whole model unrolls its layers and takes minutes; that of one layer's parts takes seconds, and what
it saves is the same: the element-wise work between matrix products.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Shapes and modes (teacher without gradients, student with them) that a class of layers may be compiled for.
_MOST_COMPILATIONS = 64


@contextmanager
def compiled_layers(
    *models: Any, parts: Sequence[str] = ("self_attn", "mlp", "norm"), backend: str = "inductor"
) -> Iterator[None]:
    """Within the context, parts of every decoder layer of the models run compiled; attention only without a cache.

    Hooks on the parts are called outside of what is compiled.

    Args:
        models: causal language models, native or hosts.
        parts: which of a layer's children: those whose name ends with one of these ("norm" names both norms).
        backend: of `torch.compile`.

    Raises:
        ValueError: no child of a layer has such a name.
    """
    chosen: list[nn.Module] = [
        part
        for model in models
        for layer in model.get_decoder().layers
        for name, part in layer.named_children()
        if name.endswith(tuple(parts))
    ]
    if not chosen:
        raise ValueError(
            f"parts={tuple(parts)} name no child of a decoder layer; self_attn, mlp and norm do."
        )
    try:
        for part in chosen:
            compiled = torch.compile(part.forward, dynamic=False, backend=backend)
            part.forward = _without_index(part, compiled) if hasattr(part, "layer_idx") else compiled
        with torch._dynamo.config.patch(recompile_limit=_MOST_COMPILATIONS), warnings.catch_warnings():
            # What reaches a layer is no leaf, and torch looks at its gradient while it compiles.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            yield
    finally:
        for part in chosen:
            # The class has the method that the module's own attribute hides.
            part.__dict__.pop("forward", None)


def _without_index(layer: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Calls what is compiled with a layer index of 0, so that all layers share it; the index only finds a cache."""
    plain = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None:
            return plain(*args, **kwargs)
        index, layer.layer_idx = layer.layer_idx, 0
        try:
            return compiled(*args, **kwargs)
        finally:
            layer.layer_idx = index

    return forward
