"""Differential attention as it is written: two maps of the same values, subtracted. It defines what is correct."""

from __future__ import annotations

import torch

from undivided.ops._rules import combined_mask, masked_softmax
from undivided.ops.differential._combine import combine


def reasons(**arguments: object) -> list[str]:
    return []


def attend(
    query, noise_query, key, noise_key, value, lam, norm_weight, norm_eps, out_scale, attn_mask, is_causal, window,
    scale, softcap,
):  # fmt: skip
    dtype = torch.promote_types(query.dtype, torch.float32)
    mask = combined_mask(attn_mask, is_causal, window, query.shape[2], key.shape[2], query.device)

    def apply_map(query, key):
        to_heads = lambda x: x.to(dtype).repeat_interleave(query.shape[1] // x.shape[1], dim=1)  # noqa: E731
        logits = scale * (query.to(dtype) @ to_heads(key).transpose(-2, -1))
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None and mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, float("-inf"))
        elif mask is not None:
            logits = logits + mask
        return masked_softmax(logits)[0] @ to_heads(value)

    signal, noise = apply_map(query, key), apply_map(noise_query, noise_key)
    return combine(signal, noise, lam, norm_weight, norm_eps, out_scale).to(query.dtype)
