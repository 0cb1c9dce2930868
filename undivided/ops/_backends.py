"""How an operator chooses among its backends, and how it refuses.

A backend is two functions: `run`, with the arguments of the operator, and `reasons`, with the same arguments,
which returns the sentences that say why this backend cannot run them (an empty list when it can). The one check
serves three ends: it chooses for `backend="auto"`, it writes the error of a refusal, and the support table of the
documentation is printed from it. An explicit backend never silently becomes another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


def _always() -> list[str]:
    return []


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Args:
        name: what the user passes as `backend=`.
        run: the implementation; takes the operator's checked arguments by keyword.
        reasons: takes the same keywords; sentences that say why `run` cannot take them, empty when it can.
        availability: sentences that say why this machine cannot run the backend at all, empty when it can.
        automatic: device types on which `backend="auto"` may choose it.
    """

    name: str
    run: Callable[..., Any]
    reasons: Callable[..., list[str]]
    availability: Callable[[], list[str]] = _always
    automatic: tuple[str, ...] = ("cpu", "cuda")


def describe(arguments: dict[str, Any]) -> str:
    """Returns the arguments in words: shape, dtype and device of tensors, the value of what is set."""
    words = []
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            words.append(f"{name} {list(value.shape)} {dtype} on {value.device.type}")
        elif value is not None and value is not False:
            words.append(f"{name}={value}")
    return ", ".join(words)


def select(
    op: str, backends: Sequence[Backend], requested: str, device: torch.device, arguments: dict[str, Any]
) -> Backend:
    """Returns the backend that runs `arguments`: the requested one, or for "auto" the first able one.

    Raises:
        ValueError: if `requested` is not the name of a backend of this operator, or it cannot run the arguments
            (the message has its reasons and the backends that are able), or none can.
    """
    if requested == "auto":
        refusals = []
        for backend in backends:
            if device.type not in backend.automatic:
                continue
            reasons = backend.reasons(**arguments)
            if not reasons:
                return backend
            refusals.append(f'"{backend.name}": {"; ".join(reasons)}')
        raise ValueError(f"no backend of {op} can run {describe(arguments)}. {'. '.join(refusals)}.")

    for backend in backends:
        if backend.name == requested:
            reasons = backend.reasons(**arguments)
            if not reasons:
                return backend
            able = [f'"{b.name}"' for b in backends if not b.reasons(**arguments)]
            raise ValueError(
                f'backend "{requested}" cannot run this: {"; ".join(reasons)}. '
                f"Able: {', '.join(able) or 'none'}. Inputs of {op}: {describe(arguments)}."
            )
    names = ", ".join(f'"{name}"' for name in ["auto", *(b.name for b in backends)])
    raise ValueError(f"backend={requested!r} is not one of {names} that {op} has.")
