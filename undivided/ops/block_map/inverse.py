"""The inverse of block lists: for each key block, the rows of queries that attend it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from undivided.ops.block_map._bounds import kernels_run
from undivided.ops.block_map.select import BlockLists, block_mask

# Bytes of the map of all pairs that the kernel runs down; beyond it the lists are sorted.
_LARGEST_MAP = 2**31


class InverseIndex(NamedTuple):
    """The rows that attend each key block, one ragged list after the other.

    Args:
        offsets: int32 `[batch, heads, key_blocks + 1]`: the list of block j is `rows[offsets[j] : offsets[j + 1]]`.
        rows: int32 `[batch, heads, query_blocks * max_blocks]`, ascending in each list; what follows the last list is
            not written for.
    """

    offsets: torch.Tensor
    rows: torch.Tensor


@torch.no_grad()
def invert(index: torch.Tensor, counts: torch.Tensor, key_blocks: int) -> InverseIndex:
    """Returns which rows of queries attend each key block, without waiting for the device.

    Args:
        index: int32 `[batch, heads, query_blocks, max_blocks]`, the key blocks of each row; none twice.
        counts: int32 `[batch, heads, query_blocks]`, how many entries of a row are valid.
        key_blocks: how many key blocks there are.

    Raises:
        ValueError: a shape or a number does not fit.
    """
    check_lists(index, counts, key_blocks)
    width = index.shape[-1]
    if kernels_run(index) and index[..., 0].numel() * key_blocks <= _LARGEST_MAP:
        from undivided.ops.block_map import triton

        listed = block_mask(BlockLists(index, counts), key_blocks)
        offsets = F.pad(listed.sum(2, dtype=torch.int32).cumsum(-1, dtype=torch.int32), (1, 0))
        return InverseIndex(offsets, triton.invert(listed, offsets, index.shape[2] * width))
    valid = torch.arange(width, device=index.device) < counts[..., None]
    block = index.long().where(valid, key_blocks).flatten(2)
    order = block.sort(dim=-1, stable=True)
    edges = torch.arange(key_blocks + 1, device=index.device).expand(*index.shape[:2], -1).contiguous()
    offsets = torch.searchsorted(order.values, edges)
    return InverseIndex(offsets.int(), (order.indices // max(width, 1)).int())


def check_lists(index: torch.Tensor, counts: torch.Tensor, key_blocks: int) -> None:
    """Raises a ValueError or TypeError unless index and counts are block lists."""
    if index.dim() != 4:
        raise ValueError(
            f"index has shape {list(index.shape)}; it needs [batch, heads, query_blocks, max_blocks]."
        )
    for name, tensor in (("index", index), ("counts", counts)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {tensor.dtype}; use int32.")
    if counts.shape != index.shape[:3]:
        raise ValueError(f"counts has shape {list(counts.shape)}; index needs {list(index.shape[:3])}.")
    if torch.compiler.is_compiling() or index.device.type != "cpu":
        return  # Reading numbers of a device would wait for it.
    if counts.numel() and (int(counts.min()) < 0 or int(counts.max()) > index.shape[3]):
        wrong = int(counts.min()) if int(counts.min()) < 0 else int(counts.max())
        raise ValueError(
            f"counts has {wrong}; lists of {index.shape[3]} entries allow 0 to {index.shape[3]}."
        )
    valid = torch.arange(index.shape[3]) < counts[..., None]
    listed = index[valid]
    if listed.numel() and (int(listed.min()) < 0 or int(listed.max()) >= key_blocks):
        wrong = int(listed.min()) if int(listed.min()) < 0 else int(listed.max())
        raise ValueError(f"index lists block {wrong}, but there are {key_blocks} key blocks.")
    if bool(((index[..., 1:] <= index[..., :-1]) & valid[..., 1:]).any()):
        raise ValueError("index must be ascending in each list, with no block twice; sort its last axis.")
