"""The command `undivided`: one module a verb.

`undivided/cli/<verb>.py` has a typer-annotated function `command`; a hyphen of the verb is an underscore of the file.
It is imported only when that verb is called or its own help is asked for, so `undivided --help` needs neither torch
nor transformers. Verbs print results on stdout, notes and progress on stderr (`undivided.cli._console`), and signal bad
input by raising ValueError, TypeError, OSError or ImportError, which `main` turns into one line and exit status 2.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from undivided import __version__
from undivided.cli._help import PanelCommand

VERBS: dict[str, str] = {
    "convert": "Convert a checkpoint to another attention.",
    "heal": "Train a converted checkpoint on what its source gives.",
    "prefer": "Train a checkpoint on which of two answers is liked.",
    "train-vision": "Train an image classifier from scratch.",
    "generate": "Generate text with a checkpoint.",
    "evaluate": "Measure a checkpoint's perplexity and cache.",
    "plan": "Predict cache bytes, FLOPs and time of attention choices.",
    "systems": "List the attention systems, or describe one.",
    "explain": "Explain how a system differs from standard attention.",
    "doctor": "Report versions, devices and which backends can run, and why not.",
    "reproduce": "Measure a paper's claim here, beside its own figure.",
    "demo": "Convert a small real model and draw its perplexity against its cache.",
}

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for bad input, 130 when interrupted.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Raises:
        SystemExit: always, with the exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Taken out here, so that it may stand before or after the verb.
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    verb = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        _application(verb)(args=arguments, prog_name="undivided")
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if debug:
            raise
        from undivided.cli._console import err

        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)


def _application(verb: str | None) -> typer.Typer:
    """The typer application in which only `verb` is loaded; the others are a name and a summary."""
    application = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    application.callback()(_root)
    for name, summary in VERBS.items():
        function = _load(name) if name == verb else _unloaded
        application.command(name, short_help=summary, cls=PanelCommand)(function)
    return application


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"undivided {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Choose, convert, run and inspect the attention of models."""


def _unloaded() -> None:
    """Stands for a verb that was not called."""


def _load(verb: str) -> Callable[..., Any]:
    command = importlib.import_module(f"undivided.cli.{verb.replace('-', '_')}").command

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            # typer's releases do not agree on the exit status.
            raise typer.Exit(_INTERRUPTED) from None

    return run
