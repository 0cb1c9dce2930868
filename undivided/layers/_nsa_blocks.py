"""What native sparse attention knows of its blocks: which compressed ones a query sees, and which ones it selects."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from undivided.ops.block_map import BlockLists, num_blocks, select_topk

# Bytes of scores at a time while blocks are selected.
_SCORE_BYTES = 2**28


def compressed_blocks(length: int, kernel_size: int, kernel_stride: int) -> int:
    """Returns how many whole blocks of `kernel_size` tokens, one every `kernel_stride`, so many tokens hold."""
    return max((length - kernel_size) // kernel_stride + 1, 0)


def visible_blocks(
    positions: torch.Tensor, blocks: int, kernel_size: int, kernel_stride: int
) -> torch.Tensor:
    """Returns the boolean `[queries, blocks]` map: a query sees the compressed blocks that end at it or before."""
    last = torch.arange(blocks, device=positions.device) * kernel_stride + kernel_size - 1
    return positions[:, None] >= last


def importance(
    weights: torch.Tensor, blocks: int, kernel_size: int, kernel_stride: int, block_size: int
) -> torch.Tensor:
    """Returns the score of each selection block: the weights of the compressed blocks, by how much they overlap it.

    `p_slc[j] = sum_{m < block_size / d} sum_{n < kernel_size / d} p_cmp[(block_size / d) j + m - n]`, d the stride.

    Args:
        weights: `[..., compressed blocks]`.
        blocks: selection blocks.
        kernel_size, kernel_stride, block_size: in tokens; the stride divides both others.

    Returns:
        `[..., blocks]`.

    Source: Native Sparse Attention (arXiv 2502.11089), equation 9, whose indices count from 1.
    """
    inside, across = block_size // kernel_stride, kernel_size // kernel_stride
    # Strides of the text, each with the weights of the compressed blocks that cover it.
    strides = blocks * inside
    weights = F.pad(weights, (0, max(strides - weights.shape[-1], 0)))[..., :strides]
    covered = torch.stack([F.pad(weights, (n, 0))[..., :strides] for n in range(across)]).sum(0)
    return covered.unflatten(-1, (blocks, inside)).sum(-1)


@torch.no_grad()
def select_blocks(
    query: torch.Tensor,
    compressed: torch.Tensor,
    num_keys: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    scale: float,
    first_head_only: bool = False,
) -> BlockLists:
    """Returns the blocks that each query attends, one list for the heads of a group.

    The weights of the compressed branch, summed over the heads of the group in float32, score the blocks. The first
    `init_blocks` and the `local_blocks` up to the query's own come before all others; blocks behind it are not listed.

    Args:
        query: `[batch, heads, queries, head_dim]`, the last tokens.
        compressed: compressed keys, `[batch, key_heads, compressed blocks, head_dim]`.
        num_keys: tokens so far.
        kernel_size, kernel_stride, block_size: in tokens.
        topk: blocks of a list.
        init_blocks, local_blocks: of these, so many are given.
        scale: factor of the logits.
        first_head_only: score with the first head of each group alone.

    Source: Native Sparse Attention (arXiv 2502.11089), equations 8 to 12.
    """
    batch, heads, num_queries, _ = query.shape
    groups, length = compressed.shape[1:3]
    blocks = num_blocks(num_keys, block_size)
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = query.unflatten(1, (groups, heads // groups)).detach()
    if first_head_only:
        query = query[:, :, :1]
    keys = compressed.detach().to(dtype).mT[:, :, None]
    row_bytes = 4 * batch * max(query.shape[1] * query.shape[2] * length, groups * blocks)
    rows = max(_SCORE_BYTES // max(row_bytes, 1), 1)
    column = torch.arange(blocks, device=query.device)
    found = []
    for first in range(0, num_queries, rows):
        part = query[:, :, :, first : first + rows].to(dtype)
        before = num_keys - num_queries + first
        position = torch.arange(part.shape[3], device=query.device) + before
        # No query of this part sees the later ones.
        seen = min(compressed_blocks(before + part.shape[3], kernel_size, kernel_stride), length)
        with torch.autocast(query.device.type, enabled=False):
            logits = scale * (part @ keys[..., :seen])
        hidden = ~visible_blocks(position, seen, kernel_size, kernel_stride)
        weights = logits.masked_fill_(hidden, float("-inf")).softmax(-1)
        # A query that sees no compressed block has no scores.
        weights = weights.masked_fill_(hidden, 0.0).sum(2)
        scores = importance(weights, blocks, kernel_size, kernel_stride, block_size)
        own = (position // block_size)[:, None]
        given = (column < init_blocks) | ((column <= own) & (column > own - local_blocks))
        found.append(select_topk(scores, topk, allowed=column <= own, always=given))
    return BlockLists(*(torch.cat(parts, dim=2) for parts in zip(*found, strict=True)))
