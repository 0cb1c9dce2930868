"""Which keys a tile of queries attends: lists of them, without a mask of queries times keys.

The rank of a key depends on the key alone, so that query t keeps the best `keep_window_size` (w) keys of its prefix,
and a key that has left never comes back. Two things follow, on which all kernels here rest:

- The keys that any query of a tile of T attends are the best w of those before the tile, and the tile's own: at most
  `w + T - 1`.
- A key is attended by an unbroken run of queries, from its own to the one before its `death`.

All keys are ranked once; a program then reads the order from the best key on until it has w keys that stand
before its tile: `w M / prefix` places if ranks do not depend on time, all M at worst.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops.dynamic_mask._rank import key_order

_BLOCK = 1024
# Pairs of keys up to which comparing all is faster than sorting, which takes many launches.
_MOST_PAIRS = 2**29


# One program: the ranks of BLOCK_I keys of one head, by comparing them with all. It does two operations a pair, and
# reads the biases of the head, mostly from the L1 cache.
@triton.jit(do_not_specialize=("num_keys", "num_queries"))
def _rank_kernel(
    bias, order, rank, death, num_keys, num_queries, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    bias += head * num_keys
    first = tl.program_id(0) * BLOCK_I
    own = first + tl.arange(0, BLOCK_I)
    own_inside = own < num_keys
    b = tl.load(bias + own, mask=own_inside, other=0.0)[:, None]
    better = tl.zeros([BLOCK_I, BLOCK_J], tl.int32)
    # Of earlier keys the greater are better, of later ones the equal too.
    for start in tl.range(0, first, BLOCK_J):
        key = start + tl.arange(0, BLOCK_J)
        other = tl.load(bias + key, mask=key < first, other=float("-inf"))
        better += (other[None, :] > b).to(tl.int32)
    for start in tl.range(first, num_keys, BLOCK_J):
        key = start + tl.arange(0, BLOCK_J)
        other = tl.load(bias + key, mask=key < num_keys, other=float("-inf"))[None, :]
        is_later = (key[None, :] > own[:, None]) & (key < num_keys)[None, :]
        better += ((other > b) | ((other == b) & is_later)).to(tl.int32)
    place = tl.sum(better, 1)
    tl.store(rank + head * num_keys + own, place, mask=own_inside)
    tl.store(order + head * num_keys + place, own, mask=own_inside)
    tl.store(death + head * num_keys + own, tl.zeros_like(own) + num_queries, mask=own_inside)


# One program: the list of one tile of one key head. It moves 4 bytes a place of the order and a key of the list.
@triton.jit(do_not_specialize=("num_queries", "num_keys", "keep", "num_tiles"))
def _select_kernel(
    order, rank, kept, death, before, num_queries, num_keys, keep, num_tiles,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    first = tile * TILE
    prefix = first + num_keys - num_queries
    size = tl.minimum(keep, prefix)
    order += head * num_keys
    rank += head * num_keys
    death += head * num_keys
    kept += (head * num_tiles + tile) * keep
    before += (head * num_tiles + tile) * TILE

    # How many keys of the list are better than each of the tile's own; all, for those that the scan does not reach.
    own = tl.arange(0, TILE)
    tl.store(before + own, size + tl.zeros_like(own))
    tl.debug_barrier()
    count = 0
    start = 0
    while (count < size) & (start < num_keys):
        place = start + tl.arange(0, BLOCK)
        inside = place < num_keys
        key = tl.load(order + place, mask=inside, other=0)
        is_listed = inside & (key < prefix)
        position = count + tl.cumsum(is_listed.to(tl.int32), 0)
        tl.store(kept + position - 1, key, mask=is_listed & (position <= size))
        local = key - prefix
        tl.store(before + local, tl.minimum(position, size), mask=inside & (local >= 0) & (local < TILE))
        count += tl.sum(is_listed.to(tl.int32), 0)
        start += BLOCK
    tl.debug_barrier()

    num_rows = tl.minimum(TILE, num_queries - first)
    valid = own < num_rows
    place = tl.load(rank + prefix + own, mask=valid, other=num_keys)
    # better[t, i]: how many of the tile's keys up to t are better than i; counts of at most TILE are exact.
    is_better = (place[:, None] < place[None, :]).to(tl.float16)
    until = (own[None, :] <= own[:, None]).to(tl.float16)
    better = tl.dot(until, is_better).to(tl.int32)
    is_kept = (own[None, :] <= own[:, None]) & valid[None, :] & valid[:, None]
    is_kept = is_kept & (tl.load(before + own)[None, :] + better < keep)
    is_kept = is_kept.to(tl.int32)
    listed = tl.minimum(size, keep - tl.sum(is_kept, 1))

    # The first query of the tile that has lost a key: of the tile's own keys, then of the last TILE of the list.
    end = own + tl.sum(is_kept, 0)
    tl.store(death + prefix + own, first + end, mask=valid & (end < num_rows))
    position = size - TILE + own
    holders = tl.sum(((listed[:, None] > position[None, :]) & valid[:, None]).to(tl.int32), 0)
    leaves = (position >= 0) & (holders < num_rows)
    key = tl.load(kept + position, mask=leaves, other=0)
    tl.store(death + key, first + holders, mask=leaves)


def select(
    key_bias: torch.Tensor, num_queries: int, keep: int, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the lists of all tiles and the deaths of all keys, int32.

    Args:
        key_bias: `[batch, heads, keys]`, float32; of equal keys the latest is the best.
        num_queries: the last positions of the keys.
        keep: keys that a query keeps, at most.
        tile: queries that share a list.

    Returns:
        `kept [batch, heads, tiles, keep]`, of which the first `min(keep, keys before the tile)` are filled, from the
        best on; `death [batch, heads, keys]`, the first query that a key is lost to. (It means nothing for keys before
        the first query that no query attends.)
    """
    batch, heads, num_keys = key_bias.shape
    order, rank, death = _ranked(key_bias, num_queries)
    num_tiles = triton.cdiv(num_queries, tile)
    keep = min(keep, num_keys)
    kept = order.new_empty((batch, heads, num_tiles, keep))
    before = order.new_empty((batch, heads, num_tiles, tile))
    _select_kernel[num_tiles, batch * heads](
        order, rank, kept, death, before, num_queries, num_keys, keep, num_tiles,
        TILE=tile, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return kept, death


def _ranked(
    key_bias: torch.Tensor, num_queries: int, most_pairs: int = _MOST_PAIRS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the keys from the best on, the place of each key there, and deaths after the last query."""
    batch, heads, num_keys = key_bias.shape
    if batch * heads * num_keys**2 > most_pairs:
        order = key_order(key_bias)
        places = torch.arange(num_keys, dtype=torch.int32, device=order.device).expand_as(order)
        rank = torch.empty_like(places, memory_format=torch.contiguous_format).scatter_(-1, order, places)
        return order.to(torch.int32), rank, torch.full_like(rank, num_queries)
    order, rank, death = (torch.empty_like(key_bias, dtype=torch.int32) for _ in range(3))
    block = 64
    _rank_kernel[triton.cdiv(num_keys, block), batch * heads](
        key_bias, order, rank, death, num_keys, num_queries, BLOCK_I=block, BLOCK_J=block, num_warps=4
    )
    return order, rank, death
