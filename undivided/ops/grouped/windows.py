"""Groups of tokens that lie in one window of a map."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Windows:
    """Cuts a map of tokens into windows that do not overlap.

    Tokens stand in row-major order, in the map, and in each window; windows stand in row-major order too.

    Args:
        size: tokens along each axis of the map, one to three axes.
        window_size: tokens along each axis of a window; each divides that of the map.

    Raises:
        ValueError: a window does not divide its axis (names the axis and both numbers).
    """

    size: tuple[int, ...]
    window_size: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.size) <= 3 or len(self.window_size) != len(self.size):
            raise ValueError(
                f"size={self.size} and window_size={self.window_size} must have the same one to three axes."
            )
        for axis, (length, window) in enumerate(zip(self.size, self.window_size, strict=True)):
            if window < 1:
                raise ValueError(f"window_size[{axis}] is {window}; it must be at least 1.")
            if length < 1 or length % window:
                raise ValueError(
                    f"window_size[{axis}] is {window}, which does not divide the {length} positions of axis {axis}; "
                    f"pad it to {max(-(-length // window), 1) * window}."
                )

    @property
    def num_tokens(self) -> int:
        """Tokens of the map."""
        return math.prod(self.size)

    @property
    def group_size(self) -> int:
        """Tokens of a window."""
        return math.prod(self.window_size)

    @property
    def num_groups(self) -> int:
        """Windows of the map."""
        return self.num_tokens // self.group_size

    def gather(self, x: torch.Tensor, group_axis: int = 1) -> torch.Tensor:
        """Returns tokens `[batch, heads, num_tokens, dim]` by windows, the windows' axis where `group_axis` says.

        `[batch, num_groups, heads, group_size, dim]`, or with `group_axis=2`
        `[batch, heads, num_groups, group_size, dim]`; at most one copy.
        """
        axes = len(self.size)
        pairs = [part for pair in zip(self._counts, self.window_size, strict=True) for part in pair]
        x = x.unflatten(2, pairs)
        outer, inner = (list(range(2 + first, 2 + 2 * axes, 2)) for first in (0, 1))
        lead = [0, *outer, 1] if group_axis == 1 else [0, 1, *outer]
        x = x.permute(*lead, *inner, 2 + 2 * axes)
        return x.flatten(2 + axes, 1 + 2 * axes).flatten(group_axis, group_axis + axes - 1)

    def scatter(self, x: torch.Tensor, group_axis: int = 1) -> torch.Tensor:
        """Returns what `gather` gave, with any last axis, as tokens `[batch, heads, num_tokens, dim]` again."""
        axes = len(self.size)
        x = x.unflatten(3, self.window_size).unflatten(group_axis, self._counts)
        first = 1 if group_axis == 1 else 2
        heads = 1 + axes if group_axis == 1 else 1
        order = [index for axis in range(axes) for index in (first + axis, 2 + axes + axis)]
        return x.permute(0, heads, *order, 2 + 2 * axes).flatten(2, 1 + 2 * axes)

    @property
    def _counts(self) -> tuple[int, ...]:
        return tuple(length // window for length, window in zip(self.size, self.window_size, strict=True))
