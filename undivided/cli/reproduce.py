"""`undivided reproduce SLUG`: check results, then measure a paper's figure beside the best rival."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Annotated

import typer

from undivided import claims
from undivided.claims import Claim, Row, _harness, _results
from undivided.cli._console import err, note, out

_HEADS = ("quantity", "shape", "ours", "baseline", "ratio", "bar", "holds", "of ceiling")


def command(
    slug: Annotated[str | None, typer.Argument(help="The system, as `undivided systems` lists it.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every claim whose device is here.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes.")] = False,
    part: Annotated[str | None, typer.Option(help="One part of the claim, such as speed or quality.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results"),
) -> None:
    """Measure a paper's claim here, beside its own figure.

    The claim's gate runs first: nothing is timed if results are wrong. Rows are added to OUTPUT/SLUG.jsonl as
    they are measured, figures are written beside it, and OUTPUT/RESULTS.md is renewed. The exit status is 1 if
    a bar does not hold.
    """
    if every == (slug is not None):
        raise ValueError("give either a system or --all.")
    if device not in ("auto", *_harness.DEVICES):
        raise ValueError(f'--device "{device}" is none of auto, cpu, cuda.')
    if slug is None:
        if part is not None:
            raise ValueError(f"--part {part} is a part of one claim; name its system.")
        chosen = _every(device)
    else:
        claim = claims.load(slug)
        chosen = [(claim, _harness.choose_device(claim, device))]
    # A list, so that one claim that fails does not keep the others from running.
    held = [_reproduce(claim, where, quick, part, output) for claim, where in chosen]
    if not all(held):
        raise typer.Exit(1)


def _every(device: str) -> list[tuple[Claim, str]]:
    chosen = []
    for slug in claims.available():
        claim = claims.load(slug)
        try:
            chosen.append((claim, _harness.choose_device(claim, device)))
        except ValueError as error:
            note(f"skipped: {error}")
    return chosen


def _reproduce(claim: Claim, device: str, quick: bool, part: str | None, output: Path) -> bool:
    """Runs one claim, keeps its rows, prints its table; returns whether it ran and every bar holds."""
    rows: list[Row] = []
    error: Exception | None = None
    with err.status(f"{claim.slug}: gate, then measurement"):
        note(f"{claim.slug} on {_harness.device_name(device)}")
        try:
            for row in _harness.run(claim, device, quick, part):
                if isinstance(row, _harness.Figure):
                    output.mkdir(parents=True, exist_ok=True)
                    row.save(output / f"{claim.slug}-{row.name}.png")
                    continue
                # Kept at once: what a killed run had measured is not lost.
                _results.append(output, row)
                rows.append(row)
                note(f"{row.what}; {row.shape}: {_results.cells(row)[2]}")
        except Exception as raised:  # whatever one claim raises, the others must still run
            error = raised
    if rows:
        _results.write_table(output)
        _print_rows(claim, rows)
        clock = f", SM clock {_harness.clock()}" if device == "cuda" else ""
        note(", ".join(f"{name} {version}" for name, version in rows[-1].versions.items()) + clock)
    if error is not None:
        note("".join(traceback.format_exception(error)))
        _complain(f"{claim.slug}: {error}")
    failed = [row for row in rows if row.holds is False]
    for row in failed:
        _complain(f"{row.what}; {row.shape}: ratio {row.ratio:.2f} is below the bar, {row.required:.2f}.")
    return error is None and not failed


def _complain(message: str) -> None:
    err.print(message, style="red", markup=False, soft_wrap=True)


def _print_rows(claim: Claim, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    for line in (f"{claim.source}:", *(f"  {figure}" for figure in claim.paper)):
        out.print(line, markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in _HEADS:
        numeric = head in ("ratio", "bar", "of ceiling")
        table.add_column(head, justify="right" if numeric else "left", header_style="bold")
    for row in rows:
        lost = row.holds is False or (row.ratio is not None and row.ratio < 1)
        table.add_row(*_results.cells(row), style="red" if lost else None)
    # Where there is no terminal there is no width to fit, and whole lines are easier to search.
    (out if out.is_terminal else Console(file=out.file, width=10_000)).print(table, markup=False)
