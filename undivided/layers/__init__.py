"""Attention layers, one file a mechanism, built from `undivided.ops` only."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from undivided.layers._base import CausalAttention

# mechanism -> class; the name is what a config stores for each layer.
CAUSAL_MECHANISMS: dict[str, str] = {
    "gqa": "undivided.layers.gqa:GQAttention",
    "sqa": "undivided.layers.sqa:SQAttention",
    "rcmha": "undivided.layers.rcmha:RelativeConvAttention",
    "gaam": "undivided.layers.gaam:GaussianGQAttention",
    "gate_swa": "undivided.layers.gate_swa:GateSWAttention",
    "neighborhood": "undivided.layers.causal_neighborhood:CausalNeighborhoodAttention",
    "gda": "undivided.layers.gda:GDAttention",
    "gda_v2": "undivided.layers.gda_v2:GDAttentionV2",
    "gdla": "undivided.layers.gdla:GDLAttention",
    "kdgqa": "undivided.layers.kdgqa:KDGQAttention",
    "dha": "undivided.layers.dha:DecoupledHeadAttention",
    "moh": "undivided.layers.moh:MoHAttention",
    "cca": "undivided.layers.cca:CCAttention",
    "dma": "undivided.layers.dma:DynamicMaskAttention",
    "core_context": "undivided.layers.core_context:CoreContextAttention",
    "dhsa": "undivided.layers.dhsa:DHSAttention",
    "nsa": "undivided.layers.nsa:NSAttention",
    "mla": "undivided.layers.mla:MLAttention",
    "gla": "undivided.layers.gla:GLAttention",
    "tpla": "undivided.layers.tpla:TPLAttention",
}


def causal_attention(mechanism: str) -> type[CausalAttention]:
    """Returns the layer class of a mechanism of language models.

    Raises:
        ValueError: no mechanism has this name.
    """
    if mechanism not in CAUSAL_MECHANISMS:
        raise ValueError(f"mechanism={mechanism!r} is not one of {', '.join(sorted(CAUSAL_MECHANISMS))}.")
    module, name = CAUSAL_MECHANISMS[mechanism].split(":")
    return getattr(import_module(module), name)


__all__ = ["CAUSAL_MECHANISMS", "causal_attention"]
