"""What training gives back of a mixture of heads made from a trained model: tiny byte models, and SmolLM2-135M."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from undivided.claims._conversion_study import ConversionStudy, scale_of
from undivided.claims._harness import Row, measured
from undivided.claims._tiny_lm import mean_and_deviation
from undivided.convert.moh import convert_moh

if TYPE_CHECKING:
    from undivided.claims._smollm_study import SmolStudy

_SEEDS = (0, 1, 2)
_STEPS = {"cpu": 120, "cuda": 300}
# What the paper's LLaMA3-8B gives back of what routing has cost, and more.
_RECOVERED = 0.95


def tuning_rows(device: str, quick: bool) -> Iterator[Row]:
    """Yields bits a byte before and after training, beside the source trained as long, and the share given back.

    Routers: norms of queries, and 75 % or 50 % of the heads, as the paper's. The gap is that to the source trained as
    long on the same text, so that training itself is not counted as recovery.
    """
    scale = scale_of(device, key_heads=8)
    steps, seeds = (20, _SEEDS[:1]) if quick else (_STEPS[device], _SEEDS)
    heads = scale.sizes["num_attention_heads"]
    arms = {"75 %": (heads // 4, heads // 2), "50 %": (heads // 4, heads // 4)}
    sources: list[tuple[float, float]] = []
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in arms}
    for seed in seeds:
        study = ConversionStudy(scale, seed, device, 60 if quick else None)
        longer = study.convert(lambda model: (model, None))
        sources.append((study.bits(study.source), study.bits(study.tune(longer, steps))))
        for name, (shared, routed) in arms.items():
            model = study.convert(convert_moh, shared_heads=shared, top_k=routed)
            found[name][0].append(study.bits(model))
            found[name][1].append(study.bits(study.tune(model, steps)))
    where = f"{scale.where}, {len(seeds)} seeds"
    for name, (before, after) in found.items():
        for when, values, own in (("at once", before, 0), (f"after {scale.tokens(steps)}", after, 1)):
            value, deviation = mean_and_deviation(values)
            yield measured(
                f"bits a byte, {name} of the heads of a trained model, {when}", where, value, "bits/byte",
                better="lower", deviation=deviation,
                baseline_name="the source" if own == 0 else "the source, trained as long",
                baseline=mean_and_deviation([pair[own] for pair in sources])[0],
            )  # fmt: skip
        shares = [
            1 - (late - source[1]) / (early - source[0])
            for early, late, source in zip(before, after, sources, strict=True)
        ]
        value, deviation = mean_and_deviation(shares)
        yield measured(
            f"share given back of what routing to {name} of the heads has cost", f"{where}, {scale.tokens(steps)}",
            max(value, 1e-6), "of the gap", better="higher", deviation=deviation, baseline_name="the bar",
            baseline=_RECOVERED, required=1.0 if name == "75 %" else None,
        )  # fmt: skip


# Of SmolLM2's 9 heads 5 are always used, and 2 of the others.
_HEADS = 5, 2
_NORMS = "norms of queries"
_ARMS: dict[str, dict[str, Any]] = {
    _NORMS: {"router": "query_norm", "gate_mode": "binary"},
    "norms of queries, weighed": {"router": "query_norm", "gate_mode": "released"},
    "a new router": {"router": "linear", "gate_mode": "binary"},
}
_COUNTS = (1_000_000,)


def smollm_rows(device: str, quick: bool) -> Iterator[Row]:
    """Yields the losses of SmolLM2-135M with three routers before and after distillation, on a GPU."""
    if device == "cpu":
        return
    from undivided.claims._smollm_study import Plan, demo_study

    study = demo_study(device, Plan(attention_rate=3e-4, rate=1e-4))
    counts = (250_000,) if quick else _COUNTS
    yield from routed_rows(study, counts, "SmolLM2-135M-Instruct, 7 of 9 heads, speeches", *_HEADS)


def routed_rows(
    study: SmolStudy, counts: tuple[int, ...], where: str, shared_heads: int, top_k: int
) -> Iterator[Row]:
    """Trains the routers' arms and yields perplexities, and the share of the loss given back.

    Args:
        study: the source and its text.
        counts: tokens at which arms are judged.
        where: of the rows.
        shared_heads, top_k: as in `convert_moh`.
    """
    models = {
        name: study.convert(convert_moh, shared_heads=shared_heads, top_k=top_k, **options)
        for name, options in _ARMS.items()
    }
    found: dict[tuple[str, int], float] = {}
    for name, count, scores in study.run(models, counts):
        found[name, count] = math.log(scores.perplexity)
        yield measured(
            f"perplexity, heads routed by {name}", f"{where}, {count / 1e6:g}M tokens", scores.perplexity, "perplexity",
            better="lower", baseline_name="the source", baseline=study.own.perplexity,
        )  # fmt: skip
    own, last = math.log(study.own.perplexity), max(counts)
    for name in models:
        before, after = found[name, 0] - own, found[name, last] - own
        if before <= 0:
            continue
        yield measured(
            f"share given back of what routing by {name} has cost", f"{where}, {last / 1e6:g}M tokens",
            max(1 - after / before, 1e-6), "of the loss", better="higher", baseline_name="the bar",
            baseline=_RECOVERED, required=1.0 if name == _NORMS else None,
        )  # fmt: skip
