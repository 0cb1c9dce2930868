"""Which commitments of standard attention an operator keeps, found by running it.

Standard attention is what is left after eight commitments. The checker runs an operator that discloses its
parts on sampled states and reports each commitment as kept, violated, or undefined (it presupposes one that
is violated).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from undivided.spec.anchors import anchor
from undivided.spec.regime import RowSum

COMMITMENTS: dict[str, str] = {
    "fixed carrier": "the mask is the same in every state",
    "pairwise score": "s_ri depends on receiver r and source i alone",
    "separable score": "s_ri = sum_l f_l(x_r) g_l(y_i), `rank` terms at most, up to unary fields",
    "positive weights": "no weight is negative",
    "exponential link": "log w_ri = beta s_ri + log kappa_ri",
    "row anchor": "alpha_ri = w_ri / sum_j w_rj",
    "source payload": "v_i depends on the source alone",
    "additive aggregation": "z_r = sum_i alpha_ri v_i",
}


class Trace(NamedTuple):
    """What an operator discloses about one run; N receivers, M sources.

    Args:
        mask: boolean `[N, M]`.
        scores: `[N, M]`, finite also outside the mask.
        log_prior: log kappa `[N, M]`.
        evidence: w `[N, M]`, zero outside the mask.
        weights: alpha `[N, M]`.
        payload: `[M, dim]`, or `[N, M, dim]`.
        out: z `[N, dim]`.
    """

    mask: torch.Tensor
    scores: torch.Tensor
    log_prior: torch.Tensor
    evidence: torch.Tensor
    weights: torch.Tensor
    payload: torch.Tensor
    out: torch.Tensor


class Finding(NamedTuple):
    """One commitment: "kept", "violated" or "undefined", and the residual that decided it."""

    commitment: str
    verdict: str
    residual: float


class CommitmentReport(NamedTuple):
    """All findings, in the order of `COMMITMENTS`."""

    findings: tuple[Finding, ...]

    @property
    def violated(self) -> list[str]:
        """Names of the violated commitments."""
        return [finding.commitment for finding in self.findings if finding.verdict == "violated"]

    def __str__(self) -> str:
        return "\n".join(f"{f.commitment:21} {f.verdict:10} {f.residual:.1e}" for f in self.findings)


def check_commitments(
    fn: Callable[[torch.Tensor, torch.Tensor], Trace],
    sampler: Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]],
    *,
    rank: int | None = None,
    samples: int = 3,
    tolerance: float = 1e-8,
    seed: int = 0,
) -> CommitmentReport:
    """Runs an operator on sampled states and says which commitments of standard attention it violates.

    Args:
        fn: takes receivers `[N, d]` and sources `[M, d]`, returns a `Trace`; float64.
        sampler: draws receivers and sources; N and M should exceed `rank` by a few.
        rank: most terms of a separable score; default the width d of the receivers.
        samples: states drawn.
        tolerance: residual, relative to the size of what is compared, from which a commitment counts as
            violated.
        seed: of the states.

    Returns:
        The report.

    Source: Geometric Attention (arXiv 2601.11618 v1), abstract (standard attention as a regime of choices).
    """
    generator = torch.Generator().manual_seed(seed)
    states = [sampler(generator) for _ in range(samples)]
    traces = [fn(*state) for state in states]
    residuals = dict.fromkeys(COMMITMENTS, 0.0)

    def record(name: str, value: float) -> None:
        residuals[name] = max(residuals[name], value if math.isfinite(value) else math.inf)

    for state, trace in zip(states, traces, strict=True):
        record("fixed carrier", float((trace.mask != traces[0].mask).sum()))
        record("pairwise score", _dependence_on_others(fn, sampler(generator), state, trace))
        record("separable score", _beyond_rank(trace.scores, state[0].shape[-1] if rank is None else rank))
        record("positive weights", max(0.0, -_relative(trace.weights.min(), trace.weights)))
        record("source payload", _payload_spread(trace.payload))
        record("additive aggregation", _difference(trace.out, _aggregated(trace)))
    undefined = set()
    if residuals["positive weights"] > tolerance:
        undefined |= {"exponential link", "row anchor"}
    else:
        for trace in traces:
            record("exponential link", _link_residual(trace))
            record(
                "row anchor", _difference(trace.weights, anchor(trace.evidence, RowSum(), mask=trace.mask))
            )
    findings = []
    for name, residual in residuals.items():
        verdict = "undefined" if name in undefined else "violated" if residual > tolerance else "kept"
        findings.append(Finding(name, verdict, residual))
    return CommitmentReport(tuple(findings))


def _dependence_on_others(fn, fresh, state, trace: Trace) -> float:
    """How much scores move when all receivers and sources but the first half are replaced."""
    receivers, sources = (x.clone() for x in state)
    n, m = receivers.shape[0] // 2, sources.shape[0] // 2
    receivers[n:], sources[m:] = fresh[0][n:], fresh[1][m:]
    return _difference(fn(receivers, sources).scores[:n, :m], trace.scores[:n, :m])


def _beyond_rank(scores: torch.Tensor, rank: int) -> float:
    centred = scores - scores.mean(0, keepdim=True)
    centred = centred - centred.mean(1, keepdim=True)
    values = torch.linalg.svdvals(centred)
    return float(values[rank] / values[0]) if rank < len(values) and values[0] > 0 else 0.0


def _payload_spread(payload: torch.Tensor) -> float:
    return 0.0 if payload.dim() == 2 else _difference(payload, payload[:1].expand_as(payload))


def _aggregated(trace: Trace) -> torch.Tensor:
    if trace.payload.dim() == 2:
        return trace.weights @ trace.payload
    return torch.einsum("nm,nmd->nd", trace.weights, trace.payload)


def _link_residual(trace: Trace) -> float:
    """Residual of the best affine map from scores to log evidence (the constant is a gauge)."""
    inside = trace.mask
    if (trace.evidence[inside] <= 0).any():
        return math.inf
    logs = trace.evidence[inside].log() - trace.log_prior[inside]
    columns = torch.stack([trace.scores[inside], torch.ones_like(logs)], dim=-1)
    fitted = columns @ torch.linalg.lstsq(columns, logs[:, None]).solution
    return _difference(fitted[:, 0], logs)


def _difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-300))


def _relative(value: torch.Tensor, scale: torch.Tensor) -> float:
    return float(value / scale.abs().max().clamp(min=1e-300))


class LinkLaw(NamedTuple):
    """Largest relative violation of `psi(a + b) psi(0) = psi(a) psi(b)`; tau of the fitted `e^(s / tau)`."""

    residual: float
    temperature: float


def link_law(link: Callable[[torch.Tensor], torch.Tensor], grid: torch.Tensor) -> LinkLaw:
    """Tests whether evidence that adds in the score multiplies in the weight.

    Only `psi(s) = c e^(s / tau)` does, among continuous increasing links.

    Args:
        link: psi, elementwise.
        grid: scores, one axis; sums of two are tried as well.

    Returns:
        The residual, and tau by least squares of `log psi` on the grid (NaN if psi is not positive there).
    """
    together = link(grid[:, None] + grid[None, :]) * link(torch.zeros_like(grid[:1]))
    apart = link(grid)[:, None] * link(grid)[None, :]
    residual = float(
        ((together - apart).abs() / torch.maximum(together.abs(), apart.abs()).clamp(min=1e-300)).max()
    )
    values = link(grid)
    if (values <= 0).any():
        return LinkLaw(residual, math.nan)
    centred = grid - grid.mean()
    slope = float((centred * values.log()).sum() / centred.square().sum())
    return LinkLaw(residual, math.inf if slope == 0 else 1 / slope)
