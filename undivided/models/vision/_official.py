"""Released weights, whose authors use other names, into our models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from undivided.models.vision._backbone import VisionBackbone

# Keys under which training scripts keep the weights in a checkpoint.
_WRAPPERS = ("state_dict", "model")
_SHOWN = 4


@dataclass(frozen=True)
class Renaming:
    """How the names of one release become ours.

    Args:
        rules: patterns and replacements, applied to each name with `re.sub`, all of them, in order.
        ignored: pattern of names that hold no weights (tables of indices), matched from the start.
    """

    rules: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
    ignored: str | None = None

    def apply(self, name: str) -> str | None:
        """Returns our name, or None if it is ignored."""
        if self.ignored is not None and re.match(self.ignored, name):
            return None
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name


def load_official(
    model: VisionBackbone, state_dict: Mapping[str, Any], *, resize_position_bias: bool = False
) -> None:
    """Loads weights under the authors' names, all of them or none.

    Args:
        model: a model of this library.
        state_dict: name -> tensor; also a checkpoint that has it under "state_dict" or "model", and names behind
            "module.".
        resize_position_bias: resize tables of relative positions, learned for another window size, by bicubic
            interpolation.

    Raises:
        ValueError: the names or shapes are not those of this model in any release that it knows; says what is missing,
            what is too much, and what has another shape.
    """
    own = model.state_dict()
    renamed_state = renamed(state_dict, model)
    missing = [name for name in own if name not in renamed_state]
    unexpected = [name for name in renamed_state if name not in own]
    if missing or unexpected:
        releases = ", ".join(model.renamings) or "none"
        raise ValueError(
            f"state_dict is not one of {type(model).__name__} as built here (known releases: {releases}). "
            f"Missing: {_some(missing)}. Not of this model: {_some(unexpected)}."
        )
    for name, tensor in renamed_state.items():
        if tensor.shape == own[name].shape:
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        can_resize = hasattr(module, "resized")
        if not (can_resize and resize_position_bias):
            hint = "; resize_position_bias=True would resize it." if can_resize else "."
            raise ValueError(
                f"{name} has shape {list(tensor.shape)} in state_dict, but {list(own[name].shape)} in the model{hint}"
            )
        renamed_state[name] = module.resized(tensor)
    model.load_state_dict(renamed_state)


def renamed(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weights under our names; those of a release are recognised by which renaming fits best.

    What no renaming knows keeps its name, so that whoever loads it can say so. timm calls this on what it downloads.
    """
    for key in _WRAPPERS:
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    if state_dict and all(name.startswith("module.") for name in state_dict):
        state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    own = model.state_dict()
    candidates = [dict(state_dict)]
    for renaming in getattr(model, "renamings", {}).values():
        candidate: dict[str, torch.Tensor] = {}
        for name, tensor in state_dict.items():
            new = renaming.apply(name)
            if new is not None:
                # Two names for one of ours: the second is not of this release, and must not vanish.
                candidate[name if new in candidate else new] = tensor
        candidates.append(candidate)
    best = max(candidates, key=lambda candidate: len(own.keys() & candidate.keys()))
    return {name: _fitted(tensor, own.get(name)) for name, tensor in best.items()}


def _fitted(tensor: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """A linear layer and a convolution of one pixel hold the same numbers in other shapes."""
    if own is not None and tensor.squeeze().shape == own.squeeze().shape:
        return tensor.reshape(own.shape)
    return tensor


def _some(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
