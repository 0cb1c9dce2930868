"""Transport attention as it is written: logits, potentials, plan. It defines what is correct."""

from __future__ import annotations

import torch

from undivided.ops._rules import combined_mask, masked_softmax


def reasons(**arguments: object) -> list[str]:
    """Runs everything."""
    return []


def _logits(query, key, attn_mask, is_causal, scale):
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = scale * (query.to(dtype) @ key.transpose(-2, -1))
    mask = combined_mask(attn_mask, is_causal, None, query.shape[2], key.shape[2], query.device)
    return logits if mask is None else logits.masked_fill(~mask, float("-inf"))


def _aggregate(plan, query, value):
    value = value.to(plan.dtype).repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return (plan @ value).to(query.dtype)


def column(query, key, value, attn_mask, is_causal, scale):
    """Softmax over the queries."""
    logits = _logits(query, key, attn_mask, is_causal, scale)
    weights, _ = masked_softmax(logits.transpose(-2, -1))
    return _aggregate(weights.transpose(-2, -1), query, value)


def sinkhorn(
    query, key, value, row_marginal, column_marginal, attn_mask, is_causal, scale, num_iterations, relaxation
):
    """Sweeps of row and column potentials, then the plan; returns out and both potentials."""
    logits = _logits(query, key, attn_mask, is_causal, scale)
    log_rows = row_marginal.to(logits.dtype).log()
    log_columns = column_marginal.to(logits.dtype).log()
    columns = torch.zeros_like(log_columns)
    for _ in range(num_iterations):
        rows = log_rows - torch.logsumexp(logits + columns[..., None, :], dim=-1)
        columns = relaxation * (log_columns - torch.logsumexp(logits + rows[..., None], dim=-2))
    rows = log_rows - torch.logsumexp(logits + columns[..., None, :], dim=-1)
    plan = torch.exp(logits + rows[..., None] + columns[..., None, :])
    return _aggregate(plan, query, value), rows.detach(), columns.detach()
