"""The torch operators around the Triton kernels: forward and backward with fakes, and the gradient between them."""

from __future__ import annotations

import torch

_TENSORS = "Tensor query, Tensor key, Tensor value"
_TABLES = "Tensor content_bias, Tensor distance_vectors, Tensor distance_bias"
_INPUTS = f"{_TENSORS}, {_TABLES}, float scale"
torch.library.define("undivided::relative_forward", f"({_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    "undivided::relative_backward",
    f"(Tensor dout, Tensor dlse, Tensor out, Tensor lse, {_INPUTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("undivided::relative_forward", "default")
def _forward(*arguments):
    from undivided.ops.relative import triton

    return triton.forward(*arguments)


@torch.library.impl("undivided::relative_backward", "default")
def _backward(*arguments):
    from undivided.ops.relative import backward

    return backward.backward(*arguments)


def _tokens_first(x):
    batch, heads, length, head_dim = x.shape
    return x.new_empty((batch, length, heads, head_dim)).transpose(1, 2)


@torch.library.register_fake("undivided::relative_forward")
def _forward_fake(query, *arguments):
    return _tokens_first(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("undivided::relative_backward")
def _backward_fake(dout, dlse, out, lse, query, key, value, *arguments):
    return *map(_tokens_first, (query, key, value)), *(lse.new_empty(x.shape) for x in arguments[:3])


class Relative(torch.autograd.Function):
    """The output and the log-sums, and the gradients of all six tensors."""

    @staticmethod
    def forward(ctx, *arguments):
        out, lse = torch.ops.undivided.relative_forward(*arguments)
        ctx.save_for_backward(out, lse, *arguments[:6])
        ctx.scale = arguments[6]
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        found = torch.ops.undivided.relative_backward(dout, dlse, *ctx.saved_tensors, ctx.scale)
        kinds = (x.dtype for x in ctx.saved_tensors[2:])
        return *(gradient.to(dtype) for gradient, dtype in zip(found, kinds, strict=True)), None


def attend(
    query, key, value, content_bias, distance_vectors, distance_bias, attn_mask, scale, return_lse
):  # fmt: skip
    num_keys = key.shape[2]
    inputs = query, key, value, content_bias, distance_vectors[:num_keys], distance_bias[:num_keys]
    run = torch.ops.undivided.relative_forward
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        run = Relative.apply
    out, lse = run(*inputs, float(scale))
    return (out, lse) if return_lse else out
