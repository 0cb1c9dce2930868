"""Dense attention in a sliding window: blocks of queries beside the keys they reach, through torch's fused kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from undivided.ops._rules import zero_rows_without_keys

# A block shorter than this leaves a GPU's tiles empty, however narrow the window.
_LEAST_BLOCK = 64


def reasons(query, key, value, attn_mask, is_causal, window, scale, softcap, return_lse) -> list[str]:
    found = []
    if window is None:
        found.append("window is None (every key may be seen)")
    if attn_mask is not None:
        found.append("attn_mask is given (blocks share one mask)")
    if softcap is not None:
        found.append(f"softcap is {softcap} (scaled_dot_product_attention has no cap)")
    if return_lse:
        found.append("return_lse is True (scaled_dot_product_attention keeps the log-sum-exp)")
    if key.shape[2] == 0:
        found.append("key has no positions")
    return found


def attend(query, key, value, attn_mask, is_causal, window, scale, softcap, return_lse):
    batch, heads, num_queries, _ = query.shape
    block = min(max(window, _LEAST_BLOCK), num_queries)
    blocks = -(-num_queries // block)
    # Keys start where the first query's window does, one early so that a block's keys are a multiple of its queries
    # where block and window are; places before the first key are padding.
    padding = num_queries + window - key.shape[2]
    tail = blocks * block - num_queries
    query = F.pad(query, (0, 0, 0, tail)).unflatten(2, (blocks, block)).permute(2, 0, 1, 3, 4).flatten(0, 1)
    key, value = (
        F.pad(x, (0, 0, padding, tail)).unfold(2, window + block, block).permute(2, 0, 1, 4, 3).flatten(0, 1)
        for x in (key, value)
    )
    row = torch.arange(block, device=query.device)[:, None]
    column = torch.arange(window + block, device=query.device)
    seen = (column > row) & (column <= row + window)
    # The first blocks alone reach the padding, and may have queries without a key; all others share one small mask.
    edge = min(-(-max(padding, 0) // block), blocks)
    parts = []
    if edge:
        first = block * torch.arange(edge, device=query.device).repeat_interleave(batch)
        exists = column + first[:, None, None, None] >= padding
        parts.append(_fused(query, key, value, slice(0, edge * batch), seen & exists, scale))
    if edge < blocks:
        parts.append(_fused(query, key, value, slice(edge * batch, None), seen, scale))
    out = torch.cat(parts).unflatten(0, (blocks, batch)).permute(1, 2, 0, 3, 4)
    return out.reshape(batch, heads, blocks * block, -1)[:, :, :num_queries]


def _fused(query, key, value, rows, mask, scale):
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query[rows], key[rows], value[rows], attn_mask=mask, scale=scale, enable_gqa=grouped
    )
    return zero_rows_without_keys(out, mask if mask.dim() > 2 else None)
