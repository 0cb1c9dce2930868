"""Attention by strips of PyTorch's operators: strips in float32 at least, products in the type of the map."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F


def reasons(**arguments: object) -> list[str]:
    return []


def strip_means(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the means of rows `[B, C, H]` and of columns `[B, C, W]` of a map, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.mean(3, dtype=dtype), x.mean(2, dtype=dtype)


def gate(strip, conv, norm, bias, conv_groups, norm_groups, eps, is_circular):
    """Returns the gate of a strip `[batch, channels, length]`."""
    padding = conv.shape[2] // 2
    if is_circular:
        strip, padding = F.pad(strip, (padding, padding), mode="circular"), 0
    strip = F.conv1d(strip, conv.to(strip.dtype), padding=padding, groups=conv_groups)
    # Not F.group_norm, which refuses a strip of one position in a batch of one and takes it in a larger batch.
    return torch.sigmoid(
        torch.group_norm(strip, norm_groups, norm.to(strip.dtype), bias.to(strip.dtype), eps)
    )


def attend(x, weights, conv_groups, norm_groups, eps, is_circular, residual):
    options = conv_groups, norm_groups, eps, is_circular
    # Autocast would round the strips; on the meta device there is none.
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        rows, columns = strip_means(x)
        rows, columns = gate(rows, *weights[:3], *options), gate(columns, *weights[3:], *options)
    out = x * rows.to(x.dtype)[:, :, :, None] * columns.to(x.dtype)[:, :, None, :]
    return x + out if residual else out
