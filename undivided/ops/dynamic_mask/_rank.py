"""Which keys are the best, in plain PyTorch: of equals the latest, so that a constant bias is a sliding window."""

from __future__ import annotations

import torch


def key_order(key_bias: torch.Tensor) -> torch.Tensor:
    """Returns the keys along the last axis from the best on, int64; of equals the latest first."""
    order = key_bias.flip(-1).argsort(dim=-1, descending=True, stable=True)
    return key_bias.shape[-1] - 1 - order


def best_keys(key_bias: torch.Tensor, keep: int) -> torch.Tensor:
    """Returns the best `keep` keys along the last axis in no order, int32; of equals the latest.

    Args:
        key_bias: float32, without NaN.
        keep: at most the number of keys.
    """
    # One integer for value and position: no two are equal, so that what top-k keeps is defined. (0.0 + -0.0 is 0.0.)
    bits = (key_bias + 0.0).view(torch.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    position = torch.arange(key_bias.shape[-1], device=key_bias.device)
    packed = (ascending.long() << 32) | position
    return packed.topk(keep, dim=-1, sorted=False).values.to(torch.int32)
