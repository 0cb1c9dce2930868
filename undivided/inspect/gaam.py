"""Which features a Gaussian gate keeps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch


def importance_factor(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns the Importance Factor of a gate: its mean weights over a data set, from 0 for the least to 1.

    `IF = (W - min W) / (max W - min W)` with W the mean over all samples. A gate whose weights are all the same gives
    zeros, with a warning.

    Args:
        weights: batches of weights `[batch, ...]`, as layers return them with `need_weights`.

    Returns:
        Of the shape of one sample's weights, float32 at least.

    Raises:
        ValueError: there is no batch, or their shapes differ.

    Source: Gaussian Adaptive Attention (arXiv 2401.11143), Importance Factor.
    """
    total, count = None, 0
    for batch in weights:
        wide = batch.detach().to(torch.promote_types(batch.dtype, torch.float32))
        if total is not None and wide.shape[1:] != total.shape:
            raise ValueError(
                f"weights of shapes {list(total.shape)} and {list(wide.shape[1:])} cannot be averaged."
            )
        total = wide.sum(0) if total is None else total + wide.sum(0)
        count += len(wide)
    if total is None or not count:
        raise ValueError("weights is empty; give at least one batch.")
    mean = total / count
    low, high = mean.min(), mean.max()
    if not high > low:
        warnings.warn(
            "the gate weighs everything alike; its Importance Factor is zero everywhere.", stacklevel=2
        )
        return torch.zeros_like(mean)
    return (mean - low) / (high - low)
