"""The torch operators around the kernels for lists of single tokens, and the choice between their two loop orders."""

from __future__ import annotations

import torch

from undivided.ops._backends import Backend
from undivided.ops._triton import availability
from undivided.ops.block_map import num_blocks
from undivided.ops.selected.blocks import tensor_reasons

# So many heads of a list fill a tile of the tensor cores, and with tokens outside none of its rows is wasted. So few
# queries leave a key block, which a share of them lists, less than a tile of rows.
FULL_GROUP, FEW_QUERIES = 16, 1024

_LISTS = "Tensor index, Tensor counts, Tensor? offsets, Tensor? entries"
_OPTIONS = "int block_size, float scale, bool is_causal, Tensor? cu_seqlens"
torch.library.define(
    "undivided::selected_tokens_invert", "(Tensor index, Tensor counts, int blocks) -> (Tensor, Tensor)"
)
torch.library.define(
    "undivided::selected_tokens_forward",
    f"(Tensor query, Tensor key, Tensor value, {_LISTS}, {_OPTIONS}) -> (Tensor, Tensor)",
)
torch.library.define(
    "undivided::selected_tokens_two_pass",
    f"(Tensor query, Tensor key, Tensor value, {_LISTS}, {_OPTIONS}) -> (Tensor, Tensor)",
)
torch.library.define(
    "undivided::selected_tokens_backward",
    f"(Tensor dout, Tensor? dlse, Tensor out, Tensor query, Tensor key, Tensor value, {_LISTS}, Tensor lse, "
    f"{_OPTIONS}, bool by_keys) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("undivided::selected_tokens_invert", "default")
def _invert(index, counts, blocks):
    from undivided.ops.selected import tokens_index

    return tokens_index.invert(index, counts, blocks)


@torch.library.impl("undivided::selected_tokens_forward", "default")
def _forward(*arguments):
    from undivided.ops.selected import tokens_forward

    return tokens_forward.forward(*arguments)


@torch.library.impl("undivided::selected_tokens_two_pass", "default")
def _two_pass(*arguments):
    from undivided.ops.selected import tokens_two_pass

    return tokens_two_pass.forward(*arguments)


@torch.library.impl("undivided::selected_tokens_backward", "default")
def _backward(dout, dlse, out, *arguments):
    from undivided.ops.selected import blocks_backward, tokens_backward

    return tokens_backward.backward(dout, blocks_backward.deltas(dout, out, dlse), *arguments)


@torch.library.register_fake("undivided::selected_tokens_invert")
def _invert_fake(index, counts, blocks):
    batch, heads, tokens, max_blocks = index.shape
    return index.new_empty((batch, heads, blocks + 1)), index.new_empty((batch, heads, tokens * max_blocks))


@torch.library.register_fake("undivided::selected_tokens_forward")
@torch.library.register_fake("undivided::selected_tokens_two_pass")
def _forward_fake(query, key, value, *arguments):
    batch, heads, num_queries, _ = query.shape
    out = query.new_empty((batch, num_queries, heads, value.shape[3])).transpose(1, 2)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("undivided::selected_tokens_backward")
def _backward_fake(dout, dlse, out, query, key, value, *arguments):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _forward_in(order, *inputs):
    if order == "two_pass":
        return torch.ops.undivided.selected_tokens_two_pass(*inputs)
    return torch.ops.undivided.selected_tokens_forward(*inputs)


class SelectedTokens(torch.autograd.Function):
    """The output and lse of the forward, and the gradients of query, key and value."""

    @staticmethod
    def forward(ctx, query, key, value, index, counts, offsets, entries, *options):
        *options, order = options
        inverse = (None, None) if order == "query_outer" else (offsets, entries)
        out, lse = _forward_in(order, query, key, value, index, counts, *inverse, *options)
        ctx.save_for_backward(out, query, key, value, index, counts, offsets, entries, lse, options[-1])
        ctx.options = (*options[:-1], order)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        *tensors, cu_seqlens = ctx.saved_tensors
        *options, order = ctx.options
        if dout is None:
            dout = torch.zeros_like(tensors[0])
        gradients = torch.ops.undivided.selected_tokens_backward(
            dout, dlse, *tensors, *options, cu_seqlens, order != "query_outer"
        )
        return *gradients, *(None for _ in range(9))


def _attend(
    order, query, key, value, index, counts, query_block_size, block_size, scale, is_causal, cu_seqlens
):  # fmt: skip
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    offsets, entries = None, None
    if order != "query_outer" or needs_gradient:
        blocks = num_blocks(key.shape[2], block_size, cu_seqlens)
        offsets, entries = torch.ops.undivided.selected_tokens_invert(index, counts, blocks)
    inputs = (query, key, value, index, counts, offsets, entries, block_size, scale, is_causal, cu_seqlens)
    if needs_gradient:
        return SelectedTokens.apply(*inputs, order)
    return _forward_in(order, *inputs)


def _query_outer(**arguments):
    """Tokens outside, as in the kernels of Native Sparse Attention (arXiv 2502.11089), section 3.4."""
    return _attend("query_outer", **arguments)


def _key_outer(**arguments):
    """Key blocks outside, as in Flash Sparse Attention (arXiv 2508.18224), section 3."""
    return _attend("key_outer", **arguments)


def _two_passes(**arguments):
    """Key blocks outside, with a pass for the maxima, as the paper has it."""
    return _attend("two_pass", **arguments)


def keys_outside(query: torch.Tensor, index: torch.Tensor) -> bool:
    """Whether key blocks go outside: few heads share a list, and tokens are enough to fill tiles. By count alone."""
    return query.shape[1] // index.shape[1] < FULL_GROUP and query.shape[2] >= FEW_QUERIES


def _faster(**arguments):
    """The order that `keys_outside` says."""
    outside = keys_outside(arguments["query"], arguments["index"])
    return _attend("key_outer" if outside else "query_outer", **arguments)


def reasons(
    query, key, value, index, counts, query_block_size, block_size, scale, is_causal, cu_seqlens
) -> list[str]:  # fmt: skip
    found = availability()
    if found:
        return found
    if query_block_size != 1:
        found.append(f"query_block_size is {query_block_size} (these kernels have a list a token: 1)")
    if block_size not in (16, 32, 64, 128):
        found.append(f"block_size is {block_size} (needs 16, 32, 64 or 128)")
    if scale <= 0:
        found.append(f"scale is {scale} (the kernels need a positive one)")
    if query.shape[1] // index.shape[1] > 64:
        found.append(f"{query.shape[1] // index.shape[1]} heads share a list (at most 64)")
    wide = max(query.shape[3], value.shape[3]) > 128
    if wide and block_size > 64:
        found.append(f"block_size is {block_size} (at most 64 where a head is wider than 128)")
    if wide and query.dtype == torch.float32:
        found.append("query is float32 (float16 or bfloat16 where a head is wider than 128)")
    return found + tensor_reasons(query, value, widest=256)


BACKENDS = (
    Backend("tokens", _faster, reasons, availability, automatic=("cuda",)),
    Backend("query_outer", _query_outer, reasons, availability, automatic=()),
    Backend("key_outer", _key_outer, reasons, availability, automatic=()),
    Backend("two_pass", _two_passes, reasons, availability, automatic=()),
)
