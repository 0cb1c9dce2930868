"""Help with a heading for each panel of options."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class PanelCommand(TyperCommand):
    """A verb whose options stand under their `rich_help_panel`, in plain text like the rest of the help.

    A panel of several lines is several headings, and the option stands under each.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            plain = "Arguments" if parameter.param_type_name == "argument" else "Options"
            for title in (getattr(parameter, "rich_help_panel", None) or plain).split("\n"):
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)
