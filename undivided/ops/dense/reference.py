"""Dense attention as it is written: logits, softmax, weighted sum. It defines what is correct."""

from __future__ import annotations

import torch

from undivided.ops._rules import combined_mask, masked_softmax


def reasons(**arguments: object) -> list[str]:
    return []


def attend(query, key, value, attn_mask, is_causal, window, scale, softcap, return_lse):
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (key, value))

    logits = scale * (query.to(dtype) @ key.transpose(-2, -1))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    mask = combined_mask(attn_mask, is_causal, window, query.shape[2], key.shape[2], query.device)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        logits = logits + mask

    weights, lse = masked_softmax(logits)
    out = (weights @ value).to(query.dtype)
    return (out, lse) if return_lse else out
