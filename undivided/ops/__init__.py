"""Primitives: tensor functions, each with an exact reference and fast backends.

Every operator takes `backend="auto"` or the name of one of its backends; `OPS` lists them.
"""

from __future__ import annotations

from undivided.ops import (
    conv,
    dense,
    differential,
    gaussian,
    grouped,
    latent_append,
    latent_decode,
    linear,
    merge,
    neighborhood,
    positional,
    relative,
    routed,
    scan,
    transport,
)
from undivided.ops._backends import Backend
from undivided.ops.conv import convolved_heads
from undivided.ops.dense import dense_attention
from undivided.ops.differential import differential_attention
from undivided.ops.gaussian import gaussian_gate
from undivided.ops.grouped import grouped_attention
from undivided.ops.latent_append import append_latent
from undivided.ops.latent_decode import latent_attention
from undivided.ops.linear import linear_attention
from undivided.ops.merge import merge_attention
from undivided.ops.neighborhood import neighborhood_attention
from undivided.ops.positional import gated_positional_attention
from undivided.ops.relative import relative_attention
from undivided.ops.routed import routed_attention
from undivided.ops.scan import gated_scan
from undivided.ops.transport import column_attention, sinkhorn_attention

OPS: dict[str, tuple[Backend, ...]] = {
    "dense_attention": dense.BACKENDS,
    "merge_attention": merge.BACKENDS,
    "latent_attention": latent_decode.BACKENDS,
    "append_latent": latent_append.BACKENDS,
    "differential_attention": differential.BACKENDS,
    "convolved_heads": conv.BACKENDS,
    "relative_attention": relative.BACKENDS,
    "routed_attention": routed.BACKENDS,
    "gaussian_gate": gaussian.BACKENDS,
    "grouped_attention": grouped.BACKENDS,
    "neighborhood_attention": neighborhood.BACKENDS,
    "linear_attention": linear.BACKENDS,
    "gated_scan": scan.BACKENDS,
    "gated_positional_attention": positional.BACKENDS,
    "column_attention": transport.COLUMN_BACKENDS,
    "sinkhorn_attention": transport.SINKHORN_BACKENDS,
}

__all__ = [
    "OPS",
    "Backend",
    "append_latent",
    "column_attention",
    "convolved_heads",
    "dense_attention",
    "differential_attention",
    "gated_positional_attention",
    "gated_scan",
    "gaussian_gate",
    "grouped_attention",
    "latent_attention",
    "linear_attention",
    "merge_attention",
    "neighborhood_attention",
    "relative_attention",
    "routed_attention",
    "sinkhorn_attention",
]
