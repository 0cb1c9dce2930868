"""Which boxes of the grid a kernel computes at a time, chosen by counting what they visit. No kernel is run."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from undivided.ops.neighborhood._tables import Axis, Neighborhood

# In boxes of columns that need no mask: what a box that needs one costs beside, and what a program costs at all.
_MASK_COST = 0.4
_PROGRAM_COST = 3.0

Three = tuple[int, int, int]


@dataclass(frozen=True)
class Boxes:
    """How a kernel cuts a grid of three axes; grids of fewer have axes of one position before theirs.

    Args:
        rows: edges of the box of rows that a program keeps, powers of 2.
        columns: edges of the boxes of columns that it visits one after the other, powers of 2.
        is_masked: for each axis, whether some visited box holds a column that some row does not see.
        overruns: whether a visited box may reach beyond its class.
        programs: programs of one head of one sample.
        visited: boxes that a program visits on average.
        full: how many of them need no mask.
    """

    rows: Three
    columns: Three
    is_masked: tuple[bool, bool, bool]
    overruns: bool
    programs: int
    visited: float
    full: float

    @property
    def cost(self) -> float:
        """Time of one head, in boxes that need no mask."""
        return self.programs * (_PROGRAM_COST + self.visited + _MASK_COST * (self.visited - self.full))


class _Visits(NamedTuple):
    programs: int
    visited: float
    full: float
    is_masked: bool
    overruns: bool


@functools.lru_cache(maxsize=1024)
def choose_boxes(neighborhood: Neighborhood, rows: int, columns: int, inverse: bool = False) -> Boxes:
    """Returns the cheapest boxes of so many rows and columns.

    Args:
        neighborhood: the grid and its windows.
        rows: rows of a program, a power of 2.
        columns: columns that meet them at a time, a power of 2.
        inverse: whether rows are keys and columns the queries that see them, instead of queries and keys.
    """
    axes = [Axis(1, 1, 1, 1, False)] * (3 - len(neighborhood.axes)) + list(neighborhood.axes)
    longest = [axis.longest for axis in axes]
    candidates = [
        _boxes(axes, row_box, column_box, inverse)
        for row_box in _shapes(rows, longest)
        for column_box in _shapes(columns, longest)
    ]
    # Of equals the one with the longest runs of tokens.
    return min(candidates, key=lambda boxes: (boxes.cost, -boxes.columns[2], -boxes.rows[2]))


def _shapes(tokens: int, longest: list[int]) -> list[Three]:
    """The boxes of so many tokens that are on no axis twice as long as it; else all that are on the last axis."""
    powers = [2**power for power in range(tokens.bit_length())]
    limits = [2 * length for length in longest[:2]]
    shapes = [
        (first, second, tokens // (first * second))
        for first, second in itertools.product(powers, powers)
        if first * second <= tokens and first < limits[0] and second < limits[1]
    ]
    within = [shape for shape in shapes if shape[2] < 2 * longest[2]]
    return within or [min(shapes, key=lambda shape: shape[2])]


def _boxes(axes: list[Axis], rows: Three, columns: Three, inverse: bool) -> Boxes:
    along = [
        _visits(axis, row, column, inverse) for axis, row, column in zip(axes, rows, columns, strict=True)
    ]
    return Boxes(
        rows,
        columns,
        (along[0].is_masked, along[1].is_masked, along[2].is_masked),
        any(visits.overruns for visits in along),
        # Axes are independent, so the means of the products are the products of the means.
        math.prod(visits.programs for visits in along),
        math.prod(visits.visited for visits in along),
        math.prod(visits.full for visits in along),
    )


@functools.lru_cache(maxsize=4096)
def _visits(axis: Axis, rows: int, columns: int, inverse: bool) -> _Visits:
    """Counts along one axis; what a box visits is what the kernels compute."""
    shorter, longer_classes = divmod(axis.length, axis.dilation)
    programs, visited, full, is_masked, overruns = 0, 0, 0, False, False
    for length, copies in ((shorter + 1, longer_classes), (shorter, axis.dilation - longer_classes)):
        if not copies or not length:
            continue
        one = Axis(length, axis.kernel_size, axis.stride, 1, axis.is_causal)
        start, end = one.tables(torch.device("cpu"))[2 * inverse : 2 * inverse + 2]
        first = torch.arange(0, length, rows)
        final = (first + rows - 1).clamp(max=length - 1)
        low, high = start[first], end[final]
        count = (high - low + columns - 1) // columns
        low = torch.minimum(low, length - count * columns).clamp(min=0)
        # Boxes from the first that all rows see whole to the last.
        inner = (torch.div(end[first] - low, columns, rounding_mode="floor")).clamp(max=count)
        outer = (start[final] - low + columns - 1) // columns
        whole = (inner - outer).clamp(min=0)
        programs += copies * first.numel()
        visited += copies * int(count.sum())
        full += copies * int(whole.sum())
        is_masked = is_masked or bool((whole < count).any())
        overruns = overruns or bool((low + count * columns > length).any())
    # Every class has as many programs as the longest, some of which have nothing to do.
    return _Visits(
        -(-axis.longest // rows) * axis.dilation, visited / programs, full / programs, is_masked, overruns
    )
