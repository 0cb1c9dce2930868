"""X-EcoMLA: initialisations of latent attention beside each other, and the speed of what comes of it.

Quality comes from tiny byte models, three seeds, and on a GPU from SmolLM2-135M-Instruct: how fast each initialisation
recovers by distillation from its source. Throughput has the shapes of Llama-3.1-8B with random weights, on a GPU, where
latent and grouped-query attention each get the largest batch that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from undivided.claims._conversion_study import ConversionStudy, scale_of
from undivided.claims._harness import Claim, Figure, Measure, Row, all_of, measured
from undivided.claims._tiny_lm import mean_and_deviation, tiny_lm
from undivided.claims._upcycling import preference_rows, teacher_rows
from undivided.convert.attention_editing import convert_edit_mla
from undivided.convert.transmla import convert_transmla
from undivided.convert.x_ecomla import convert_x_ecomla

_SEEDS = (0, 1, 2)
_STEPS = {"cpu": 120, "cuda": 400}
# Of the steps, those of the first stage of Attention Editing.
_LAYER_SHARE = 5


def gate(device: str) -> None:
    """At full rank, with no positions, the conversion is its source, in float64."""
    model = tiny_lm(None, num_key_value_heads=2).to(device, torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        ids = torch.randint(256, (2, 24), device=device)
        nowhere = torch.zeros_like(ids)
        host, _ = convert_x_ecomla(model, latent_energy=1.0, query_energy=1.0, rope_dim=0)
        outputs = [
            each(ids, position_ids=nowhere, attention_mask=torch.ones_like(ids)).logits
            for each in (host, model)
        ]
    error = (outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()
    if not error < 1e-9:
        raise ValueError(
            f"at full rank without positions logits differ from the source's by {error:.1e} of the largest."
        )


def _arms(
    study: ConversionStudy, latent: int, rope: int, steps: int
) -> dict[str, Callable[[int], nn.Module]]:
    """Name to what gives the taught model, of so many steps."""

    def taught(build: Callable[[], nn.Module], layers: bool = False) -> Callable[[int], nn.Module]:
        return lambda count: study.teach(build(), count, layers=count // _LAYER_SHARE if layers else 0)

    def dynamic() -> nn.Module:
        # The share whose ranks, rounded as they are, come nearest to the fixed one in all.
        def total(share: float) -> int:
            report = convert_x_ecomla(study.source, latent_energy=share, rope_dim=rope)[1]
            return sum(report.options["ranks"]["latent_dim"])

        layers = study.scale.sizes["num_hidden_layers"]
        share = min(
            (k / 100 for k in range(5, 100, 3)), key=lambda share: abs(total(share) - layers * latent)
        )
        return study.convert(convert_x_ecomla, latent_energy=share, rope_dim=rope)

    def transmla() -> nn.Module:
        return study.convert(
            convert_transmla, study.calibration(), latent_dim=latent, rope_dim=rope, freqfold=2
        )

    fixed: dict[str, Any] = {"latent_dim": latent, "rope_dim": rope}
    return {
        "random": taught(lambda: study.convert(convert_edit_mla, seed=study.seed, **fixed)),
        "SVD, fixed rank": taught(lambda: study.convert(convert_x_ecomla, **fixed)),
        "SVD, dynamic rank": taught(dynamic),
        "TransMLA": taught(transmla),
        "random, first layer by layer": taught(
            lambda: study.convert(convert_edit_mla, seed=study.seed, **fixed), layers=True
        ),
        "SVD, first layer by layer": taught(lambda: study.convert(convert_x_ecomla, **fixed), layers=True),
    }


def quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields divergences from the source after distillation, for six initialisations of a tiny model."""
    scale = scale_of(device, key_heads=2)
    steps, seeds = (40, _SEEDS[:1]) if quick else (_STEPS[device], _SEEDS)
    studies = [ConversionStudy(scale, seed, device, 60 if quick else None) for seed in seeds]
    cached = 2 * scale.sizes["num_key_value_heads"] * scale.sizes["head_dim"]
    rope = scale.sizes["head_dim"] // 2
    latent = cached // 4 - rope
    where = f"{scale.where}, {latent + rope} of {cached} cached numbers, {len(seeds)} seeds"
    found: dict[tuple[str, int], tuple[float, float]] = {}

    def judged(name: str, count: int) -> tuple[float, float]:
        if (name, count) not in found:
            values = [s.divergence(_arms(s, latent, rope, steps)[name](count)) for s in studies]
            found[name, count] = mean_and_deviation(values)
        return found[name, count]

    base = judged("random", steps)
    for name in (
        "random",
        "SVD, fixed rank",
        "SVD, dynamic rank",
        "TransMLA",
        "random, first layer by layer",
        "SVD, first layer by layer",
    ):
        value, deviation = judged(name, steps)
        yield measured(
            f"divergence from the source, {name}", f"{where}, {scale.tokens(steps)}", value, "nats", better="lower",
            deviation=deviation, baseline_name=None if name == "random" else "random",
            baseline=None if name == "random" else base[0],
        )  # fmt: skip
    early = steps // 5
    value, deviation = judged("SVD, fixed rank", early)
    yield measured(
        "divergence from the source, SVD at a fifth of the bytes, against random at all of them",
        f"{where}, {scale.tokens(early)}", value, "nats", better="lower", deviation=deviation,
        baseline_name=f"random, {scale.tokens(steps)}", baseline=base[0], required=2.0,
    )  # fmt: skip
    value, deviation = judged("random, first layer by layer", steps)
    yield measured(
        "divergence from the source, layer by layer first, against as a whole from the start",
        f"{where}, {scale.tokens(steps)}, a fifth of them layer by layer", value, "nats", better="lower",
        deviation=deviation, baseline_name="random", baseline=base[0], required=5.0,
    )  # fmt: skip


def throughput(device: str, quick: bool) -> Iterator[Row]:
    """Yields decode throughput of Llama-3.1-8B's shapes as latent and as grouped-query attention, on a GPU."""
    if device == "cpu":
        return
    from undivided.claims._end_to_end import GroupedShapes, grouped_rows

    yield from grouped_rows(
        GroupedShapes("Llama-3.1-8B", 32, 4096, 8, 14336, 128256), latent_dim=128, rope_dim=64, keys=8192,
        memory=70 * 10**9, required=1.7, required_batch=5.0,
    )  # fmt: skip


def _table(latent_dim: int, long: bool) -> Measure:
    """All initial values of SmolLM2-135M at one size of the cache, on a GPU; minutes, most of it the random one's."""

    def part(device: str, quick: bool) -> Iterator[Row | Figure]:
        if device == "cpu":
            return
        from undivided.claims._smollm_study import demo_study
        from undivided.claims._smollm_table import COUNTS, LONG, Table

        counts = (250_000, 500_000) if quick else COUNTS
        table = Table(demo_study(device), latent_dim, counts=counts, long=LONG if long and not quick else ())
        yield from table.rows()
        yield from table.early_rows()
        yield table.figure

    return part


_PARTS: dict[str, Measure] = {
    "quality": quality,
    "throughput": throughput,
    "teachers": teacher_rows,
    "preferences": preference_rows,
    "table_128": _table(128, long=True),
    "table_64": _table(64, long=False),
}
CLAIM = Claim(
    slug="x_ecomla",
    source="arXiv 2503.11132, abstract and tables 1 to 4",
    paper=(
        "Llama-3.2-1B-Instruct, nine tasks, 52.85 before: with 53.1 % of the cache after 7B tokens and DPO 53.31 with "
        "SVD, 49.44 with random weights; with 15.6 % 52.94 after 3.6B tokens of an 8B teacher, 53.61 after 7B.",
        "SmolLM-135M with half of the cache, 41.91 before: SVD 41.31, dynamic 41.35, random 34.03.",
        "Llama-3.1-8B with 128 cached numbers: 1.7 to 2 times the throughput (MI300).",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
)
