"""What the implementations of MSA-Conv share: where a tap of the kernel lies, and what it finds beyond the map."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Beyond the map: "zero" has keys and values of zeros, which stay in the softmax; "mask" has nothing; "circular" the
# opposite border.
BORDERS = ("zero", "mask", "circular")


def offsets(kernel_size: tuple[int, int], dilation: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yields the places of the taps from the query, row-major over the kernel."""
    for row in range(kernel_size[0]):
        for column in range(kernel_size[1]):
            yield (row - kernel_size[0] // 2) * dilation[0], (column - kernel_size[1] // 2) * dilation[1]


def inside(size: tuple[int, int], offset: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Returns the boolean `[height, width]`: whether the tap of each query lies on the map."""
    along = (
        (torch.arange(length, device=device) + step >= 0)
        & (torch.arange(length, device=device) + step < length)
        for length, step in zip(size, offset, strict=True)
    )
    rows, columns = along
    return rows[:, None] & columns[None, :]


def empty_like_tokens(x: torch.Tensor, width: int) -> torch.Tensor:
    """An empty `[batch, heads, height, width of the map, width]` in which the heads of a token are side by side."""
    batch, heads, rows, columns, _ = x.shape
    return x.new_empty((batch, rows, columns, heads, width)).movedim(3, 1)


def is_depthwise(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether each head is one channel."""
    return query.shape[-1] == value.shape[-1] == 1


def empty_sums(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """An empty float32 `[batch, heads, height, width]` of log-sums; where a head is one channel they lie like these."""
    if is_depthwise(query, value):
        return empty_like_tokens(query.new_empty((), dtype=torch.float32).expand(query.shape), 1).squeeze(-1)
    return query.new_empty(query.shape[:-1], dtype=torch.float32)
