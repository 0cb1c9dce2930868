"""Two more stages of X-EcoMLA: a teacher larger than the student, and preferences learnt after distillation."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from undivided.claims._conversion_study import ConversionStudy, scale_of
from undivided.claims._harness import Row, measured
from undivided.claims._tiny_lm import mean_and_deviation
from undivided.convert.x_ecomla import convert_x_ecomla

_SEEDS = (0, 1, 2)
_STEPS = {"cpu": 120, "cuda": 400}
_LATENT, _ROPE = 8, 8
# Of a model twice as wide: rates fall with the width.
_WIDER = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def teacher_rows(device: str, quick: bool) -> Iterator[Row]:
    """Yields bits a byte of a converted model taught by its source, and by a model twice as wide, on the same bytes."""
    scale = scale_of(device, key_heads=2)
    steps, seeds = (20, _SEEDS[:1]) if quick else (_STEPS[device], _SEEDS)
    wider = scale.sizes | {name: 2 * scale.sizes[name] for name in _WIDER}
    found: dict[str, list[float]] = {name: [] for name in ("source", "wider", "by source", "by wider")}
    for seed in seeds:
        study = ConversionStudy(scale, seed, device, 60 if quick else None)
        large = study.trained(scale.learning_rate / 2, wider)
        found["source"].append(study.bits(study.source))
        found["wider"].append(study.bits(large))
        for name, teacher in (("by source", study.source), ("by wider", large)):
            model = study.convert(convert_x_ecomla, latent_dim=_LATENT, rope_dim=_ROPE)
            found[name].append(study.bits(study.teach(model, steps, teacher=teacher)))
    means = {name: mean_and_deviation(values) for name, values in found.items()}
    cached = 2 * scale.sizes["num_key_value_heads"] * scale.sizes["head_dim"]
    where = f"{scale.where}, {len(seeds)} seeds"
    taught = f"{where}, {_LATENT} + {_ROPE} of {cached} cached numbers, {scale.tokens(steps)}"
    for what, shape, name, rival, bar in (
        ("bits a byte, the source", where, "source", None, None),
        ("bits a byte, the teacher of twice its width", where, "wider", "source", None),
        ("bits a byte, converted and taught by the source", taught, "by source", "source", None),
        ("bits a byte, converted and taught by the wider one, against by the source", taught, "by wider", "by source",
         1.0),
    ):  # fmt: skip
        yield measured(
            what, shape, means[name][0], "bits/byte", better="lower", deviation=means[name][1],
            baseline_name=None if rival is None else rival, baseline=None if rival is None else means[rival][0],
            required=bar,
        )  # fmt: skip


# Tokens of an answer, pairs to learn from and to judge by, and tokens of distillation before.
_ANSWER, _PAIRS, _JUDGED, _DISTILLED = 64, 640, 160, 500_000
_PROMPT = "From an address of the President to the Congress:\n\n"


def preference_rows(device: str, quick: bool) -> Iterator[Row]:
    """Yields how many held-out pairs SmolLM2-135M as MLA orders as it was taught, before and after DPO, on a GPU.

    Liked are passages of speeches of 1945 and the years after, not liked those of the years before 2005. Nobody's taste
    is learnt, but a distinction that the model did not make.
    """
    if device == "cpu":
        return
    from undivided.claims._healing import training_sequences
    from undivided.models.checkpoint import open_checkpoint
    from undivided.training import Recipe, heal

    source = open_checkpoint("smollm2-135m", device=device)
    sequences = training_sequences(source.tokenizer, 1024)
    model, _ = convert_x_ecomla(
        open_checkpoint("smollm2-135m", device=device).model, latent_dim=128, rope_dim=32
    )
    count = _DISTILLED // 4 if quick else _DISTILLED
    recipe = Recipe(
        tokens=count, learning_rate=5e-4, batch_size=8, bf16=True, compile=not quick, evaluations=1, checkpoints=0
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        heal(model.requires_grad_(True), source.model, sequences, Path(folder), recipe)
    pairs, judged = speech_pairs(
        source.tokenizer(_PROMPT).input_ids, sequences, 80 if quick else _PAIRS, _JUDGED
    )
    where = f"SmolLM2-135M-Instruct, 128 + 32 cached numbers, {count:,} tokens of distillation, {len(pairs)} pairs"
    yield from ordered_rows(model, pairs, judged, where)


def ordered_rows(
    model: Any, pairs: Sequence[Any], judged: Sequence[Any], where: str, learning_rate: float = 1e-5
) -> Iterator[Row]:
    """Trains a model on pairs and yields the shares of others whose liked answer is the likelier, and gained more."""
    from undivided.training import PreferenceRecipe, prefer

    on_gpu = next(model.parameters()).device.type == "cuda"
    recipe = PreferenceRecipe(
        epochs=2, beta=0.1, learning_rate=learning_rate, batch_size=16, bf16=on_gpu, checkpoints=0
    )
    with tempfile.TemporaryDirectory() as folder:
        found = prefer(model, pairs, Path(folder), recipe, heldout=judged)
    before = found["before"]["accuracy"]
    shape = f"{where}, {len(judged)} pairs held out"
    yield measured(
        "share of pairs whose liked answer is the likelier, after DPO against before", shape,
        ordered(model, judged), "of pairs", better="higher", baseline_name="before", baseline=max(before, 1e-6),
        required=1.0,
    )  # fmt: skip
    yield measured(
        "share of pairs whose liked answer gained more by DPO", shape, found["after"]["accuracy"], "of pairs",
        better="higher", baseline_name="a coin", baseline=0.5,
    )  # fmt: skip


def speech_pairs(
    prompt: list[int], sequences: torch.Tensor, number: int, judged: int
) -> tuple[list[Any], list[Any]]:
    """Returns pairs to learn from and others to judge by, of passages from the end and from the beginning of a text.

    Args:
        prompt: of all pairs.
        sequences: token ids `[number, length]` of the text, the newest speeches first.
        number, judged: how many pairs.
    """
    from undivided.training import PreferencePair

    passages = sequences.flatten()
    passages = passages[: len(passages) // _ANSWER * _ANSWER].view(-1, _ANSWER).tolist()
    count = min(number + judged, len(passages) // 2)
    pairs = [PreferencePair(prompt, passages[-1 - k], passages[k]) for k in range(count)]
    # Every few are held out, so that both halves have speeches of all years.
    step = max(count // judged, 2)
    held = pairs[::step]
    return [pair for k, pair in enumerate(pairs) if k % step], held


@torch.no_grad()
def ordered(model: Any, pairs: Sequence[Any], batch_size: int = 16) -> float:
    """Returns the share of pairs whose liked answer is the likelier."""
    from undivided.training.preference import answer_log_probability, collated

    device, right = next(model.parameters()).device, 0
    for start in range(0, len(pairs), batch_size):
        batch = collated([{"pair": pair} for pair in pairs[start : start + batch_size]])
        chosen, rejected = answer_log_probability(
            model, **{name: x.to(device) for name, x in batch.items()}
        ).chunk(2)
        right += int((chosen > rejected).sum())
    return right / len(pairs)
