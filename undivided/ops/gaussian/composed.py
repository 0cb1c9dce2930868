"""Gaussian gates through the one Gaussian that the product is."""

from __future__ import annotations

import torch


def product(offset: torch.Tensor, width: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns precision and precision times offset of the product, `[heads]` each, in float32 at least."""
    wide = torch.promote_types(width.dtype, torch.float32)
    precision = width.to(wide).square().reciprocal()
    return precision.sum(1), (precision * offset.to(wide)).sum(1)


def gate(x, offset, width, eps):
    precision, moment = (p[:, None, None] for p in product(offset, width))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    apart = wide - wide.mean(2, keepdim=True)
    variance = apart.square().sum(2, keepdim=True) / (x.shape[2] - 1) + eps
    logits = -apart * (precision * apart - 2 * moment) / (2 * variance)
    return (wide * torch.softmax(logits, dim=2)).to(x.dtype)
