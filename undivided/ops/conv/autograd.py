"""The torch operators around the Triton kernels: forward and backward with fakes, and the gradient between them."""

from __future__ import annotations

import torch

_INPUTS = (
    "Tensor latents, Tensor? depthwise_weight, Tensor? depthwise_bias, Tensor? grouped_weight, Tensor? grouped_bias, "
    "Tensor? temperature, Tensor? cos, Tensor? sin, Tensor? history, SymInt prefix, int num_heads, "
    "int num_key_value_heads, bool qk_mean, bool qk_norm, bool value_shift"
)
torch.library.define("undivided::convolved_heads_forward", f"({_INPUTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "undivided::convolved_heads_backward",
    f"(Tensor dquery, Tensor dkey, Tensor dvalue, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("undivided::convolved_heads_forward", "default")
def _forward(*arguments):
    from undivided.ops.conv import triton

    return triton.forward(*arguments)


@torch.library.impl("undivided::convolved_heads_backward", "default")
def _backward(dquery, dkey, dvalue, latents, *arguments):
    from undivided.ops.conv import backward

    gradients = backward.backward(dquery, dkey, dvalue, latents, *arguments)
    return tuple(latents.new_empty(0) if gradient is None else gradient for gradient in gradients)


@torch.library.register_fake("undivided::convolved_heads_forward")
def _forward_fake(latents, *arguments):
    prefix, num_heads, num_key_value_heads = arguments[8:11]
    kinds = (num_heads, num_key_value_heads, num_key_value_heads if arguments[-1] else 0)
    batch, rows, channels = latents.shape
    return tuple(
        latents.new_empty(batch, rows - prefix, heads, channels // sum(kinds)).transpose(1, 2)
        for heads in kinds
    )


@torch.library.register_fake("undivided::convolved_heads_backward")
def _backward_fake(dquery, dkey, dvalue, latents, *arguments):
    return tuple(
        latents.new_empty(0) if x is None else x.new_empty(x.shape) for x in (latents, *arguments[:5])
    )


class ConvolvedHeads(torch.autograd.Function):
    """Query, key and value of the forward, and the gradients of latents, weights and temperature."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments[:9])
        ctx.options = arguments[9:]
        return torch.ops.undivided.convolved_heads_forward(*arguments)

    @staticmethod
    def backward(ctx, *gradients):
        gradients = torch.ops.undivided.convolved_heads_backward(*gradients, *ctx.saved_tensors, *ctx.options)
        given = (x is not None for x in ctx.saved_tensors[:6])
        gradients = (gradient if there else None for gradient, there in zip(gradients, given, strict=True))
        return *gradients, *(None for _ in range(3 + len(ctx.options)))


def run(
    latents, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias, temperature, cos, sin, history, prefix,
    num_heads, num_key_value_heads, qk_mean, qk_norm, value_shift,
):  # fmt: skip
    arguments = (
        latents, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias, temperature, cos, sin, history,
        prefix, num_heads, num_key_value_heads, bool(qk_mean), bool(qk_norm), bool(value_shift),
    )  # fmt: skip
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:6]):
        return ConvolvedHeads.apply(*arguments)
    return torch.ops.undivided.convolved_heads_forward(*arguments)
