"""Attention to selected blocks as it is written: one mask over all pairs. It defines what is correct."""

from __future__ import annotations

import torch

from undivided.ops._rules import causal_mask, masked_softmax
from undivided.ops.block_map import BlockLists, block_mask, block_sequences, num_blocks, token_blocks


def reasons(**arguments: object) -> list[str]:
    return []


def attend(
    query, key, value, index, counts, query_block_size, block_size, scale, is_causal, cu_seqlens
):  # fmt: skip
    dtype = torch.promote_types(query.dtype, torch.float32)
    num_queries, num_keys = query.shape[2], key.shape[2]
    visible = block_mask(BlockLists(index, counts), num_blocks(num_keys, block_size, cu_seqlens))
    rows = token_blocks(num_queries, query_block_size, query.device, cu_seqlens)
    columns = token_blocks(num_keys, block_size, query.device, cu_seqlens)
    visible = visible[:, :, rows][..., columns]
    if is_causal:
        visible = visible & causal_mask(num_queries, num_keys, query.device)
    if cu_seqlens is not None:
        sequence = block_sequences(num_queries, 1, query.device, cu_seqlens)
        visible = visible & (sequence[:, None] == sequence)

    def to_heads(x):
        return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)

    logits = scale * (query.to(dtype) @ to_heads(key.to(dtype)).transpose(-2, -1))
    weights, lse = masked_softmax(logits.masked_fill(~to_heads(visible), float("-inf")))
    return (weights @ to_heads(value.to(dtype))).to(query.dtype), lse
