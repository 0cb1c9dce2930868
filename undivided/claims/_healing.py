"""What distillation from the source gives back: to MLA from grouped-query attention, and to TPLA from MLA.

The papers train on billions of tokens of general text. Here a few million tokens of speeches are gone through several
times, at higher rates; other speeches are held out. That shows how fast a conversion recovers on text of one kind, and
nothing about tasks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from undivided.claims._harness import Row, measured
from undivided.claims._latent_study import Study, demo_study
from undivided.data import demo_texts
from undivided.data.text import token_blocks
from undivided.models.checkpoint import Checkpoint, open_checkpoint
from undivided.training import Recipe, heal

_LENGTH = 1024
# The share of the loss that healing has to give back, as the ratio of the gap before to the gap after.
_GAP_RATIO = 10.0


def healed_mla(
    source: Checkpoint,
    model: Any,
    perplexity: Callable[[Any], float],
    shape: str,
    tokens: int,
    length: int = _LENGTH,
) -> Iterator[Row]:
    """Trains a converted model on its source's distribution and yields perplexities over the tokens.

    Args:
        source: the checkpoint that was converted.
        model: the converted model; it is trained in place.
        perplexity: of a model.
        shape: of the rows.
        tokens: to train on.
        length: of a sequence.
    """
    original = perplexity(source.model)
    sequences = training_sequences(source.tokenizer, length)
    recipe = Recipe(
        tokens=tokens,
        learning_rate=2e-4,
        bf16=on_cuda(model),
        compile=on_cuda(model),
        evaluations=5,
        checkpoints=0,
    )
    found = _heal(model, source.model, sequences, recipe, perplexity)
    for seen, value in found:
        yield _row(f"MLA after {seen:,} tokens of distillation", shape, value, "the original", original)
    before, after = found[0][1] - original, max(found[-1][1] - original, 1e-3)
    yield _row(
        "MLA healed: what is left of the increase in perplexity",
        shape,
        after,
        "without training",
        before,
        _GAP_RATIO,
    )


def aligned(study: Study, shape: str, tokens: tuple[int, int], batch_size: int = 16) -> Iterator[Row]:
    """Aligns TPLA to MLA, layer by layer and then as a whole, and yields both perplexities.

    Args:
        study: the model with MLA.
        shape: of the rows.
        tokens: to train on, by stage.
        batch_size: sequences a step.
    """
    mla = study.perplexity(study.model)
    converted = study.converted("pca")
    sequences = training_sequences(study.tokenizer, study.block)
    values = [study.perplexity(converted)]
    for stage, count, rate in zip(("layers", "logits"), tokens, (3e-4, 1e-4), strict=True):
        recipe = Recipe(
            tokens=count, stage=stage, learning_rate=rate, batch_size=batch_size, bf16=on_cuda(study.model),
            evaluations=1, checkpoints=0,
        )  # fmt: skip
        values.append(_heal(converted, study.model, sequences, recipe, study.perplexity)[-1][1])
    names = (f"aligned by layers on {tokens[0]:,} tokens", f"then as a whole on {tokens[1]:,}")
    for name, value in zip(names, values[1:], strict=True):
        yield _row(f"perplexity, norm and softmax cut, pca, {name}", shape, value, "MLA", mla)
    yield _row(f"perplexity, pca, {names[1]}", shape, values[2], "pca without training", values[0], 1.0)


def healed_study(device: str, quick: bool, tokens: int) -> Study:
    """SmolLM2-135M-Instruct as MLA with normalised latents, healed, so that the norm can be cut too."""
    study = demo_study(device, quick, latent_norm=True)
    source = open_checkpoint("smollm2-135m", device=device)
    sequences = training_sequences(study.tokenizer, study.block)
    compiled = device == "cuda"
    recipe = Recipe(
        tokens=tokens, learning_rate=2e-4, bf16=compiled, compile=compiled, evaluations=1, checkpoints=0
    )
    _heal(study.model, source.model, sequences, recipe, study.perplexity)
    return study


def training_sequences(tokenizer: Any, length: int) -> torch.Tensor:
    """Token ids `[number, length]` of the demo's calibration text."""
    blocks = token_blocks(tokenizer, demo_texts().calibration, length)
    return torch.cat([block for block in blocks if block.shape[1] == length])


def on_cuda(model: Any) -> bool:
    """Whether a model is on a GPU, where it is trained in bfloat16."""
    return next(model.parameters()).device.type == "cuda"


def _heal(
    model: Any, teacher: Any, sequences: torch.Tensor, recipe: Recipe, perplexity: Callable[[Any], float]
) -> list[tuple[int, float]]:
    with tempfile.TemporaryDirectory() as folder:
        rows = heal(
            model, teacher, sequences, Path(folder), recipe,
            evaluate=lambda trained: {"perplexity": perplexity(trained)},
        )  # fmt: skip
    return [(int(row["tokens"]), row["perplexity"]) for row in rows]


def _row(
    what: str, shape: str, ours: float, name: str, baseline: float, required: float | None = None
) -> Row:
    return measured(
        f"{what}, against {name}", shape, ours, "perplexity", better="lower", baseline_name=name, baseline=baseline,
        required=required,
    )  # fmt: skip
