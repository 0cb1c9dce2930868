"""Which keys a query's neighborhood holds, axis by axis: the meaning that all backends share.

With dilation d an axis falls into d classes, the positions of equal remainder; each is an axis of its own, without
dilation, and everything below is in positions within a class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

Number = TypeVar("Number", int, bool)


class AxisTables(NamedTuple):
    """Windows along one axis, int32 `[length]`, indexed by position on the axis; bounds count within its class.

    Args:
        start, end: the query there sees the keys `start <= key < end`.
        inverse_start, inverse_end: the key there is seen by the queries `inverse_start <= query < inverse_end`.
    """

    start: torch.Tensor
    end: torch.Tensor
    inverse_start: torch.Tensor
    inverse_end: torch.Tensor


@dataclass(frozen=True)
class Axis:
    """The neighborhoods along one axis of a grid; `Neighborhood` checks the numbers."""

    length: int
    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool

    @property
    def longest(self) -> int:
        """Positions of the longest class."""
        return -(-self.length // self.dilation)

    def windows(self, positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns start and end of the windows, each `[positions]`.

        Positions beyond the axis, which padding adds, have the window of the last one of their class.
        """
        position = torch.arange(positions, device=device)
        last = self.last(position)
        index = torch.minimum(position // self.dilation, last)
        group = index // self.stride * self.stride
        if self.is_causal:
            leader = torch.minimum(group + self.stride - 1, last)
            return (leader - self.kernel_size + 1).clamp(min=0), index + 1
        leader = torch.minimum(group + self.stride // 2, last)
        start = torch.minimum((leader - self.kernel_size // 2).clamp(min=0), last + 1 - self.kernel_size)
        return start, start + self.kernel_size

    def last(self, position: torch.Tensor) -> torch.Tensor:
        """Returns the last index of the class of each position."""
        return (self.length - 1 - position % self.dilation) // self.dilation

    def tables(self, device: torch.device) -> AxisTables:
        """Returns the windows and, for each key, the queries whose windows hold it."""
        start, end = self.windows(self.length, device)
        inverse_start, inverse_end = torch.empty_like(start), torch.empty_like(end)
        for residue in range(self.dilation):
            one = slice(residue, None, self.dilation)
            keys = torch.arange(start[one].numel(), device=device)
            # Both bounds never decrease, so the queries of a key are without gaps.
            inverse_start[one] = torch.searchsorted(end[one].contiguous(), keys, right=True)
            inverse_end[one] = torch.searchsorted(start[one].contiguous(), keys, right=True)
        return AxisTables(*(table.int() for table in (start, end, inverse_start, inverse_end)))

    def mask(self, device: torch.device) -> torch.Tensor:
        """Returns the boolean `[length, length]`, True where the query (first axis) sees the key."""
        start, end = self.windows(self.length, device)
        position = torch.arange(self.length, device=device)
        index, residue = position // self.dilation, position % self.dilation
        inside = (index >= start[:, None]) & (index < end[:, None])
        return inside & (residue == residue[:, None])

    def reach(self, tile: int) -> int:
        """Returns how many keys hold the windows of `tile` neighbors, a multiple of the stride, at most."""
        return min(self.kernel_size + tile - self.stride, self.longest)


@dataclass(frozen=True)
class Neighborhood:
    """A grid of tokens and the window of each; a query sees what lies in its window on every axis.

    Args:
        size: positions along each axis, one to three axes.
        kernel_size: keys of a window along each axis.
        stride: queries along each axis that share a window.
        dilation: distance between two keys of a window along each axis.
        is_causal: whether windows end at the query, for each axis.

    Raises:
        ValueError: a number does not fit its axis (names the axis and the numbers).
    """

    size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    def __post_init__(self) -> None:
        for axis, length in enumerate(self.size):
            kernel, stride, dilation = self.kernel_size[axis], self.stride[axis], self.dilation[axis]
            if length < 1:
                raise ValueError(f"axis {axis} has no positions; the grid is {list(self.size)}.")
            for name, value in (("kernel_size", kernel), ("stride", stride), ("dilation", dilation)):
                if value < 1:
                    raise ValueError(f"{name}[{axis}] is {value}; it must be at least 1.")
            if kernel > length:
                raise ValueError(
                    f"kernel_size[{axis}] is {kernel}, but axis {axis} has {length} positions; use at most {length}."
                )
            if stride > kernel:
                raise ValueError(
                    f"stride[{axis}] is {stride}, but kernel_size[{axis}] is {kernel}; use at most {kernel}, or some "
                    "queries are outside their own window."
                )
            if kernel * dilation > length:
                raise ValueError(
                    f"kernel_size[{axis}] * dilation[{axis}] is {kernel} * {dilation} = {kernel * dilation}, but axis "
                    f"{axis} has {length} positions; use a dilation of at most {length // kernel}."
                )

    @classmethod
    def of(
        cls,
        size: Sequence[int],
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
    ) -> Neighborhood:
        """Returns the neighborhood of numbers given once for all axes, or one an axis.

        Raises:
            ValueError: a number does not fit its axis, or there is neither one nor one an axis.
            TypeError: what should be a whole number or a truth value is not.
        """
        axes = len(size)
        return cls(
            tuple(size),
            per_axis("kernel_size", kernel_size, axes, int),
            per_axis("stride", stride, axes, int),
            per_axis("dilation", dilation, axes, int),
            per_axis("is_causal", is_causal, axes, bool),
        )

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes, one at a time."""
        return tuple(
            Axis(*numbers)
            for numbers in zip(
                self.size, self.kernel_size, self.stride, self.dilation, self.is_causal, strict=True
            )
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.size)

    def mask(self, device: torch.device) -> torch.Tensor:
        """Returns the boolean `[tokens, tokens]`, True where the query sees the key; tokens are in row-major order."""
        seen = torch.ones(1, 1, dtype=torch.bool, device=device)
        for axis in self.axes:
            along = axis.mask(device)
            seen = seen[:, None, :, None] & along[None, :, None, :]
            seen = seen.flatten(2).flatten(0, 1)
        return seen


def check_bias(bias: torch.Tensor, heads: int, neighborhood: Neighborhood, query: torch.Tensor) -> None:
    """Raises unless a relative bias fits the heads and the windows, and is on the device of the query."""
    shape = (heads, *(2 * kernel - 1 for kernel in neighborhood.kernel_size))
    if tuple(bias.shape) != shape:
        raise ValueError(
            f"relative_bias has shape {list(bias.shape)}; for {heads} heads and kernel_size="
            f"{neighborhood.kernel_size} it must be {list(shape)}."
        )
    if bias.device != query.device:
        raise ValueError(
            f"relative_bias is on {bias.device}, but query is on {query.device}; use one device."
        )


def window_bias(bias: torch.Tensor, neighborhood: Neighborhood) -> torch.Tensor:
    """Returns the relative bias of each key of each window, `[heads, *size, w]`, the keys of a window row-major."""
    offsets = []
    for axis in neighborhood.axes:
        start, _ = axis.windows(axis.length, bias.device)
        index = torch.arange(axis.length, device=bias.device) // axis.dilation
        offsets.append((start - index)[:, None] + torch.arange(axis.kernel_size, device=bias.device))
    return _by_offsets(bias, offsets, neighborhood).flatten(1 + len(offsets))


def pair_bias(bias: torch.Tensor, neighborhood: Neighborhood) -> torch.Tensor:
    """Returns the relative bias of all pairs, `[heads, tokens, tokens]`; any entry where a window holds no such key."""
    offsets = []
    for axis in neighborhood.axes:
        index = torch.arange(axis.length, device=bias.device) // axis.dilation
        offsets.append(index - index[:, None])
    return _by_offsets(bias, offsets, neighborhood).flatten(1 + len(offsets)).flatten(1, len(offsets))


def _by_offsets(
    bias: torch.Tensor, offsets: Sequence[torch.Tensor], neighborhood: Neighborhood
) -> torch.Tensor:
    """Looks a relative bias up at offsets `[rows_a, columns_a]` of each axis: `[heads, *rows, *columns]`."""
    axes = len(offsets)
    places = []
    for axis, (offset, kernel) in enumerate(zip(offsets, neighborhood.kernel_size, strict=True)):
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = offset.shape
        places.append((offset + kernel - 1).clamp(0, 2 * kernel - 2).view(shape))
    return bias[(slice(None), *places)]


def per_axis(
    name: str, value: Number | Sequence[Number], axes: int, kind: type[Number]
) -> tuple[Number, ...]:
    """Returns one entry for each axis: a single value repeated, or the sequence as it is.

    Raises:
        ValueError: the sequence has another number of entries.
        TypeError: an entry is not of the kind; a truth value is no number.
    """
    entries = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(entries) != axes:
        raise ValueError(
            f"{name}={value} has {len(entries)} entries, but there are {axes} axes; give 1 or {axes}."
        )
    for entry in entries:
        if not isinstance(entry, kind) or (kind is int and isinstance(entry, bool)):
            wanted = "a whole number" if kind is int else "True or False"
            raise TypeError(f"{name}={value!r} must be {wanted}, or one an axis.")
    return entries
