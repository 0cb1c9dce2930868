"""Latent attention through torch's scaled_dot_product_attention, which reads a row twice: as key and as value."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from undivided.ops._rules import zero_rows_without_keys
from undivided.ops.latent_decode._rows import cache_rows, visible


def reasons(
    query_latent, query_rope, latent, rope_key, scale, attn_mask, is_causal, cache_seqlens, softcap, block_table,
    latent_scale, num_splits, return_lse,
) -> list[str]:  # fmt: skip
    found = []
    if softcap is not None:
        found.append(f"softcap is {softcap} (scaled_dot_product_attention has no cap)")
    if return_lse:
        found.append("return_lse is True (scaled_dot_product_attention keeps the log-sum-exp)")
    if num_splits is not None and num_splits > 1:
        found.append(f"num_splits is {num_splits} (it splits as it likes)")
    if latent.shape[2] == 0:
        found.append("latent has no positions")
    return found


def attend(
    query_latent, query_rope, latent, rope_key, scale, attn_mask, is_causal, cache_seqlens, softcap, block_table,
    latent_scale, num_splits, return_lse,
):  # fmt: skip
    latent, rope_key = cache_rows(
        latent, rope_key, cache_seqlens, block_table, latent_scale, query_latent.dtype
    )
    heads, latent_heads = query_latent.shape[1], latent.shape[1]
    query, key = query_latent, latent
    if query_rope is not None:
        query = torch.cat([query_latent, query_rope], dim=-1)
        key = torch.cat([latent, rope_key.expand(-1, latent_heads, -1, -1)], dim=-1)
    mask = visible(query.shape[2], key.shape[2], is_causal, cache_seqlens, query.device)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            mask = attn_mask if mask is None else attn_mask & mask
        else:
            mask = attn_mask if mask is None else attn_mask.masked_fill(~mask, float("-inf"))
            mask = mask.to(query.dtype)
    # Heads of one latent head stand as queries, so that no copy of the cache a head is made.
    shape, groups = query_latent.shape, heads // latent_heads
    query = query.reshape(shape[0], latent_heads, groups * shape[2], query.shape[3])
    if mask is not None:
        mask = mask.expand(-1, heads if mask.shape[1] > 1 else latent_heads * groups, -1, -1)
        mask = mask.reshape(mask.shape[0], latent_heads, groups * shape[2], mask.shape[3])
    out = F.scaled_dot_product_attention(query, key, latent, attn_mask=mask, scale=scale)
    return zero_rows_without_keys(out, mask).reshape(shape)
