"""The torch operators around the Triton kernels: forward and backward with fakes, and the gradient between them."""

from __future__ import annotations

import torch

# As undivided.ops.routed.triton has it, which must not be imported before a kernel runs.
RANK_STEP = 16
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor selected, Tensor? gates, bool is_causal, float scale"
)
_LISTS = "Tensor lse, Tensor index, Tensor count, Tensor rank"
torch.library.define(
    "undivided::routed_forward", f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define("undivided::routed_inference", f"({_INPUTS}) -> Tensor")
torch.library.define(
    "undivided::routed_backward",
    f"(Tensor dout, Tensor unscaled, {_LISTS}, Tensor query, Tensor key, Tensor value, Tensor? gates, "
    "bool is_causal, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("undivided::routed_forward", "default")
def _forward(*arguments):
    from undivided.ops.routed import triton

    return triton.forward(*arguments)


@torch.library.impl("undivided::routed_inference", "default")
def _inference(*arguments):
    from undivided.ops.routed import triton

    return triton.forward(*arguments, with_unscaled=False)[0]


@torch.library.impl("undivided::routed_backward", "default")
def _backward(*arguments):
    from undivided.ops.routed import backward

    return backward.backward(*arguments)


def _out(query, value):
    batch, heads, num_queries, _ = query.shape
    return query.new_empty((batch, num_queries, heads, value.shape[3])).transpose(1, 2)


@torch.library.register_fake("undivided::routed_forward")
def _forward_fake(query, key, value, selected, gates, is_causal, scale):
    batch, heads, num_queries, _ = query.shape
    unscaled = query.new_empty((0, 0, 0, value.shape[3])).transpose(1, 2)
    shapes = ((batch, heads, num_queries), (batch, heads), (batch, heads, -(-num_queries // RANK_STEP)))
    return (
        _out(query, value),
        unscaled if gates is None else _out(query, value),
        query.new_empty(query.shape[:3], dtype=torch.float32),
        *(query.new_empty(shape, dtype=torch.int32) for shape in shapes),
    )


@torch.library.register_fake("undivided::routed_inference")
def _inference_fake(query, key, value, selected, gates, is_causal, scale):
    return _out(query, value)


@torch.library.register_fake("undivided::routed_backward")
def _backward_fake(
    dout, unscaled, lse, index, count, rank, query, key, value, gates, is_causal, scale
):  # fmt: skip
    dgates = lse.new_empty(0 if gates is None else lse.shape)
    return *(x.new_empty(x.shape) for x in (query, key, value)), dgates


class Routed(torch.autograd.Function):
    """The output of the forward, and the gradients of query, key, value and gates."""

    @staticmethod
    def forward(ctx, query, key, value, selected, gates, is_causal, scale):
        out, unscaled, *lists = torch.ops.undivided.routed_forward(
            query, key, value, selected, gates, is_causal, scale
        )
        ctx.save_for_backward(out if gates is None else unscaled, *lists, query, key, value, gates)
        ctx.options = is_causal, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        *gradients, dgates = torch.ops.undivided.routed_backward(dout, *ctx.saved_tensors, *ctx.options)
        has_gates = ctx.saved_tensors[-1] is not None
        return *gradients, None, dgates if has_gates else None, None, None


def attend(query, key, value, selected, gates, attn_mask, is_causal, scale, softcap):
    inputs = (query, key, value, selected, gates, bool(is_causal), float(scale))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, gates)):
        return Routed.apply(*inputs)
    return torch.ops.undivided.routed_inference(*inputs)
