"""The torch operators around the Triton kernels: forward and backward with fakes, and the gradient between them."""

from __future__ import annotations

import torch

_INPUTS = "Tensor query, Tensor key, Tensor value"
_OPTIONS = "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale"
torch.library.define("undivided::neighborhood_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "undivided::neighborhood_backward",
    f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("undivided::neighborhood_forward", "default")
def _forward(*arguments):
    from undivided.ops.neighborhood import triton

    return triton.forward(*arguments)


@torch.library.impl("undivided::neighborhood_backward", "default")
def _backward(*arguments):
    from undivided.ops.neighborhood import backward

    return backward.backward(*arguments)


@torch.library.register_fake("undivided::neighborhood_forward")
def _forward_fake(query, key, value, *options):
    batch, heads, *size, _ = query.shape
    out = query.new_empty((batch, *size, heads, value.shape[-1])).movedim(-2, 1)
    return out, query.new_empty((batch, heads, *size), dtype=torch.float32)


@torch.library.register_fake("undivided::neighborhood_backward")
def _backward_fake(dout, dlse, out, lse, query, key, value, *options):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


class _Attend(torch.autograd.Function):
    """Out and log-sums, and the gradients of query, key and value from those of both."""

    @staticmethod
    def forward(ctx, query, key, value, *options):
        out, lse = torch.ops.undivided.neighborhood_forward(query, key, value, *options)
        ctx.save_for_backward(out, lse, query, key, value)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None:
            if dlse is None:
                return (None,) * (3 + len(ctx.options))
            dout = torch.zeros_like(ctx.saved_tensors[0])
        gradients = torch.ops.undivided.neighborhood_backward(dout, dlse, *ctx.saved_tensors, *ctx.options)
        return *gradients, *(None for _ in ctx.options)


def attend(query, key, value, neighborhood, scale, return_lse, relative_bias=None):
    """Runs the fused kernels; a relative bias is none of theirs, and never gets here."""
    options = (
        list(neighborhood.kernel_size),
        list(neighborhood.stride),
        list(neighborhood.dilation),
        list(neighborhood.is_causal),
        float(scale),
    )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        out, lse = _Attend.apply(query, key, value, *options)
    else:
        out, lse = torch.ops.undivided.neighborhood_forward(query, key, value, *options)
    return (out, lse) if return_lse else out
