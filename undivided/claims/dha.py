"""DHA: fused heads against means of heads, in bytes of training until the losses are equal.

Tiny byte models with multi-head attention, three seeds, a quarter of the key and value heads. What is counted is all
training after the source, the search and the fusion included.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from undivided.claims._conversion_study import ConversionStudy, scale_of
from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._tiny_lm import mean_and_deviation, tiny_lm
from undivided.convert.dha import convert_dha, group_heads, head_similarity
from undivided.convert.kdgqa import mha_to_gqa

_SEEDS = (0, 1, 2)
_BUDGET = 0.25
_SEARCH, _FUSION, _TUNING = 20, 80, 20
# How often as many steps as DHA's whole training the mean-pooled model may take.
_MULTIPLES = (1, 5)


def gate(device: str) -> None:
    """Heads that a model shares are found again, and fusing them changes nothing, in float64."""
    model = tiny_lm(None, num_attention_heads=8, num_key_value_heads=2).to(device, torch.float64).eval()
    ids = torch.randint(256, (2, 24), device=device)
    with torch.no_grad():
        host, _ = convert_dha(model, None, head_budget=0.25, adaptive=False, fusion_steps=0)
        error = (host(ids).logits - model(ids).logits).abs().max()
    if not error < 1e-9:
        raise ValueError(f"logits of the model with its own groups fused differ by {error:.1e}.")
    planted = torch.randn(4, 8, 32)[torch.arange(32) % 4]
    if group_heads(head_similarity(planted), 4).tolist() != [list(range(k, 32, 4)) for k in range(4)]:
        raise ValueError("the search does not find planted groups of 32 heads.")


def quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields bits a byte right after the conversion and after training, and how much longer mean-pooling takes."""
    scale = scale_of(device, key_heads=8)
    seeds = _SEEDS[:1] if quick else _SEEDS
    where = f"{scale.where}, a quarter of key and value heads, {len(seeds)} seeds"
    spent = _SEARCH + _FUSION + _TUNING
    found: dict[str, list[float]] = {}

    def keep(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    speedups = []
    for seed in seeds:
        study = ConversionStudy(scale, seed, device, 60 if quick else None)
        keep("source", study.bits(study.source))
        heads = scale.sizes["num_attention_heads"]
        mean = study.convert(mha_to_gqa, num_key_value_heads=heads // 4)
        keep("mean of neighbours, at once", study.bits(mean))
        alike = study.convert(convert_dha, None, head_budget=_BUDGET, adaptive=False, fusion_steps=0)
        keep("mean of similar heads, at once", study.bits(alike))
        options = {
            "head_budget": _BUDGET,
            "learning_rate": scale.learning_rate / 3,
            "batch_size": scale.batch_size,
        }
        text = study.calibration(scale.batch_size * 64)
        arms = {
            "fused": {"adaptive": True, "search_steps": _SEARCH, "fusion_steps": _FUSION},
            "fused, as many heads in every layer": {"adaptive": False, "fusion_steps": _FUSION + _SEARCH},
        }
        for name, chosen in arms.items():
            model = study.convert(convert_dha, text, **options, **chosen, seed=seed)
            keep(f"{name}, after fusion", study.bits(model))
            keep(f"{name}, then trained", study.bits(study.tune(model, _TUNING)))
        goal = found["fused, then trained"][-1]
        for multiple in _MULTIPLES:
            value = study.bits(
                study.tune(study.convert(mha_to_gqa, num_key_value_heads=heads // 4), multiple * spent)
            )
            keep(f"mean of neighbours, trained {multiple} times as long", value)
            if value <= goal:
                break
        # Where it has not caught up by the last, at least so many times as long.
        speedups.append(float(multiple))
    base = mean_and_deviation(found["mean of neighbours, at once"])[0]
    for name, values in found.items():
        value, deviation = mean_and_deviation(values)
        first = "at once" in name or "after fusion" in name
        is_rival = name.startswith("mean of neighbours") or name == "source"
        count = (
            0 if "at once" in name or name == "source" else spent if "trained" in name else _SEARCH + _FUSION
        )
        if "times as long" in name:
            count = spent * int(name.split(" times")[0].split()[-1])
        bar = 1.0 if name == "fused, after fusion" else None
        yield measured(
            f"bits a byte, {name}", f"{where}, {scale.tokens(count)} after the source", value, "bits/byte",
            better="lower", deviation=deviation,
            baseline_name=None if is_rival or not first else "mean of neighbours, at once",
            baseline=None if is_rival or not first else base, required=bar,
        )  # fmt: skip
    value, deviation = mean_and_deviation(speedups)
    yield measured(
        f"training until the mean of neighbours is as good, at most {_MULTIPLES[-1]} times as long, over DHA's",
        f"{where}, {scale.tokens(spent)} after the source", value, "times", better="higher", deviation=deviation,
        baseline_name="as long", baseline=1.0, required=5.0,
    )  # fmt: skip


_PARTS: dict[str, Measure] = {"quality": quality}
CLAIM = Claim(
    slug="dha",
    source="arXiv 2406.06567, abstract",
    paper=(
        "A quarter of a percent of the original pre-training budget reaches 97.6 % of the performance with 75 % of the "
        "cache saved; training is 5 times shorter than GQA's to the same loss (other versions of the paper: 12 times).",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
    devices=("cpu", "cuda"),
)
