"""The torch operators around the Triton kernels: forward, backward and choice with fakes, and the gradient."""

from __future__ import annotations

import torch

from undivided.ops._triton import availability, interprets
from undivided.ops.block_map import num_blocks

_INPUTS = "Tensor query, Tensor key, Tensor value"
_OPTIONS = "int num_keys, int kernel_size, int kernel_stride, float scale"
torch.library.define("undivided::compressed_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "undivided::compressed_backward",
    f"(Tensor dout, Tensor? dlse, Tensor out, {_INPUTS}, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "undivided::compressed_choice",
    "(Tensor query, Tensor key, Tensor lse, int num_keys, int kernel_size, int kernel_stride, int block_size, "
    "int topk, int init_blocks, int local_blocks, float scale) -> (Tensor, Tensor)",
)


@torch.library.impl("undivided::compressed_forward", "default")
def _forward(*arguments):
    from undivided.ops.compressed import triton

    return triton.forward(*arguments)


@torch.library.impl("undivided::compressed_backward", "default")
def _backward(*arguments):
    from undivided.ops.compressed import backward

    return backward.backward(*arguments)


@torch.library.impl("undivided::compressed_choice", "default")
def _choice(*arguments):
    from undivided.ops.compressed import choice

    return choice.choose(*arguments)


@torch.library.register_fake("undivided::compressed_forward")
def _forward_fake(query, key, value, *options):
    batch, heads, num_queries, _ = query.shape
    out = query.new_empty((batch, num_queries, heads, value.shape[3])).transpose(1, 2)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("undivided::compressed_backward")
def _backward_fake(dout, dlse, out, query, key, value, *options):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


@torch.library.register_fake("undivided::compressed_choice")
def _choice_fake(query, key, lse, num_keys, kernel_size, kernel_stride, block_size, topk, *options):
    shape = (query.shape[0], key.shape[1], query.shape[2])
    width = min(topk, num_blocks(num_keys, block_size))
    return (
        query.new_empty((*shape, width), dtype=torch.int32),
        query.new_empty(shape, dtype=torch.int32),
    )


class Compressed(torch.autograd.Function):
    """The output and lse of the forward, and the gradients of query, key and value."""

    @staticmethod
    def forward(ctx, query, key, value, *options):
        out, lse = torch.ops.undivided.compressed_forward(query, key, value, *options)
        ctx.save_for_backward(out, query, key, value, lse)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        out, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        gradients = torch.ops.undivided.compressed_backward(dout, dlse, out, *tensors, *ctx.options)
        return *gradients, *(None for _ in ctx.options)


def attend(query, key, value, num_keys, kernel_size, kernel_stride, scale):
    options = (num_keys, kernel_size, kernel_stride, scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return Compressed.apply(query, key, value, *options)
    return torch.ops.undivided.compressed_forward(query, key, value, *options)


def choose(query, key, lse, *options, **arguments):
    return torch.ops.undivided.compressed_choice(
        query.detach(), key.detach(), lse.detach(), *options, **arguments
    )


def reasons(query, key, value, num_keys, kernel_size, kernel_stride, scale) -> list[str]:
    return availability() or _kernel_reasons(query, scale, head_dim=query, value_dim=value)


def choice_reasons(
    query, key, lse, num_keys, kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, scale
) -> list[str]:  # fmt: skip
    found = availability() or _kernel_reasons(query, scale, head_dim=query)
    inside, across = block_size // kernel_stride, kernel_size // kernel_stride
    if inside & (inside - 1) or inside > 32:
        found.append(f"block_size / kernel_stride is {inside} (needs a power of two, at most 32)")
    if across > inside + 1:
        found.append(
            f"kernel_size is {kernel_size} (needs at most {block_size + kernel_stride}: a block and a stride)"
        )
    if query.shape[1] // key.shape[1] > 16:
        found.append(f"{query.shape[1] // key.shape[1]} heads share a key head (at most 16)")
    if num_blocks(num_keys, block_size) > 8192:
        found.append(
            f"there are {num_blocks(num_keys, block_size)} blocks (a row of scores has at most 8192)"
        )
    return found


def _kernel_reasons(query, scale, **widths) -> list[str]:
    found = []
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(
            f"query is {str(query.dtype).removeprefix('torch.')} (needs float32, float16 or bfloat16)"
        )
    for name, tensor in widths.items():
        if tensor.shape[3] > 256:
            found.append(f"{name} is {tensor.shape[3]} (at most 256)")
    if scale <= 0:
        found.append(f"scale is {scale} (the kernels need a positive one)")
    if query.device.type != "cuda" and not interprets():
        found.append(f"query is on {query.device.type}")
    elif query.device.type != "cuda" and query.dtype == torch.bfloat16:
        found.append("query is bfloat16 (Triton's interpreter multiplies it wrongly)")
    return found
