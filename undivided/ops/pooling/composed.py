"""The generalised mean of PyTorch's operators, relative to the largest token, in float32 at least."""

from __future__ import annotations

import torch


def reasons(**arguments: object) -> list[str]:
    return []


def pool(x, power, eps, mask):
    dtype = torch.promote_types(torch.promote_types(x.dtype, power.dtype), torch.float32)
    power = power.to(dtype)
    tokens = x.to(dtype)
    if mask is not None:
        tokens = torch.where(mask[:, :, None], tokens, eps)
    tokens = tokens.clamp(min=eps)
    # The mean does not depend on its scale, so the scale needs no gradient.
    scale = tokens.detach().amax(1, keepdim=True)
    raised = (tokens / scale) ** power
    if mask is None:
        mean = raised.mean(1)
    else:
        counted = mask | ~mask.any(1, keepdim=True)
        raised = torch.where(counted[:, :, None], raised, 0.0)
        mean = raised.sum(1) / counted.sum(1, keepdim=True)
    return (scale[:, 0] * mean ** (1 / power)).to(x.dtype)
