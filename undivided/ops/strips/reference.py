"""Attention by strips as it is written, in the type of the map. It defines what is correct."""

from __future__ import annotations

from undivided.ops.strips.composed import gate


def reasons(**arguments: object) -> list[str]:
    return []


def attend(x, weights, conv_groups, norm_groups, eps, is_circular, residual):
    weights = [weight.to(x.dtype) for weight in weights]
    options = conv_groups, norm_groups, eps, is_circular
    rows, columns = gate(x.mean(3), *weights[:3], *options), gate(x.mean(2), *weights[3:], *options)
    out = x * rows[:, :, :, None] * columns[:, :, None, :]
    return x + out if residual else out
