"""Options that several verbs read alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def dtype_of(name: str | None) -> torch.dtype | None:
    """Returns the torch dtype of a name, None for None.

    Raises:
        ValueError: no dtype for weights has this name.
    """
    import torch

    if name is None:
        return None
    if name not in _DTYPES:
        raise ValueError(f"--dtype {name} is not one of {', '.join(_DTYPES)}.")
    return getattr(torch, name)
