"""Models over several ranks: latent attention whose cache and weights are split, not replicated."""

from __future__ import annotations

from undivided.distributed.attention import RankLatentAttention
from undivided.distributed.collectives import Collectives
from undivided.distributed.layout import Layout
from undivided.distributed.loading import load_distributed, open_distributed, rank_layouts

__all__ = [
    "Collectives",
    "Layout",
    "RankLatentAttention",
    "load_distributed",
    "open_distributed",
    "rank_layouts",
]
