"""The torch operators of the fused linear attention, forward and backward, and the gradient between them."""

from __future__ import annotations

import torch

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? local, Tensor? modulation, Tensor? cos, Tensor? sin, "
    "str feature_map, bool context, float scale, bool normalize, float eps"
)
torch.library.define("undivided::linear_attention_forward", f"({_INPUTS}) -> Tensor")
torch.library.define(
    "undivided::linear_attention_backward",
    f"(Tensor dout, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("undivided::linear_attention_forward", "default")
def _forward(query, key, value, local, modulation, cos, sin, feature_map, context, scale, normalize, eps):
    from undivided.ops.linear import triton

    return triton.forward(
        query, key, value, feature_map, context, scale, cos, sin, local, modulation, normalize, eps
    )


@torch.library.impl("undivided::linear_attention_backward", "default")
def _backward(*arguments):
    from undivided.ops.linear import backward

    return backward.backward(*arguments)


@torch.library.register_fake("undivided::linear_attention_forward")
def _forward_fake(query, key, value, *arguments):
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)


@torch.library.register_fake("undivided::linear_attention_backward")
def _backward_fake(dout, query, key, value, local, modulation, *arguments):
    return tuple(
        query.new_empty(0) if x is None else x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)
        for x in (query, key, value, local, modulation)
    )


class LinearAttention(torch.autograd.Function):
    """The fused output and its gradients; nothing is kept from the forward but its inputs."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs[:7])
        ctx.options = inputs[7:]
        return torch.ops.undivided.linear_attention_forward(*inputs)

    @staticmethod
    def backward(ctx, dout):
        found = torch.ops.undivided.linear_attention_backward(dout, *ctx.saved_tensors, *ctx.options)
        gradients = [
            None if x is None else gradient for x, gradient in zip(ctx.saved_tensors, found, strict=False)
        ]
        return *gradients, *(None for _ in range(2 + len(ctx.options)))


def attend(
    query, key, value, feature_map, key_weight, scale, cos, sin, token_mask, local, modulation, normalize, eps
):
    options = (feature_map, key_weight is not None, float(scale), bool(normalize), float(eps))
    tensors = (query, key, value, local, modulation, cos, sin)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors[:5]):
        return LinearAttention.apply(*tensors, *options)
    return torch.ops.undivided.linear_attention_forward(*tensors, *options)
