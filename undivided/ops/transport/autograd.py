"""Torch operators around the Triton kernels: forward and backward, their fakes, and the gradient."""

from __future__ import annotations

import math

import torch

_SHARED = "bool is_causal, float scale, int num_iterations, float relaxation, bool column"
torch.library.define(
    "undivided::transport_forward",
    f"(Tensor query, Tensor key, Tensor value, Tensor row_mass, Tensor column_mass, {_SHARED}) -> (Tensor, "
    "Tensor, Tensor)",
)
torch.library.define(
    "undivided::transport_backward",
    "(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor row_mass, Tensor column_mass, "
    f"Tensor row_lse, Tensor col_lse, {_SHARED}) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("undivided::transport_forward", "default")
def _forward(query, key, value, row_mass, column_mass, is_causal, scale, num_iterations, relaxation, column):
    from undivided.ops.transport import triton

    return triton.forward(
        query, key, value, row_mass, column_mass, is_causal, scale, num_iterations, relaxation, column
    )


@torch.library.impl("undivided::transport_backward", "default")
def _backward(
    dout, query, key, value, out, row_mass, column_mass, row_lse, col_lse, is_causal, scale, num_iterations,
    relaxation, column,
):  # fmt: skip
    from undivided.ops.transport import triton

    return triton.backward(
        dout, query, key, value, out, row_mass, column_mass, row_lse, col_lse, is_causal, scale,
        num_iterations, relaxation, column,
    )  # fmt: skip


@torch.library.register_fake("undivided::transport_forward")
def _forward_fake(
    query, key, value, row_mass, column_mass, is_causal, scale, num_iterations, relaxation, column
):
    batch, heads, num_queries, _ = query.shape
    row_steps, sweeps = (0, 1) if column else (num_iterations + 1, num_iterations)
    return (
        query.new_empty(batch, heads, num_queries, value.shape[3]),
        query.new_empty(row_steps, batch, heads, num_queries, dtype=torch.float32),
        query.new_empty(sweeps, batch, heads, key.shape[2], dtype=torch.float32),
    )


@torch.library.register_fake("undivided::transport_backward")
def _backward_fake(
    dout, query, key, value, out, row_mass, column_mass, row_lse, col_lse, is_causal, scale, num_iterations,
    relaxation, column,
):  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


class Transport(torch.autograd.Function):
    """Out and log-sum-exps of the forward; gradients of query, key and value."""

    @staticmethod
    def forward(ctx, query, key, value, row_mass, column_mass, *options):
        out, row_lse, col_lse = torch.ops.undivided.transport_forward(
            query, key, value, row_mass, column_mass, *options
        )
        ctx.save_for_backward(query, key, value, out, row_mass, column_mass, row_lse, col_lse)
        ctx.options = options
        ctx.mark_non_differentiable(row_lse, col_lse)
        return out, row_lse, col_lse

    @staticmethod
    def backward(ctx, dout, _row, _col):
        gradients = torch.ops.undivided.transport_backward(dout, *ctx.saved_tensors, *ctx.options)
        return *gradients, *(None for _ in range(2 + len(ctx.options)))


def column(query, key, value, attn_mask, is_causal, scale):
    """Runs column attention through the kernels."""
    mass = torch.ones(1, 1, 1, dtype=torch.float32, device=query.device)
    rows = mass.expand(*query.shape[:3])
    columns = mass.expand(*query.shape[:2], key.shape[2])
    return Transport.apply(query, key, value, rows, columns, is_causal, float(scale), 0, 1.0, True)[0]


def sinkhorn(
    query, key, value, row_marginal, column_marginal, attn_mask, is_causal, scale, num_iterations, relaxation
):
    """Runs Sinkhorn attention through the kernels; returns out and the potentials, natural logarithms."""
    rows, columns = row_marginal.float(), column_marginal.float()
    out, row_lse, col_lse = Transport.apply(
        query, key, value, rows, columns, is_causal, float(scale), num_iterations, float(relaxation), False
    )
    # The kernels count in base 2.
    row_potential = rows.log() - math.log(2) * row_lse[-1]
    if num_iterations == 0:
        return out, row_potential, torch.zeros_like(columns)
    return out, row_potential, relaxation * (columns.log() - math.log(2) * col_lse[-1])
