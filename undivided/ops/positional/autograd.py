"""The torch operators around the Triton kernels: forward and backward with fakes, and the gradient between them."""

from __future__ import annotations

import torch

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor position_weight, Tensor gate"
_INPUTS = f"{_TENSORS}, int height, int width, float scale"
torch.library.define("undivided::gated_positional_forward", f"({_INPUTS}) -> (Tensor, Tensor)")
torch.library.define("undivided::gated_positional_inference", f"({_INPUTS}) -> Tensor")
torch.library.define(
    "undivided::gated_positional_backward",
    f"(Tensor dout, Tensor lse, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("undivided::gated_positional_forward", "default")
def _forward(*arguments):
    from undivided.ops.positional import triton

    return triton.forward(*arguments)


@torch.library.impl("undivided::gated_positional_inference", "default")
def _inference(*arguments):
    from undivided.ops.positional import triton

    return triton.forward(*arguments, with_lse=False)[0]


@torch.library.impl("undivided::gated_positional_backward", "default")
def _backward(*arguments):
    from undivided.ops.positional import backward

    return backward.backward(*arguments)


def _tokens_first(query, width):
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, width)).transpose(1, 2)


@torch.library.register_fake("undivided::gated_positional_forward")
def _forward_fake(query, key, value, position_weight, gate, height, width, scale):
    return _tokens_first(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("undivided::gated_positional_inference")
def _inference_fake(query, key, value, position_weight, gate, height, width, scale):
    return _tokens_first(query, value.shape[3])


@torch.library.register_fake("undivided::gated_positional_backward")
def _backward_fake(dout, lse, query, key, value, position_weight, gate, height, width, scale):
    return *(_tokens_first(query, x.shape[3]) for x in (query, key, value)), lse.new_empty(
        (query.shape[1], 4)
    )


class GatedPositional(torch.autograd.Function):
    """The output of the forward, and the gradients of all five tensors."""

    @staticmethod
    def forward(ctx, query, key, value, position_weight, gate, height, width, scale):
        inputs = query, key, value, position_weight, gate
        out, lse = torch.ops.undivided.gated_positional_forward(*inputs, height, width, scale)
        ctx.save_for_backward(lse, *inputs)
        ctx.options = height, width, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        *gradients, sums = torch.ops.undivided.gated_positional_backward(
            dout, *ctx.saved_tensors, *ctx.options
        )
        weight, gate = ctx.saved_tensors[4:]
        return *gradients, sums[:, :3].to(weight.dtype), sums[:, 3].to(gate.dtype), None, None, None


def attend(query, key, value, position_weight, gate, size, scale):
    inputs = query, key, value, position_weight, gate
    options = int(size[0]), int(size[1]), float(scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return GatedPositional.apply(*inputs, *options)
    return torch.ops.undivided.gated_positional_inference(*inputs, *options)
