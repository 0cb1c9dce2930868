"""Attention to compressed blocks and the choice that its weights make, as they are written."""

from __future__ import annotations

import torch

from undivided.ops._rules import masked_softmax
from undivided.ops.block_map import BlockLists, num_blocks, select_topk
from undivided.ops.compressed._blocks import compressed_blocks, importance, visible_blocks

# Bytes of weights at a time while blocks are chosen.
_WEIGHT_BYTES = 2**28


def reasons(**arguments: object) -> list[str]:
    return []


def attend(query, key, value, num_keys, kernel_size, kernel_stride, scale):
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = key.shape[1]
    position = torch.arange(num_keys - query.shape[2], num_keys, device=query.device)
    seen = visible_blocks(position, key.shape[2], kernel_size, kernel_stride)
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.to(dtype).unflatten(1, (groups, -1))
        logits = scale * (grouped @ key.to(dtype).mT[:, :, None])
        if key.shape[2] == 0:
            weights, lse = logits, logits.new_full(logits.shape[:-1], float("-inf"))
        else:
            weights, lse = masked_softmax(logits.masked_fill(~seen, float("-inf")))
        out = weights @ value.to(dtype)[:, :, None]
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def choose(
    query, key, lse, num_keys, kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, scale
):  # fmt: skip
    batch, heads, num_queries, _ = query.shape
    groups, length = key.shape[1:3]
    blocks = num_blocks(num_keys, block_size)
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, lse = (x.unflatten(1, (groups, heads // groups)) for x in (query, lse))
    keys = key.to(dtype).mT[:, :, None]
    rows = max(_WEIGHT_BYTES // (4 * batch * max(heads * length, groups * blocks, 1)), 1)
    column = torch.arange(blocks, device=query.device)
    found = []
    for first in range(0, max(num_queries, 1), rows):
        part = query[:, :, :, first : first + rows].to(dtype)
        before = num_keys - num_queries + first
        position = torch.arange(part.shape[3], device=query.device) + before
        # No query of this part sees the later ones.
        some = min(compressed_blocks(before + part.shape[3], kernel_size, kernel_stride), length)
        with torch.autocast(query.device.type, enabled=False):
            logits = scale * (part @ keys[..., :some])
        hidden = ~visible_blocks(position, some, kernel_size, kernel_stride)
        weights = (logits - lse[:, :, :, first : first + rows, None].to(dtype)).exp()
        weights = weights.masked_fill(hidden, 0.0).sum(2)
        scores = importance(weights, blocks, kernel_size, kernel_stride, block_size)
        own = (position // block_size)[:, None]
        given = (column < init_blocks) | ((column <= own) & (column > own - local_blocks))
        found.append(select_topk(scores, topk, allowed=column <= own, always=given))
    return BlockLists(*(torch.cat(parts, dim=2) for parts in zip(*found, strict=True)))
