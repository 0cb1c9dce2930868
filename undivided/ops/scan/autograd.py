"""The torch operators around the Triton kernels: forward and backward with fakes, and the gradient between them."""

from __future__ import annotations

import torch

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor log_gate, Tensor? reverse_log_gate, float scale"
torch.library.define("undivided::gated_scan_forward", f"({_INPUTS}) -> Tensor")
torch.library.define(
    "undivided::gated_scan_backward", f"(Tensor dout, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl("undivided::gated_scan_forward", "default")
def _forward(*arguments):
    from undivided.ops.scan import triton

    return triton.forward(*arguments)


@torch.library.impl("undivided::gated_scan_backward", "default")
def _backward(*arguments):
    from undivided.ops.scan import backward

    return backward.backward(*arguments)


def _by_token(x):
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


@torch.library.register_fake("undivided::gated_scan_forward")
def _forward_fake(query, key, value, log_gate, reverse_log_gate, scale):
    return _by_token(value)


@torch.library.register_fake("undivided::gated_scan_backward")
def _backward_fake(dout, query, key, value, log_gate, reverse_log_gate, scale):
    gates = (log_gate, log_gate if reverse_log_gate is None else reverse_log_gate)
    return tuple(map(_by_token, (query, key, value, *gates)))


class GatedScan(torch.autograd.Function):
    """The output of the forward, and the gradients of all its tensors; states are computed again."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)
        return torch.ops.undivided.gated_scan_forward(*inputs)

    @staticmethod
    def backward(ctx, dout):
        *gradients, dreverse = torch.ops.undivided.gated_scan_backward(dout, *ctx.saved_tensors, ctx.scale)
        return *gradients, None if ctx.saved_tensors[-1] is None else dreverse, None


def scan(query, key, value, log_gate, reverse_log_gate, scale):
    tensors = (query, key, value, log_gate, reverse_log_gate)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return GatedScan.apply(*tensors, float(scale))
    return torch.ops.undivided.gated_scan_forward(*tensors, float(scale))
