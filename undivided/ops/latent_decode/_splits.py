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
from triton.language.extra.cuda import gdc_wait

_MAX_SPLITS = 256
# What starting a program costs, merging at all, and merging each part, in blocks of keys (of which a program
# does one in a microsecond or two), and what splitting must gain to be worth the traffic of the sums. Set by
# measurements on an H100 at 32,768 keys and batches of 1 to 64.
_START_COST = 2.0
_MERGE_COST = 4.0
_PART_COST = 0.12
_LEAST_GAIN = 1.05


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
        compute = waves * (-(-blocks // splits) + _START_COST)
        return compute if splits == 1 else compute * _LEAST_GAIN + _MERGE_COST + _PART_COST * splits

    return min(range(1, max(min(blocks, _MAX_SPLITS), 1) + 1), key=lambda splits: (duration(splits), splits))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Returns how many programs the device runs at a time, one on each multiprocessor; 1 on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def allocate(query_latent: torch.Tensor, num_splits: int) -> tuple[torch.Tensor, ...]:
    """Returns `out`, `lse` and what the decode kernel writes: these, or the float32 sums of each part."""
    batch, heads, num_queries, latent_dim = query_latent.shape
    out = query_latent.new_empty((batch, heads, num_queries, latent_dim))
    lse = query_latent.new_empty((batch, heads, num_queries), dtype=torch.float32)
    if num_splits == 1:
        return out, lse, out, lse
    rows = batch * heads * num_queries
    partial = query_latent.new_empty((num_splits, rows, latent_dim), dtype=torch.float32)
    return out, lse, partial, query_latent.new_empty((num_splits, rows), dtype=torch.float32)


# One program merges BLOCK_COLUMNS columns of ROWS rows. Each of its ROWS x GROUPS lines of accumulators
# [BLOCK_COLUMNS] in registers takes every GROUPS-th part of a row, weighed by exp2 of its log-sum over a
# running maximum, so that all loads are independent; with many parts the lines of a row are added up at the
# end. It moves `splits * 4` bytes an element, which the decode kernel has just left in the L2 cache.
@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _merge_kernel(
    partial, partial_lse, out, lse, num_rows, num_splits,
    LATENT_DIM: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        # Launched while the decode kernel still runs: what it writes is there behind this line.
        gdc_wait()
    # Neighbouring programs read neighbouring columns of the same rows.
    column_blocks: tl.constexpr = (LATENT_DIM + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    column_block = tl.program_id(0) % column_blocks
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_inside = columns < LATENT_DIM
    line = tl.arange(0, ROWS * GROUPS)
    row = tl.program_id(0) // column_blocks * ROWS + line // GROUPS
    row_inside = row < num_rows

    top = tl.full([ROWS * GROUPS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS * GROUPS], tl.float32)
    merged = tl.zeros([ROWS * GROUPS, BLOCK_COLUMNS], tl.float32)
    for step in tl.static_range(STEPS):
        part = step * GROUPS + line % GROUPS
        inside = row_inside & (part < num_splits)
        # int64: parts * rows * columns passes 2**31.
        part_row = part.to(tl.int64) * num_rows + row
        log = tl.load(partial_lse + part_row, mask=inside, other=float("-inf"))
        values = tl.load(
            partial + part_row[:, None] * LATENT_DIM + columns[None, :],
            mask=inside[:, None] & column_inside[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, log)
        # A row that sees no key yet: exp2 of -inf minus 0 is a weight of zero, -inf minus -inf were NaN.
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay = tl.exp2(top - finite)
        weight = tl.exp2(log - finite)
        total = total * decay + weight
        merged = merged * decay[:, None] + weight[:, None] * values
        top = new_top

    if GROUPS > 1:
        row = tl.program_id(0) // column_blocks + tl.arange(0, 1)
        row_inside = row < num_rows
        best = tl.max(top, 0, keep_dims=True)
        weight = tl.exp2(top - tl.where(best == float("-inf"), 0.0, best))
        total = tl.sum(total * weight, 0, keep_dims=True)
        merged = tl.sum(merged * weight[:, None], 0, keep_dims=True)
        top = best
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    tl.store(
        out + row.to(tl.int64)[:, None] * LATENT_DIM + columns[None, :],
        (merged / safe[:, None]).to(out.dtype.element_ty),
        mask=row_inside[:, None] & column_inside[None, :],
    )
    log = tl.where(seen, (top + tl.log2(safe)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + row, log, mask=row_inside & (column_block == 0))


def merge_splits(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    overlaps: bool = False,
) -> None:
    """Merges sums `[splits, rows, latent_dim]` and base-2 log-sums `[splits, rows]` into out and lse.

    `overlaps`: the launch is hidden behind the decode kernel, which says when; needs compute capability 9.0.
    """
    num_splits, num_rows, latent_dim = partial.shape
    groups = 1 if num_splits <= 32 else 32
    steps = triton.next_power_of_2(triton.cdiv(num_splits, groups))
    rows = 1 if groups > 1 else 16 if num_splits <= 2 else 8 if num_splits <= 4 else 4
    block_columns = min(triton.next_power_of_2(latent_dim), 128)
    grid = (triton.cdiv(num_rows, rows) * triton.cdiv(latent_dim, block_columns),)
    _merge_kernel[grid](
        partial, partial_lse, out, lse, num_rows, num_splits,
        LATENT_DIM=latent_dim, STEPS=steps, GROUPS=groups, ROWS=rows, BLOCK_COLUMNS=block_columns,
        OVERLAPS=overlaps, num_warps=4, **({"launch_pdl": True} if overlaps else {}),
    )  # fmt: skip
