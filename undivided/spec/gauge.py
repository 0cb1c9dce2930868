"""Gauge tools: transformations a probe cannot see, invariants, equivalence of specifications."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from undivided.spec.decomposition import decompose_scores
from undivided.spec.errors import NotPositive
from undivided.spec.evaluation import Tensors
from undivided.spec.interpreter import interpret
from undivided.spec.regime import Column, Global, Plan, Probe, Row, Support, Values
from undivided.spec.specification import AttentionSpec

# Two kernels in float64 that differ by less than this, relative to their size, are taken as equal.
_SAME = 1e-9


def random_gauge(
    probe: Probe,
    weights: torch.Tensor,
    *,
    payload: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws a kernel of the same class: every observable of the probe agrees, the entries need not.

    Args:
        probe: the probe; its class has the gauge `probe.gauge`.
        weights: kernel `[..., receivers, sources]`, zero outside the mask.
        payload: for `Values()`, `[..., sources, dim]` with fewer channels than sources.
        generator: source of randomness.

    Returns:
        A kernel like `weights`.

    Raises:
        ValueError: `Values()` without payload.

    Source: Geometric Attention (arXiv 2601.11618 v1), abstract (probe, equivalence, gauge).
    """

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=weights.dtype, device=weights.device)

    rows, columns = (*weights.shape[:-1], 1), (*weights.shape[:-2], 1, weights.shape[-1])
    if isinstance(probe, Row):
        return weights * draw(*rows).exp()
    if isinstance(probe, Column):
        return weights * draw(*columns).exp()
    if isinstance(probe, Plan):
        return weights * draw(*rows).exp() * draw(*columns).exp()
    if isinstance(probe, Global):
        return weights * draw(*weights.shape[:-2], 1, 1).exp()
    if isinstance(probe, Support):
        return torch.where(weights > 0, (weights.clamp(min=1e-300).log() * draw(*rows).exp()).exp(), weights)
    if isinstance(probe, Values):
        if payload is None:
            raise ValueError("payload is None; the gauge of Values() is the null space of the payload.")
        projector = payload @ torch.linalg.pinv(payload)
        noise = draw(*weights.shape)
        return weights + noise - noise @ projector
    return weights.clone()


def gauge_orbit(
    spec: AttentionSpec, tensors: Tensors, count: int, generator: torch.Generator | None = None
) -> Iterator[torch.Tensor]:
    """Yields `count` kernels equivalent to the evidence of the first term of `spec`, in float64."""
    trace = interpret(spec, tensors).terms[0]
    for _ in range(count):
        yield random_gauge(spec.probe, trace.evidence, payload=trace.payload, generator=generator)


def canonical(
    probe: Probe,
    weights: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    payload: torch.Tensor | None = None,
) -> torch.Tensor:
    """A complete invariant of a kernel's class: equal exactly where the probe cannot tell two kernels.

    Rows, columns and totals of one for their ratios; the doubly centred logarithm for cross-ratios; ranks
    within the row for the order; the aggregate for values; the kernel itself for the entries.

    Args:
        probe: the probe.
        weights: kernel `[..., receivers, sources]`.
        mask: boolean, True where the pair is admissible; default all.
        payload: for `Values()`, `[..., sources, dim]`.

    Raises:
        NotPositive: ratios of a kernel that is not positive on the mask.
        ValueError: `Values()` without payload.
    """
    mask = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask.expand(weights.shape)
    if isinstance(probe, Values):
        if payload is None:
            raise ValueError("payload is None; the observable of Values() is weights @ payload.")
        return weights @ payload
    if isinstance(probe, Support):
        order = weights.masked_fill(~mask, float("-inf")).argsort(dim=-1, stable=True)
        return order.argsort(-1).masked_fill(~mask, -1).to(weights.dtype)
    sums = {Row: (-1,), Column: (-2,), Global: (-2, -1)}
    if not isinstance(probe, Row | Column | Global | Plan):
        return weights.masked_fill(~mask, 0.0)
    if (weights[mask] <= 0).any():
        raise NotPositive(
            f"the smallest weight is {weights[mask].min().item():g}; ratios need positive weights."
        )
    if isinstance(probe, Plan):
        logs = torch.where(mask, weights, torch.ones_like(weights)).log()
        return decompose_scores(logs, mask).interaction
    inside = weights.masked_fill(~mask, 0.0)
    return inside / inside.sum(sums[type(probe)], keepdim=True).clamp(min=1e-300)


class Equivalence(NamedTuple):
    """Whether two specifications are equivalent on the inputs, and how far their invariants are apart."""

    holds: bool
    deviation: float


def equivalent(first: AttentionSpec, second: AttentionSpec, tensors: Tensors) -> Equivalence:
    """Compares the kernels of two specifications under their common probe, in float64.

    Args:
        first: a specification.
        second: one with the same probe and as many terms.
        tensors: the inputs of both.

    Returns:
        Whether the invariants agree, and their largest difference, relative to the largest entry.

    Raises:
        ValueError: the probes or the numbers of terms differ.
    """
    if first.probe != second.probe or len(first.mix) != len(second.mix):
        raise ValueError(
            f"only specifications of one probe and one number of terms compare; these have {first.probe!r} "
            f"with {len(first.mix)} and {second.probe!r} with {len(second.mix)}."
        )
    deviation = 0.0
    pairs = zip(interpret(first, tensors).terms, interpret(second, tensors).terms, strict=True)
    for one, other in pairs:
        if not torch.equal(one.mask, other.mask):
            return Equivalence(False, float("inf"))
        left = canonical(first.probe, one.evidence, mask=one.mask, payload=one.payload)
        right = canonical(second.probe, other.evidence, mask=other.mask, payload=other.payload)
        deviation = max(deviation, ((left - right).abs().max() / left.abs().max().clamp(min=1e-300)).item())
    return Equivalence(deviation <= _SAME, deviation)


def score_gauge(
    query: torch.Tensor, key: torch.Tensor, matrix: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transforms `q -> R q`, `k -> R^-T k`, which leaves every score `q . k` as it is.

    Args:
        query: `[..., length, head_dim]`.
        key: `[..., length, head_dim]`.
        matrix: R, invertible, `[..., head_dim, head_dim]`.

    Returns:
        The transformed query and key.
    """
    return query @ matrix.transpose(-2, -1), key @ torch.linalg.inv(matrix)


def rope_gauge(angles: torch.Tensor, scales: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """The matrices that commute with every rotary embedding: one scaled rotation for each frequency pair.

    Args:
        angles: `[pairs]`.
        scales: `[pairs]`, not zero.
        interleaved: pairs are `(x0, x1), (x2, x3), ...`; otherwise `(x0, x_pairs), ...`.

    Returns:
        R, `[2 * pairs, 2 * pairs]`.
    """
    pairs = angles.shape[0]
    first = torch.arange(pairs) * 2 if interleaved else torch.arange(pairs)
    second = first + 1 if interleaved else first + pairs
    matrix = torch.zeros(2 * pairs, 2 * pairs, dtype=angles.dtype)
    cos, sin = scales * angles.cos(), scales * angles.sin()
    matrix[first, first], matrix[second, second] = cos, cos
    matrix[first, second], matrix[second, first] = -sin, sin
    return matrix
