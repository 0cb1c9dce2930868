"""The torch operators around the Triton kernels: selection, forward and backward with fakes, and the gradient."""

from __future__ import annotations

import torch

# Queries that share a list of keys, by the bytes of an element: as undivided.ops.dynamic_mask.triton has it, which must
# not be imported before a kernel runs.
TILES = {2: 128, 4: 32}
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor key_bias"
_LISTS = "Tensor kept, Tensor death"
torch.library.define(
    "undivided::dynamic_mask_select",
    "(Tensor key_bias, SymInt num_queries, SymInt keep, int tile) -> (Tensor, Tensor)",
)
torch.library.define(
    "undivided::dynamic_mask_forward", f"({_INPUTS}, {_LISTS}, float scale) -> (Tensor, Tensor)"
)
torch.library.define(
    "undivided::dynamic_mask_backward",
    f"(Tensor dout, Tensor out, Tensor lse, {_INPUTS}, {_LISTS}, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define("undivided::dynamic_mask_decode", f"({_INPUTS}, SymInt keep, float scale) -> Tensor")


@torch.library.impl("undivided::dynamic_mask_select", "default")
def _select(*arguments):
    from undivided.ops.dynamic_mask import lists

    return lists.select(*arguments)


@torch.library.impl("undivided::dynamic_mask_forward", "default")
def _forward(*arguments):
    from undivided.ops.dynamic_mask import triton

    return triton.forward(*arguments)


@torch.library.impl("undivided::dynamic_mask_backward", "default")
def _backward(*arguments):
    from undivided.ops.dynamic_mask import backward

    return backward.backward(*arguments)


@torch.library.impl("undivided::dynamic_mask_decode", "default")
def _decode(*arguments):
    from undivided.ops.dynamic_mask import decode

    return decode.attend(*arguments)


@torch.library.register_fake("undivided::dynamic_mask_select")
def _select_fake(key_bias, num_queries, keep, tile):
    batch, heads, num_keys = key_bias.shape
    tiles = (num_queries + tile - 1) // tile
    shapes = ((batch, heads, tiles, min(keep, num_keys)), key_bias.shape)
    return tuple(key_bias.new_empty(shape, dtype=torch.int32) for shape in shapes)


@torch.library.register_fake("undivided::dynamic_mask_forward")
def _forward_fake(query, key, value, *arguments):
    batch, heads, num_queries, _ = query.shape
    out = query.new_empty((batch, num_queries, heads, value.shape[3])).transpose(1, 2)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("undivided::dynamic_mask_backward")
def _backward_fake(dout, out, lse, query, key, value, key_bias, *arguments):
    return tuple(x.new_empty(x.shape) for x in (query, key, value, key_bias))


@torch.library.register_fake("undivided::dynamic_mask_decode")
def _decode_fake(query, key, value, *arguments):
    return query.new_empty((*query.shape[:3], value.shape[3]))


class DynamicMask(torch.autograd.Function):
    """The output of the forward, and the gradients of its tensors; the choice of keys has none."""

    @staticmethod
    def forward(ctx, query, key, value, key_bias, kept, death, scale):
        inputs = (query, key, value, key_bias, kept, death)
        out, lse = torch.ops.undivided.dynamic_mask_forward(*inputs, scale)
        ctx.save_for_backward(out, lse, *inputs)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, dout):
        gradients = torch.ops.undivided.dynamic_mask_backward(dout, *ctx.saved_tensors, ctx.scale)
        return *gradients, None, None, None


def attend(query, key, value, key_bias, keep_window_size, attn_mask, is_causal, scale, selection):
    key_bias = key_bias.float().contiguous()
    num_queries, scale = query.shape[2], float(scale)
    inputs = (query, key, value, key_bias)
    with_gradient = needs_gradient(*inputs)
    if num_queries == 1 and not with_gradient:
        return torch.ops.undivided.dynamic_mask_decode(*inputs, keep_window_size, scale)
    lists = torch.ops.undivided.dynamic_mask_select(
        key_bias.detach(), num_queries, keep_window_size, TILES[query.element_size()]
    )
    if with_gradient:
        return DynamicMask.apply(*inputs, *lists, scale)
    return torch.ops.undivided.dynamic_mask_forward(*inputs, *lists, scale)[0]


def needs_gradient(*tensors) -> bool:
    """Whether a backward pass will want what the forward kept."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
