"""Merging partial attention results, as it is written."""

from __future__ import annotations

import torch


def reasons(**arguments: object) -> list[str]:
    return []


def merge(outs, lses):
    out = torch.stack([x.to(torch.promote_types(x.dtype, torch.float32)) for x in outs])
    parts = torch.stack(list(lses)).to(out.dtype)
    empty = parts == float("-inf")
    all_empty = empty.all(dim=0)
    # Shifting by a finite number where nothing is left keeps -inf - (-inf) = NaN out of value and gradient.
    safe = parts.masked_fill(all_empty, 0.0)
    lse = torch.logsumexp(safe, dim=0)
    weights = torch.exp(safe - lse).masked_fill(empty, 0.0)
    # An empty part may hold anything, NaN too, and NaN times a zero weight is NaN.
    out = (out.masked_fill(empty[..., None], 0.0) * weights[..., None]).sum(dim=0)
    return out.to(outs[0].dtype), lse.masked_fill(all_empty, float("-inf")).to(lses[0].dtype)
