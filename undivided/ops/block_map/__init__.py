"""Which blocks of keys each block of queries attends: pooled, scored, chosen, and turned around.

`pool_blocks`, `score_blocks` and `select_topk` or `select_mass` give `BlockLists`; `invert` turns them around for the
gradients of keys and values. Counts are tensors, nothing has a gradient, and nothing waits for the device.
"""

from __future__ import annotations

from undivided.ops.block_map._bounds import block_bounds, block_sequences, num_blocks, token_blocks
from undivided.ops.block_map.inverse import InverseIndex, check_lists, invert
from undivided.ops.block_map.select import (
    BlockLists,
    block_mask,
    causal_blocks,
    check_block_size,
    pool_blocks,
    same_sequence,
    score_blocks,
    select_mass,
    select_topk,
)

__all__ = [
    "BlockLists",
    "InverseIndex",
    "block_bounds",
    "block_mask",
    "block_sequences",
    "causal_blocks",
    "check_block_size",
    "check_lists",
    "invert",
    "num_blocks",
    "pool_blocks",
    "same_sequence",
    "score_blocks",
    "select_mass",
    "select_topk",
    "token_blocks",
]
