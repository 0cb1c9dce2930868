"""Neighborhood attention as it is written: all logits, those outside the window dropped. It defines what is correct."""

from __future__ import annotations

import torch

from undivided.ops._rules import masked_softmax
from undivided.ops.neighborhood._tables import pair_bias


def reasons(**arguments: object) -> list[str]:
    return []


def attend(query, key, value, neighborhood, scale, return_lse, relative_bias):
    given, size = query.dtype, neighborhood.size
    groups = query.shape[1] // key.shape[1]
    dtype = torch.promote_types(given, torch.float32)
    query, key, value = (x.to(dtype).flatten(2, -2) for x in (query, key, value))
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))

    logits = scale * (query @ key.transpose(-2, -1))
    if relative_bias is not None:
        logits = logits + pair_bias(relative_bias.to(dtype), neighborhood)
    logits = logits.masked_fill(~neighborhood.mask(query.device), float("-inf"))
    weights, lse = masked_softmax(logits)
    out = (weights @ value).to(given).unflatten(2, size)
    return (out, lse.unflatten(2, size)) if return_lse else out
