"""`undivided evaluate`: what a checkpoint costs and gives, alone or beside another."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from undivided.models.checkpoint import Checkpoint
    from undivided.models.evaluation import Evaluation


def command(
    src: Annotated[
        str, typer.Argument(help="Checkpoint folder, smollm2-135m, or a name on the Hub (org/name).")
    ],
    text: Annotated[Path, typer.Option(help="Text file, UTF-8.")],
    reference: Annotated[
        str | None, typer.Option(help="Checkpoint to compare with, such as the source of a conversion.")
    ] = None,
    block: Annotated[
        int | None, typer.Option(help="Tokens a block [2048, or a shorter context of the model].")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Use only so many tokens of the text.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 [as the checkpoint].")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [cuda where there is one].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a checkpoint's perplexity and cache, and how far it is from a reference.

    Perplexity is over non-overlapping blocks of the text. Beside a reference: the mean KL divergence from it,
    in nats a token, and the share of tokens where both find the same one most probable.
    """
    import torch

    from undivided.cli._console import note, progress
    from undivided.cli._options import dtype_of
    from undivided.data import read_text
    from undivided.models.checkpoint import open_checkpoint
    from undivided.models.evaluation import compare, perplexity

    # The text first: a mistyped name should not wait for a model to load.
    content = read_text(text)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_checkpoint(src, dtype=dtype_of(dtype), device=place, progress=note)
    options: dict[str, Any] = {"block": block, "max_tokens": max_tokens, "progress": progress}
    report: dict[str, Any] = {"text": str(text)}
    if reference is None:
        report["model"] = _measured(opened, perplexity(opened.model, opened.tokenizer, content, **options))
    else:
        other = open_checkpoint(reference, dtype=dtype_of(dtype), device=place, progress=note)
        if other.tokenizer.get_vocab() != opened.tokenizer.get_vocab():
            raise ValueError(f"{src} and {reference} have different vocabularies; they cannot be compared.")
        result = compare(opened.model, other.model, opened.tokenizer, content, **options)
        report["model"] = _measured(opened, result.model)
        report["reference"] = _measured(other, result.reference)
        report["kl"] = result.kl
        report["agreement"] = result.agreement
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def _measured(checkpoint: Checkpoint, evaluation: Evaluation) -> dict[str, Any]:
    from undivided.models.evaluation import cache_bytes_per_token

    return {
        "name": checkpoint.name,
        "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
        **asdict(evaluation),
        "cache_bytes_per_token": cache_bytes_per_token(checkpoint.model),
    }


def _print(report: dict[str, Any]) -> None:
    from undivided.cli._console import table

    rows = [report[role] for role in ("model", "reference") if role in report]
    heads = ["checkpoint", "dtype", "perplexity", "nats a token", "tokens", "cache bytes a token"]
    cells = [
        (
            row["name"],
            row["dtype"],
            f"{row['perplexity']:.3f}",
            f"{row['nll']:.4f}",
            f"{row['tokens']:,}",
            f"{row['cache_bytes_per_token']:,.0f}",
        )
        for row in rows
    ]
    table(heads, cells, numeric=heads[2:])
    if "kl" in report:
        typer.echo(
            f"KL from {report['reference']['name']}: {report['kl']:.4f} nats a token; "
            f"same most probable token: {report['agreement']:.1%}"
        )
