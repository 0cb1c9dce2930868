"""Multiply-adds of a vision model, counted on a forward pass that computes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# Operators of torch, whose formulas the counter has where they multiply.
_OWN = ("aten", "prim", "prims", "inductor", "profiler")
_CONVOLUTIONS = ("aten.convolution", "aten._convolution", "torchvision.deform_conv2d")
_PROJECTIONS = ("aten.mm", "aten.addmm")


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of one forward pass, by what they are spent on.

    Papers of vision models print `total`, as a rule under the name FLOPs. Formulas for an attention alone often have
    `attention`, without the projections. Norms, activations, softmax, pooling and additions are not counted.

    Args:
        convolutions: convolutions, a patch embedding among them.
        projections: linear layers: queries, keys, values, outputs, MLPs, the classifier.
        attention: products of two activations: queries with keys, weights with values; and operators of this library
            that have a formula.
    """

    convolutions: int
    projections: int
    attention: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.convolutions + self.projections + self.attention

    def __str__(self) -> str:
        giga = {name: f"{getattr(self, name) / 1e9:.2f} G" for name in ("total", *self.__dataclass_fields__)}
        return (
            f"{giga['total']} multiply-adds: {giga['convolutions']} in convolutions, {giga['projections']} in "
            f"projections, {giga['attention']} in attention"
        )


def multiply_adds(model: nn.Module, input_size: Sequence[int] | None = None) -> MultiplyAdds:
    """Counts the multiply-adds of a model for one image.

    The forward pass runs on shapes alone, so that a large model costs no memory beyond its own and its weights
    may be on the meta device. Counted is what runs on a CPU.

    Args:
        model: a module that takes images `[1, channels, height, width]`.
        input_size: `(channels, height, width)`; default that of `model.pretrained_cfg`.

    Raises:
        ValueError: no `input_size`, or the model runs an operator whose multiply-adds are unknown.
    """
    if input_size is None:
        input_size = getattr(model, "pretrained_cfg", {}).get("input_size")
    if input_size is None or len(input_size) != 3:
        raise ValueError(f"input_size={input_size} must be (channels, height, width).")
    counter = FlopCounterMode(display=False)
    # The fused attention of the CPU has no formula in the counter; its two products have.
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        named = itertools.chain(model.named_parameters(), model.named_buffers())
        state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in named}
        image = torch.empty(1, *input_size, dtype=next(model.parameters()).dtype)
        with _Formulas(counter.flop_registry), counter:
            torch.func.functional_call(model, state, (image,))
    flops = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    convolutions = sum(flops.pop(name, 0) for name in _CONVOLUTIONS)
    projections = sum(flops.pop(name, 0) for name in _PROJECTIONS)
    return MultiplyAdds(convolutions // 2, projections // 2, sum(flops.values()) // 2)


class _Formulas(TorchDispatchMode):
    """Refuses operators that are not torch's and that the counter would pass over."""

    def __init__(self, registry: dict[Any, Any]) -> None:
        super().__init__()
        self._registry = registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in _OWN and func._overloadpacket not in self._registry:
            raise ValueError(
                f"the multiply-adds of {func._overloadpacket} are unknown; give its formula with "
                "torch.utils.flop_counter.register_flop_formula."
            )
        return func(*args, **(kwargs or {}))
