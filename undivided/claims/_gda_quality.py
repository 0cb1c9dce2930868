"""What small models show of GDA's quality: losses on text, growth, and recall among distractors.

On a CPU tiny models are trained for seconds: they show that every ratio trains, and that growth costs nothing;
differences of a few hundredths of a bit are those between seeds, and say nothing about large models. Recall is what the
subtraction is meant for: a text gives keys with their values, half of which nobody asks for, and then asks. The steps
that a CPU has time for teach no more than that an answer is one of the values of the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.claims._harness import Row, measured
from undivided.claims._tiny_lm import (
    bits_per_byte,
    matching_width,
    mean_and_deviation,
    tiny_lm,
    train,
    train_tiny_lm,
)
from undivided.data.recall import RecallTexts, recall_texts, recall_vocabulary

# Ten maps in all, and one key head of each kind, the most that nine signal heads a noise head allow: every arm caches
# the same. The width of the MLPs makes the arms equal in parameters.
_SIZES: dict[str, Any] = {
    "hidden_size": 80,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_ARMS = {
    "10 plain heads": None,
    "5:5 (Differential Transformer)": {"mechanism": "gda", "num_noise_heads": 5},
    "8:2": {"mechanism": "gda", "num_noise_heads": 2},
    "9:1": {"mechanism": "gda", "num_noise_heads": 1},
}
_STEPS, _QUICK_STEPS, _SEEDS = 150, 20, (0, 1, 2)
_SYMMETRIC = "5:5 (Differential Transformer)"


@dataclass(frozen=True)
class _Scale:
    """Sizes and training of the models of a quality table."""

    sizes: dict[str, Any]
    parameters: int
    steps: int
    batch_size: int
    length: int
    device: str


_TINY = _Scale(_SIZES, 160_000, _STEPS, 16, 128, "cpu")
_LARGER = _Scale(
    {**_SIZES, "hidden_size": 320, "head_dim": 32, "num_hidden_layers": 6}, 6_000_000, 400, 32, 256, "cuda"
)


def quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields losses of small models on a GPU; of tiny ones, and of growth, on a CPU."""
    if device == "cuda":
        yield from _losses(quick, _LARGER)
        return
    yield from _losses(quick, _TINY)
    yield from _growth(quick)


def _texts() -> tuple[str, str]:
    from undivided.data import demo_texts

    texts = demo_texts()
    return texts.calibration, texts.heldout["2024-Biden-1"]


def _shape(steps: int, scale: _Scale = _TINY) -> str:
    layers, width = scale.sizes.get("num_hidden_layers", 2), scale.sizes["hidden_size"]
    amount = f"{steps} steps of {scale.batch_size * scale.length} bytes"
    return f"{layers} layers, width {width}, {amount}, {len(_SEEDS)} seeds"


def _losses(quick: bool, scale: _Scale) -> Iterator[Row]:
    text, heldout = _texts()
    steps = _QUICK_STEPS if quick else scale.steps
    runs = {
        arm: train_tiny_lm(
            entry, text, heldout, seeds=_SEEDS, steps=steps, parameters=scale.parameters, device=scale.device,
            batch_size=scale.batch_size, length=scale.length, **scale.sizes,
        )
        for arm, entry in _ARMS.items()
    }  # fmt: skip
    baseline, _ = mean_and_deviation([run.bits_per_byte for run in runs[_SYMMETRIC]])
    for arm, own in runs.items():
        mean, deviation = mean_and_deviation([run.bits_per_byte for run in own])
        named = arm != _SYMMETRIC
        yield measured(
            f"bits a byte of a {'tiny' if scale is _TINY else 'small'} model, {arm}",
            f"{_shape(steps, scale)}, {own[0].parameters} parameters", mean, "bits/byte", better="lower",
            deviation=deviation, baseline_name=_SYMMETRIC if named else None, baseline=baseline if named else None,
        )  # fmt: skip


def _growth(quick: bool) -> Iterator[Row]:
    """Trains with two signal heads a noise head, grows to four, and trains on; beside it, the larger from scratch."""
    from undivided.convert.gda_grow import convert_gda_grow

    text, heldout = _texts()
    steps = _QUICK_STEPS if quick else _STEPS
    early = 3 * steps // 10
    small = {"mechanism": "gda", "num_signal_heads": 4, "num_noise_heads": 2}
    arms: dict[str, list[float]] = {"grown": [], "grown with its noise heads": [], "from scratch": []}
    largest = 0.0
    for seed in _SEEDS:
        model = tiny_lm(small, seed, **_SIZES)
        train(model, text, steps=early, seed=seed)
        before = bits_per_byte(model, heldout)
        grown, _ = convert_gda_grow(model, signal_factor=2, seed=seed)
        doubled = duplicate_groups(model)
        largest = max(largest, *(abs(bits_per_byte(other, heldout) - before) for other in (grown, doubled)))
        scratch = tiny_lm(small | {"num_signal_heads": 8}, seed, **_SIZES)
        for name, other, rest in (
            ("grown", grown, steps - early),
            ("grown with its noise heads", doubled, steps - early),
            ("from scratch", scratch, steps),
        ):
            train(other, text, steps=rest, seed=seed + 100)
            arms[name].append(bits_per_byte(other, heldout))
    yield measured(
        "change of bits a byte by growth from 4:2 to 8:2 heads",
        _shape(early),
        largest,
        "bits/byte",
        better="lower",
    )
    values = {name: mean_and_deviation(own) for name, own in arms.items()}
    shape = f"{_shape(steps)}, the first {early} with 4:2 heads, then 8:2"
    for name in ("grown with its noise heads", "from scratch"):
        mean, deviation = values["grown"]
        yield measured(
            f"bits a byte after growth of signal heads, against {name}", shape, mean, "bits/byte", better="lower",
            deviation=deviation, baseline_name=name, baseline=values[name][0],
        )  # fmt: skip


@torch.no_grad()
def duplicate_groups(model: nn.Module) -> nn.Module:
    """Returns a copy in which every group, its noise head included, stands twice: growth that tells no heads apart."""
    import copy

    host = copy.deepcopy(model)
    for index, layer in enumerate(host.attention_layers()):
        groups, ratio, width = layer.num_noise_heads, layer.signal_ratio, layer.head_dim
        rows = layer.q_proj.weight.unflatten(0, (groups, (ratio + 1) * width)).repeat_interleave(2, dim=0)
        columns = (
            layer.o_proj.weight.unflatten(1, (groups, ratio * 2 * width)).repeat_interleave(2, dim=1) / 2
        )
        for name, weight in (("q_proj", rows.flatten(0, 1)), ("o_proj", columns.flatten(1))):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.copy_(weight)
            setattr(layer, name, linear)
        layer.num_noise_heads, layer.num_signal_heads = 2 * groups, 2 * groups * ratio
        sizes = {"num_signal_heads": layer.num_signal_heads, "num_noise_heads": layer.num_noise_heads}
        host.set_attention(index, layer, **sizes)
    return host


@dataclass(frozen=True)
class _Recall:
    """Texts to recall from, and the training of the models that do.

    Attributes:
        pairs: pairs of a text in each stage of the training, easy ones first; the last are those of the test. Half of
            the pairs are asked for.
        tokens: different keys, and different values.
        steps, quick_steps: of each stage.
    """

    pairs: tuple[int, ...]
    tokens: int
    sizes: dict[str, Any]
    parameters: int
    steps: int
    quick_steps: int
    batch_size: int
    learning_rate: float


_FEW_PAIRS = _Recall((4, 8), 16, _SIZES, 130_000, 100, 16, 32, 3e-3)
_MANY_PAIRS = _Recall(
    (16, 64), 128, {**_SIZES, "hidden_size": 160, "head_dim": 32}, 1_000_000, 900, 200, 64, 3e-3
)
_TEST_TEXTS = 512


def recall(device: str, quick: bool) -> Iterator[Row]:
    """Yields how often small models recall the value of a key among as many pairs that nobody asks for."""
    scale = _MANY_PAIRS if device == "cuda" else _FEW_PAIRS
    steps = scale.quick_steps if quick else scale.steps
    found: dict[str, list[float]] = {arm: [] for arm in _ARMS}
    test = _texts_of(scale, scale.pairs[-1], _TEST_TEXTS, 99)
    for seed in _SEEDS:
        stages = [
            _texts_of(scale, pairs, steps * scale.batch_size, 100 * seed + pairs) for pairs in scale.pairs
        ]
        for arm, entry in _ARMS.items():
            model = _recall_lm(entry, scale, seed).to(device)
            for texts in stages:
                train_on_recall(
                    model, texts, steps=steps, batch_size=scale.batch_size, learning_rate=scale.learning_rate,
                    seed=seed,
                )  # fmt: skip
            found[arm].append(recalled(model, test))
    baseline, _ = mean_and_deviation(found[_SYMMETRIC])
    shape = (
        f"{scale.pairs[-1]} pairs, half of them asked for, {scale.tokens} values (any one of the text would be right "
        f"for {1 / scale.pairs[-1]:.3f}), {steps} steps of {scale.batch_size} texts at each of "
        f"{', '.join(map(str, scale.pairs))} pairs, about {scale.parameters} parameters, {len(_SEEDS)} seeds"
    )
    for arm, shares in found.items():
        mean, deviation = mean_and_deviation(shares)
        # A share of zero is no baseline: nothing is a multiple of it.
        named = arm != _SYMMETRIC and mean > 0 and baseline > 0
        yield measured(
            f"share of values recalled, {arm}", shape, mean, "share", better="higher", deviation=deviation,
            baseline_name=_SYMMETRIC if named else None, baseline=baseline if named else None,
        )  # fmt: skip


def _texts_of(scale: _Recall, pairs: int, count: int, seed: int) -> RecallTexts:
    vocabulary = recall_vocabulary(scale.tokens, scale.tokens)
    return recall_texts(count, vocabulary, num_pairs=pairs, num_queries=pairs // 2, seed=seed)


def _recall_lm(entry: dict[str, Any] | None, scale: _Recall, seed: int) -> nn.Module:
    sizes = {"vocab_size": recall_vocabulary(scale.tokens, scale.tokens).size, **scale.sizes}
    sizes["intermediate_size"] = matching_width(entry, scale.parameters, **sizes)
    return tiny_lm(entry, seed, **sizes)


def train_on_recall(model: nn.Module, texts: RecallTexts, **training: Any) -> list[float]:
    """Trains a model to answer: `train` draws whole texts by their number, and the loss is that of the answers."""
    ids = texts.ids.to(next(model.parameters()).device)
    columns = texts.answer_positions.flatten().to(ids.device)

    def loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        drawn = ids[rows[:, 0]]
        logits = model(input_ids=drawn, use_cache=False).logits.index_select(1, columns - 1)
        return F.cross_entropy(logits.flatten(0, 1).float(), drawn[:, columns].flatten())

    return train(model, torch.arange(len(ids)), length=1, loss=loss, **training)


@torch.no_grad()
def recalled(model: nn.Module, texts: RecallTexts, batch_size: int = 64) -> float:
    """Returns the share of the questions that a model answers right."""
    model.eval()
    device = next(model.parameters()).device
    right = [
        texts.part(start, start + batch_size).correct(
            model(input_ids=texts.ids[start : start + batch_size].to(device), use_cache=False).logits.cpu()
        )
        for start in range(0, len(texts.ids), batch_size)
    ]
    return torch.cat(right).float().mean().item()
