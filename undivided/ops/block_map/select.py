"""Blocks of tokens are pooled, scored and chosen; nothing here has a gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch

from undivided.ops import _rules
from undivided.ops.block_map._bounds import block_sequences, kernels_run, num_blocks, token_blocks

# Entries of a row of scores that the kernel holds in registers.
_WIDEST_ROW = 8192


class BlockLists(NamedTuple):
    """The key blocks that each row of queries attends.

    Args:
        index: int32 `[batch, heads, query_blocks, max_blocks]`, ascending; -1 after the last valid one.
        counts: int32 `[batch, heads, query_blocks]`, how many entries are valid.
    """

    index: torch.Tensor
    counts: torch.Tensor


@torch.no_grad()
def pool_blocks(
    tokens: torch.Tensor, block_size: int, *, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the mean token of each block, in float32 or wider.

    `p_j = sum_{n in block j} x_n / |block j|`: a short last block is divided by its own length. A block without tokens
    (packed sequences) is zero.

    Args:
        tokens: `[batch, heads, length, dim]`.
        block_size: tokens of a block.
        cu_seqlens: int `[sequences + 1]`, where packed sequences begin; blocks are cut inside each.

    Returns:
        `[batch, heads, blocks, dim]`; how many blocks there are: `num_blocks(length, block_size, cu_seqlens)`.

    Raises:
        ValueError: a shape or a number does not fit.
    """
    _rules.check_rank(4, "[batch, heads, length, dim]", tokens=tokens)
    check_block_size("block_size", block_size)
    batch, heads, length, dim = tokens.shape
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    blocks = num_blocks(length, block_size, cu_seqlens)
    if cu_seqlens is None:
        full = length // block_size
        parts = []
        if full:
            whole = tokens[:, :, : full * block_size]
            parts.append(whole.unflatten(2, (full, block_size)).mean(3, dtype=dtype))
        if full < blocks:
            parts.append(tokens[:, :, full * block_size :].mean(2, keepdim=True, dtype=dtype))
        return torch.cat(parts, dim=2) if parts else tokens.new_zeros((batch, heads, 0, dim), dtype=dtype)
    owner = token_blocks(length, block_size, tokens.device, cu_seqlens)
    total = tokens.new_zeros((batch, heads, blocks, dim), dtype=dtype).index_add_(2, owner, tokens.to(dtype))
    sizes = tokens.new_zeros(blocks, dtype=dtype).index_add_(0, owner, tokens.new_ones(length, dtype=dtype))
    return total / sizes.clamp(min=1)[:, None]


@torch.no_grad()
def score_blocks(query_blocks: torch.Tensor, key_blocks: torch.Tensor) -> torch.Tensor:
    """Returns `query_blocks @ key_blocks^T` in float32 or wider; key heads may divide query heads.

    Args:
        query_blocks: pooled queries, `[batch, heads, query_blocks, dim]`.
        key_blocks: pooled keys, `[batch, key_heads, key_blocks, dim]`.

    Returns:
        `[batch, heads, query_blocks, key_blocks]`.

    Raises:
        ValueError: the shapes do not fit.
    """
    _rules.check_rank(4, "[batch, heads, blocks, dim]", query_blocks=query_blocks, key_blocks=key_blocks)
    heads, key_heads = query_blocks.shape[1], key_blocks.shape[1]
    if heads % key_heads:
        raise ValueError(
            f"key_blocks has {key_heads} heads, which does not divide the {heads} of query_blocks."
        )
    dtype = torch.promote_types(query_blocks.dtype, torch.float32)
    keys = key_blocks.to(dtype).repeat_interleave(heads // key_heads, dim=1)
    with torch.autocast(query_blocks.device.type, enabled=False):
        return query_blocks.to(dtype) @ keys.transpose(-2, -1)


def causal_blocks(
    num_queries: int, num_keys: int, query_block_size: int, block_size: int, device: torch.device
) -> torch.Tensor:
    """Returns the boolean `[query_blocks, key_blocks]` map, True where some query of a row sees a key of the block."""
    query_blocks, key_blocks = num_blocks(num_queries, query_block_size), num_blocks(num_keys, block_size)
    last_query = (torch.arange(1, query_blocks + 1, device=device) * query_block_size).clamp(max=num_queries)
    first_key = torch.arange(key_blocks, device=device) * block_size
    return first_key <= (last_query + (num_keys - num_queries - 1))[:, None]


def same_sequence(
    length: int, query_block_size: int, block_size: int, device: torch.device, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Returns the boolean `[query_blocks, key_blocks]` map, True where both are of one packed sequence."""
    rows = block_sequences(length, query_block_size, device, cu_seqlens)
    columns = block_sequences(length, block_size, device, cu_seqlens)
    real = rows < cu_seqlens.numel() - 1
    return (rows[:, None] == columns) & real[:, None]


@torch.no_grad()
def select_topk(
    scores: torch.Tensor,
    topk: int | torch.Tensor,
    *,
    allowed: torch.Tensor | None = None,
    always: torch.Tensor | None = None,
    max_blocks: int | None = None,
) -> BlockLists:
    """Chooses the blocks with the highest scores, the lower number first among equals.

    A row takes `min(topk, allowed blocks)` blocks, at least one if it may see any. Those of `always` come first and
    count.

    Args:
        scores: `[batch, heads, query_blocks, key_blocks]`; a score of -inf is not allowed.
        topk: blocks a row, at least 1; or an integer tensor that broadcasts to `[batch, heads, query_blocks]`: counts
            by head or by row.
        allowed: boolean, broadcasts to `scores`: blocks that may be chosen. Default all.
        always: boolean, broadcasts to `scores`: blocks chosen before all others, if allowed.
        max_blocks: width of the lists; default `topk`, or the number of key blocks if that is a tensor.

    Returns:
        `BlockLists`.

    Raises:
        ValueError: a shape or a number does not fit.
    """
    _check_scores(scores, allowed, always)
    key_blocks = scores.shape[-1]
    if isinstance(topk, torch.Tensor):
        if topk.is_floating_point() or topk.dtype == torch.bool:
            raise TypeError(f"topk has dtype {topk.dtype}; counts are integers.")
        wanted = topk.to(scores.device).expand(scores.shape[:3])
        width = key_blocks if max_blocks is None else max_blocks
    else:
        if topk < 1:
            raise ValueError(f"topk={topk} must be at least 1: a row without a block has no output.")
        wanted = scores.new_full((), topk, dtype=torch.int32).expand(scores.shape[:3])
        width = topk if max_blocks is None else max_blocks
    if width < 1:
        raise ValueError(f"max_blocks={max_blocks} must be at least 1.")
    width = min(width, key_blocks)
    wanted = wanted.clamp(1, max(width, 1)).int()
    ranked = _ranked(scores, allowed, always)
    if kernels_choose(ranked):
        from undivided.ops.block_map import triton

        index, counts, _ = triton.select(ranked, wanted, width)
        return BlockLists(index, counts)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    return _lists(order, torch.minimum(wanted, _available(ranked)), width)


@torch.no_grad()
def select_mass(
    scores: torch.Tensor,
    mass: float | torch.Tensor,
    *,
    allowed: torch.Tensor | None = None,
    always: torch.Tensor | None = None,
    max_blocks: int | None = None,
) -> BlockLists:
    """Chooses the fewest blocks whose softmax weights reach `mass`.

    Args:
        scores: logits, `[batch, heads, query_blocks, key_blocks]`.
        mass: of (0, 1]; or a tensor that broadcasts to `[batch, heads, query_blocks]`.
        allowed: as in `select_topk`.
        always: as in `select_topk`; their weights count.
        max_blocks: width of the lists, and most blocks a row; default the number of key blocks.

    Returns:
        `BlockLists`.

    Raises:
        ValueError: a shape or a number does not fit.
    """
    _check_scores(scores, allowed, always)
    if not isinstance(mass, torch.Tensor) and not 0 < mass <= 1:
        raise ValueError(f"mass={mass} must be in (0, 1].")
    if max_blocks is not None and max_blocks < 1:
        raise ValueError(f"max_blocks={max_blocks} must be at least 1.")
    key_blocks = scores.shape[-1]
    width = key_blocks if max_blocks is None else min(max_blocks, key_blocks)
    ranked = _ranked(scores, allowed, always)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    logits = scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))
    weights, _ = _rules.masked_softmax(logits)
    before = weights.gather(-1, order).cumsum(-1) - weights.gather(-1, order)
    target = mass.to(scores).expand(scores.shape[:3])[..., None] if isinstance(mass, torch.Tensor) else mass
    counts = (before < target).sum(-1).clamp(min=1)
    if always is not None:
        kept = always if allowed is None else always & allowed
        counts = torch.maximum(counts, kept.expand(scores.shape).sum(-1))
    return _lists(order, torch.minimum(counts.clamp(max=max(width, 1)), _available(ranked)), width)


def block_mask(lists: BlockLists, key_blocks: int) -> torch.Tensor:
    """Returns the boolean map `[batch, heads, query_blocks, key_blocks]` of the lists."""
    index, counts = lists
    valid = torch.arange(index.shape[-1], device=index.device) < counts[..., None]
    # One column more takes what is not valid.
    target = index.long().where(valid, key_blocks)
    found = torch.zeros((*index.shape[:3], key_blocks + 1), dtype=torch.bool, device=index.device)
    return found.scatter_(-1, target, True)[..., :key_blocks]


def kernels_choose(scores: torch.Tensor) -> bool:
    """Whether a kernel of Triton can choose from these scores."""
    return kernels_run(scores) and scores.dtype == torch.float32 and 0 < scores.shape[3] <= _WIDEST_ROW


def check_block_size(name: str, block_size: int) -> None:
    """Raises a ValueError unless a block has a token."""
    if block_size < 1:
        raise ValueError(f"{name}={block_size} must be at least 1.")


def _check_scores(scores, allowed, always) -> None:
    _rules.check_rank(4, "[batch, heads, query_blocks, key_blocks]", scores=scores)
    for name, mask in (("allowed", allowed), ("always", always)):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} has dtype {mask.dtype}; use bool.")
        shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
        if len(shape) != 4 or any(
            size not in (1, want) for size, want in zip(shape, scores.shape, strict=True)
        ):
            raise ValueError(
                f"{name} has shape {list(mask.shape)}; it must broadcast to {list(scores.shape)}."
            )


def _ranked(scores, allowed, always) -> torch.Tensor:
    """The scores by which blocks are chosen: +inf for those of `always`, -inf for those that are not allowed."""
    ranked = scores.detach()
    if always is not None:
        ranked = ranked.masked_fill(always, float("inf"))
    if allowed is not None:
        ranked = ranked.masked_fill(~allowed, float("-inf"))
    return ranked


def _available(ranked: torch.Tensor) -> torch.Tensor:
    return (ranked > float("-inf")).sum(-1)


def _lists(order, counts, width) -> BlockLists:
    position = torch.arange(width, device=order.device)
    valid = position < counts[..., None]
    # What is not valid goes behind all blocks, so that the valid ones can be put in ascending order.
    index = order[..., :width].where(valid, order.shape[-1]).sort(-1).values
    return BlockLists(index.where(valid, -1).int().contiguous(), counts.int().contiguous())
