"""Which blocks of keys each block of queries reads, by the later version of dynamic hierarchical sparse attention.

Blocks are of fixed sizes, heads choose for themselves, and `count` blocks of keys are chosen. "topk" takes those whose
mean key has the largest product with the block's mean query. The others always take the first block, and look for the
rest between it and the queries: "a" by the same product; "vs" by what the last queries of the text attend to, half of
the budget for columns and half for distances ("vertical" and "slash"); "vsb" by the means of blocks in their place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

MODES = ("topk", "a", "vs", "vsb")
VARIANTS = ("paper", "released")
# Numbers formed at once while distances become blocks: 64 MB in float32.
_CHUNK = 2**24


def block_means(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the mean of each block, float32 `[batch, heads, blocks, width]`; the last block may be short."""
    length = rows.shape[2]
    blocks = -(-length // size)
    sums = (
        F.pad(rows, (0, 0, 0, blocks * size - length))
        .unflatten(2, (blocks, size))
        .sum(dim=3, dtype=torch.float32)
    )
    counts = (length - size * torch.arange(blocks, device=rows.device)).clamp(max=size)
    return sums / counts[:, None]


def choose_blocks(
    query: torch.Tensor, key: torch.Tensor, mode: str, count: int, query_block: int, key_block: int,
    variant: str = "paper", vertical_share: float = 0.5,
) -> torch.Tensor:  # fmt: skip
    """Returns which blocks of keys are chosen, boolean `[batch, heads, query blocks, key blocks]`.

    Args:
        query, key: of a whole text, `[batch, heads, length, head_dim]`, key with a divisor of the heads.
        mode: "topk", "a", "vs" or "vsb".
        count: blocks of keys to choose for a block of queries.
        query_block, key_block: tokens of a block.
        variant: "paper": every query reads the blocks from its own block's first token on. "released": as in the
            authors' code, "topk" chooses among blocks of the future too, which are masked later, and "a" and "vs"
            keep of the blocks beside the queries the last one alone.
        vertical_share: share of the budget of "vs" and "vsb" for columns.
    """
    heads = query.shape[1]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    query_blocks, key_blocks = -(-query.shape[2] // query_block), -(-key.shape[2] // key_block)
    count = min(count, key_blocks)
    row = torch.arange(query_blocks, device=query.device)
    column = torch.arange(key_blocks, device=query.device)
    last = (((row + 1) * query_block - 1) // key_block).clamp(max=key_blocks - 1)[:, None]
    first = (row * query_block // key_block)[:, None]
    causal = column <= last
    if mode in ("topk", "a"):
        scores = block_means(query, query_block) @ block_means(key, key_block).transpose(2, 3)
    if mode == "topk":
        if variant == "released":
            return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count).indices, True)
        forced = causal & (column >= first)
        return forced | _best(scores, causal & ~forced, count - forced.sum(dim=1))
    if mode == "vs":
        scores = _lines(query, key, count, query_block, key_block, vertical_share, last)
    elif mode == "vsb":
        scores = _block_lines(query, key, count, query_block, key_block, vertical_share, first, last)
    dense = (last + 1 <= count).squeeze(1)
    if mode != "a":
        # As many rows as the budget has tokens, and the last, are read in full.
        prefix = -(-min(key.shape[2], count * key_block) // query_block)
        dense = dense | (row < prefix) | (row == query_blocks - 1)
    band = (column >= first) if variant == "paper" or mode == "vsb" else (column == last)
    forced = causal & ((column == 0) | band)
    middle = causal & (column > 0) & (column < last)
    # The authors' code counts the band of "vsb" among the budget, but may choose its blocks again.
    eligible = middle if variant == "released" else middle & ~forced
    left = torch.minimum((count - forced.sum(dim=1)).clamp(min=0), middle.sum(dim=1))
    chosen = forced | _best(scores, eligible, left)
    return torch.where(dense[:, None], causal, chosen)


def _best(scores: torch.Tensor, eligible: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Returns the highest eligible scores of each row, as many as its count."""
    most = min(int(counts.max()), scores.shape[-1])
    if most <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    top, places = scores.masked_fill(~eligible, float("-inf")).topk(most, dim=-1)
    rank = torch.arange(most, device=scores.device)
    keep = (rank < counts[:, None]) & (top > float("-inf"))
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, keep)


def _lines(query, key, count, query_block, key_block, vertical_share, last):
    """Scores of blocks by the columns and distances that the last queries attend to most."""
    length = key.shape[2]
    budget = min(length, count * key_block)
    vertical = int(budget * vertical_share)
    rows = min(query_block, length)
    position = torch.arange(length - rows, length, device=query.device)
    column = torch.arange(length, device=query.device)
    logits = query[:, :, -rows:].float() @ key.float().transpose(2, 3) * query.shape[3] ** -0.5
    weights = logits.masked_fill(column > position[:, None], float("-inf")).softmax(dim=-1)
    blocks = -(-length // key_block)
    scores = weights.new_zeros(*weights.shape[:2], last.shape[0], blocks)
    if vertical:
        top, places = weights.sum(dim=2).topk(vertical, dim=-1)
        scores += weights.new_zeros(*weights.shape[:2], blocks).scatter_add_(-1, places // key_block, top)[
            :, :, None
        ]
    if budget - vertical:
        place = position[:, None] - column
        along = weights.gather(-1, place.clamp(min=0).expand_as(weights)) * (place >= 0)
        top, distance = along.sum(dim=2).topk(budget - vertical, dim=-1)
        span = -(-query_block // key_block) + 1
        _add_lines(scores, top, distance, query_block, key_block, last, span, length)
    return scores


def _add_lines(scores, top, distance, query_block, key_block, last, span, length):
    """Adds the score of each distance to the blocks that the rows of a block of queries meet at it."""
    step = max(_CHUNK // max(top.numel(), 1), 1)
    for start in range(0, scores.shape[2], step):
        row = torch.arange(start, min(start + step, scores.shape[2]), device=scores.device)[:, None]
        low = row * query_block - distance[:, :, None]
        high = (row + 1) * query_block - 1 - distance[:, :, None]
        first, end = (x.clamp(0, length - 1) // key_block for x in (low, high))
        for offset in range(span):
            block = first + offset
            meets = (high >= 0) & (block <= end) & (block <= last[row.squeeze(1)])
            scores[:, :, start : start + step].scatter_add_(
                -1, block.clamp(max=scores.shape[3] - 1), top[:, :, None] * meets
            )


def _block_lines(query, key, count, query_block, key_block, vertical_share, first, last):
    """The same by means of blocks: the last block of queries and all blocks of keys."""
    means = block_means(key, key_block)
    own = block_means(query, query_block)[:, :, -1:]
    logits = (own @ means.transpose(2, 3)).squeeze(2) * query.shape[3] ** -0.5
    blocks = logits.shape[2]
    vertical = int(count * vertical_share)
    scores = logits.new_zeros(*logits.shape[:2], last.shape[0], blocks)
    if vertical:
        top, places = logits.topk(vertical, dim=-1)
        scores += torch.zeros_like(logits).scatter_add_(-1, places, top)[:, :, None]
    if count - vertical:
        top, places = logits.topk(count - vertical, dim=-1)
        distance = (blocks - 1 - places)[:, :, None]
        for offset in range(int((last - first).max()) + 1):
            block = first - distance + offset
            meets = (block <= last - distance) & (block > 0) & (block < last)
            scores.scatter_add_(-1, block.clamp(0, blocks - 1), top[:, :, None] * meets)
    return scores


def tokens_of_blocks(
    query: torch.Tensor, means: torch.Tensor, boundaries: torch.Tensor, mode: str, density: float, key_block: int,
    variant: str = "paper",
) -> torch.Tensor:  # fmt: skip
    """Returns the keys that one more token reads: those of the blocks that `choose_blocks` gives the last row.

    Args:
        query: `[batch, heads, 1, head_dim]`.
        means: of the blocks of keys, `[batch, key_heads, blocks, head_dim]`.
        boundaries: of the blocks, int64 `[batch, blocks + 1]`; empty blocks are behind the others.
        mode: "topk" or "a"; of the others the last row reads everything.
        density: chosen share of a text's blocks; one at least.
        key_block: tokens of a block.
        variant: as in `choose_blocks`.

    Returns:
        Positions, int32 `[batch, heads, 1, places]`, -1 where there is none.
    """
    scores = (query.to(means.dtype) @ means.repeat_interleave(query.shape[1] // means.shape[1], dim=1).mT)[
        :, :, 0
    ]
    starts, sizes = boundaries[:, None, :-1], boundaries.diff(dim=1)[:, None]
    numbers = (sizes > 0).sum(dim=-1, keepdim=True)
    column = torch.arange(sizes.shape[2], device=query.device)
    forced = (column == numbers - 1) | ((column == 0) & (mode == "a"))
    if mode == "topk" and variant == "released":
        forced = torch.zeros_like(forced)
    counts = torch.maximum((density * numbers.double()).long().clamp(min=1), forced.sum(-1, keepdim=True))
    most = min(max(int(density * sizes.shape[2]), 2), sizes.shape[2])
    scores = scores.masked_fill(sizes == 0, float("-inf")).masked_fill(forced, float("inf"))
    top, places = scores.topk(most, dim=-1)
    chosen = (torch.arange(most, device=query.device) < counts) & (top > float("-inf"))
    starts, sizes = (x.expand_as(scores).gather(-1, places)[..., None] for x in (starts, sizes))
    token = torch.arange(key_block, device=query.device)
    listed = torch.where(chosen[..., None] & (token < sizes), starts + token, -1)
    return listed.flatten(2)[:, :, None].to(torch.int32)
