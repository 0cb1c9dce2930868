"""What the implementations share: which core tokens and which single keys a query sees, and what a core token is."""

from __future__ import annotations

import torch


def visible_cores(seen: int, group_size: int, window: int) -> int:
    """Returns how many core tokens a query sees that has `seen` tokens, itself included: `(seen - window) // g`."""
    return max(seen - window, 0) // group_size


def visible(
    num_queries: int, num_keys: int, num_cores: int, num_tokens: int, group_size: int, window: int,
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """Returns the boolean `[queries, cores + keys]`, True where a query sees a core token or a single key.

    Queries and keys are the last of `num_tokens` tokens. With n core tokens a query sees those of the first n groups,
    and the single keys from the end of group n to itself: together every token up to itself, once.
    """
    seen = num_tokens - num_queries + 1 + torch.arange(num_queries, device=device)[:, None]
    cores = (seen - window).clamp(min=0) // group_size
    position = num_tokens - num_keys + torch.arange(num_keys, device=device)
    single = (position >= cores * group_size) & (position < seen)
    return torch.cat([torch.arange(num_cores, device=device) < cores, single], dim=1)


def group_weights(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns the weight of each key in its group, `[batch, core_heads, groups, group_size]`, at least float32.

    Args:
        query: the last query of each group, `[batch, core_heads, groups, head_dim]`.
        key: `[batch, key_heads, groups, group_size, head_dim]`.
        scale: factor of the logits.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = (key @ query[..., None]).squeeze(-1)
    return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale, dim=-1)


def weighted(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Returns `sum_j weights_j rows_j` of each group, `[batch, core_heads, groups, width]`, of the dtype of `rows`."""
    rows = rows.repeat_interleave(weights.shape[1] // rows.shape[1], dim=1)
    return (weights[..., None, :].to(rows.dtype) @ rows).squeeze(-2)
