"""The torch operators around the Triton kernels: forward and backward with fakes, and the gradient between them."""

from __future__ import annotations

import torch

torch.library.define(
    "undivided::generalised_mean_forward", "(Tensor x, Tensor power, float eps) -> (Tensor, Tensor)"
)
torch.library.define("undivided::generalised_mean_inference", "(Tensor x, Tensor power, float eps) -> Tensor")
torch.library.define(
    "undivided::generalised_mean_backward",
    "(Tensor dout, Tensor x, Tensor power, Tensor log_out, float eps) -> (Tensor, Tensor)",
)


@torch.library.impl("undivided::generalised_mean_forward", "default")
def _forward(*arguments):
    from undivided.ops.pooling import triton

    return triton.forward(*arguments)


@torch.library.impl("undivided::generalised_mean_inference", "default")
def _inference(*arguments):
    from undivided.ops.pooling import triton

    return triton.forward(*arguments, with_log=False)[0]


@torch.library.impl("undivided::generalised_mean_backward", "default")
def _backward(*arguments):
    from undivided.ops.pooling import triton

    return triton.backward(*arguments)


@torch.library.register_fake("undivided::generalised_mean_forward")
def _forward_fake(x, power, eps):
    shape = x.shape[0], x.shape[2]
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("undivided::generalised_mean_inference")
def _inference_fake(x, power, eps):
    return x.new_empty((x.shape[0], x.shape[2]))


@torch.library.register_fake("undivided::generalised_mean_backward")
def _backward_fake(dout, x, power, log_out, eps):
    return torch.empty_like(x), power.new_empty(power.shape, dtype=torch.float32)


class GeneralisedMean(torch.autograd.Function):
    """The mean, and the gradients of tokens and exponents."""

    @staticmethod
    def forward(ctx, x, power, eps):
        out, log_out = torch.ops.undivided.generalised_mean_forward(x, power, eps)
        ctx.save_for_backward(x, power, log_out)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, dout):
        dx, dpower = torch.ops.undivided.generalised_mean_backward(dout, *ctx.saved_tensors, ctx.eps)
        return dx, dpower.to(ctx.saved_tensors[1].dtype), None


def pool(x, power, eps, mask):
    if torch.is_grad_enabled() and (x.requires_grad or power.requires_grad):
        return GeneralisedMean.apply(x, power, float(eps))
    return torch.ops.undivided.generalised_mean_inference(x, power, float(eps))
