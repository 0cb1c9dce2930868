"""Where blocks of tokens begin and end, in one sequence or in packed ones."""

from __future__ import annotations

import torch

from undivided.ops._triton import availability


def num_blocks(length: int, block_size: int, cu_seqlens: torch.Tensor | None = None) -> int:
    """Returns how many blocks `block_bounds` has: exact for one sequence, an upper bound for packed ones."""
    if cu_seqlens is None or block_size == 1:
        return -(-length // block_size)
    return length // block_size + cu_seqlens.numel() - 1


def block_bounds(
    length: int, block_size: int, device: torch.device, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the first token of each block and the one after its last, int32 `[blocks, 2]`.

    Blocks are cut inside each packed sequence, whose last block may be short, and numbered through all sequences.
    How many there are is not read from the device: those at the end may be empty, `[length, length]`.
    """
    number = torch.arange(num_blocks(length, block_size, cu_seqlens), device=device)
    if cu_seqlens is None or block_size == 1:
        first = number * block_size
        return torch.stack([first, (first + block_size).clamp(max=length)], dim=1).int()
    starts = cu_seqlens.to(device, torch.int64)
    counts = (starts[1:] - starts[:-1] + block_size - 1) // block_size
    ends = counts.cumsum(0)
    sequence = torch.searchsorted(ends, number, right=True)
    inside = sequence < counts.numel()
    sequence = sequence.clamp(max=counts.numel() - 1)
    first = starts[sequence] + (number - (ends - counts)[sequence]) * block_size
    last = torch.minimum(first + block_size, starts[sequence + 1])
    return torch.stack([first, last], dim=1).where(inside[:, None], length).int()


def token_blocks(
    length: int, block_size: int, device: torch.device, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the number of the block that holds each token, int64 `[length]`."""
    token = torch.arange(length, device=device)
    if cu_seqlens is None or block_size == 1:
        return token // block_size
    first = block_bounds(length, block_size, device, cu_seqlens)[:, 0].long()
    return torch.searchsorted(first, token, right=True) - 1


def block_sequences(
    length: int, block_size: int, device: torch.device, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Returns the packed sequence of each block, int64 `[blocks]`; empty blocks get a number of no sequence."""
    first = block_bounds(length, block_size, device, cu_seqlens)[:, 0].long()
    # `right` skips sequences without tokens, which begin where the next one does.
    return torch.searchsorted(cu_seqlens.to(device, torch.int64), first, right=True) - 1


def kernels_run(tensor: torch.Tensor) -> bool:
    """Whether kernels of Triton make the maps of this tensor's device."""
    return tensor.device.type == "cuda" and not availability()
