"""Latent attention as it is written. It defines what is correct."""

from __future__ import annotations

import torch

from undivided.ops._rules import masked_softmax
from undivided.ops.latent_decode._rows import cache_rows, visible


def reasons(**arguments: object) -> list[str]:
    return []


def attend(
    query_latent, query_rope, latent, rope_key, scale, attn_mask, is_causal, cache_seqlens, softcap, block_table,
    latent_scale, num_splits, return_lse,
):  # fmt: skip
    dtype = torch.promote_types(query_latent.dtype, torch.float32)
    latent, rope_key = cache_rows(latent, rope_key, cache_seqlens, block_table, latent_scale, dtype)
    rows = latent.repeat_interleave(query_latent.shape[1] // latent.shape[1], dim=1)

    logits = query_latent.to(dtype) @ rows.transpose(-2, -1)
    if query_rope is not None:
        logits = logits + query_rope.to(dtype) @ rope_key.transpose(-2, -1)
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        logits = logits + attn_mask
    elif attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, float("-inf"))
    seen = visible(logits.shape[2], logits.shape[3], is_causal, cache_seqlens, logits.device)
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))

    weights, lse = masked_softmax(logits)
    out = (weights @ rows).to(query_latent.dtype)
    return (out, lse) if return_lse else out
