"""Models over several ranks: latent attention whose cache and weights are split, not replicated."""

from __future__ import annotations

from undivided.distributed.attention import RankLatentAttention
from undivided.distributed.collectives import Collectives, LostPeerError
from undivided.distributed.handover import generate_separated, prefill_and_send, receive_and_decode
from undivided.distributed.layout import Layout
from undivided.distributed.loading import load_distributed, open_distributed, rank_layouts
from undivided.distributed.roles import Roles
from undivided.distributed.separation import Separation

__all__ = [
    "Collectives",
    "Layout",
    "LostPeerError",
    "RankLatentAttention",
    "Roles",
    "Separation",
    "generate_separated",
    "load_distributed",
    "open_distributed",
    "prefill_and_send",
    "rank_layouts",
    "receive_and_decode",
]
