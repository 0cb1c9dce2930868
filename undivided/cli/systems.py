"""`undivided systems`: what the library holds, for people, as JSON, or as the README's table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from undivided import catalog
from undivided.catalog import FIDELITIES, KINDS, STATES, SYSTEMS, System

# Columns of a terminal that hold the widest names beside each other.
_ROOM_FOR_ALL = 96
BEGIN = "<!-- systems:begin -->"
END = "<!-- systems:end -->"


def command(
    slug: Annotated[str | None, typer.Argument(help="Describe this system alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every field as JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's table.")] = False,
    write: Annotated[
        Path | None,
        typer.Option(metavar="README.md", help="Renew the table between the markers of this file."),
    ] = None,
    kind: Annotated[str | None, typer.Option(help=f"Only one kind: {', '.join(KINDS)}.")] = None,
    state: Annotated[str | None, typer.Option(help=f"Only one state: {', '.join(STATES)}.")] = None,
) -> None:
    """List the attention systems, or describe one: what it changes, where it lives, how far it is."""
    if sum((as_json, markdown, write is not None)) > 1:
        raise ValueError("--json, --markdown and --write exclude each other; give one.")
    if write is not None and (slug or kind or state):
        raise ValueError("--write puts in every system; leave out the system, --kind and --state.")
    if slug is not None and (kind or state):
        raise ValueError("--kind and --state choose from the list; leave them out when a system is named.")
    rows = [catalog.get(slug)] if slug is not None else _selected(kind, state)
    if as_json:
        fields = [{**dataclasses.asdict(row), "link": row.link} for row in rows]
        typer.echo(json.dumps(fields, indent=2, ensure_ascii=False))
    elif markdown:
        typer.echo(markdown_table(rows, Path("results")))
    elif write is not None:
        _write(write)
    elif slug is not None:
        _describe(rows[0])
    else:
        _list(rows)


def _selected(kind: str | None, state: str | None) -> list[System]:
    for option, value, allowed in (("--kind", kind, KINDS), ("--state", state, STATES)):
        if value is not None and value not in allowed:
            raise ValueError(f'{option} "{value}" is none of {", ".join(allowed)}.')
    return [row for row in SYSTEMS if kind in (None, row.kind) and state in (None, row.state)]


def _list(rows: list[System]) -> None:
    from rich.console import Console
    from rich.table import Table

    from undivided.cli._console import note, out

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("#", justify="right", header_style="bold")
    heads = ["system", "paper", "kind", "state", "where", "fidelity"]
    if out.is_terminal and out.width < _ROOM_FOR_ALL:
        # It is the one that the page of a system says as well and nobody types.
        heads.remove("fidelity")
    for head in heads:
        # Only modules may wrap: a name that is cut or split cannot be typed.
        table.add_column(head, no_wrap=head != "where", overflow="fold", header_style="bold")
    for row in rows:
        names = (row.slug, row.arxiv, row.kind, row.state, _rooms(row), row.fidelity or "")
        table.add_row(str(row.number), *names[: len(heads)])
    # Where there is no terminal there is no width to fit, and whole lines are easier to search.
    (out if out.is_terminal else Console(file=out.file, width=10_000)).print(table, markup=False)
    counts = ", ".join(f"{sum(row.state == state for row in rows)} {state}" for state in reversed(STATES))
    note(f'{len(rows)} systems: {counts}. "layers" stands for undivided.layers.SYSTEM, and so on.')


def _rooms(row: System) -> str:
    """The rooms of the modules that bear the system's name, and the names of the others."""
    return ", ".join(module.removeprefix("undivided.").removesuffix(f".{row.slug}") for module in row.code)


def _describe(row: System) -> None:
    from undivided.cli._console import out

    fidelity = f"{row.fidelity}: {FIDELITIES[row.fidelity]}" if row.fidelity else ""
    lines = {
        "paper": f"{row.title} ({row.year})",
        "link": row.link,
        "changes": row.summary,
        "kind": f"{row.kind}: {KINDS[row.kind]}",
        "state": f"{row.state}: {STATES[row.state]}",
        "where": ", ".join(row.code),
        "fidelity": fidelity,
        "measured": _bars(row, Path("results")),
    }
    out.print(f"{row.name}, system {row.number} of {len(SYSTEMS)}", style="bold", markup=False)
    for name, value in lines.items():
        if value:
            out.print(f"{name:9} {value}", markup=False, soft_wrap=True)


def markdown_table(rows: list[System], results: Path) -> str:
    """Table of the README.

    Args:
        rows: The systems.
        results: Folder whose `.jsonl` files say what was measured.
    """
    heads = ("#", "system", "what it changes", "where", "state", "fidelity", "against its paper")
    lines = [heads, ("---",) * len(heads)]
    for row in rows:
        bars = _bars(row, results)
        lines.append(
            (
                str(row.number),
                f"[{row.name}]({row.link})",
                row.summary,
                "<br>".join(f"`{module}`" for module in row.code),
                row.state,
                row.fidelity or "",
                f"[{bars}](results/RESULTS.md#{row.slug})" if bars else "",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _bars(row: System, results: Path) -> str:
    """How many bars of the system's claim hold in the latest results; empty where there are none."""
    path = results / f"{row.slug}.jsonl"
    if not path.exists():
        return ""
    from undivided.claims import _results

    bars = [result.holds for result in _results.latest(_results.read(path)) if result.holds is not None]
    return f"{sum(bars)} of {len(bars)} bars hold" if bars else "measured, no bar"


def _write(path: Path) -> None:
    from undivided.claims import _results
    from undivided.cli._console import note

    text = path.read_text(encoding="utf-8")
    begin, end = text.find(BEGIN), text.find(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or begin > end:
        raise ValueError(f"{path} must hold the line {BEGIN} once and, below it, the line {END} once.")
    table = markdown_table(list(SYSTEMS), path.parent / "results")
    fresh = f"{text[: begin + len(BEGIN)]}\n{table}\n{text[end:]}"
    if fresh == text:
        note(f"{path} is up to date.")
        return
    _results.replace_text(path, fresh)
    note(f"{path}: wrote the table of {len(SYSTEMS)} systems.")
