"""Where verbs print: results on stdout through `out`, everything else on stderr through `err`."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TypeVar

from rich.console import Console
from rich.table import Table

T = TypeVar("T")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_SECONDS_BETWEEN_LINES = 10.0
_LONGEST_ROW = 10_000


def note(message: str) -> None:
    """Print one line about what is going on, on stderr."""
    err.print(message, style="dim", markup=False, soft_wrap=True)


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` and show on stderr how far it is.

    On a terminal this is a bar that goes away at the end. Elsewhere (a log) it is a line every ten seconds
    and one at the end, so that a long run is never silent.

    Args:
        items: what to go through.
        description: what is being done, such as "perplexity".
        total: their number, where `items` does not know it.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if err.is_terminal:
        yield from _bar(items, description, total)
        return
    begin = last = time.monotonic()
    of_total = "" if total is None else f"/{total}"
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            note(f"{description}: {done}{of_total}, {now - begin:.0f} s")
    note(f"{description}: {done}{of_total}, {time.monotonic() - begin:.0f} s")


_bars: list[str] = []


def _bar(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    """A bar on the terminal; one within another's loop is not drawn, since a terminal shows one at a time."""
    from rich.progress import track

    if _bars:
        yield from items
        return
    _bars.append(description)
    try:
        yield from track(items, description, total=total, console=err, transient=True)
    finally:
        _bars.pop()


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    numeric: Sequence[str] = (),
    title: str | None = None,
) -> None:
    """Print a table on stdout, as `show` does.

    Args:
        columns: headings.
        rows: one value a column; None prints as an empty cell.
        numeric: headings of the columns to align right.
        title: a line above.
    """
    grid = Table(title=title, box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
    for name in columns:
        grid.add_column(name, justify="right" if name in numeric else "left", header_style="bold")
    for row in rows:
        grid.add_row(*("" if value is None else str(value) for value in row))
    show(grid)


def show(grid: Table) -> None:
    """Print a rich table on stdout: fitted to a terminal, and as wide as its rows where there is none."""
    if out.is_terminal:
        out.print(grid, markup=False)
        return
    text = io.StringIO()
    Console(file=text, width=_LONGEST_ROW).print(grid, markup=False)
    for line in text.getvalue().splitlines():
        out.print(line.rstrip(), markup=False, soft_wrap=True)
