"""Routed attention as it is written: every head for every token, then zeros where a token did not choose the head."""

from __future__ import annotations

import torch

from undivided.ops._rules import combined_mask, masked_softmax


def reasons(**arguments: object) -> list[str]:
    return []


def attend(query, key, value, selected, gates, attn_mask, is_causal, scale, softcap):
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (key, value))
    logits = scale * (query.to(dtype) @ key.transpose(-2, -1))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    mask = combined_mask(attn_mask, is_causal, None, query.shape[2], key.shape[2], query.device)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        logits = logits + mask
    out = masked_softmax(logits)[0] @ value
    if gates is not None:
        out = out * gates[..., None]
    return out.masked_fill(~selected[..., None], 0.0).to(query.dtype)
