"""What the scores of a language model's heads are made of, what cutting them costs, and how merged keys must count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undivided.claims._harness import Figure, Row, measured
from undivided.spec.coarse import coarse_grain, push_forward
from undivided.spec.heads import (
    Attention,
    ScoreProbe,
    changed_loss,
    cut_to,
    replaced_attention,
    score_figure,
    score_probe,
    text_loss,
    without,
)
from undivided.spec.potential import divergence

_SPEECHES = ("2015-Obama-1", "2024-Biden-1")
RANKS = (1, 2, 4, 8, 16, 32)
_CUT = (4, 8, 16, 32)
_SIZES = (2, 4, 8)
# Read one by one whatever is merged: the first tokens, on which heads rest, and the latest.
_FIRST, _RECENT = 8, 32
# How many times fewer components than a head is wide the interaction must need for the claim to hold.
_CLEARLY_FEWER = 2.0
_LAYER_GROUPS = 3


@dataclass
class ScoreStudy:
    """A language model and short texts.

    Args:
        model: the model, in eval mode.
        texts: token ids `[1, length]` each.
        name: of the model, for the rows.
        head_dim: width of its heads, the bound of the rank of a score matrix.
    """

    model: Any
    texts: Sequence[Tensor]
    name: str
    head_dim: int

    @property
    def where(self) -> str:
        """The texts in words."""
        return f"{self.name}, float32, {len(self.texts)} texts of {self.texts[0].shape[1]} tokens"

    def perplexity(self, change: Any = None) -> float:
        """Perplexity over the texts, with the scores of all heads changed."""
        losses = [
            text_loss(self.model, ids) if change is None else changed_loss(self.model, ids, change)
            for ids in self.texts
        ]
        return exp(sum(losses) / len(losses))

    def probe(self, ranks: Sequence[int] = RANKS) -> ScoreProbe:
        """The measurements of all heads on the texts."""
        with torch.no_grad(), score_probe(self.model, ranks=ranks) as probe:
            for ids in self.texts:
                self.model(input_ids=ids, use_cache=False)
        return probe


def study(device: str, quick: bool) -> ScoreStudy:
    """SmolLM2-135M-Instruct on the beginnings of two speeches and on later parts of them."""
    from undivided.data import demo_texts
    from undivided.models.checkpoint import open_checkpoint

    source = open_checkpoint("smollm2-135m", device=device)
    length, texts = 128, demo_texts().heldout
    whole = [source.tokenizer(texts[name], return_tensors="pt").input_ids for name in _SPEECHES]
    starts = (0,) if quick else (0, 1024)
    pieces = [ids[:, start : start + length].to(device) for start in starts for ids in whole]
    return ScoreStudy(source.model, pieces, "SmolLM2-135M-Instruct", source.model.config.head_dim)


def measure(found: ScoreStudy) -> Iterator[Row | Figure]:
    """Rows of the parts, the ranks, the divergences, the perplexities and the merged keys; and the figure."""
    probe = found.probe()
    yield from _parts(found, probe)
    yield Figure(name="shares", save=lambda path: draw(found, probe, path))
    yield from _cuts(found)
    yield from _merged(found)


def draw(found: ScoreStudy, probe: ScoreProbe, path: Path) -> None:
    """Draws shares, ranks and divergences of every head."""
    score_figure(probe, path, head_dim=found.head_dim, title=f"Causal scores of {found.where}")


def _parts(found: ScoreStudy, probe: ScoreProbe) -> Iterator[Row]:
    """Shares by groups of layers, the ranks of the whole model, and what attention loses with the interaction cut."""
    layers = sorted(probe.layers)
    size = -(-len(layers) // _LAYER_GROUPS)
    for name in ("row", "column", "interaction"):
        shares = probe.mean(name)
        for start in range(0, len(layers), size):
            group = shares[start : start + size]
            yield measured(
                f"share of the variance of causal scores: {name}{'' if name == 'interaction' else ' field'}",
                f"{found.where}; layers {layers[start]} to {layers[start] + len(group) - 1}, mean of heads",
                float(group.mean()), "of 1", better="lower",
            )  # fmt: skip
    for name, words in (("raw_rank", "scores"), ("interaction_rank", "interaction")):
        rank = probe.mean(name)
        for which, value in (("median", rank.median()), ("largest", rank.max())):
            bar = _CLEARLY_FEWER if (name, which) == ("interaction_rank", "median") else None
            yield measured(
                f"components that hold 90 % of the energy of the {words}", f"{found.where}; {which} of the heads",
                float(value), "components", better="lower", baseline_name="width of a head",
                baseline=float(found.head_dim), required=bar,
            )  # fmt: skip
    for rank in sorted(next(iter(probe.layers.values()))[0].divergence):
        values = probe.mean_divergence(rank).flatten()
        yield measured(
            "KL of attention from attention with the interaction cut",
            f"{found.where}; rank {rank} kept; median of heads",
            float(values.median()), "nats", better="lower",
        )  # fmt: skip


def _cuts(found: ScoreStudy) -> Iterator[Row]:
    original = found.perplexity()

    def row(what: str, change: Any) -> Row:
        return measured(
            what, found.where, found.perplexity(change), "perplexity", better="lower",
            baseline_name="the model as it is", baseline=original,
        )  # fmt: skip

    for rank in _CUT:
        yield row(f"perplexity with the interaction of every head cut to rank {rank}", cut_to(rank))
    yield row("perplexity without row fields, which softmax does not see", without("row"))
    yield row("perplexity without column fields", without("column"))
    yield row("perplexity without interactions", without("interaction"))


def _merged(found: ScoreStudy) -> Iterator[Row]:
    """Old keys merged by position, with and without the logarithm of their number."""
    for size in _SIZES:
        losses, divergences = {}, {}
        for counted in (True, False):
            mean: list[float] = []
            with replaced_attention(found.model, merged_attention(size, counted, mean)):
                losses[counted] = exp(
                    sum(text_loss(found.model, ids) for ids in found.texts) / len(found.texts)
                )
            divergences[counted] = sum(mean) / len(mean)
        shape = f"{found.where}; keys {_RECENT} or more tokens back, but the first {_FIRST}, merged by {size}"
        for what, unit, values in (
            ("perplexity with merged keys that count as many", "perplexity", losses),
            ("KL of attention from attention over merged keys that count as many", "nats", divergences),
        ):
            yield measured(
                what, shape, values[True], unit, better="lower", baseline_name="that count as one",
                baseline=values[False], required=1.0,
            )  # fmt: skip


def merged_attention(
    size: int,
    counted: bool,
    divergences: list[float] | None = None,
    *,
    first: int = _FIRST,
    recent: int = _RECENT,
) -> Attention:
    """Causal attention over means of `size` neighbouring keys where all of them are `recent` or more tokens back.

    Args:
        size: keys merged into one, of which the value is the mean as well.
        counted: whether a merged key has the baseline `size`, as the identity of coarse-graining requires.
        divergences: filled with the mean divergence of each layer, over queries that see a merged key, of exact
            attention (summed over what is merged) from this one.
        first: tokens at the start that every query reads one by one, a multiple of `size`.
        recent: latest tokens that every query reads one by one, itself included, and up to `size - 1` more.

    Returns:
        For `replaced_attention`.
    """

    def attend(layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        length, positions = key.shape[2], torch.arange(key.shape[2], device=key.device)
        classes = positions // size
        coarse = coarse_grain(key, value, classes)
        merged = coarse.key.shape[2]
        # The classes that a query reads merged come before those whose keys it reads one by one.
        cut = ((positions + 1 - recent).clamp(min=0) // size)[:, None]
        index, causal = torch.arange(merged, device=key.device), positions <= positions[:, None]
        seen = torch.cat(
            [
                (index < cut) & (index >= first // size),
                causal & ((classes >= cut) | (positions < first)),
            ],
            1,
        )
        bias = torch.cat([coarse.log_count.flatten() * counted, torch.zeros(length, device=key.device)])
        scores = scale * (query @ torch.cat([coarse.key, key], 2).transpose(-2, -1)) + bias
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        if divergences is not None:
            exact = scale * (query @ key.transpose(-2, -1))
            exact = exact.masked_fill(~causal, float("-inf")).softmax(-1)
            pushed = torch.cat([push_forward(exact, classes), exact], -1) * seen
            far = cut[:, 0] > first // size
            log = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
            divergences.append(float(divergence(pushed.double(), log.double())[..., far].mean()))
        return weights @ torch.cat([coarse.value, value], 2)

    return attend
