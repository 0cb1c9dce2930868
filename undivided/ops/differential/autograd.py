"""The torch operators around the Triton kernels: forward and backward with fakes, and the gradient between them."""

from __future__ import annotations

import torch

_HEADS = "Tensor query, Tensor noise_query, Tensor key, Tensor noise_key, Tensor value"
_INPUTS = f"{_HEADS}, Tensor lam, Tensor? norm_weight"
_OPTIONS = "float norm_eps, float out_scale, bool is_causal, float scale"
# Which implementation runs the forward: "triton" or "gluon".
_KERNEL = "str kernel"
torch.library.define(
    "undivided::differential_forward",
    f"({_INPUTS}, {_OPTIONS}, {_KERNEL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define("undivided::differential_inference", f"({_INPUTS}, {_OPTIONS}, {_KERNEL}) -> Tensor")
torch.library.define(
    "undivided::differential_backward",
    f"(Tensor dout, Tensor mixed, Tensor noise_out, Tensor lse, Tensor noise_lse, {_INPUTS}, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("undivided::differential_forward", "default")
def _forward(*arguments):
    *arguments, kernel = arguments
    return _implementation(kernel).forward(*arguments, with_mixed=True)


@torch.library.impl("undivided::differential_inference", "default")
def _inference(query, noise_query, key, noise_key, value, *arguments):
    from undivided.ops.differential import decode

    *arguments, kernel = arguments
    run = decode.attend if few_rows(query, noise_query, value) else _implementation(kernel).infer
    return run(query, noise_query, key, noise_key, value, *arguments)


def _implementation(kernel):
    if kernel == "gluon":
        from undivided.ops.differential import gluon

        return gluon
    from undivided.ops.differential import triton

    return triton


def few_rows(query, noise_query, value) -> bool:
    """Whether the rows that read a value head fit one tile: then the keys are split, as decoding needs."""
    rows = (query.shape[1] + noise_query.shape[1]) // value.shape[1] * query.shape[2]
    return 0 < rows <= 64


@torch.library.impl("undivided::differential_backward", "default")
def _backward(
    dout, mixed, noise_out, lse, noise_lse, query, noise_query, key, noise_key, value, lam, norm_weight, norm_eps,
    out_scale, is_causal, scale,
):  # fmt: skip
    from undivided.ops.differential import backward, triton

    dsignal, dnoise, delta, noise_delta, dlam, dweight = triton.mix_backward(
        dout, mixed, noise_out, lam, norm_weight, norm_eps, out_scale
    )
    gradients = backward.backward(
        dsignal,
        dnoise,
        delta,
        noise_delta,
        query,
        noise_query,
        key,
        noise_key,
        value,
        lse,
        noise_lse,
        is_causal,
        scale,
    )
    return *gradients, dlam, mixed.new_empty(0) if dweight is None else dweight


def _out(query, value):
    batch, heads, num_queries, _ = query.shape
    return query.new_empty((batch, num_queries, heads, value.shape[3])).transpose(1, 2)


@torch.library.register_fake("undivided::differential_forward")
def _forward_fake(query, noise_query, key, noise_key, value, *arguments):
    noise_shape = noise_query.shape[:3]
    return (
        _out(query, value),
        _out(query, value),
        query.new_empty((*noise_shape, value.shape[3]), dtype=torch.float32),
        query.new_empty(query.shape[:3], dtype=torch.float32),
        query.new_empty(noise_shape, dtype=torch.float32),
    )


@torch.library.register_fake("undivided::differential_inference")
def _inference_fake(query, noise_query, key, noise_key, value, *arguments):
    return _out(query, value)


@torch.library.register_fake("undivided::differential_backward")
def _backward_fake(
    dout, mixed, noise_out, lse, noise_lse, query, noise_query, key, noise_key, value, lam, norm_weight, *arguments,
):  # fmt: skip
    gradients = tuple(x.new_empty(x.shape) for x in (query, noise_query, key, noise_key, value))
    dweight = mixed.new_empty(0) if norm_weight is None else norm_weight.new_empty(norm_weight.shape)
    return *gradients, lse.new_empty(lse.shape), dweight


class Differential(torch.autograd.Function):
    """The output of the forward, and the gradients of all its tensors."""

    @staticmethod
    def forward(ctx, query, noise_query, key, noise_key, value, lam, norm_weight, kernel, *options):
        inputs = (query, noise_query, key, noise_key, value, lam, norm_weight)
        out, *kept = torch.ops.undivided.differential_forward(*inputs, *options, kernel)
        ctx.save_for_backward(*kept, *inputs)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dout):
        *gradients, dweight = torch.ops.undivided.differential_backward(
            dout, *ctx.saved_tensors, *ctx.options
        )
        has_norm = ctx.saved_tensors[-1] is not None
        return *gradients, dweight if has_norm else None, None, *(None for _ in ctx.options)


def attend(
    kernel, query, noise_query, key, noise_key, value, lam, norm_weight, norm_eps, out_scale, attn_mask, is_causal,
    window, scale, softcap,
):  # fmt: skip
    inputs = (query, noise_query, key, noise_key, value, lam, norm_weight)
    options = (float(norm_eps), float(out_scale), bool(is_causal), float(scale))
    if needs_gradient(*inputs):
        return Differential.apply(*inputs, kernel, *options)
    return torch.ops.undivided.differential_inference(*inputs, *options, kernel)


def needs_gradient(*tensors) -> bool:
    """Whether a backward pass will want what the forward kept."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
