"""What the choice of keys is worth: associative recall and language modelling with few kept keys, on small models.

A sliding window and dynamic mask attention keep the same number of keys, as native sparse attention does in the claim
of FSA; full attention is the upper bound. Of the trained model it is counted how many tiles a kernel that skips empty
ones would have to compute.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from undivided.claims._dma_tiles import trained_share
from undivided.claims._harness import Row, measured
from undivided.claims._tiny_lm import as_bytes, mean_and_deviation, tiny_lm, train, train_tiny_lm
from undivided.data.recall import RecallTexts, RecallVocabulary, recall_texts, recall_vocabulary

SEEDS = (0, 1, 2)
# An eighth of a GPU's tile, as the models' texts are shorter.
TILE = 16
FULL, WINDOW, DYNAMIC, NATIVE = "full attention", "sliding window", "dynamic mask", "native sparse"
# The window, against which the others are measured, first.
ARMS = (WINDOW, DYNAMIC, FULL)


def arms(keep: int) -> dict[str, dict[str, Any]]:
    """Returns the entry of a config for each attention; all but one attend at most `keep` keys, a multiple of 16.

    Native sparse attention has three quarters of them in six blocks and the rest in its window, and compressed blocks
    beside these.
    """
    block = keep // 8
    return {
        WINDOW: {"mechanism": "sqa", "window": keep},
        NATIVE: {
            "mechanism": "nsa", "kernel_size": block, "kernel_stride": block // 2, "block_size": block, "topk": 6,
            "init_blocks": 1, "local_blocks": 1, "window": keep // 4,
        },
        DYNAMIC: {"mechanism": "dma", "keep_window_size": keep},
        FULL: {"mechanism": "gqa"},
    }  # fmt: skip


@dataclass(frozen=True)
class Recall:
    """One table of associative recall.

    Args:
        hidden_size: width of the models, in heads of 16 or 32.
        num_pairs: key-value pairs in a text, all of which are asked for.
        num_fillers: other tokens in a text.
        keep: keys that a query attends at most.
        steps, batch_size: of training.
        num_texts: texts to train on.
        learning_rate: the highest.
    """

    hidden_size: int = 64
    num_pairs: int = 16
    num_fillers: int = 48
    keep: int = 32
    steps: int = 1000
    batch_size: int = 128
    num_texts: int = 50_000
    learning_rate: float = 5e-3

    @property
    def vocabulary(self) -> RecallVocabulary:
        """128 ids."""
        return recall_vocabulary(48, 48, 31)

    def texts(self, count: int, seed: int) -> RecallTexts:
        """Returns texts, of `num_fillers + 5 * num_pairs` tokens."""
        return recall_texts(
            count, self.vocabulary, num_pairs=self.num_pairs, num_queries=self.num_pairs,
            num_fillers=self.num_fillers, seed=seed,
        )  # fmt: skip

    def __str__(self) -> str:
        length = self.num_fillers + 5 * self.num_pairs
        return (
            f"{self.num_pairs} pairs in {length} tokens of {self.vocabulary.size}, 2 layers of width "
            f"{self.hidden_size}, {self.keep} keys, {self.steps} steps of {self.batch_size} texts, {len(SEEDS)} seeds"
        )


def recall_accuracy(
    problem: Recall, attention: dict[str, Any], seed: int, device: str
) -> tuple[float, list[float]]:
    """Trains one model and returns the share of its right answers on 1000 new texts, and its losses."""
    texts = _training_texts(problem, seed)
    ids = texts.ids.to(device)
    places = texts.answer_positions.flatten().to(device)
    model = tiny_lm(
        attention, seed, hidden_size=problem.hidden_size, num_attention_heads=4, head_dim=problem.hidden_size // 4,
        max_position_embeddings=ids.shape[1],
    ).to(device)  # fmt: skip

    def loss(model: nn.Module, chosen: torch.Tensor) -> torch.Tensor:
        batch = ids[chosen[:, 0]]
        logits = model(input_ids=batch, use_cache=False).logits[:, places - 1]
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, places].flatten())

    # The tokens that are drawn are numbers of texts.
    losses = train(
        model, torch.arange(problem.num_texts), steps=problem.steps, batch_size=problem.batch_size, length=1,
        learning_rate=problem.learning_rate, seed=seed, loss=loss,
    )  # fmt: skip
    model.eval()
    fresh = problem.texts(1000, seed=5000 + seed)
    right = []
    with torch.no_grad():
        for start in range(0, 1000, 100):
            part = fresh.part(start, start + 100)
            right.append(part.correct(model(input_ids=part.ids.to(device), use_cache=False).logits))
    return torch.cat(right).float().mean().item(), losses


@functools.lru_cache(maxsize=len(SEEDS))
def _training_texts(problem: Recall, seed: int) -> RecallTexts:
    return problem.texts(problem.num_texts, seed=1000 + seed)


def recall_rows(
    problem: Recall, device: str, names: Sequence[str] = ARMS, barred: str = DYNAMIC
) -> Iterator[Row]:
    """Yields the accuracy of some arms, against the sliding window, which `barred` must beat by a half."""
    found: dict[str, float] = {}
    for name in names:
        entry = arms(problem.keep)[name]
        runs = [recall_accuracy(problem, entry, seed, device)[0] for seed in SEEDS]
        found[name], deviation = mean_and_deviation(runs)
        has_baseline = name != WINDOW
        yield measured(
            f"share of right answers in associative recall, {name}", str(problem), found[name], "share",
            better="higher", deviation=deviation, baseline_name=WINDOW if has_baseline else None,
            baseline=found[WINDOW] if has_baseline else None, required=1.5 if name == barred else None,
        )  # fmt: skip


# On a GPU what a minute allows; on a CPU what a few seconds do.
LANGUAGE: dict[str, dict[str, Any]] = {
    "cuda": {
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "steps": 250, "batch_size": 16, "length": 512, "learning_rate": 2e-3,
    },
    "cpu": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "steps": 40, "batch_size": 8, "length": 128, "learning_rate": 3e-3,
    },
}  # fmt: skip


def language_rows(device: str, keep: int, quick: bool = False) -> Iterator[Row]:
    """Yields the bits a byte of small language models, against the sliding window."""
    from undivided.data import demo_texts

    texts = demo_texts()
    options = dict(LANGUAGE[device])
    if quick:
        options["steps"] = 20
    shape = (
        f"{options['num_hidden_layers']} layers, width {options['hidden_size']}, {keep} of {options['length']} keys, "
        f"{options['steps']} steps of {options['batch_size']} x {options['length']} bytes, {len(SEEDS)} seeds"
    )
    found: dict[str, float] = {}
    for name in ARMS:
        runs = train_tiny_lm(
            arms(keep)[name],
            texts.calibration,
            texts.heldout["2024-Biden-1"],
            seeds=SEEDS,
            device=device,
            **options,
        )
        found[name], deviation = mean_and_deviation([run.bits_per_byte for run in runs])
        has_baseline = name != WINDOW
        yield measured(
            f"bits a byte of a tiny model, {name}", f"{shape}, {runs[0].parameters} parameters", found[name],
            "bits/byte", better="lower", deviation=deviation, baseline_name=WINDOW if has_baseline else None,
            baseline=found[WINDOW] if has_baseline else None, required=1.0 if name == DYNAMIC else None,
        )  # fmt: skip
        if name == DYNAMIC:
            ids = as_bytes(texts.heldout["2024-Biden-1"])[None, : options["length"]].to(device)
            yield measured(
                "share of causal tiles with a kept key, biases of the trained model",
                f"{shape}, tiles of {TILE} x {TILE}, mean of layers and key heads of one seed",
                trained_share(runs[0].model, ids, TILE), "share", better="lower", baseline_name="all causal tiles",
                baseline=1.0,
            )  # fmt: skip
