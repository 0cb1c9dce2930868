"""Dense attention through torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from undivided.ops._rules import combined_mask


def reasons(query, key, value, attn_mask, is_causal, window, scale, softcap, return_lse) -> list[str]:
    found = []
    if softcap is not None:
        found.append(f"softcap is {softcap} (scaled_dot_product_attention has no cap)")
    if return_lse:
        found.append("return_lse is True (scaled_dot_product_attention keeps the log-sum-exp)")
    if key.shape[2] == 0:
        found.append("key has no positions")
    return found


def attend(query, key, value, attn_mask, is_causal, window, scale, softcap, return_lse):
    num_queries, num_keys = query.shape[2], key.shape[2]
    # Torch aligns is_causal upper left; only the square case means the same as ours, and there it is the fast path.
    plain_causal = is_causal and attn_mask is None and window is None and num_queries == num_keys
    mask = None
    if not plain_causal:
        mask = combined_mask(attn_mask, is_causal, window, num_queries, num_keys, query.device)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
    grouped = query.shape[1] != key.shape[1]
    head_dim, value_dim = query.shape[3], value.shape[3]
    if query.device.type == "cpu" and value_dim != head_dim:
        # Torch's fused CPU kernel wants equal widths; without it the N x M matrix is formed, at five times the time.
        query, key = (F.pad(x, (0, max(value_dim - head_dim, 0))) for x in (query, key))
        value = F.pad(value, (0, max(head_dim - value_dim, 0)))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=plain_causal, scale=scale, enable_gqa=grouped
    )
    return out[..., :value_dim]
