"""`undivided heal`: a converted checkpoint learns from the one it came from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

_LAYERS = "A first stage, in which every attention layer learns from the teacher's layer"


def command(
    src: Annotated[Path, typer.Argument(help="Checkpoint folder of the converted model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    teacher: Annotated[
        str, typer.Option(help="The checkpoint it was converted from: a folder, smollm2-135m, or org/name.")
    ],
    tokens: Annotated[str, typer.Option(help="Tokens to train on, such as 500K or 20M.")] = "1M",
    text: Annotated[
        Path | None, typer.Option(help="Text to train on; smollm2-135m has one by default.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Text of the perplexities [the last tenth of the training text].")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 16,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Sequences computed at once, where memory is short [batch size].")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="The highest; warm-up, then a cosine.")] = 2e-5,
    kl: Annotated[float, typer.Option(help="Weight of the divergence from the teacher.")] = 1.0,
    cross_entropy: Annotated[float, typer.Option(help="Weight of the text's own next tokens.")] = 0.0,
    features: Annotated[float, typer.Option(help="Weight of the residual streams' error.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Of both distributions.")] = 1.0,
    train_on: Annotated[str, typer.Option(help="all, or attention: leave MLPs and embeddings.")] = "all",
    layers_tokens: Annotated[
        str | None, typer.Option(help="Tokens of this stage [it is left out].", rich_help_panel=_LAYERS)
    ] = None,
    layers_learning_rate: Annotated[
        float, typer.Option(help="Its highest rate.", rich_help_panel=_LAYERS)
    ] = 1e-4,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 (autocast).")] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile layers and loss first: a minute, for shorter steps.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the text.")] = 0,
    evaluations: Annotated[int, typer.Option(help="Perplexities in between, a stage.")] = 4,
    evaluation_tokens: Annotated[int, typer.Option(help="Tokens of the evaluation text.")] = 16384,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing checkpoint at OUT.")
    ] = False,
) -> None:
    """Heal a converted checkpoint by distillation; a killed run goes on where it was.

    OUT is an ordinary transformers folder, with healing.jsonl (losses, perplexities) and healing.png.
    """
    from undivided.cli._console import note, table
    from undivided.training.healing import Recipe
    from undivided.training.pipeline import FIGURE, heal_checkpoint

    shared: dict[str, Any] = {
        "batch_size": batch_size, "micro_batch_size": micro_batch_size, "bf16": bf16, "compile": compile,
        "seed": seed, "evaluations": evaluations,
    }  # fmt: skip
    recipes = [
        Recipe(
            tokens=_count(tokens, "--tokens"), learning_rate=learning_rate, kl=kl, cross_entropy=cross_entropy,
            features=features, temperature=temperature, train_on=train_on, **shared,
        )
    ]  # fmt: skip
    if layers_tokens is not None:
        count = _count(layers_tokens, "--layers-tokens")
        recipes.insert(0, Recipe(tokens=count, stage="layers", learning_rate=layers_learning_rate, **shared))
    report = heal_checkpoint(
        src, out, teacher, recipes, text=text, evaluation=evaluation, length=length,
        evaluation_tokens=evaluation_tokens, device=device, overwrite=overwrite, say=note,
    )["healing"]  # fmt: skip
    rows = [
        (recipe["stage"], f"{int(row['tokens']):,}", f"{row['perplexity']:.3f}")
        for recipe, found in zip(report["recipes"], report["evaluations"], strict=True)
        for row in found
    ]
    table(["stage", "tokens", "perplexity"], rows, numeric=["tokens", "perplexity"])
    note(f"perplexity of the teacher: {report['teacher']['perplexity']:.3f}")
    note(f"written to {out}, curve in {out / FIGURE}")


def _count(value: str, option: str) -> int:
    """Reads `20M` as twenty million."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", value.strip().upper())
    if match is None:
        raise ValueError(f"{option} {value} is not a number of tokens; write 500000, 500K or 20M.")
    return round(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[match[2]])
