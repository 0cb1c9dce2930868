"""Attention to listed keys, as it is written: a list is a mask."""

from __future__ import annotations

import torch

from undivided.ops._rules import causal_mask, masked_softmax


def reasons(**arguments: object) -> list[str]:
    return []


def attend(query, key, value, indices, block_size, is_causal, window, scale, softcap, return_lse):
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    # One column more takes the places that list nothing.
    listed = torch.zeros(*indices.shape[:3], num_keys + 1, dtype=torch.bool, device=query.device)
    places = torch.where(indices >= 0, indices, num_keys).long()
    listed = listed.scatter(-1, places, True)[..., :num_keys]
    seen = listed.repeat_interleave(block_size, dim=2)[:, :, :num_queries]
    if is_causal:
        seen = seen & causal_mask(num_queries, num_keys, query.device, window)
    logits = query @ key.transpose(2, 3)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights, lse = masked_softmax(logits.masked_fill(~seen, float("-inf")))
    return weights.to(value.dtype) @ value, lse
