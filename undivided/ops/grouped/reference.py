"""Attention inside groups as it is written. It defines what is correct."""

from __future__ import annotations

import torch


def reasons(**arguments: object) -> list[str]:
    return []


def attend(query, key, value, groups, shared_query, bias, scale):
    given = query.dtype
    query, key, value = (x.to(torch.promote_types(given, torch.float32)) for x in (query, key, value))
    query = query[:, :, None] if shared_query else groups.gather(query, group_axis=2)
    key, value = (groups.gather(x, group_axis=2) for x in (key, value))

    logits = scale * (query @ key.transpose(-2, -1))
    if bias is not None:
        logits = logits + bias[:, None]
    out = torch.softmax(logits, dim=-1) @ value
    return groups.scatter(out, group_axis=2).to(given)
