"""Selection of blocks and the inverse of their lists in Triton: no sort, no atomics, no wait for the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _ordered(scores):
    """Floats as unsigned integers of the same order."""
    bits = scores.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _reached(order, threshold, inside):
    return tl.sum(((order >= threshold[:, None]) & inside).to(tl.int32), 1)


@triton.jit
def _above(order, threshold, inside, wanted, LAST: tl.constexpr):
    """The `wanted` entries of each row that are largest; of those at the threshold the first, or with LAST the last."""
    above = inside & (order > threshold[:, None])
    equal = (inside & (order == threshold[:, None])).to(tl.int32)
    left = wanted - tl.sum(above.to(tl.int32), 1)
    rank = tl.cumsum(equal, 1)
    if LAST:
        rank = tl.sum(equal, 1)[:, None] + 1 - rank
    return (above | ((equal > 0) & (rank <= left[:, None]))) & (wanted > 0)[:, None]


# One program: ROWS rows of scores, which one warp holds, so that counting needs no barrier. The threshold that `wanted`
# entries reach is found bit by bit, and with LOWEST that of the lowest entries beside it. It reads the scores once and
# writes the lists, 4 bytes an entry, and by MAP for each block: "classes" 1 chosen, -1 lowest, 0 between; or `unit`
# where it is "between", "beside" (not chosen) or "everywhere", 0 elsewhere.
@triton.jit
def _select_kernel(
    scores, wanted, index, counts, blocks, rows, key_blocks, max_blocks, most, lowest, unit,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, LOWEST: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    column = tl.arange(0, WIDTH)
    inside = real[:, None] & (column < key_blocks)[None, :]
    place = row.to(tl.int64)[:, None] * key_blocks + column[None, :]
    values = tl.load(scores + place, mask=inside, other=float("-inf"))
    # A zero has two signs, which must not decide among equals.
    order = _ordered(tl.where(values == 0, 0.0, values))
    allowed = inside & (values > float("-inf"))
    count = tl.zeros([ROWS], tl.int32) + most
    if wanted is not None:
        count = tl.load(wanted + row, mask=real, other=0)
    count = tl.minimum(count, tl.sum(allowed.to(tl.int32), 1))
    few = tl.minimum(tl.zeros_like(count) + lowest, key_blocks - count)
    # The highest of the complement are the lowest.
    reverse = order ^ 0xFFFFFFFF
    high = tl.zeros([ROWS], tl.uint32)
    low = tl.zeros([ROWS], tl.uint32)
    bit = tl.zeros([ROWS], tl.uint32) + 0x80000000
    for _ in range(32):
        high = tl.where(_reached(order, high | bit, allowed) >= count, high | bit, high)
        if LOWEST:
            low = tl.where(_reached(reverse, low | bit, inside) >= few, low | bit, low)
        bit = bit >> 1
    chosen = _above(order, high, allowed, count, False)
    position = tl.cumsum(chosen.to(tl.int32), 1) - 1
    lists = row.to(tl.int64)[:, None] * max_blocks
    tl.store(
        index + lists + column[None, :], tl.full([ROWS, WIDTH], -1, tl.int32),
        mask=real[:, None] & (column[None, :] < max_blocks) & (column[None, :] >= count[:, None]),
    )  # fmt: skip
    tl.store(index + lists + position, tl.zeros_like(position) + column[None, :], mask=chosen)
    tl.store(counts + row, count, mask=real)
    dropped = chosen & (chosen == 0)
    if LOWEST:
        dropped = _above(reverse, low, inside, few, True)
    if MAP == "classes":
        kind = tl.where(chosen, 1, tl.where(dropped, -1, 0))
        tl.store(blocks + place, kind.to(tl.int8), mask=inside)
    elif MAP != "":
        seen = inside
        if MAP == "between":
            seen = inside & (chosen == 0) & (dropped == 0)
        elif MAP == "beside":
            seen = inside & (chosen == 0)
        share = tl.where(seen, unit, 0.0)
        tl.store(blocks + place, share.to(blocks.dtype.element_ty), mask=inside)


def select(scores, wanted, max_blocks, lowest=0, kind="", dtype=torch.int8, unit=1.0):
    """Returns the lists of the highest of each row, their counts, and a map of all blocks, or None.

    Args:
        scores: float32 `[batch, heads, query_blocks, key_blocks]`; -inf may not be chosen.
        wanted: how many of a row, 1 to `max_blocks`: int32 `[batch, heads, query_blocks]`, or a number for all.
        max_blocks: width of the lists.
        lowest: so many of a row are of class -1, the last among equals.
        kind: of the map: "classes" (int8), or "between", "beside" or "everywhere": where it has `unit` and not zero;
            "" for none.
        dtype, unit: of the map.
    """
    scores = scores.contiguous()
    key_blocks = scores.shape[3]
    rows = scores.numel() // max(key_blocks, 1)
    index = scores.new_empty((*scores.shape[:3], max_blocks), dtype=torch.int32)
    counts = scores.new_empty(scores.shape[:3], dtype=torch.int32)
    blocks = scores.new_empty(scores.shape, dtype=dtype) if kind else None
    by_row = isinstance(wanted, torch.Tensor)
    if rows:
        width = triton.next_power_of_2(key_blocks)
        tile = 2 if width <= 256 else 1
        _select_kernel[(triton.cdiv(rows, tile),)](
            scores, wanted.contiguous() if by_row else None, index, counts, blocks, rows, key_blocks, max_blocks,
            0 if by_row else wanted, lowest, unit, ROWS=tile, WIDTH=width, LOWEST=lowest > 0, MAP=kind,
            num_warps=max(1, width // 1024),
        )  # fmt: skip
    return index, counts, blocks


# One program: BLOCK key blocks of one head. It runs down the map of one byte a pair, and writes the rows that it meets.
@triton.jit
def _invert_kernel(
    listed, offsets, rows_out, rows, key_blocks, entries, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < key_blocks
    position = tl.load(offsets + head * (key_blocks + 1) + column, mask=inside, other=0)
    for first in tl.range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        present = tl.load(
            listed + (head * rows + row)[:, None] * key_blocks + column[None, :],
            mask=(row < rows)[:, None] & inside[None, :],
            other=0,
        ).to(tl.int32)
        rank = tl.cumsum(present, 0) - 1 + position[None, :]
        tl.store(rows_out + head * entries + rank, tl.zeros_like(rank) + row[:, None], mask=present > 0)
        position += tl.sum(present, 0)


def invert(listed, offsets, entries):
    """Returns the rows of each key block, ascending, int32 `[batch, heads, entries]`.

    Args:
        listed: boolean map `[batch, heads, query_blocks, key_blocks]`.
        offsets: int32 `[batch, heads, key_blocks + 1]`, where the list of each key block begins.
        entries: length of the lists of a head.
    """
    batch, heads, rows, key_blocks = listed.shape
    found = offsets.new_empty((batch, heads, entries))
    if listed.numel():
        tile = 16
        _invert_kernel[triton.cdiv(key_blocks, tile), batch * heads](
            listed.contiguous().view(torch.int8), offsets, found, rows, key_blocks, entries,
            ROWS=128, BLOCK=tile, num_warps=4,
        )  # fmt: skip
    return found
