"""Primitives: tensor functions, each with an exact reference and fast backends.

Every operator takes `backend="auto"` or the name of one of its backends; `OPS` lists them.
"""

from __future__ import annotations

from undivided.ops import dense, latent_decode, merge
from undivided.ops._backends import Backend
from undivided.ops.dense import dense_attention
from undivided.ops.latent_decode import latent_attention
from undivided.ops.merge import merge_attention

OPS: dict[str, tuple[Backend, ...]] = {
    "dense_attention": dense.BACKENDS,
    "merge_attention": merge.BACKENDS,
    "latent_attention": latent_decode.BACKENDS,
}

__all__ = ["OPS", "Backend", "dense_attention", "latent_attention", "merge_attention"]
