"""Core context attention in blocks of queries, each beside the core tokens and keys it reaches, through torch's SDPA.

Memory is linear in the length, and no product is formed that all of a block's queries would mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from undivided.ops.core_context._groups import visible, visible_cores

_LEAST_BLOCK = 128


def reasons(
    query,
    key,
    value,
    core_key,
    core_value,
    num_tokens,
    group_size,
    window,
    scale,
    softcap,
    core_logit_bias,
    return_lse,
) -> list[str]:
    found = []
    if softcap is not None:
        found.append(f"softcap is {softcap} (scaled_dot_product_attention has no cap)")
    if return_lse:
        found.append("return_lse is True (scaled_dot_product_attention keeps the log-sum-exp)")
    return found


def attend(
    query, key, value, core_key, core_value, num_tokens, group_size, window, scale, softcap, core_logit_bias
):
    heads, num_queries, num_keys = query.shape[1], query.shape[2], key.shape[2]
    if core_key.shape[1] != key.shape[1]:
        copies = core_key.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    block = min(max(window // 2, _LEAST_BLOCK), num_queries)
    before_queries, before_keys = num_tokens - num_queries, num_tokens - num_keys
    parts = []
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        seen = before_queries + stop
        first = group_size * visible_cores(before_queries + start + 1, group_size, window) - before_keys
        cores = visible_cores(seen, group_size, window)
        keys = slice(first, seen - before_keys)
        mask = None
        if stop - start > 1 or core_logit_bias:
            mask = visible(
                stop - start, seen - before_keys - first, cores, seen, group_size, window, query.device
            )
        if core_logit_bias:
            bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
            bias[:, :cores] = core_logit_bias
            mask = bias.masked_fill(~mask, float("-inf"))
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, start:stop],
                torch.cat([core_key[:, :, :cores], key[:, :, keys]], dim=2),
                torch.cat([core_value[:, :, :cores], value[:, :, keys]], dim=2),
                attn_mask=mask,
                scale=scale,
                enable_gqa=heads != key.shape[1],
            )
        )
    return torch.cat(parts, dim=2), None
