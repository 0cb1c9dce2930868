"""The torch operator around the Triton kernel, with its fake; it has no gradient."""

from __future__ import annotations

import torch

torch.library.define(
    "undivided::listed_forward",
    "(Tensor query, Tensor key, Tensor value, Tensor indices, float scale) -> Tensor",
)


@torch.library.impl("undivided::listed_forward", "default")
def _forward(*arguments):
    from undivided.ops.listed import triton

    return triton.forward(*arguments)


@torch.library.register_fake("undivided::listed_forward")
def _forward_fake(query, key, value, indices, scale):
    return query.new_empty((*query.shape[:3], value.shape[-1]))


def attend(query, key, value, indices, scale):
    """Runs the kernel."""
    return torch.ops.undivided.listed_forward(query, key, value, indices, scale)
