"""Torch operators around the Triton kernels: forward and backward, their fakes, and the gradient."""

from __future__ import annotations

import torch

from undivided.ops.gaussian.composed import product

torch.library.define(
    "undivided::gaussian_forward",
    "(Tensor x, Tensor precision, Tensor moment, float eps) -> (Tensor, Tensor)",
)
torch.library.define(
    "undivided::gaussian_backward",
    "(Tensor dout, Tensor x, Tensor precision, Tensor moment, Tensor saved, float eps) -> (Tensor, Tensor)",
)


@torch.library.impl("undivided::gaussian_forward", "default")
def _forward(x, precision, moment, eps):
    from undivided.ops.gaussian import triton

    return triton.forward(x, precision, moment, eps)


@torch.library.impl("undivided::gaussian_backward", "default")
def _backward(dout, x, precision, moment, saved, eps):
    from undivided.ops.gaussian import triton

    return triton.backward(dout, x, precision, moment, saved, eps)


@torch.library.register_fake("undivided::gaussian_forward")
def _forward_fake(x, precision, moment, eps):
    outer, heads, _, inner = x.shape
    return x.new_empty(x.shape), x.new_empty(4, outer, heads, inner, dtype=torch.float32)


@torch.library.register_fake("undivided::gaussian_backward")
def _backward_fake(dout, x, precision, moment, saved, eps):
    outer, heads, _, inner = x.shape
    return x.new_empty(x.shape), x.new_empty(2, outer, heads, inner, dtype=torch.float32)


class Gate(torch.autograd.Function):
    """The gated values; gradients of x and of the product's precision and moment."""

    @staticmethod
    def forward(ctx, x, precision, moment, eps):
        out, saved = torch.ops.undivided.gaussian_forward(x, precision, moment, eps)
        ctx.save_for_backward(x, precision, moment, saved)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, dout):
        dx, parts = torch.ops.undivided.gaussian_backward(dout.contiguous(), *ctx.saved_tensors, ctx.eps)
        precision, moment = parts.sum((1, 3))
        return dx, precision, moment, None


def gate(x, offset, width, eps):
    """Gates through the kernels; the few parameters are torch's."""
    precision, moment = product(offset, width)
    return Gate.apply(x.contiguous(), precision, moment, float(eps))
