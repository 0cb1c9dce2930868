"""`undivided train-vision`: a vision model of timm's registry learns to classify images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

_AUGMENTATION = "Augmentation"


def command(
    name: Annotated[str, typer.Argument(help="Model, such as undivided_convit_tiny, or any of timm's.")],
    data: Annotated[
        str,
        typer.Option(help="Folder with train/CLASS/ and val/CLASS/; or fashion-mnist or digits."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    epochs: Annotated[int, typer.Option(help="How often the images are gone through.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="The highest; warm-up, then a cosine.")] = 1e-3,
    warmup_epochs: Annotated[int, typer.Option(help="Epochs of the warm-up.")] = 1,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.05,
    optimizer: Annotated[str, typer.Option(help="An optimiser of timm.")] = "adamw",
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for any.")] = 1.0,
    smoothing: Annotated[float, typer.Option(help="Of the labels.")] = 0.1,
    ema: Annotated[
        float | None, typer.Option(help="Decay of an average of the weights, which is then kept.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels of a side [those of the data, or of the model].")
    ] = None,
    model_options: Annotated[
        str | None, typer.Option(help="Further arguments of the model, as JSON: '{\"depth\": 4}'.")
    ] = None,
    mixup: Annotated[float, typer.Option(help="Strength; 0 for none.", rich_help_panel=_AUGMENTATION)] = 0.0,
    cutmix: Annotated[float, typer.Option(help="Strength; 0 for none.", rich_help_panel=_AUGMENTATION)] = 0.0,
    crop: Annotated[
        float, typer.Option(help="Least share of an image in a crop.", rich_help_panel=_AUGMENTATION)
    ] = 0.5,
    flip: Annotated[
        float, typer.Option(help="Share of mirrored images.", rich_help_panel=_AUGMENTATION)
    ] = 0.5,
    augment: Annotated[
        str | None, typer.Option(help="timm's name, such as rand-m9-mstd0.5.", rich_help_panel=_AUGMENTATION)
    ] = None,
    erasing: Annotated[
        float, typer.Option(help="Probability of an erased part.", rich_help_panel=_AUGMENTATION)
    ] = 0.0,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 (autocast).")] = False,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Train an image classifier from scratch; a killed run goes on behind its last whole epoch.

    OUT is a folder that timm opens ("local-dir:OUT"), with training.jsonl (losses, accuracies) and training.png.
    """
    from undivided.cli._console import note, progress, table
    from undivided.training.vision import FIGURE, VisionRecipe, train_vision

    recipe = VisionRecipe(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, warmup_epochs=warmup_epochs,
        weight_decay=weight_decay, optimizer=optimizer, clip=clip or None, smoothing=smoothing, mixup=mixup,
        cutmix=cutmix, ema=ema, crop=crop, flip=flip, augment=augment, erasing=erasing, workers=workers, bf16=bf16,
        seed=seed,
    )  # fmt: skip

    def watch(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        return progress(items, description, total)

    report = train_vision(
        name, data, out, recipe, image_size=image_size, model_options=_options(model_options), device=device,
        overwrite=overwrite, say=note, watch=watch,
    )  # fmt: skip
    rows = [
        (row["epoch"], f"{row['loss']:.4f}", f"{row['accuracy']:.2f}", f"{row['learning_rate']:.2e}")
        for row in report["epochs"]
    ]
    columns = ["epoch", "loss", "accuracy, %", "learning rate"]
    table(columns, rows, numeric=columns)
    note(f"{report['parameters']:,} parameters; written to {out}, curve in {out / FIGURE}")


def _options(text: str | None) -> dict[str, Any]:
    """Reads the JSON of `--model-options`."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--model-options {text} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"--model-options {text} must be an object, such as '{{\"depth\": 4}}'.")
    return found
