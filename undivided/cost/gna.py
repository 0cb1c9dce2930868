"""What a window, stride and tile of neighborhood attention can gain at most: tiles counted, no kernel run. No torch.

A kernel computes whole tiles: a tile of queries with every tile of keys that one of its windows touches. What is in the
tile and in no window is computed for nothing.

    report = simulate((30, 48, 80), (18, 24, 24), stride=(16, 8, 8), query_tile=(4, 8, 8), key_tile=(2, 8, 8))
    report.speedup                      # 11.11, which is report.flop_bound: this stride wastes nothing
    print(table(search((256, 256), (80, 80), query_tile=(16, 16), key_tile=(16, 8))))
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Numbers = int | Sequence[int]


@dataclass(frozen=True)
class TileReport:
    """Tiles of keys that a tile of queries meets.

    Args:
        size, kernel_size, stride, dilation, is_causal: the problem, a number for each axis.
        query_tile, key_tile: tokens of a tile along each axis.
        visited: tiles of keys that the worst tile of queries visits.
        mean_visited: the same on average over the tiles of queries.
        dense: tiles of keys that there are, all of which full attention visits.
        is_perfect: every key of a visited tile is seen by every query of the tile (padding aside), so that no mask
            is needed.
    """

    size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    visited: int
    mean_visited: float
    dense: int
    is_perfect: bool

    @property
    def speedup(self) -> float:
        """Bound of the speed-up over full attention, `dense / visited`: the worst tile decides."""
        return self.dense / self.visited

    @property
    def flop_bound(self) -> float:
        """Operations of full attention over those of the definition, without causality: `prod(size / kernel_size)`."""
        return math.prod(self.size) / math.prod(self.kernel_size)


def simulate(
    size: Numbers,
    kernel_size: Numbers,
    *,
    stride: Numbers = 1,
    dilation: Numbers = 1,
    is_causal: bool | Sequence[bool] = False,
    query_tile: Numbers,
    key_tile: Numbers,
    tiling: str = "multi",
    key_tiling: str = "static",
) -> TileReport:
    """Counts the tiles of keys that each tile of queries visits.

    Along one axis the queries `a..b` of a tile visit the tiles from `start(a) // T` to `ceil(end(b) / T)`, with T the
    key tile; the counts of the axes multiply. With dilation each class of positions is an axis of its own.

    Args:
        size: positions along each axis, one to three axes; a number for one axis.
        kernel_size: keys of a window.
        stride: queries that share a window.
        dilation: distance between two keys of a window.
        is_causal: whether windows end at the query.
        query_tile: queries of a tile along each axis.
        key_tile: keys of a tile along each axis.
        tiling: "multi": tiles are boxes of the grid (tokens permuted); "single": they are runs of as many tokens of
            the grid in row-major order.
        key_tiling: "static": tiles of keys lie on a fixed grid; "dynamic": they start at the first key that the tile
            of queries sees.

    Returns:
        The counts; `report.speedup` is the bound.

    Raises:
        ValueError: a number does not fit its axis, or a mode is unknown or not defined: runs of tokens have no dilation
            and no dynamic tiles.

    Source: GNA (arXiv 2504.16922), the analytical model of its simulator.
    """
    problem = _problem(size, kernel_size, stride, dilation, is_causal, query_tile, key_tile)
    axes = _axes(problem)
    if tiling not in ("multi", "single"):
        raise ValueError(f'tiling="{tiling}" is not one of "multi", "single".')
    if key_tiling not in ("static", "dynamic"):
        raise ValueError(f'key_tiling="{key_tiling}" is not one of "static", "dynamic".')
    if tiling == "single":
        if key_tiling == "dynamic" or any(axis.dilation > 1 for axis in axes):
            raise ValueError(
                'tiling="single" needs key_tiling="static" and dilation=1: a run of tokens is no box of a class.'
            )
        counts, is_perfect = _runs(axes)
        dense = -(-math.prod(axis.length for axis in axes) // math.prod(axis.key_tile for axis in axes))
        return TileReport(
            **problem,
            visited=max(counts),
            mean_visited=sum(counts) / len(counts),
            dense=dense,
            is_perfect=is_perfect,
        )
    visits = [axis.visits(key_tiling == "dynamic") for axis in axes]
    # Axes are independent, so the worst of the products is the product of the worst, and so is the mean.
    visited = math.prod(max(counts) for counts, _ in visits)
    mean_visited = math.prod(sum(counts) / len(counts) for counts, _ in visits)
    dense = math.prod(-(-axis.length // axis.key_tile) for axis in axes)
    is_perfect = all(perfect for _, perfect in visits)
    return TileReport(
        **problem, visited=visited, mean_visited=mean_visited, dense=dense, is_perfect=is_perfect
    )


def search(
    size: Numbers,
    kernel_size: Numbers,
    *,
    dilation: Numbers = 1,
    is_causal: bool | Sequence[bool] = False,
    query_tile: Numbers,
    key_tile: Numbers,
    key_tiling: str = "static",
) -> list[TileReport]:
    """Returns the strides that pay, the fastest first.

    A larger stride costs translational equivariance, so it must gain over every one that is smaller or equal on all
    axes; those that do not are left out.

    Args and errors: as in `simulate`.

    Source: GNA (arXiv 2504.16922), the sweep of strides.
    """
    windows = _problem(size, kernel_size, 1, dilation, is_causal, query_tile, key_tile)["kernel_size"]

    def report(stride: Sequence[int]) -> TileReport:
        return simulate(
            size, kernel_size, stride=stride, dilation=dilation, is_causal=is_causal, query_tile=query_tile,
            key_tile=key_tile, key_tiling=key_tiling,
        )  # fmt: skip

    # Counts of the axes multiply, so a stride pays if and only if each of its numbers pays on its own axis.
    paying = []
    for axis, window in enumerate(windows):
        kept, fewest = [], math.inf
        for stride in range(1, window + 1):
            visited = report([stride if place == axis else 1 for place in range(len(windows))]).visited
            if visited < fewest:
                kept.append(stride)
                fewest = visited
        paying.append(kept)
    reports = [report(stride) for stride in itertools.product(*paying)]
    return sorted(reports, key=lambda found: (found.visited, math.prod(found.stride)))


def end_to_end(share: float, speedup: float) -> float:
    """Returns the speed-up of a model, `1 / (1 - share + share / speedup)`.

    Args:
        share: part of the model's time that its attention takes, 0 to 1.
        speedup: of the attention.

    Raises:
        ValueError: the share is outside 0 to 1, or the speed-up is not positive.

    Source: GNA (arXiv 2504.16922); Amdahl's law.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must be from 0 to 1.")
    if speedup <= 0:
        raise ValueError(f"speedup={speedup} must be positive.")
    return 1 / (1 - share + share / speedup)


def arithmetic_intensity(window: int, head_dim: int, element_size: int, fused: bool) -> float:
    """Returns operations a byte of the forward, `4 w D / bytes`, when every tensor is moved once.

    Fused, a token moves its query, key, value and output, `4 D` numbers: the intensity is `w / element_size`, however
    many tokens there are, so that small windows are bound by memory. With the weights in memory it also writes and
    reads w of them: `4 w D / (4 D + 2 w)`, at most `2 D / element_size`, that of full attention in this form.

    Args:
        window: keys of a window, all axes together.
        head_dim: width D of a head.
        element_size: bytes of a number.
        fused: whether the weights stay on the chip.

    Source: Faster Neighborhood Attention (arXiv 2403.04690), section 3.
    """
    moved = 4 * head_dim + (0 if fused else 2 * window)
    return 4 * window * head_dim / (moved * element_size)


def weight_bytes(tokens: int, window: int, batch_heads: int, element_size: int, fused: bool) -> int:
    """Returns the bytes that a forward keeps beside its inputs and output.

    Args:
        tokens: tokens of the grid.
        window: keys of a window, all axes together.
        batch_heads: samples times heads.
        element_size: bytes of a number.
        fused: the log-sums, float32, which do not depend on the window; else logits and weights of every window.

    Source: Faster Neighborhood Attention (arXiv 2403.04690), section 3.
    """
    return batch_heads * tokens * (4 if fused else 2 * window * element_size)


def table(reports: Sequence[TileReport]) -> str:
    """Returns one line a report: stride, tiles visited, bound of the speed-up, and whether no mask is needed."""
    rows = [("stride", "visited / all", "speed-up", "FLOP bound", "perfect")]
    for report in reports:
        rows.append(
            (
                " x ".join(map(str, report.stride)),
                f"{report.visited} / {report.dense}",
                f"{report.speedup:.2f}",
                f"{report.flop_bound:.2f}",
                "yes" if report.is_perfect else "no",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


@dataclass(frozen=True)
class _Axis:
    length: int
    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool
    query_tile: int
    key_tile: int

    def window(self, index: int, length: int) -> tuple[int, int]:
        """Start and end of the window of a query in a class of so many positions."""
        group = index // self.stride * self.stride
        if self.is_causal:
            leader = min(group + self.stride - 1, length - 1)
            return max(leader - self.kernel_size + 1, 0), index + 1
        leader = min(group + self.stride // 2, length - 1)
        start = min(max(leader - self.kernel_size // 2, 0), length - self.kernel_size)
        return start, start + self.kernel_size

    def visits(self, is_dynamic: bool) -> tuple[list[int], bool]:
        """Tiles of keys visited by each tile of queries, over all classes; and whether no visit needs a mask."""
        counts, is_perfect = [], True
        # Classes are of two lengths at most; each counts as often as there are classes of it.
        shorter, longer_classes = divmod(self.length, self.dilation)
        classes = [(shorter + 1, longer_classes), (shorter, self.dilation - longer_classes)]
        for length, copies in classes:
            if not copies:
                continue
            for first in range(0, length, self.query_tile):
                # Bounds never decrease from query to query: the first and the last of a tile say all.
                start, least_end = self.window(first, length)
                last_start, end = self.window(min(first + self.query_tile, length) - 1, length)
                # What is visited runs from `low` to the next multiple of the tile, or to the end of the class.
                low = start if is_dynamic else start // self.key_tile * self.key_tile
                count = -(-(end - low) // self.key_tile)
                counts += [count] * copies
                high = min(low + count * self.key_tile, length)
                is_perfect = is_perfect and last_start <= low and high <= least_end
        return counts, is_perfect


def _runs(axes: Sequence[_Axis]) -> tuple[list[int], bool]:
    """Tiles of keys visited by each run of queries, in row-major order, and whether no visit needs a mask."""
    sizes = [axis.length for axis in axes]
    steps = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
    windows = [[axis.window(index, axis.length) for index in range(axis.length)] for axis in axes]
    query_tile = math.prod(axis.query_tile for axis in axes)
    key_tile = math.prod(axis.key_tile for axis in axes)
    tokens, width = math.prod(sizes), sizes[-1]
    counts, is_perfect = [], True
    for first in range(0, tokens, query_tile):
        last = min(first + query_tile, tokens) - 1
        visited: set[int] = set()
        fewest = tokens
        for row in range(first // width, last // width + 1):
            # The queries of the run in this row are without gaps, and so are the keys along it.
            ends = max(first - row * width, 0), min(last - row * width, width - 1)
            start, end = windows[-1][ends[0]][0], windows[-1][ends[1]][1]
            place = [
                row * width // step % length for step, length in zip(steps[:-1], sizes[:-1], strict=True)
            ]
            rows = [range(*windows[axis][index]) for axis, index in enumerate(place)]
            for corner in itertools.product(*rows):
                base = sum(index * step for index, step in zip(corner, steps[:-1], strict=True))
                visited.update(range((base + start) // key_tile, (base + end - 1) // key_tile + 1))
            narrowest = min(end - start for start, end in windows[-1][ends[0] : ends[1] + 1])
            fewest = min(fewest, math.prod(map(len, rows)) * narrowest)
        counts.append(len(visited))
        # What a query sees is visited, so it sees all of it if it sees as many keys.
        held = sum(min((tile + 1) * key_tile, tokens) - tile * key_tile for tile in visited)
        is_perfect = is_perfect and fewest == held
    return counts, is_perfect


def _problem(size, kernel_size, stride, dilation, is_causal, query_tile, key_tile) -> dict[str, Any]:
    """The arguments, an entry for each axis, in the order of `_Axis`, after checking them."""
    size = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(size) <= 3:
        raise ValueError(f"size={size} has {len(size)} axes; it needs 1 to 3.")
    given = {
        "kernel_size": kernel_size, "stride": stride, "dilation": dilation, "is_causal": is_causal,
        "query_tile": query_tile, "key_tile": key_tile,
    }  # fmt: skip
    found = {}
    for name, value in given.items():
        found[name] = entries = (value,) * len(size) if isinstance(value, int) else tuple(value)
        if len(entries) != len(size):
            raise ValueError(
                f"{name}={value} has {len(entries)} entries, but size={size} has {len(size)} axes."
            )
        if name != "is_causal" and min(entries) < 1:
            raise ValueError(f"{name}={value} must be at least 1 on every axis.")
    for axis, length in enumerate(size):
        kernel, stride, dilation = (found[name][axis] for name in ("kernel_size", "stride", "dilation"))
        if kernel * dilation > length:
            raise ValueError(
                f"kernel_size[{axis}] * dilation[{axis}] is {kernel} * {dilation} = {kernel * dilation}, but axis "
                f"{axis} has {length} positions."
            )
        if stride > kernel:
            raise ValueError(
                f"stride[{axis}] is {stride}, but kernel_size[{axis}] is {kernel}; use at most {kernel}."
            )
    return {"size": size, **found}


def _axes(problem: dict[str, Any]) -> list[_Axis]:
    return [_Axis(*numbers) for numbers in zip(*problem.values(), strict=True)]
