"""Geometric Attention: its identities, real heads in its terms, and its anchors without a matrix of all pairs.

The paper has no experiment, so there is no figure to reproduce. On a CPU: the identities that the specification
language rests on, each to the last digits of float64; what the scores of SmolLM2-135M's heads consist of, and what the
model loses without each part; and that merged keys must count as often as the keys they stand for. On a GPU: the
column and the plan anchor, whose matrix of scores eager PyTorch must hold, and how far specifications that are softmax
attention fall short of the fastest kernel for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from undivided.claims import _score_study, _transport
from undivided.claims._harness import Claim, Figure, Measure, Row, all_of, measured
from undivided.claims._timing import time_rivals
from undivided.spec import (
    ColumnSum,
    RowSum,
    Sinkhorn,
    anchor_log,
    coarse_grain,
    decompose_scores,
    free_energy,
    interpret,
    link_law,
    low_rank_factors,
    lower,
    push_forward,
    score_gauge,
    standard,
    truncate_interaction,
)
from undivided.spec.coarse import coarse_log_weights
from undivided.spec.potential import divergence
from undivided.spec.systems import cca, gqa, mla, moh, sqa

# Rounding of float64 over sums of a few hundred terms; a limit of sweeps is reached less closely.
_EXACT, _LIMIT = 1e-12, 1e-10
_AS_FAST = 0.9


def gate(device: str) -> None:
    """Raises unless the identities hold and, on CUDA, the kernels are as accurate as eager PyTorch."""
    for name, (error, bound) in identities().items():
        if not error < bound:
            raise AssertionError(f"{name}: {error:.1e} is not below {bound:g}.")
    if device == "cuda":
        _transport.gate()


def _anchors(device: str, quick: bool) -> Iterator[Row]:
    """Time and memory of the column and the plan anchor, on CUDA."""
    if device == "cuda":
        yield from _transport.measure(quick)


def _lowering(device: str, quick: bool) -> Iterator[Row]:
    """Times of lowered specifications, on CUDA."""
    if device == "cuda":
        yield from lowered(device)


def _identities(device: str, quick: bool) -> Iterator[Row]:
    """Errors of the identities, which need no GPU."""
    if device == "cpu":
        for name, (error, bound) in identities().items():
            yield measured(
                f"largest error of an identity: {name}", f"float64, bound {bound:g}", error, "relative", better="lower"
            )  # fmt: skip


def _heads(device: str, quick: bool) -> Iterator[Row | Figure]:
    """What the scores of a model's heads consist of, which needs no GPU."""
    if device == "cpu":
        yield from _score_study.measure(_score_study.study(device, quick))


def _training(device: str, quick: bool) -> Iterator[Row]:
    """Losses of small models with other links and anchors, on CUDA."""
    if device == "cuda":
        from undivided.claims._regime_training import training_rows

        yield from training_rows(device, quick)


def identities() -> dict[str, tuple[float, float]]:
    """Largest relative error of each identity on random inputs in float64, and what it must stay below."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scores, rows, columns = draw(3, 24, 32), 5 * draw(3, 24, 1), 5 * draw(3, 1, 32)
    alpha, plan, limit = (anchor_log(scores, kind) for kind in (RowSum(), Sinkhorn(20), Sinkhorn(2000)))
    parts = decompose_scores(scores)
    prior = columns.log_softmax(-1)
    found = {
        "row fields leave the row anchor": (anchor_log(scores + rows, RowSum()), alpha),
        "column fields are the prior of the row anchor": (
            anchor_log(scores + columns, RowSum()),
            F.normalize(columns.exp() * scores.exp(), p=1, dim=-1),
        ),
        "column fields leave the column anchor": (
            anchor_log(scores + columns, ColumnSum()),
            anchor_log(scores, ColumnSum()),
        ),
        "a plan of no sweep is the row anchor": (anchor_log(scores, Sinkhorn(0)), alpha),
        "a plan has its row sums": (plan.sum(-1), torch.ones(3, 24, dtype=torch.float64)),
        "interaction: double centring": (
            parts.interaction,
            scores
            - scores.mean(-1, keepdim=True)
            - scores.mean(-2, keepdim=True)
            + scores.mean((-2, -1), True),
        ),
        "interaction: fields drop out": (
            decompose_scores(scores + rows + columns).interaction,
            parts.interaction,
        ),
        "truncation: its error is the tail of singular values": _tail(scores, parts.interaction),
        "free energy: F[p] - F[alpha] = tau KL(p, alpha)": _free_energy(
            scores, prior, draw(3, 24, 32).softmax(-1)
        ),
        "merging: rows of classes are the anchor of the summed kernel": _merging(scores),
        "merging: n equal keys are one of baseline n": _equal_keys(draw),
        "score gauge GL(D) leaves the outputs": _gauge(draw, generator),
        "the interpreter is scaled dot-product attention": _standard(draw),
    }
    errors = {name: (_error(*pair), _EXACT) for name, pair in found.items()}
    shifted = anchor_log(scores + rows + columns, Sinkhorn(2000))
    of_interaction = anchor_log(parts.interaction, Sinkhorn(2000))
    errors["both fields leave the plan in the limit"] = (_error(shifted, limit), _LIMIT)
    errors["the plan is that of the interaction"] = (_error(of_interaction, limit), _LIMIT)
    law = link_law(lambda s: (s / 0.7).exp(), torch.linspace(-3, 3, 25, dtype=torch.float64))
    errors["link law: exp(s / tau) is multiplicative"] = (law.residual, _EXACT)
    return errors


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _tail(
    scores: torch.Tensor, interaction: torch.Tensor, rank: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = low_rank_factors(interaction, rank)
    values = torch.linalg.svdvals(interaction)
    lost = (scores - truncate_interaction(scores, rank)).square().sum((-2, -1))
    own = (interaction - left @ right.mT).square().sum((-2, -1))
    return torch.stack([lost, own]), values[..., rank:].square().sum(-1).expand(2, -1)


def _free_energy(scores, prior, other, tau=0.7) -> tuple[torch.Tensor, torch.Tensor]:
    log_alpha = (prior + scores / tau).log_softmax(-1)
    energy = free_energy(other, scores, prior, tau) - free_energy(log_alpha.exp(), scores, prior, tau)
    return energy, tau * divergence(other, log_alpha)


def _merging(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    classes = torch.arange(scores.shape[-1]) % 5
    coarse = coarse_log_weights(scores, classes).softmax(-1)
    return push_forward(scores.softmax(-1), classes), coarse


def _equal_keys(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = draw(1, 2, 6, 8), draw(1, 2, 5, 8), draw(1, 2, 5, 8)
    classes = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4])
    merged = coarse_grain(key[:, :, classes], value[:, :, classes], classes)
    bias = merged.log_count[:, None, None, :]
    return (
        F.scaled_dot_product_attention(query, merged.key, merged.value, attn_mask=bias),
        F.scaled_dot_product_attention(query, key[:, :, classes], value[:, :, classes]),
    )


def _gauge(draw: Any, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = draw(1, 2, 6, 8), draw(1, 2, 6, 8), draw(1, 2, 6, 8)
    other = score_gauge(query, key, torch.eye(8, dtype=torch.float64) + 0.2 * draw(8, 8))
    outs = [
        interpret(standard(), {"query": q, "key": k, "value": value}).out for q, k in (other, (query, key))
    ]
    return outs[0], outs[1]


def _standard(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x = {"query": draw(1, 4, 9, 8), "key": draw(1, 2, 9, 8), "value": draw(1, 2, 9, 8)}
    expected = F.scaled_dot_product_attention(**x, is_causal=True, enable_gqa=True)
    return interpret(standard(is_causal=True), x).out, expected


@torch.no_grad()
def lowered(device: str, batch: int = 4, length: int = 4096) -> Iterator[Row]:
    """Specifications that are softmax attention: lowered, against the fastest kernel on prepared queries and keys."""
    heads, dim = 16, 64

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    query, key, value = (draw(batch, n, length, dim) for n in (heads, 4, 4))
    plain = {"query": query, "key": key, "value": value}
    latents = {
        "query": query, "query_rope": draw(batch, heads, length, 32), "latent": draw(batch, 1, length, 128),
        "rope_key": draw(batch, 1, length, 32), "key_up": draw(heads, dim, 128) / 11, "value_up": draw(heads, 128, dim),
    }  # fmt: skip
    gates = torch.rand(batch, heads, length, device=device).bfloat16()
    cases = {
        "GQA": (gqa(), plain, (query, key, value), True),
        "SQA": (sqa(8, 4), plain | {"query": query[:, :8]}, (query[:, :8], key, value), True),
        "MoH, every head": (moh(), plain | {"gates": gates}, (query, key, value), False),
        "CCA": (cca(4), plain | {"temperature": torch.ones(4, device=device)}, (query, key, value), False),
        "MLA": (
            mla(1, dim, 32), latents,
            (*(draw(batch, heads, length, dim + 32) for _ in range(2)), draw(batch, heads, length, dim)), False,
        ),
    }  # fmt: skip
    for name, (spec, tensors, prepared, barred) in cases.items():
        own, kernel = partial(lower(spec), tensors), partial(_flash, *prepared)
        times = time_rivals({"lowered": own, "kernel": kernel}, device, seconds=0.2)
        sizes = f"{prepared[0].shape[1]} heads, head_dim {prepared[0].shape[3]}, {length} tokens"
        yield measured(
            f"{name} from its specification, against its kernel alone", f"batch {batch}, {sizes}, causal, bf16",
            times["lowered"].median, "ms", better="lower", baseline_name="scaled_dot_product_attention",
            baseline=times["kernel"].median, required=_AS_FAST if barred else None,
        )  # fmt: skip


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


_PARTS: dict[str, Measure] = {
    "anchors": _anchors,
    "lowering": _lowering,
    "training": _training,
    "identities": _identities,
    "heads": _heads,
}
CLAIM = Claim(
    slug="geometric_attention",
    source="arXiv 2601.11618 v1, abstract",
    paper=(
        "Theory only; no experiment. What is stated: an exponential link follows from compositionality; softmax is "
        "the row anchor of it; row and column fields are no interaction, whose best rank-r form is a truncated SVD; "
        "other regimes, such as transport plans, are other anchors of the same kernel.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
    devices=("cuda", "cpu"),
)
