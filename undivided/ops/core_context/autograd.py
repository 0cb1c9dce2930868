"""The torch operators around the Triton kernels: forward and backward with fakes, and the gradient between them."""

from __future__ import annotations

import math

import torch

from undivided.ops._triton import availability, interprets

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor core_key, Tensor core_value"
_OPTIONS = "int num_tokens, int group_size, int window, float scale, float core_logit_bias"
torch.library.define("undivided::core_context_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "undivided::core_context_backward",
    f"(Tensor dout, Tensor delta, {_INPUTS}, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_POOLED = "Tensor query, Tensor key, Tensor value, int group_size, float scale"
torch.library.define("undivided::core_pool_forward", f"({_POOLED}) -> (Tensor, Tensor)")
torch.library.define(
    "undivided::core_pool_backward",
    f"(Tensor dcore_key, Tensor dcore_value, {_POOLED}) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("undivided::core_context_forward", "default")
def _forward(*arguments):
    from undivided.ops.core_context import triton

    return triton.forward(*arguments)


@torch.library.impl("undivided::core_context_backward", "default")
def _backward(*arguments):
    from undivided.ops.core_context import backward

    return backward.backward(*arguments)


@torch.library.impl("undivided::core_pool_forward", "default")
def _pool_forward(*arguments):
    from undivided.ops.core_context import triton

    return triton.pool(*arguments)


@torch.library.impl("undivided::core_pool_backward", "default")
def _pool_backward(*arguments):
    from undivided.ops.core_context import backward

    return backward.pool_backward(*arguments)


@torch.library.register_fake("undivided::core_context_forward")
def _forward_fake(query, key, value, *arguments):
    batch, heads, num_queries, _ = query.shape
    out = query.new_empty((batch, num_queries, heads, value.shape[3])).transpose(1, 2)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("undivided::core_context_backward")
def _backward_fake(dout, delta, *arguments):
    return tuple(x.new_empty(x.shape) for x in arguments[:5])


@torch.library.register_fake("undivided::core_pool_forward")
def _pool_forward_fake(query, key, value, *arguments):
    return query.new_empty(query.shape), query.new_empty((*query.shape[:3], value.shape[3]))


@torch.library.register_fake("undivided::core_pool_backward")
def _pool_backward_fake(dcore_key, dcore_value, query, key, value, *arguments):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


class CoreContext(torch.autograd.Function):
    """The output and its log-sum-exp in base 2, and the gradients of all tensors through both."""

    @staticmethod
    def forward(ctx, query, key, value, core_key, core_value, *options):
        inputs = (query, key, value, core_key, core_value)
        out, lse = torch.ops.undivided.core_context_forward(*inputs, *options)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.options = options
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        *inputs, out, lse = ctx.saved_tensors
        # The derivative of a log-sum-exp in base 2 by a logit is `p / ln 2`.
        delta = (dout.float() * out.float()).sum(-1) - dlse / math.log(2)
        gradients = torch.ops.undivided.core_context_backward(
            dout, delta.contiguous(), *inputs, lse, *ctx.options
        )
        return *gradients, *(None for _ in ctx.options)


class CorePool(torch.autograd.Function):
    """The core keys and values, and the gradients of the queries, keys and values."""

    @staticmethod
    def forward(ctx, query, key, value, group_size, scale):
        ctx.save_for_backward(query, key, value)
        ctx.options = (group_size, scale)
        return torch.ops.undivided.core_pool_forward(query, key, value, group_size, scale)

    @staticmethod
    def backward(ctx, dcore_key, dcore_value):
        gradients = torch.ops.undivided.core_pool_backward(
            dcore_key, dcore_value, *ctx.saved_tensors, *ctx.options
        )
        return *gradients, None, None


def _kernel_reasons(query, value) -> list[str]:
    if query.device.type != "cuda" and not interprets():
        return [f"query is on {query.device.type}"]
    found = []
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"query is {query.dtype} (needs float32, float16 or bfloat16)")
    for name, width in (("head_dim", query.shape[3]), ("value_dim", value.shape[3])):
        if width > 256:
            found.append(f"{name} is {width} (needs at most 256)")
    return found


def reasons(
    query,
    key,
    value,
    core_key,
    core_value,
    num_tokens,
    group_size,
    window,
    scale,
    softcap,
    core_logit_bias,
    return_lse,
) -> list[str]:
    found = availability() or _kernel_reasons(query, value)
    if softcap is not None:
        found.append(f"softcap is {softcap}")
    if scale <= 0:
        found.append(f"scale is {scale} (needs a positive one)")
    return found


def attend(
    query, key, value, core_key, core_value, num_tokens, group_size, window, scale, softcap, core_logit_bias
):
    """Kernels in Triton, forward and backward: one running softmax over single keys and core tokens."""
    inputs = (query, key, value, core_key, core_value)
    options = (int(num_tokens), int(group_size), int(window), float(scale), float(core_logit_bias))
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        out, lse = CoreContext.apply(*inputs, *options)
    else:
        out, lse = torch.ops.undivided.core_context_forward(*inputs, *options)
    return out, lse * math.log(2)


def pool_reasons(query, key, value, group_size, pooling, scale) -> list[str]:
    if pooling != "cca":
        return [f'pooling is "{pooling}" (torch pools so in one kernel)']
    found = availability() or _kernel_reasons(query, value)
    if group_size > 256:
        found.append(f"group_size is {group_size} (needs at most 256)")
    return found


def pool(query, key, value, group_size, pooling, scale):
    """Kernels in Triton, forward and backward: keys and values of a group are read once."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return CorePool.apply(query, key, value, int(group_size), float(scale))
    return torch.ops.undivided.core_pool_forward(query, key, value, int(group_size), float(scale))
