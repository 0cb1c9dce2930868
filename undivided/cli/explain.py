"""`undivided explain`: how a system differs from standard attention, declaration by declaration."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    slug: Annotated[str, typer.Argument(help="The system, such as tpla or gda.")],
    full: Annotated[bool, typer.Option("--full", help="Print also what is the same.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the specification as JSON.")] = False,
) -> None:
    """Explain a system: its specification beside that of standard attention."""
    from undivided.cli._console import out, table
    from undivided.spec import explain, system

    described = system(slug)
    if as_json:
        typer.echo(described.spec.to_json(indent=2))
        return
    lines = explain(described.spec)
    same = [line.declaration for line in lines if not line.differs]
    shown = [line for line in lines if full or line.differs]
    if shown:
        table(("", "standard attention", described.name), shown)
    else:
        out.print(f"{described.name} is standard attention with a choice of heads.", markup=False)
    if same and not full:
        out.print(f"the same: {', '.join(same)}", markup=False, soft_wrap=True)
    for name, meaning in described.inputs:
        out.print(f"{name}: {meaning}", markup=False, soft_wrap=True)
    for text in (described.remark, described.source):
        if text:
            out.print(text, markup=False, soft_wrap=True)
