"""SLA's ablation on a small diffusion transformer: one model trained in full, then fine-tuned with each core."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from undivided.claims import _tiny_dit as dit
from undivided.claims._harness import Row, measured
from undivided.claims._tiny_lm import mean_and_deviation
from undivided.convert.sla import convert_sla
from undivided.ops import linear_attention

# 256 tokens are 16 blocks of 16, of which two are critical; on a CPU what a few seconds allow.
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {
        "size": 32, "patch_size": 2, "width": 192, "depth": 6, "heads": 3, "images": 4096, "heldout": 128,
        "steps": 500, "tuning": 300, "batch_size": 16, "block": 16, "topk": 0.125, "rate": 1e-3, "tuning_rate": 3e-4,
    },
    "cpu": {
        "size": 16, "patch_size": 2, "width": 32, "depth": 2, "heads": 2, "images": 256, "heldout": 32,
        "steps": 60, "tuning": 20, "batch_size": 16, "block": 8, "topk": 0.125, "rate": 3e-3, "tuning_rate": 1e-3,
    },
}  # fmt: skip
SEEDS = (0, 1, 2)
FULL, SLA, SPARSE = "full", "SLA", "sparse only"
# The projections start at zero and learn so many times faster than the trained weights: with their rate they would
# still be near zero after hundreds of steps.
NEW_FACTOR = 30.0
# Paper: within noise of full attention; here within one percent of its loss.
NEAR = 0.99


class LinearCore(nn.Module):
    """Linear attention of all pairs, with the features that SLA has."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key = (x.float().softmax(-1).type_as(value) for x in (query, key))
        return linear_attention(query, key, value, feature_map="relu", eps=0.0)


def arms(topk: float, block: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Returns name to what gives a copy of the trained model its core.

    Args:
        topk: share of critical blocks.
        block: tokens of a block.
    """

    def sla(frozen: bool = False, **options: Any) -> Callable[[nn.Module], nn.Module]:
        def change(model: nn.Module) -> nn.Module:
            given = {"topk": topk, "query_block_size": block, "block_size": block} | options
            convert_sla(model, **given)
            for attention in _attentions(model):
                attention.core.proj.requires_grad_(not frozen)
            return model

        return change

    def linear(model: nn.Module) -> nn.Module:
        for attention in _attentions(model):
            attention.core = LinearCore()
        return model

    return {
        FULL: lambda model: model,
        SLA: sla(),
        SPARSE: sla(frozen=True, bottomk=0.0),
        "sparse only, twice the blocks": sla(frozen=True, bottomk=0.0, topk=2 * topk),
        "linear only": linear,
        "sum without a projection": sla(frozen=True, proj_init=1.0, linear_scope="all"),
        "SLA, elu1": sla(feature_map="elu1"),
        "SLA, none negligible": sla(bottomk=0.0),
    }


def _attentions(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, dit.Attention)]


def quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields losses of the arms after fine-tuning, SLA's along the way, and the ranks of the trained maps."""
    sizes = dict(SIZES[device])
    if quick:
        sizes |= {"steps": 10, "tuning": 5}
    images = dit.textured_shapes(sizes["images"], sizes["size"], 0, device)
    heldout = dit.textured_shapes(sizes["heldout"], sizes["size"], 1, device)
    changes = arms(sizes["topk"], sizes["block"])
    losses: dict[str, list[float]] = {name: [] for name in changes}
    distances: dict[str, list[float]] = {name: [] for name in changes}
    along: dict[int, list[float]] = {}
    ranks: list[tuple[float, float, float]] = []
    for seed in SEEDS:
        names = ("size", "patch_size", "width", "depth", "heads")
        teacher = dit.TinyDiT(**{name: sizes[name] for name in names}, seed=seed).to(device)
        batch = {"batch_size": sizes["batch_size"], "seed": seed}
        dit.train(teacher, images, steps=sizes["steps"], learning_rate=sizes["rate"], **batch)
        ranks.append(_ranks(teacher, heldout[:1]))
        for name, change in changes.items():
            model = change(copy.deepcopy(teacher))
            at = None
            if name == SLA:
                marks = {sizes["tuning"] // 4, sizes["tuning"]}
                along.setdefault(0, []).append(dit.loss_of(model, heldout))

                def at(step: int, model: nn.Module = model, marks: set[int] = marks) -> None:
                    if step in marks:
                        along.setdefault(step, []).append(dit.loss_of(model, heldout))

            dit.train(
                model, images, steps=sizes["tuning"], learning_rate=sizes["tuning_rate"], new_factor=NEW_FACTOR,
                at=at, **batch,
            )  # fmt: skip
            losses[name].append(dit.loss_of(model, heldout))
            distances[name].append(dit.distance_of(model, teacher, heldout))
    yield from _rows(sizes, losses, distances, along, ranks)


def _rows(
    sizes: dict[str, Any],
    losses: dict[str, list[float]],
    distances: dict[str, list[float]],
    along: dict[int, list[float]],
    ranks: list[tuple[float, float, float]],
) -> Iterator[Row]:
    tokens = (sizes["size"] // sizes["patch_size"]) ** 2
    shape = (
        f"{sizes['depth']} layers, width {sizes['width']}, {tokens} tokens, blocks of {sizes['block']}, "
        f"{sizes['topk']:.1%} critical, {sizes['steps']} + {sizes['tuning']} steps of {sizes['batch_size']}, new "
        f"projections {NEW_FACTOR:.0f} times faster, "
        f"{len(SEEDS)} seeds"
    )
    full, sparse = (mean_and_deviation(losses[name])[0] for name in (FULL, SPARSE))
    for name, own in losses.items():
        mean, deviation = mean_and_deviation(own)
        yield measured(
            f"flow-matching loss after fine-tuning, {name}", shape, mean, "loss", better="lower", deviation=deviation,
            baseline_name=None if name == FULL else FULL, baseline=None if name == FULL else full,
            required=NEAR if name == SLA else None,
        )  # fmt: skip
    yield measured(
        "flow-matching loss after fine-tuning, SLA against sparse only", shape, mean_and_deviation(losses[SLA])[0],
        "loss", better="lower", baseline_name=SPARSE, baseline=sparse, required=1.0,
    )  # fmt: skip
    for step, own in sorted(along.items()):
        mean, deviation = mean_and_deviation(own)
        yield measured(
            f"flow-matching loss of SLA after {step} steps of fine-tuning", shape, mean, "loss", better="lower",
            deviation=deviation, baseline_name=FULL, baseline=full,
        )  # fmt: skip
    for name, own in distances.items():
        mean, deviation = mean_and_deviation(own)
        yield measured(
            f"relative L1 of velocities to the model before fine-tuning, {name}", shape, mean, "share",
            better="lower", deviation=deviation,
        )  # fmt: skip
    for place, what in enumerate(("all weights", "the highest 8 %", "the lowest 92 %")):
        mean, deviation = mean_and_deviation([own[place] for own in ranks])
        yield measured(
            f"stable rank of the trained attention maps, {what}", shape, mean, "rank", better="lower",
            deviation=deviation,
        )  # fmt: skip


def _ranks(model: nn.Module, images: torch.Tensor) -> tuple[float, float, float]:
    """Mean stable ranks over layers: of the maps, of their highest 8 percent of a row, and of what is left."""
    found = []
    for weights in dit.attention_maps(model, images):
        kept = weights.topk(max(int(0.08 * weights.shape[-1]), 1), dim=-1)
        high = torch.zeros_like(weights).scatter_(-1, kept.indices, kept.values)
        found.append([dit.stable_rank(part) for part in (weights, high, weights - high)])
    all_weights, high, low = (sum(own) / len(found) for own in zip(*found, strict=True))
    return all_weights, high, low
