"""Chunks of keys: what stands for them, which of their tokens queries choose, and lists of what is chosen."""

from __future__ import annotations

import torch

NORMS = ("sqrt", "mean", "sum")


def chunk_representations(rows: torch.Tensor, boundaries: torch.Tensor, norm: str = "sqrt") -> torch.Tensor:
    """Returns a vector of each chunk, `mean * sqrt(tokens)` = `sum / sqrt(tokens)`, `[batch, chunks, width]`.

    For independent tokens its variance does not depend on the chunk's length: a sum favours long chunks, a mean short
    ones.

    Args:
        rows: `[batch, length, width]`.
        boundaries: where chunks begin, ascending, and the length, int64 `[batch, chunks + 1]`.
        norm: "sqrt"; or "mean" or "sum" of the tokens.

    Source: Dynamic Hierarchical Sparse Attention (arXiv 2510.24606), chunk representations.
    """
    counts = boundaries.diff(dim=1)
    # One sum a chunk: prefix sums would be small differences of large numbers.
    total = torch.segment_reduce(
        rows.to(torch.promote_types(rows.dtype, torch.float32)).flatten(0, 1), "sum", lengths=counts.flatten(),
        initial=0.0, unsafe=True,
    ).unflatten(0, counts.shape)  # fmt: skip
    return normalised(total, boundaries, norm)


def normalised(sums: torch.Tensor, boundaries: torch.Tensor, norm: str = "sqrt") -> torch.Tensor:
    """Returns `chunk_representations` from the sums of chunks, `[batch, chunks, width]`; empty chunks have zero."""
    if norm == "sum":
        return sums
    counts = boundaries.diff(dim=1).clamp(min=1)[..., None].to(sums.dtype)
    return sums / (counts.sqrt() if norm == "sqrt" else counts)


def dhsa_select(
    query: torch.Tensor,
    key: torch.Tensor,
    boundaries: torch.Tensor,
    *,
    block_size: int = 128,
    budget: int = 1024,
    num_local: int = 128,
    num_global: int = 128,
    window: int | None = None,
    norm: str = "sqrt",
) -> torch.Tensor:
    """Chooses the keys of each block of queries, one list for all heads.

    The first `num_global` tokens (of the window, where there is one) and the last `num_local` up to the block's end, at
    least the block itself, are always among them. The others are those of the chunks with the highest
    `S = q . k`, with q and k the representations of the block and of the chunk, means over heads; the chunk at the end
    of the budget gives its first tokens.

    Args:
        query: of the first tokens of a text, `[batch, heads, queries, head_dim]`.
        key: of the whole text, `[batch, key_heads, length, head_dim]`.
        boundaries: chunks of the keys, int64 `[batch, chunks + 1]`, as `decode_boundaries` returns them.
        block_size: queries of a block.
        budget: keys of a block of queries, local and global ones included.
        num_local, num_global: tokens that are always chosen.
        window: tokens a query sees, itself included, in layers with a window; default all.
        norm: of the representations, "sqrt", "mean" or "sum".

    Returns:
        Positions, ascending, int32 `[batch, 1, blocks, budget]`, -1 behind the last where there are fewer.

    Raises:
        ValueError: the budget is less than the tokens that are always chosen, or boundaries are none of this text.

    Source: Dynamic Hierarchical Sparse Attention (arXiv 2510.24606); constants: the authors' code, which puts the
    global tokens in place of the first chosen ones, some of which then count twice.
    """
    num_local = max(num_local, block_size)
    check_budget(budget, block_size, num_local, num_global)
    length, queries = key.shape[2], query.shape[2]
    if boundaries.dim() != 2 or boundaries.shape[0] not in (1, key.shape[0]):
        raise ValueError(f"boundaries has shape {list(boundaries.shape)}; it needs [batch, chunks + 1].")
    if not torch.compiler.is_compiling() and boundaries.device.type == "cpu":
        if bool((boundaries.diff(dim=1) < 0).any()) or bool((boundaries[:, 0] != 0).any()):
            raise ValueError("boundaries are not ascending from 0 on.")
        if bool((boundaries[:, -1] != length).any()):
            raise ValueError(f"boundaries end at {int(boundaries[0, -1])}, but key has {length} tokens.")
    boundaries = boundaries.expand(key.shape[0], -1).contiguous()
    places = torch.arange(0, queries + block_size, block_size, device=key.device).clamp(max=queries)
    blocks = -(-queries // block_size)
    places = places[: blocks + 1].expand(key.shape[0], -1)
    # Means over heads in float32: signs cancel.
    dtype = torch.promote_types(key.dtype, torch.float32)
    rows = chunk_representations(query.mean(dim=1, dtype=dtype), places, norm)
    chunks = chunk_representations(key.mean(dim=1, dtype=dtype), boundaries, norm)
    scores = rows @ chunks.transpose(1, 2)

    begin, end = places[:, :-1], places[:, 1:]
    low = torch.zeros_like(begin) if window is None else (begin - window + 1).clamp(min=0)
    return choose_tokens(scores, boundaries, begin, end, low, budget, num_local, num_global)


def choose_tokens(
    scores: torch.Tensor,
    boundaries: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    low: torch.Tensor,
    budget: int,
    num_local: int,
    num_global: int,
) -> torch.Tensor:
    """Returns the positions that rows of queries choose, as `dhsa_select` does, int32 `[batch, 1, rows, budget]`.

    Args:
        scores: of the chunks, `[batch, rows, chunks]`.
        boundaries: of the chunks, int64 `[batch, chunks + 1]`.
        begin, end, low: of each row its first query, the token behind its last one, and the first token that it may
            see, int64 `[batch, rows]`.
        budget, num_local, num_global: as in `dhsa_select`.
    """
    begin, end, low = begin[..., None], end[..., None], low[..., None]
    local = torch.minimum((end - num_local).clamp(min=0), begin)
    local = torch.maximum(local, low)
    free = torch.minimum(low + num_global, local)
    first = torch.maximum(boundaries[:, None, :-1], free)
    size = (torch.minimum(boundaries[:, None, 1:], local) - first).clamp(min=0)
    left = budget - (free - low) - (end - local)
    order = scores.masked_fill(size == 0, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    sizes = size.gather(-1, order)
    taken = torch.minimum((left - sizes.cumsum(dim=-1) + sizes).clamp(min=0), sizes)
    taken = torch.zeros_like(size).scatter_(-1, order, taken)
    # What is chosen is a row of intervals: the global tokens, a part of each chunk, the local ones.
    starts = torch.cat([low, first, local], dim=-1)
    lengths = torch.cat([free - low, taken, end - local], dim=-1)
    stops = lengths.cumsum(dim=-1)
    slot = torch.arange(budget, device=scores.device).expand(*stops.shape[:2], -1).contiguous()
    interval = torch.searchsorted(stops, slot, right=True).clamp(max=stops.shape[-1] - 1)
    position = slot - stops.gather(-1, interval) + lengths.gather(-1, interval) + starts.gather(-1, interval)
    return torch.where(slot < stops[..., -1:], position, -1).to(torch.int32)[:, None]


def check_budget(budget: int, block_size: int, num_local: int, num_global: int) -> None:
    """Raises a ValueError unless a budget holds what is always chosen."""
    if min(block_size, num_local) < 1 or num_global < 0:
        raise ValueError(
            f"query_block={block_size} and num_local={num_local} must be at least 1, num_global={num_global} at "
            "least 0."
        )
    needed = max(num_local, block_size) + num_global
    if budget < needed:
        raise ValueError(
            f"budget={budget} is less than the {needed} tokens that are always chosen: num_global={num_global}, and "
            f"num_local={num_local} or a block of {block_size} queries."
        )


def block_lists(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the chosen blocks of each row, ascending and -1 behind the last, and how many they are, int32.

    Args:
        chosen: boolean `[batch, heads, rows, blocks]`.
    """
    counts = chosen.sum(dim=-1, dtype=torch.int32)
    width = max(int(counts.max()), 1)
    # What is not chosen goes to a column that is cut off.
    slot = torch.where(chosen, chosen.cumsum(dim=-1, dtype=torch.int32) - 1, width).long()
    index = torch.full((*chosen.shape[:3], width + 1), -1, dtype=torch.int32, device=chosen.device)
    column = torch.arange(chosen.shape[3], dtype=torch.int32, device=chosen.device).expand_as(chosen)
    return index.scatter_(-1, slot, column)[..., :width].contiguous(), counts
