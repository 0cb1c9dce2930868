"""Coarse-graining of sources, and the doubled carrier that turns signed weights into positive ones."""

from __future__ import annotations

from typing import NamedTuple

import torch


class CoarseGrained(NamedTuple):
    """Merged sources: means of the classes, and the logarithms of their sizes."""

    key: torch.Tensor
    value: torch.Tensor
    log_count: torch.Tensor


def coarse_grain(
    key: torch.Tensor, value: torch.Tensor, assignment: torch.Tensor, num_classes: int | None = None
) -> CoarseGrained:
    """Merges the sources of each class into one.

    `k'_c = mean_{i in c} k_i`, `v'_c = mean_{i in c} v_i`, `log_count_c = log n_c`. If the keys of a class
    are equal, attention over the merged sources with baseline `n_c` equals attention over all sources;
    without it a class of n weighs n times too little.

    Args:
        key: `[batch, heads, sources, dim]`.
        value: `[batch, heads, sources, value_dim]`.
        assignment: class of each source, integer `[sources]` or `[batch, sources]`.
        num_classes: default the largest class plus one.

    Returns:
        `key` and `value` `[batch, heads, num_classes, dim]`, `log_count` `[batch or 1, num_classes]`.

    Raises:
        ValueError: the assignment does not fit, or a class is empty.

    Source: Geometric Attention (arXiv 2601.11618 v1), abstract (adaptive carriers).
    """
    assignment = assignment.reshape(-1, assignment.shape[-1])
    num_sources = key.shape[2]
    if assignment.shape[1] != num_sources or assignment.shape[0] not in (1, key.shape[0]):
        raise ValueError(
            f"assignment has shape {list(assignment.shape)}; it needs [{num_sources}] or [{key.shape[0]}, "
            f"{num_sources}]."
        )
    total = int(assignment.max()) + 1 if num_classes is None else num_classes
    if int(assignment.min()) < 0 or int(assignment.max()) >= total:
        raise ValueError(
            f"assignment has class {int(assignment.max())}; with num_classes={total} it goes from 0 to "
            f"{total - 1}."
        )
    member = torch.nn.functional.one_hot(assignment, total).to(key.dtype)
    count = member.sum(1)
    if (count == 0).any():
        raise ValueError(
            f"class {int((count == 0).nonzero()[0, 1])} of {total} has no source; every class needs one."
        )
    shares = (member / count[:, None, :]).transpose(1, 2)[:, None]
    return CoarseGrained(shares @ key, shares @ value.to(key.dtype), count.log())


def push_forward(
    weights: torch.Tensor, assignment: torch.Tensor, num_classes: int | None = None
) -> torch.Tensor:
    """Row weights of classes: `alpha'_rc = sum_{i in c} alpha_ri`.

    Args:
        weights: `[..., receivers, sources]`.
        assignment: class of each source, integer `[sources]`.
        num_classes: default the largest class plus one.

    Returns:
        `[..., receivers, num_classes]`.
    """
    total = int(assignment.max()) + 1 if num_classes is None else num_classes
    return weights @ torch.nn.functional.one_hot(assignment, total).to(weights.dtype)


def coarse_log_weights(
    log_weights: torch.Tensor, assignment: torch.Tensor, num_classes: int | None = None
) -> torch.Tensor:
    """The coarse kernel: `log w'_rc = log sum_{i in c} w_ri`, which anchoring commutes with.

    Args:
        log_weights: `[..., receivers, sources]`, -inf outside the mask.
        assignment: class of each source, integer `[sources]`.
        num_classes: default the largest class plus one.

    Returns:
        `[..., receivers, num_classes]`.
    """
    total = int(assignment.max()) + 1 if num_classes is None else num_classes
    return torch.stack(
        [torch.logsumexp(log_weights[..., assignment == index], dim=-1) for index in range(total)], dim=-1
    )


class DoubledCarrier(NamedTuple):
    """`amplitude * weights @ payload` with positive rows that sum to one."""

    weights: torch.Tensor
    payload: torch.Tensor
    amplitude: torch.Tensor


def double_carrier(weights: torch.Tensor, payload: torch.Tensor) -> DoubledCarrier:
    """Splits every source in two, so that signed weights become a positive row-anchored kernel.

    `sum_i a_i v_i = A * (sum_i [a_i]_+ / A v_i + sum_i [a_i]_- / A (-v_i))`, `A = sum_i |a_i|`.

    Args:
        weights: signed, `[..., receivers, sources]`.
        payload: `[..., sources, dim]`.

    Returns:
        Weights `[..., receivers, 2 * sources]`, payload `[..., 2 * sources, dim]`, amplitude `[...,
        receivers, 1]`. A row of zeros has amplitude zero and zero weights.
    """
    amplitude = weights.abs().sum(-1, keepdim=True)
    safe = torch.where(amplitude > 0, amplitude, torch.ones_like(amplitude))
    doubled = torch.cat([weights.clamp(min=0), (-weights).clamp(min=0)], dim=-1) / safe
    return DoubledCarrier(doubled, torch.cat([payload, -payload], dim=-2), amplitude)
