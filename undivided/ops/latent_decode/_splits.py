"""Split keys: into how many parts, and the kernel that merges the parts.

One program of a decode kernel sees one part of the keys of one sequence and writes `(out, log2 of the sum of
exponentials)` for its rows. What fills the device at batch 1 is the number of parts; it is chosen from shapes
alone, so that no length is ever read on the host.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

_MAX_SPLITS = 256
# What starting a program and writing its partial sums costs, in blocks of keys.
_START_COST = 2.0


@functools.lru_cache(maxsize=4096)
def choose_splits(tiles: int, blocks: int, slots: int) -> int:
    """Returns into how many parts the keys of a sequence are cut.

    The parts of all sequences run in waves of `slots` programs; a wave lasts as long as its longest part.

    Args:
        tiles: programs without splitting (row tiles x latent heads x batch).
        blocks: blocks of keys in the longest sequence that fits the cache.
        slots: programs the device runs at a time.
    """

    def duration(splits: int) -> float:
        waves = -(-tiles * splits // slots)
        return waves * (-(-blocks // splits) + _START_COST)

    return min(range(1, max(min(blocks, _MAX_SPLITS), 1) + 1), key=lambda splits: (duration(splits), splits))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Returns how many programs the device runs at a time, one on each multiprocessor; 1 on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# One program merges a slice of BLOCK_COLUMNS of one row: it keeps the slice in registers, weighs BLOCK_SPLITS parts
# at a time by exp2 of their log-sums, and skips parts without a key, whose partial sums nobody wrote. It moves
# `splits * columns * 4` bytes of partial sums, which the decode kernel has just left in the L2 cache.
@triton.jit
def _merge_kernel(
    partial, partial_lse, out, lse, num_rows, num_splits,
    LATENT_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = columns < LATENT_DIM

    splits = tl.arange(0, SPLITS)
    logs = tl.load(
        partial_lse + splits.to(tl.int64) * num_rows + row, mask=splits < num_splits, other=float("-inf")
    )
    top = tl.max(logs, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(logs - top), 0)
    # A row that sees no key: weights of zero, and no division by zero.
    inverse = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)

    merged = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for first in tl.static_range(0, SPLITS, BLOCK_SPLITS):
        part = first + tl.arange(0, BLOCK_SPLITS)
        part_row = part.to(tl.int64) * num_rows + row
        log = tl.load(partial_lse + part_row, mask=part < num_splits, other=float("-inf"))
        weight = tl.exp2(log - top) * inverse
        values = tl.load(
            partial + part_row[:, None] * LATENT_DIM + columns[None, :],
            mask=(log > float("-inf"))[:, None] & inside[None, :],
            other=0.0,
        )
        merged += tl.sum(weight[:, None] * values, 0)
    tl.store(out + row * LATENT_DIM + columns, merged.to(out.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        ln2: tl.constexpr = 0.6931471805599453
        tl.store(lse + row, tl.where(total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) * ln2, float("-inf")))


def merge_splits(partial: torch.Tensor, partial_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Merges partial sums `[splits, rows, latent_dim]` and their base-2 log-sums `[splits, rows]` into out and lse."""
    num_splits, num_rows, latent_dim = partial.shape
    splits = triton.next_power_of_2(num_splits)
    block_columns = min(triton.next_power_of_2(latent_dim), 128)
    grid = (num_rows, triton.cdiv(latent_dim, block_columns))
    _merge_kernel[grid](
        partial, partial_lse, out, lse, num_rows, num_splits,
        LATENT_DIM=latent_dim, SPLITS=splits, BLOCK_SPLITS=min(splits, 32), BLOCK_COLUMNS=block_columns,
        num_warps=4,
    )  # fmt: skip
