"""Primitives: tensor functions, each with an exact reference and fast backends.

Every operator takes `backend="auto"` or the name of one of its backends; `OPS` lists them.
"""

from __future__ import annotations

from undivided.ops import (
    block_map,
    compressed,
    conv,
    core_context,
    dense,
    differential,
    dynamic_mask,
    gathered,
    gaussian,
    grouped,
    latent_append,
    latent_decode,
    linear,
    listed,
    merge,
    msa_conv,
    neighborhood,
    pooling,
    positional,
    relative,
    routed,
    scan,
    selected,
    sparse_linear,
    strips,
    transport,
)
from undivided.ops._backends import Backend
from undivided.ops.compressed import compressed_attention, select_compressed
from undivided.ops.conv import convolved_heads
from undivided.ops.core_context import core_context_attention, pool_core_tokens
from undivided.ops.dense import dense_attention
from undivided.ops.differential import differential_attention
from undivided.ops.dynamic_mask import dynamic_mask_attention
from undivided.ops.gathered import gathered_attention
from undivided.ops.gaussian import gaussian_gate
from undivided.ops.grouped import grouped_attention
from undivided.ops.latent_append import append_latent
from undivided.ops.latent_decode import latent_attention
from undivided.ops.linear import linear_attention
from undivided.ops.listed import listed_attention
from undivided.ops.merge import merge_attention
from undivided.ops.msa_conv import msa_conv_attention
from undivided.ops.neighborhood import neighborhood_attention
from undivided.ops.pooling import generalised_mean
from undivided.ops.positional import gated_positional_attention
from undivided.ops.relative import relative_attention
from undivided.ops.routed import routed_attention
from undivided.ops.scan import gated_scan
from undivided.ops.selected import selected_attention
from undivided.ops.sparse_linear import block_classes, sparse_linear_attention
from undivided.ops.strips import strip_attention
from undivided.ops.transport import column_attention, sinkhorn_attention

OPS: dict[str, tuple[Backend, ...]] = {
    "dense_attention": dense.BACKENDS,
    "merge_attention": merge.BACKENDS,
    "latent_attention": latent_decode.BACKENDS,
    "append_latent": latent_append.BACKENDS,
    "differential_attention": differential.BACKENDS,
    "dynamic_mask_attention": dynamic_mask.BACKENDS,
    "convolved_heads": conv.BACKENDS,
    "pool_core_tokens": core_context.POOL_BACKENDS,
    "core_context_attention": core_context.BACKENDS,
    "relative_attention": relative.BACKENDS,
    "routed_attention": routed.BACKENDS,
    "gathered_attention": gathered.BACKENDS,
    "selected_attention": selected.BACKENDS,
    "compressed_attention": compressed.BACKENDS,
    "select_compressed": compressed.CHOICE_BACKENDS,
    "sparse_linear_attention": sparse_linear.BACKENDS,
    "gaussian_gate": gaussian.BACKENDS,
    "listed_attention": listed.BACKENDS,
    "grouped_attention": grouped.BACKENDS,
    "neighborhood_attention": neighborhood.BACKENDS,
    "msa_conv_attention": msa_conv.BACKENDS,
    "linear_attention": linear.BACKENDS,
    "gated_scan": scan.BACKENDS,
    "gated_positional_attention": positional.BACKENDS,
    "generalised_mean": pooling.BACKENDS,
    "strip_attention": strips.BACKENDS,
    "column_attention": transport.COLUMN_BACKENDS,
    "sinkhorn_attention": transport.SINKHORN_BACKENDS,
}

__all__ = [
    "OPS",
    "Backend",
    "append_latent",
    "block_classes",
    "block_map",
    "column_attention",
    "compressed_attention",
    "convolved_heads",
    "core_context_attention",
    "dense_attention",
    "differential_attention",
    "dynamic_mask_attention",
    "gated_positional_attention",
    "gated_scan",
    "gathered_attention",
    "generalised_mean",
    "gaussian_gate",
    "grouped_attention",
    "latent_attention",
    "linear_attention",
    "listed_attention",
    "merge_attention",
    "msa_conv_attention",
    "neighborhood_attention",
    "pool_core_tokens",
    "relative_attention",
    "routed_attention",
    "select_compressed",
    "selected_attention",
    "sinkhorn_attention",
    "sparse_linear_attention",
    "strip_attention",
]
