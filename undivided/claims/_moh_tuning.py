"""What continued training gives back of a mixture of heads made from a trained model, on tiny byte models."""

from __future__ import annotations

from collections.abc import Iterator

from undivided.claims._conversion_study import ConversionStudy, scale_of
from undivided.claims._harness import Row, measured
from undivided.claims._tiny_lm import mean_and_deviation
from undivided.convert.moh import convert_moh

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
