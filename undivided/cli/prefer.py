"""`undivided prefer`: a checkpoint learns which of two answers is liked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    src: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    pairs: Annotated[
        Path, typer.Option(help="One JSON object a line, with the texts prompt, chosen and rejected.")
    ],
    heldout: Annotated[
        Path | None, typer.Option(help="Pairs to judge by [the last tenth of the pairs].")
    ] = None,
    epochs: Annotated[int, typer.Option(help="How often the pairs are gone through.")] = 1,
    beta: Annotated[float, typer.Option(help="Weight of the divergence from the model as it was.")] = 0.01,
    learning_rate: Annotated[float, typer.Option(help="The highest; warm-up, then a cosine.")] = 5e-7,
    batch_size: Annotated[int, typer.Option(help="Pairs a step.")] = 64,
    length: Annotated[int, typer.Option(help="Most tokens of prompt and answer.")] = 1024,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 (autocast).")] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the pairs.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing checkpoint at OUT.")
    ] = False,
) -> None:
    """Train a checkpoint on preferences (DPO); a killed run goes on where it was."""
    from undivided.cli._console import note, table
    from undivided.training.pipeline import prefer_checkpoint
    from undivided.training.preference import PreferenceRecipe

    recipe = PreferenceRecipe(
        epochs=epochs, beta=beta, learning_rate=learning_rate, batch_size=batch_size, bf16=bf16, seed=seed
    )
    found = prefer_checkpoint(
        src, out, pairs, recipe, heldout=heldout, length=length, device=device, overwrite=overwrite, say=note
    )["preferences"]
    rows = [(when, f"{row['accuracy']:.1%}", f"{row['loss']:.4f}") for when, row in found["judged"].items()]
    table(["", "accuracy", "loss"], rows, numeric=["accuracy", "loss"])
    note(f"written to {out}")
