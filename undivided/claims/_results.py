"""The files of results: `results/SLUG.jsonl`, one row a line, and `results/RESULTS.md`, made from them."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from undivided import catalog
from undivided.claims._harness import Row

_FIELDS = [field.name for field in dataclasses.fields(Row)]


def append(folder: Path, row: Row) -> Path:
    """Adds a row to `folder/SLUG.jsonl`, whole and on disk before it returns; makes what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{row.slug}.jsonl"
    line = json.dumps(dataclasses.asdict(row), allow_nan=False) + "\n"
    with path.open("a+b") as file:
        _drop_torn_line(file)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
    return path


def _drop_torn_line(file: IO[bytes]) -> None:
    # A run killed while writing leaves a last line without its newline; a row added to it would be lost too.
    file.seek(0)
    content = file.read()
    if content and not content.endswith(b"\n"):
        file.truncate(content.rfind(b"\n") + 1)


def read(path: Path) -> list[Row]:
    """Rows of one file, oldest first; a torn last line is left out.

    Raises:
        ValueError: If a line is not a row; the message names file and line.
    """
    text = path.read_text(encoding="utf-8")
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(fields, dict) or set(fields) != set(_FIELDS):
            raise ValueError(f"{path}, line {number}: not a row; a row has exactly {', '.join(_FIELDS)}.")
        rows.append(Row(**fields))
    return rows


def read_all(folder: Path) -> list[Row]:
    """Rows of every `*.jsonl` of a folder, files in alphabetical order."""
    return [row for path in sorted(folder.glob("*.jsonl")) for row in read(path)]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each (slug, what, shape, device), in the order of first appearance.

    A row of a `--quick` run never stands in for one of a full run.
    """
    chosen: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        key = (row.slug, row.what, row.shape, row.device)
        if key not in chosen or not _is_quick(row) or _is_quick(chosen[key]):
            chosen[key] = row
    return list(chosen.values())


def _is_quick(row: Row) -> bool:
    return "--quick" in row.command.split()


def write_table(folder: Path) -> Path:
    """Makes `folder/RESULTS.md` from every `*.jsonl` of the folder, a table a system."""
    rows = latest(read_all(folder))
    numbers = {row.slug: row.number for row in catalog.SYSTEMS}
    slugs = sorted({row.slug for row in rows}, key=lambda slug: (numbers.get(slug, len(numbers) + 1), slug))
    parts = [
        "# Results",
        "Made by `undivided reproduce` from the `.jsonl` files of this folder: the latest row of each "
        "quantity, shape and device. A ratio above 1 means that ours is better than the baseline, which was "
        "measured in the same run. A bar is the smallest ratio for which the claim holds. Of ceiling: the "
        "roofline's time, from copy bandwidth and matrix rate measured on that device, over our time.",
    ]
    for slug in slugs:
        own = [row for row in rows if row.slug == slug]
        newest = max(own, key=lambda row: row.date)
        figures = [f"![{path.stem}]({path.name})" for path in sorted(folder.glob(f"{slug}-*.png"))]
        parts += [f"## {slug}", *_heading(slug), *figures, _table(own), f"Repeat with `{newest.command}`."]
    path = folder / "RESULTS.md"
    replace_text(path, "\n\n".join(parts) + "\n")
    return path


def _heading(slug: str) -> list[str]:
    return [f"[{row.title}]({row.link})" for row in catalog.SYSTEMS if row.slug == slug]


def _table(rows: list[Row]) -> str:
    head = ("quantity", "shape", "ours", "baseline", "ratio", "bar", "holds", "of ceiling", "device", "date")
    lines = [head, tuple("---" for _ in head)]
    for row in rows:
        lines.append((*cells(row), row.device, row.date[:10]))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def cells(row: Row) -> tuple[str, ...]:
    """A row in words: quantity, shape, ours, baseline, ratio, bar, holds, fraction of the ceiling."""
    spread = "" if row.deviation is None else f" ± {number(row.deviation)}"
    baseline = "" if row.baseline is None else f"{number(row.baseline)} {row.unit}, {row.baseline_name}"
    return (
        row.what,
        row.shape,
        f"{number(row.ours)}{spread} {row.unit}",
        baseline,
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.required is None else f"{row.required:.2f}",
        "" if row.holds is None else ("yes" if row.holds else "no"),
        "" if row.fraction_of_ceiling is None else f"{row.fraction_of_ceiling:.0%}",
    )


def number(value: float) -> str:
    """A measured number with four significant digits, or whole from 1000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def replace_text(path: Path, text: str) -> None:
    """Writes a whole file beside `path` and renames it over it, so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a report is as readable as the file it replaces.
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
