"""The Method of Four Russians for sums over marginal blocks: measured beside a product with the map, which is used.

Blocks are taken in groups; the sums of all subsets of a group are made once, and a row of queries then adds one of them
a group instead of up to `group` sums. That saves additions, not bytes: the tables are `2^group / group` times as large
as the sums, and each row reads a row of each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


# One program: COLUMNS numbers of one row. It reads one table entry a group.
@triton.jit
def _lookup_kernel(
    tables, codes, out, rows, groups, width, entries, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros([COLUMNS], tl.float32)
    for group in range(groups):
        code = tl.load(codes + (head * rows + row) * groups + group)
        place = ((head * groups + group) * entries + code) * width
        total += tl.load(tables + place + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (head * rows + row) * width + column, total.to(out.dtype.element_ty), mask=inside)


def subset_tables(sums: torch.Tensor, group: int) -> torch.Tensor:
    """Returns the sums of all subsets of each group, `[heads, groups, 2 ** group, numbers]`.

    Args:
        sums: one row a key block, `[heads, key_blocks, numbers]`; groups divide the key blocks.
        group: blocks of a group.
    """
    grouped = sums.unflatten(1, (-1, group))
    members = (
        torch.arange(2**group, device=sums.device)[:, None] >> torch.arange(group, device=sums.device)
    ) & 1
    return torch.matmul(members.to(sums.dtype), grouped)


def subset_codes(seen: torch.Tensor, group: int) -> torch.Tensor:
    """Returns which subset of each group a row sees, int32 `[heads, rows, groups]`, from the map of what it sees."""
    bits = 2 ** torch.arange(group, device=seen.device)
    return (seen.unflatten(-1, (-1, group)).long() * bits).sum(-1).int()


def add_subsets(tables: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Returns the sum over the groups of the subset that each row sees, `[heads, rows, numbers]`."""
    heads, groups, entries, width = tables.shape
    rows = codes.shape[1]
    out = tables.new_empty((heads, rows, width))
    columns = min(triton.next_power_of_2(width), 1024)
    _lookup_kernel[triton.cdiv(width, columns), rows, heads](
        tables, codes, out, rows, groups, width, entries, COLUMNS=columns, num_warps=4
    )
    return out
