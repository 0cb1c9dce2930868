"""Lists of key blocks turned around for kernels that begin with the keys: a counting sort, deterministic, in Triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from undivided.ops.block_map._bounds import kernels_run

# Entries of lists that one program sorts.
_CHUNK = 2048
# Key blocks that the histogram of one program holds.
_MOST_BLOCKS = 8192


# One program: how often the lists of a chunk of tokens name each block. It reads the lists once.
@triton.jit(do_not_specialize=["tokens", "max_blocks", "blocks"])
def _count_kernel(
    index, counts, histogram, tokens, max_blocks, blocks,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    lists = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * (CHUNK // WIDTH) + tl.arange(0, CHUNK) // WIDTH
    rank = tl.arange(0, CHUNK) % WIDTH
    inside = token < tokens
    valid = inside & (rank < tl.load(counts + lists * tokens + token, mask=inside, other=0))
    block = tl.load(index + (lists * tokens + token) * max_blocks + rank, mask=valid, other=BINS - 1)
    found = tl.histogram(block, BINS)
    bins = tl.arange(0, BINS)
    place = (lists * tl.num_programs(0) + tl.program_id(0)) * blocks + bins
    tl.store(histogram + place, found, mask=bins < blocks)


# One program: sorts the entries of a chunk by their block and writes each to its place in the block's list.
@triton.jit(do_not_specialize=["tokens", "max_blocks", "blocks"])
def _place_kernel(
    index, counts, base, entries, tokens, max_blocks, blocks, CHUNK: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    lists = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * (CHUNK // WIDTH)
    number = tl.arange(0, CHUNK)
    token = first + number // WIDTH
    rank = number % WIDTH
    inside = token < tokens
    valid = inside & (rank < tl.load(counts + lists * tokens + token, mask=inside, other=0))
    block = tl.load(index + (lists * tokens + token) * max_blocks + rank, mask=valid, other=0)
    # The number of the entry in the low bits keeps tokens ascending and brings the entry along.
    ordered = tl.sort(tl.where(valid, block * CHUNK + number, 0x7FFFFFFF))
    real = ordered < 0x7FFFFFFF
    block = tl.where(real, ordered // CHUNK, 0)
    start = tl.load(
        base + (lists * tl.num_programs(0) + tl.program_id(0)) * blocks + block, mask=real, other=0
    )
    place = lists * tokens * max_blocks + start + number
    tl.store(entries + place, first * WIDTH + ordered % CHUNK, mask=real)


def list_width(max_blocks: int) -> int:
    """The places of a list in an entry's number, a power of two."""
    return triton.next_power_of_2(max(max_blocks, 1))


def invert(
    index: torch.Tensor, counts: torch.Tensor, blocks: int, chunk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the lists turned around: for each key block the entries that name it.

    Args:
        index: int32 `[batch, lists, tokens, max_blocks]`.
        counts: int32 `[batch, lists, tokens]`.
        blocks: how many key blocks there are.
        chunk: entries that a program sorts, a power of two; default the kernels' on a GPU, and elsewhere one sort.

    Returns:
        offsets: int32 `[batch, lists, blocks + 1]`: block j has `entries[offsets[j] : offsets[j + 1]]`.
        entries: int32 `[batch, lists, tokens * max_blocks]`, `token * list_width(max_blocks) + place in its list`,
            ascending for each block; what follows the last is not written.
    """
    index, counts = index.contiguous(), counts.contiguous()
    batch, heads, tokens, max_blocks = index.shape
    width, lists = list_width(max_blocks), batch * heads
    if chunk is None and kernels_run(index):
        chunk = _CHUNK
    if chunk is None or blocks >= _MOST_BLOCKS or width > chunk or index.numel() == 0:
        return _invert_by_sorting(index, counts, blocks, width)
    chunks = triton.cdiv(tokens * width, chunk)
    histogram = index.new_empty((lists, chunks, blocks))
    shape = {"CHUNK": chunk, "WIDTH": width, "num_warps": 4}
    _count_kernel[chunks, lists](
        index, counts, histogram, tokens, max_blocks, blocks, BINS=triton.next_power_of_2(blocks + 1), **shape
    )
    offsets = F.pad(histogram.sum(1, dtype=torch.int32).cumsum(-1, dtype=torch.int32), (1, 0))
    # Where the first entry of a chunk's sorted ones would go if all were of this block.
    base = histogram.cumsum(1, dtype=torch.int32) - histogram.cumsum(2, dtype=torch.int32)
    base += offsets[:, None, :-1]
    entries = index.new_empty((batch, heads, tokens * max_blocks))
    _place_kernel[chunks, lists](index, counts, base, entries, tokens, max_blocks, blocks, **shape)
    return offsets.view(batch, heads, blocks + 1), entries


def _invert_by_sorting(index, counts, blocks, width):
    batch, heads, tokens, max_blocks = index.shape
    valid = torch.arange(max_blocks, device=index.device) < counts[..., None]
    order = index.long().where(valid, blocks).flatten(2).sort(dim=-1, stable=True)
    edges = torch.arange(blocks + 1, device=index.device).expand(batch, heads, -1).contiguous()
    offsets = torch.searchsorted(order.values, edges).int()
    token, rank = order.indices // max(max_blocks, 1), order.indices % max(max_blocks, 1)
    return offsets, (token * width + rank).int()


def segments(
    offsets: torch.Tensor, members: int, rows: int, most_entries: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cuts the list of each key block into segments of equal work, without waiting for the device.

    Args:
        offsets: int32 `[lists, blocks + 1]`.
        members: heads that read a list; each entry has as many rows.
        rows: rows of a segment.
        most_entries: entries of the lists of a head at most.

    Returns:
        table: int32 `[lists, most, 2]`, the block of each segment (the number of blocks where there is none) and its
            first row.
        ends: int32 `[lists, blocks + 1]`: the segments of block j are `ends[j] .. ends[j + 1] - 1`.
    """
    blocks = offsets.shape[-1] - 1
    pieces = ((offsets[:, 1:] - offsets[:, :-1]) * members + rows - 1) // rows
    ends = F.pad(pieces.cumsum(-1, dtype=torch.int32), (1, 0))
    most = most_entries * members // rows + blocks
    number = (
        torch.arange(most, device=offsets.device, dtype=torch.int32).expand(len(offsets), -1).contiguous()
    )
    block = torch.searchsorted(ends[:, 1:].contiguous(), number, right=True, out_int32=True)
    first = (number - ends.gather(1, block.clamp(max=blocks).long())) * rows
    return torch.stack([block, first], dim=-1).contiguous(), ends
