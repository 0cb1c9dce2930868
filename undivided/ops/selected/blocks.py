"""The torch operators around the kernels for blocks of queries: forward and backward with fakes, and the gradient."""

from __future__ import annotations

import torch

from undivided.ops._backends import Backend
from undivided.ops._triton import availability, interprets

_LISTS = "Tensor index, Tensor counts"
_OPTIONS = "int query_block_size, int block_size, float scale, bool is_causal, Tensor? cu_seqlens"
torch.library.define(
    "undivided::selected_blocks_forward",
    f"(Tensor query, Tensor key, Tensor value, {_LISTS}, {_OPTIONS}) -> (Tensor, Tensor)",
)
torch.library.define(
    "undivided::selected_blocks_backward",
    f"(Tensor dout, Tensor? dlse, Tensor out, Tensor query, Tensor key, Tensor value, {_LISTS}, Tensor lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("undivided::selected_blocks_forward", "default")
def _forward(*arguments):
    from undivided.ops.selected import blocks_forward

    return blocks_forward.forward(*arguments)


@torch.library.impl("undivided::selected_blocks_backward", "default")
def _backward(dout, dlse, out, *arguments):
    from undivided.ops.selected import blocks_backward

    return blocks_backward.backward(dout, blocks_backward.deltas(dout, out, dlse), *arguments)


@torch.library.register_fake("undivided::selected_blocks_forward")
def _forward_fake(query, key, value, *arguments):
    batch, heads, num_queries, _ = query.shape
    out = query.new_empty((batch, num_queries, heads, value.shape[3])).transpose(1, 2)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("undivided::selected_blocks_backward")
def _backward_fake(dout, dlse, out, query, key, value, *arguments):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


class SelectedBlocks(torch.autograd.Function):
    """The output and lse of the forward, and the gradients of query, key and value."""

    @staticmethod
    def forward(ctx, query, key, value, index, counts, *options):
        out, lse = torch.ops.undivided.selected_blocks_forward(query, key, value, index, counts, *options)
        ctx.save_for_backward(out, query, key, value, index, counts, lse, options[-1])
        ctx.options = options[:-1]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        *tensors, cu_seqlens = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(tensors[0])
        gradients = torch.ops.undivided.selected_blocks_backward(
            dout, dlse, *tensors, *ctx.options, cu_seqlens
        )
        return *gradients, *(None for _ in range(7))


def attend(query, key, value, index, counts, query_block_size, block_size, scale, is_causal, cu_seqlens):
    inputs = (query, key, value, index, counts, query_block_size, block_size, scale, is_causal, cu_seqlens)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return SelectedBlocks.apply(*inputs)
    return torch.ops.undivided.selected_blocks_forward(*inputs)


def reasons(
    query, key, value, index, counts, query_block_size, block_size, scale, is_causal, cu_seqlens
) -> list[str]:  # fmt: skip
    found = availability()
    if found:
        return found
    for name, size in (("query_block_size", query_block_size), ("block_size", block_size)):
        if size not in (16, 32, 64, 128):
            found.append(f"{name} is {size} (needs 16, 32, 64 or 128)")
    if scale <= 0:
        found.append(f"scale is {scale} (the kernels need a positive one)")
    return found + tensor_reasons(query, value)


def tensor_reasons(query, value, widest: int = 128) -> list[str]:
    """Sentences that say why the tensors' type, width or device do not suit kernels of Triton."""
    found = []
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"query is {str(query.dtype).removeprefix('torch.')}")
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[3] > widest:
            found.append(f"the last axis of {name} is {tensor.shape[3]} (at most {widest})")
    if query.device.type != "cuda" and not interprets():
        found.append(f"query is on {query.device.type}")
    elif query.device.type != "cuda" and query.dtype == torch.bfloat16:
        found.append("query is bfloat16 (Triton's interpreter multiplies it wrongly)")
    return found


BACKENDS = (Backend("triton", attend, reasons, availability, automatic=("cuda",)),)
