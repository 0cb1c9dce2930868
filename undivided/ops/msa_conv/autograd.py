"""The torch operators around the Triton kernels: forward and backward with fakes, and the gradient between them."""

from __future__ import annotations

import torch

from undivided.ops.msa_conv._border import empty_like_tokens, empty_sums, is_depthwise

_INPUTS = "Tensor query, Tensor key, Tensor value"
_OPTIONS = "int[] kernel_size, int[] dilation, str border, float scale"
torch.library.define("undivided::msa_conv_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "undivided::msa_conv_backward",
    f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("undivided::msa_conv_forward", "default")
def _forward(query, key, value, *options):
    from undivided.ops.msa_conv import depthwise, triton

    kernels = depthwise if is_depthwise(query, value) else triton
    return kernels.forward(query, key, value, *options)


@torch.library.impl("undivided::msa_conv_backward", "default")
def _backward(dout, dlse, out, lse, query, key, value, *options):
    from undivided.ops.msa_conv import backward, depthwise

    kernels = depthwise if is_depthwise(query, value) else backward
    return kernels.backward(dout, dlse, out, lse, query, key, value, *options)


@torch.library.register_fake("undivided::msa_conv_forward")
def _forward_fake(query, key, value, *options):
    return empty_like_tokens(query, value.shape[-1]), empty_sums(query, value)


@torch.library.register_fake("undivided::msa_conv_backward")
def _backward_fake(dout, dlse, out, lse, query, key, value, *options):
    return tuple(empty_like_tokens(x, x.shape[-1]) for x in (query, key, value))


class _Attend(torch.autograd.Function):
    """Out and log-sums, and the gradients of query, key and value from those of both."""

    @staticmethod
    def forward(ctx, query, key, value, *options):
        out, lse = torch.ops.undivided.msa_conv_forward(query, key, value, *options)
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
        gradients = torch.ops.undivided.msa_conv_backward(dout, dlse, *ctx.saved_tensors, *ctx.options)
        return *gradients, *(None for _ in ctx.options)


def attend(query, key, value, kernel_size, dilation, border, scale, return_lse):
    """Runs the fused kernels."""
    options = (list(kernel_size), list(dilation), border, float(scale))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        out, lse = _Attend.apply(query, key, value, *options)
    else:
        out, lse = torch.ops.undivided.msa_conv_forward(query, key, value, *options)
    return (out, lse) if return_lse else out
