"""The torch operators around the Triton kernels: forward and backward with fakes, and the gradient between them."""

from __future__ import annotations

import torch

from undivided.ops._triton import availability
from undivided.ops.selected.blocks import tensor_reasons
from undivided.ops.sparse_linear.classes import class_counts, map_shape

torch.library.define(
    "undivided::sparse_linear_forward",
    "(Tensor query, Tensor key, Tensor value, Tensor? weight, Tensor? bias, Tensor? classes, int critical, "
    "int negligible, str feature_map, int query_block_size, int block_size, str linear_scope, float scale, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "undivided::sparse_linear_backward",
    "(Tensor dsparse, Tensor dlinear, Tensor? dlse, Tensor sparse_out, Tensor lse, Tensor index, Tensor counts, "
    "Tensor shares, Tensor row_sums, Tensor query, Tensor key, Tensor value, str feature_map, int query_block_size, "
    "int block_size, float scale) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("undivided::sparse_linear_forward", "default")
def _forward(*arguments):
    from undivided.ops.sparse_linear import triton

    return triton.forward(*arguments)


@torch.library.impl("undivided::sparse_linear_backward", "default")
def _backward(*arguments):
    from undivided.ops.sparse_linear import backward

    return backward.backward(*arguments)


@torch.library.register_fake("undivided::sparse_linear_forward")
def _forward_fake(
    query, key, value, weight, bias, classes, critical, negligible, feature_map, query_block_size, block_size,
    linear_scope, scale, keep,
):  # fmt: skip
    batch, heads, num_queries, head_dim = query.shape
    value_dim = value.shape[3]
    _, _, rows, blocks = map_shape(query, query_block_size, block_size)

    def out(wanted):
        shape = (batch, num_queries, heads, value_dim) if wanted else (0, 0, 0, value_dim)
        return query.new_empty(shape).transpose(1, 2)

    parts = keep or weight is None
    width = critical if classes is None else blocks
    return (
        out(weight is not None),
        out(parts),
        out(parts),
        query.new_empty((batch, heads, num_queries), dtype=torch.float32),
        query.new_empty((batch, heads, rows, width), dtype=torch.int32),
        query.new_empty((batch, heads, rows), dtype=torch.int32),
        query.new_empty((batch, heads, rows, blocks)),
        query.new_empty((batch, heads, rows, head_dim * (value_dim + 1))),
    )


@torch.library.register_fake("undivided::sparse_linear_backward")
def _backward_fake(
    dsparse, dlinear, dlse, sparse_out, lse, index, counts, shares, row_sums, query, key, value, *options
):  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


class SparseLinear(torch.autograd.Function):
    """The outputs of the forward, and the gradients of queries, keys, values and the projection."""

    @staticmethod
    def forward(ctx, query, key, value, weight, bias, classes, *options):
        out, sparse_out, linear_out, lse, *kept = torch.ops.undivided.sparse_linear_forward(
            query, key, value, weight, bias, classes, *options, True
        )
        ctx.save_for_backward(sparse_out, linear_out, lse, *kept, query, key, value, weight)
        # critical, negligible, feature map, sizes, scope, scale: the backward needs the middle ones and the last.
        ctx.options = (*options[2:5], options[6])
        ctx.has_bias = bias is not None
        ctx.set_materialize_grads(False)
        return sparse_out if weight is None else out, linear_out, lse

    @staticmethod
    def backward(ctx, dout, dlinear, dlse):
        sparse_out, linear_out, *kept, weight = ctx.saved_tensors
        dout = torch.zeros_like(sparse_out) if dout is None else dout
        dweight = dbias = None
        if weight is not None:
            projected = dout @ weight.to(dout.dtype)
            dlinear = projected if dlinear is None else projected + dlinear
            # The products over all tokens are summed in float32, the type of the parameter.
            rows = dout.transpose(1, 2).reshape(-1, dout.shape[3])
            dweight = (rows.T @ linear_out.transpose(1, 2).reshape(rows.shape[0], -1)).to(weight.dtype)
            dbias = rows.sum(0, dtype=weight.dtype) if ctx.has_bias else None
        elif dlinear is None:
            dlinear = torch.zeros_like(linear_out)
        gradients = torch.ops.undivided.sparse_linear_backward(
            dout, dlinear, dlse, sparse_out, *kept, *ctx.options
        )
        return *gradients, dweight, dbias, *(None for _ in range(8))


def attend(
    query, key, value, weight, bias, classes, topk, bottomk, feature_map, query_block_size, block_size, linear_scope,
    scale,
):  # fmt: skip
    critical, negligible = class_counts(map_shape(query, query_block_size, block_size)[3], topk, bottomk)
    inputs = (
        query, key, value, weight, bias, classes, critical, negligible, feature_map, query_block_size, block_size,
        linear_scope, float(scale),
    )  # fmt: skip
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, weight, bias)
    ):
        return SparseLinear.apply(*inputs)
    # Both parts are wanted where there is no projection.
    out, sparse_out, linear_out, lse, *_ = torch.ops.undivided.sparse_linear_forward(*inputs, False)
    return sparse_out if weight is None else out, linear_out, lse


def reasons(
    query, key, value, weight, bias, classes, topk, bottomk, feature_map, query_block_size, block_size, linear_scope,
    scale,
) -> list[str]:  # fmt: skip
    found = availability()
    if found:
        return found
    for name, size in (("query_block_size", query_block_size), ("block_size", block_size)):
        if size not in (16, 32, 64, 128):
            found.append(f"{name} is {size} (needs 16, 32, 64 or 128)")
        elif size > 32 and query.dtype == torch.float32:
            # Without tensor cores a product is written out, and a large one takes minutes to compile.
            found.append(f"{name} is {size} for float32 (at most 32)")
    if scale <= 0:
        found.append(f"scale is {scale} (the kernels need a positive one)")
    return found + tensor_reasons(query, value)
