"""The generalised mean as it is written. It defines what is correct."""

from __future__ import annotations

import torch


def reasons(**arguments: object) -> list[str]:
    return []


def pool(x, power, eps, mask):
    tokens = x.clamp(min=eps)
    raised = tokens ** power.to(x.dtype)
    if mask is None:
        return raised.mean(1) ** (1 / power.to(x.dtype))
    mean = torch.where(mask[:, :, None], raised, 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    found = mean ** (1 / power.to(x.dtype))
    return torch.where(mask.any(1, keepdim=True), found, eps)
