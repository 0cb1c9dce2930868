"""`undivided convert`: another attention for a checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from undivided.convert.targets import TARGETS, Option


def convert(
    src: Annotated[
        str, typer.Argument(help="Checkpoint folder, smollm2-135m, or a name on the Hub (org/name).")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help=f"{', '.join(list(TARGETS)[:-1])} or {list(TARGETS)[-1]}.")],
    calibration: Annotated[
        Path | None, typer.Option(help="Text to calibrate on; smollm2-135m has one by default.")
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Text of the reported perplexities [the last tenth of the calibration text]."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration samples [128].")] = None,
    sample_length: Annotated[int | None, typer.Option(help="Tokens of a calibration sample [256].")] = None,
    evaluation_tokens: Annotated[int, typer.Option(help="Tokens of the evaluation text.")] = 16384,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [as the source].")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing checkpoint at OUT.")
    ] = False,
    **of_targets: Any,
) -> None:
    """Convert the attention of a checkpoint; OUT is an ordinary transformers folder with conversion.json."""
    from undivided.cli._console import note, progress, table
    from undivided.cli._options import dtype_of
    from undivided.convert.pipeline import convert_checkpoint

    known = options()
    given = {
        name: known[name].read(value)
        for name, value in of_targets.items()
        # A flag that was not given is False.
        if value is not None and value is not False
    }
    report = convert_checkpoint(
        src, out, to, options=given, calibration=calibration, evaluation=evaluation, samples=samples,
        sample_length=sample_length, evaluation_tokens=evaluation_tokens, dtype=dtype_of(dtype), device=device,
        overwrite=overwrite, progress=progress, say=note,
    )  # fmt: skip
    rows = [(stage.replace("_", " "), f"{value:.3f}") for stage, value in report["perplexity"].items()]
    table(["stage", "perplexity"], rows, numeric=["perplexity"])
    for stage, size in report["cache_bytes_per_token_per_rank"].items():
        note(f"cache bytes a token a rank, {stage}: {size:,.0f}")
    for line in report["approximations"]:
        note(line)
    note(f"written to {out}")


def options() -> dict[str, Option]:
    """Returns the options of all targets by keyword; two targets that share one mean the same by it."""
    return {name: option for row in TARGETS.values() for name, option in row.options.items()}


def _parameters() -> list[inspect.Parameter]:
    """The options of the targets as typer reads them, each under the headings of the targets that have it."""
    found = []
    for name, option in options().items():
        headings = [f"--to {to}: {row.title}" for to, row in TARGETS.items() if name in row.options]
        flag = option.flag or f"--{name.replace('_', '-')}"
        declared = typer.Option(flag, help=option.help, rich_help_panel="\n".join(headings))
        kind, default = (bool, False) if option.kind is bool else (option.kind | None, None)
        found.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared]
            )
        )
    return found


def _with_targets(function: Callable[..., None]) -> Callable[..., None]:
    """Writes the options of the targets into the signature, where typer looks for them."""
    signature = inspect.signature(function, eval_str=True)
    fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [*fixed, *_parameters()]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return function


command = _with_targets(convert)
