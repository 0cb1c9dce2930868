"""Which blocks are critical, marginal or negligible, and what the linear branch makes of a token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from undivided.ops import _rules
from undivided.ops.block_map import (
    BlockLists,
    check_block_size,
    num_blocks,
    pool_blocks,
    score_blocks,
    select_topk,
)
from undivided.ops.block_map.select import kernels_choose

FEATURE_MAPS = ("softmax", "elu1", "relu")
LINEAR_SCOPES = ("marginal", "noncritical", "all")


def feature(x: torch.Tensor, name: str) -> torch.Tensor:
    """Returns `phi(x)`: softmax over the channels of a token, elu(x) + 1, or relu."""
    if name == "softmax":
        return torch.softmax(x, dim=-1)
    # exp(x), not elu(x) + 1, which is rounded to zero for very negative x.
    return F.relu(x) if name == "relu" else torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def class_counts(key_blocks: int, topk: float, bottomk: float) -> tuple[int, int]:
    """Returns how many blocks of a row are critical and how many negligible.

    `critical = max(1, int(topk * key_blocks))` and `negligible = min(int(bottomk * key_blocks), the rest)`.
    """
    critical = max(1, int(topk * key_blocks))
    return critical, min(int(bottomk * key_blocks), max(key_blocks - critical, 0))


def check_ratios(topk: float, bottomk: float) -> None:
    """Raises a ValueError unless the shares of critical and negligible blocks fit."""
    if not 0 < topk <= 1:
        raise ValueError(f"topk={topk} must be in (0, 1]: the share of critical blocks.")
    if not 0 <= bottomk < 1 or topk + bottomk > 1:
        raise ValueError(
            f"bottomk={bottomk} with topk={topk}; bottomk is at least 0 and both together at most 1."
        )


@torch.no_grad()
def block_classes(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    topk: float = 0.05,
    bottomk: float = 0.10,
    query_block_size: int = 64,
    block_size: int = 64,
) -> torch.Tensor:
    """Returns the class of each pair of blocks: 1 critical, 0 marginal, -1 negligible.

    `P = softmax(pool(Q) pool(K)^T * scale)` by rows; the `topk` share with the highest entries is critical, at least
    one block, and the `bottomk` share with the lowest is negligible. Only the order counts, so no softmax is taken;
    among equals the first block is the higher one. Means are in float32: the release subtracts the mean key first,
    which changes no order and is for means in bfloat16.

    Args:
        query: `[batch, heads, length, head_dim]`.
        key: of the same shape.
        topk: share of critical blocks, in (0, 1].
        bottomk: share of negligible blocks.
        query_block_size: queries of a block.
        block_size: keys of a block.

    Returns:
        int8 `[batch, heads, query_blocks, key_blocks]`, without a gradient.

    Raises:
        ValueError: a shape or a number does not fit.

    Source: SLA (arXiv 2509.24006), section 4.
    """
    check_pair(query, key)
    check_ratios(topk, bottomk)
    check_block_size("query_block_size", query_block_size)
    check_block_size("block_size", block_size)
    scores = score_blocks(pool_blocks(query, query_block_size), pool_blocks(key, block_size))
    return classify(scores, *class_counts(scores.shape[3], topk, bottomk))[1]


def classify(scores: torch.Tensor, critical: int, negligible: int) -> tuple[BlockLists, torch.Tensor]:
    """Returns the lists of critical blocks and the classes, from the scores of all pairs."""
    if kernels_choose(scores):
        from undivided.ops.block_map import triton

        *lists, classes = triton.select(scores, critical, critical, negligible, "classes")
        return BlockLists(*lists), classes
    lists = select_topk(scores, critical)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    classes = torch.zeros_like(scores, dtype=torch.int8)
    classes.scatter_(-1, order[..., scores.shape[3] - negligible :], -1)
    classes.scatter_(-1, order[..., :critical], 1)
    return lists, classes


_KINDS = {"marginal": "between", "noncritical": "beside", "all": "everywhere"}


def lists_and_shares(
    scores: torch.Tensor, critical: int, negligible: int, linear_scope: str, dtype: torch.dtype
) -> tuple[BlockLists, torch.Tensor]:
    """Returns the lists of critical blocks and the map of the linear branch, as `share_map` has it, in one kernel."""
    if kernels_choose(scores):
        from undivided.ops.block_map import triton

        *lists, shares = triton.select(
            scores, critical, critical, negligible, _KINDS[linear_scope], dtype, share_unit(scores.shape[3])
        )
        return BlockLists(*lists), shares
    lists, classes = classify(scores, critical, negligible)
    return lists, share_map(classes, linear_scope, dtype)


def share_map(classes: torch.Tensor, linear_scope: str, dtype: torch.dtype) -> torch.Tensor:
    """Returns the blocks that the linear branch sees as a matrix to multiply with: `share_unit`, or zero."""
    return linear_blocks(classes, linear_scope).to(dtype).mul_(share_unit(classes.shape[3]))


def share_unit(key_blocks: int) -> float:
    """Returns a power of two that keeps sums over all key blocks in float16's range; it cancels in the division."""
    return 2.0 ** -math.ceil(math.log2(key_blocks))


def lists_of(classes: torch.Tensor) -> BlockLists:
    """Returns the lists of the critical blocks of a map of classes, as wide as there are key blocks."""
    critical = classes == 1
    counts = critical.sum(-1, dtype=torch.int32)
    order = critical.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    valid = torch.arange(classes.shape[3], device=classes.device) < counts[..., None]
    return BlockLists(order.where(valid, -1).int(), counts)


def linear_blocks(classes: torch.Tensor, linear_scope: str) -> torch.Tensor:
    """Returns the boolean map of the blocks that the linear branch sees."""
    if linear_scope == "all":
        return torch.ones_like(classes, dtype=torch.bool)
    return classes == 0 if linear_scope == "marginal" else classes <= 0


def check_pair(query: torch.Tensor, key: torch.Tensor) -> None:
    """Raises unless queries and keys are of the same tokens and heads."""
    _rules.check_rank(4, "[batch, heads, length, head_dim]", query=query, key=key)
    _rules.check_floating(query=query, key=key)
    if query.shape != key.shape:
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} must have one shape: the map is of self-attention "
            "without shared heads."
        )
    if query.numel() == 0:
        raise ValueError(f"query has shape {list(query.shape)}; it needs at least one token.")


def map_shape(query: torch.Tensor, query_block_size: int, block_size: int) -> list[int]:
    """Returns the shape of a map of classes."""
    length = query.shape[2]
    return [*query.shape[:2], num_blocks(length, query_block_size), num_blocks(length, block_size)]
