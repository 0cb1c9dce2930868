"""`undivided demo`: the main job on a real model, from grouped queries to tensor-parallel latents, in minutes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from undivided.convert._report import Report

_PROMPT = "The three most important things about a good public library are"
_NEW_TOKENS = 48


def command(
    src: Annotated[str, typer.Argument(help="Checkpoint folder, smollm2-135m, or a name on the Hub.")] = "smollm2-135m",
    output: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path("."),
    latent_dim: Annotated[int, typer.Option(help="Width of the latent.")] = 256,
    rope_dim: Annotated[int, typer.Option(help="Dimensions that keep their rotary positions.")] = 32,
    calibration: Annotated[Path | None, typer.Option(help="Text to calibrate on, for another model.")] = None,
    evaluation_tokens: Annotated[int, typer.Option(help="Tokens of the evaluation text.")] = 8192,
) -> None:
    """Convert a small real model and draw its perplexity against its cache."""
    from undivided.cli._console import note, progress, table
    from undivided.convert.demonstration import demonstrate

    begin = time.monotonic()
    result, texts = demonstrate(
        src, latent_dim=latent_dim, rope_dim=rope_dim, calibration=calibration, prompt=_PROMPT,
        new_tokens=_NEW_TOKENS, evaluation_tokens=evaluation_tokens, progress=progress, say=note,
    )  # fmt: skip
    result["seconds"] = round(time.monotonic() - begin, 1)

    for name, text in texts.items():
        typer.echo(f"{name}: {_PROMPT}{text}\n")
    table(["form", "cache bytes a token a rank", "perplexity", "same token", "tokens/s"], _rows(result), numeric=[
        "cache bytes a token a rank", "perplexity", "same token", "tokens/s"])  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    (output / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result, output / "demo.png")
    note(f"{result['seconds']:.0f} s; wrote {output / 'demo.json'} and {output / 'demo.png'}")
