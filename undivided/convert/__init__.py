"""Conversions: checkpoint in, checkpoint out; one file a method, each returns model and report."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

# attention of the result -> the function that makes it.
CONVERTERS: dict[str, str] = {
    "core_context": "undivided.convert.core_context:convert_core_context",
    "dha": "undivided.convert.dha:convert_dha",
    "edit-gate-swa": "undivided.convert.attention_editing:convert_edit_gate_swa",
    "edit-mla": "undivided.convert.attention_editing:convert_edit_mla",
    "dhsa": "undivided.convert.dhsa:convert_dhsa",
    "dma": "undivided.convert.dma:convert_dma",
    "gda-grow": "undivided.convert.gda_grow:convert_gda_grow",
    "gqa": "undivided.convert.kdgqa:mha_to_gqa",
    "kdgqa": "undivided.convert.kdgqa:convert_kdgqa",
    "mla": "undivided.convert.transmla:convert_transmla",
    "moh": "undivided.convert.moh:convert_moh",
    "nsa": "undivided.convert.nsa:convert_nsa",
    "sqa": "undivided.convert.sqa:convert_sqa",
    "tpla": "undivided.convert.tpla:convert_tpla",
    "x-ecomla": "undivided.convert.x_ecomla:convert_x_ecomla",
}

_EXPORTS = {path.split(":")[1]: path for path in CONVERTERS.values()} | {
    "attach": "undivided.convert._attach:attach",
    # A diffusion transformer is no checkpoint of a language model: not a target of the pipeline.
    "convert_sla": "undivided.convert.sla:convert_sla",
    # Nor is a vision transformer.
    "sparsify": "undivided.convert.sparsifiner:sparsify",
    "Report": "undivided.convert._report:Report",
    "convert_checkpoint": "undivided.convert.pipeline:convert_checkpoint",
}

__all__ = [
    "CONVERTERS",
    "Report",
    "attach",
    "convert_checkpoint",
    "convert_core_context",
    "convert_dhsa",
    "convert_dha",
    "convert_edit_gate_swa",
    "convert_edit_mla",
    "convert_dma",
    "convert_gda_grow",
    "convert_kdgqa",
    "convert_moh",
    "convert_nsa",
    "convert_sla",
    "convert_sqa",
    "convert_tpla",
    "convert_transmla",
    "convert_x_ecomla",
    "converter",
    "mha_to_gqa",
    "sparsify",
]


def converter(target: str) -> Callable[..., Any]:
    """Returns the function that converts a model to the attention `target`.

    Raises:
        ValueError: no converter makes it.
    """
    if target not in CONVERTERS:
        raise ValueError(f"target={target!r} is not one of {', '.join(map(repr, sorted(CONVERTERS)))}.")
    return _load(CONVERTERS[target])


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return _load(_EXPORTS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


def _load(path: str) -> Any:
    module, name = path.split(":")
    return getattr(import_module(module), name)
