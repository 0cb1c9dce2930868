"""Primitives: tensor functions, each with an exact reference and fast backends.

Every operator takes `backend="auto"` or the name of one of its backends; `OPS` lists them.
"""

from __future__ import annotations

from undivided.ops import dense, differential, latent_decode, merge, transport
from undivided.ops._backends import Backend
from undivided.ops.dense import dense_attention
from undivided.ops.differential import differential_attention
from undivided.ops.latent_decode import latent_attention
from undivided.ops.merge import merge_attention
from undivided.ops.transport import column_attention, sinkhorn_attention

OPS: dict[str, tuple[Backend, ...]] = {
    "dense_attention": dense.BACKENDS,
    "merge_attention": merge.BACKENDS,
    "latent_attention": latent_decode.BACKENDS,
    "differential_attention": differential.BACKENDS,
    "column_attention": transport.COLUMN_BACKENDS,
    "sinkhorn_attention": transport.SINKHORN_BACKENDS,
}

__all__ = [
    "OPS",
    "Backend",
    "column_attention",
    "dense_attention",
    "differential_attention",
    "latent_attention",
    "merge_attention",
    "sinkhorn_attention",
]
