"""Attention with distances, a block of queries at a time.

The scores of all queries are never held: a block sees the keys up to its last query, which also halves the products,
and for gradients it is computed again. Peak memory is that of `_BLOCK` rows in place of all.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from undivided.ops.relative.reference import attend_from

_BLOCK = 128


def reasons(
    query, key, value, content_bias, distance_vectors, distance_bias, attn_mask, scale, return_lse
) -> list[str]:
    return ["query is empty"] if query.shape[2] == 0 else []


def attend(query, key, value, content_bias, distance_vectors, distance_bias, attn_mask, scale, return_lse):
    num_queries, before = query.shape[2], key.shape[2] - query.shape[2]
    parts = []
    for start in range(0, num_queries, _BLOCK):
        stop = min(start + _BLOCK, num_queries)
        mask = attn_mask
        if mask is not None:
            mask = mask[..., start:stop, :] if mask.shape[-2] > 1 else mask
            mask = mask[..., : before + stop] if mask.shape[-1] > 1 else mask
        arguments = (
            query[:, :, start:stop], key[:, :, : before + stop], value[:, :, : before + stop], content_bias,
            distance_vectors, distance_bias, mask, scale, before + start,
        )  # fmt: skip
        if torch.is_grad_enabled() and num_queries > _BLOCK:
            parts.append(checkpoint(attend_from, *arguments, use_reentrant=False))
        else:
            parts.append(attend_from(*arguments))
    out, lse = (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
    return (out, lse) if return_lse else out
