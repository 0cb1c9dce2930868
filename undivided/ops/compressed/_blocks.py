"""Which compressed blocks a query sees, and how much they share with blocks of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
