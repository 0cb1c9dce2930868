"""The reference interpreter: executes a specification as it is written, dense and in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch

from undivided.spec.anchors import anchor, anchor_log
from undivided.spec.carrier import DefaultPayload, NullSource, Refuse
from undivided.spec.coarse import coarse_grain
from undivided.spec.errors import EmptyRow
from undivided.spec.evaluation import (
    HeadExpansion,
    Inputs,
    Tensors,
    carrier_mask,
    chart_scores,
    link_weights,
    log_baseline,
)
from undivided.spec.evidence import Exp, PairTerm
from undivided.spec.regime import Plan
from undivided.spec.specification import (
    AttentionSpec,
    Gate,
    Pair,
    Perturb,
    Residual,
    RmsNorm,
    Scale,
    Source,
    Term,
    Update,
)

_NEGATIVE_INFINITY = float("-inf")


class TermTrace(NamedTuple):
    """One term of a mix, opened up; tensors are `[batch, heads, receivers, sources]` in float64.

    `mask` is boolean; `log_prior` is log kappa; `evidence` is w, zero outside the mask; `weights` is alpha;
    `payload` is `[batch, heads, sources, dim]`, or `[batch, heads, receivers, sources, dim]` for a payload of
    the pair; `coefficient` broadcasts to `[batch, heads, receivers, 1]`.
    """

    mask: torch.Tensor
    scores: torch.Tensor
    log_prior: torch.Tensor
    evidence: torch.Tensor
    weights: torch.Tensor
    payload: torch.Tensor
    coefficient: torch.Tensor


class Interpretation(NamedTuple):
    """`out` `[batch, heads, receivers, value_dim]`, and the terms it was made of."""

    out: torch.Tensor
    terms: tuple[TermTrace, ...]

    @property
    def weights(self) -> torch.Tensor:
        """The mixed kernel `sum_t c_t alpha^t`, `[batch, heads, receivers, sources]`."""
        heads = self.terms[0].weights.shape[1]
        parts = [trace.coefficient * to_group(trace.weights, heads) for trace in self.terms]
        return torch.stack(parts).sum(0)


def interpret(
    spec: AttentionSpec, tensors: Tensors, *, attention_mask: torch.Tensor | None = None
) -> Interpretation:
    """Executes a specification.

    Args:
        spec: the operator.
        tensors: the inputs that `spec.inputs` names; the nodes that read them say their layouts.
        attention_mask: a further mask, broadcasts to `[batch, heads, receivers, sources]`: boolean (True =
            admissible) or an additive bias, which counts as log prior.

    Returns:
        Output and terms, in float64. Differentiable.

    Raises:
        ValueError: an input is missing or does not fit.
        EmptyRow: a receiver has no admissible source and the carrier declares no fallback.
        NotPositive, InfeasibleMarginals: the anchor cannot be computed.
        StatefulBaseline: a baseline tensor has a batch axis.
    """
    check_inputs(spec, tensors)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    terms = tuple(_run_term(spec, Inputs(exact, term), attention_mask) for term in spec.mix)
    heads = terms[0].weights.shape[1]
    parts = [trace.coefficient * to_group(_aggregate(spec, trace), heads) for trace in terms]
    out = torch.stack(parts).sum(0)
    if isinstance(spec.carrier.empty_row, DefaultPayload):
        empty = ~terms[0].mask.any(-1, keepdim=True)
        out = torch.where(empty, exact[spec.carrier.empty_row.tensor][:, None, :], out)
    return Interpretation(apply_updates(spec.update, out, exact), terms)


def check_inputs(spec: AttentionSpec, tensors: Tensors) -> None:
    """Raises a ValueError that names the first missing input."""
    missing = [name for name in spec.inputs if name not in tensors]
    if missing:
        raise ValueError(
            f"the specification reads a tensor {missing[0]!r} that is not given; it needs "
            f"{', '.join(spec.inputs)}."
        )


def to_group(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeats a term of fewer heads, each for a group of neighbours: head j serves j * g to j * g + g - 1."""
    if heads % tensor.shape[1]:
        raise ValueError(
            f"a term of the mix has {tensor.shape[1]} heads, which does not divide {heads} of the first."
        )
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def coefficient_of(term: Term, tensors: Tensors, like: torch.Tensor) -> torch.Tensor:
    """Returns the factor of a term, which broadcasts to `[batch, heads, receivers, 1]`."""
    if term.times is None:
        return torch.full((1, 1, 1, 1), term.coefficient, dtype=like.dtype, device=like.device)
    factor = tensors[term.times]
    factor = factor.reshape(1, -1, 1, 1) if factor.dim() < 2 else factor[..., None]
    return term.coefficient * factor.to(like.dtype)


def merged_sources(spec: AttentionSpec, inputs: Inputs) -> tuple[Inputs, torch.Tensor | None]:
    """Inputs with keys and payload merged by the source map, if any, and the log counts as a prior."""
    merge = spec.carrier.source_map
    if merge is None:
        return inputs, None
    if not isinstance(spec.payload, Source) or not all(
        isinstance(t, PairTerm) for t in spec.evidence.chart.terms
    ):
        raise ValueError(
            "source_map needs a chart of query and key and a payload of the source; others have no mean."
        )
    names = {term.key for term in spec.evidence.chart.terms if isinstance(term, PairTerm)} | {
        spec.payload.tensor
    }
    merged = {
        name: coarse_grain(inputs[name], inputs[name], inputs[merge.assignment], merge.num_classes)
        for name in names
    }
    log_count = next(iter(merged.values())).log_count[:, None, None, :]
    return inputs.replaced(
        {name: each.key for name, each in merged.items()}
    ), log_count if merge.log_counts else None


def _run_term(spec: AttentionSpec, inputs: Inputs, attention_mask: torch.Tensor | None) -> TermTrace:
    inputs, log_count = merged_sources(spec, inputs)
    to_heads = HeadExpansion(spec, inputs)
    scores = chart_scores(spec.evidence.chart, inputs, to_heads)
    size = scores.shape[2], scores.shape[3]
    mask = carrier_mask(spec.carrier.masks, *size, inputs, scores.device)
    log_prior = log_baseline(spec.evidence.baseline, *size, inputs, scores)
    if log_count is not None:
        log_prior = log_prior + log_count
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = mask & attention_mask
    elif attention_mask is not None:
        mask = mask & (attention_mask > _NEGATIVE_INFINITY)
        log_prior = log_prior + attention_mask.double().masked_fill(attention_mask == _NEGATIVE_INFINITY, 0.0)
    mask, log_prior = mask.expand(scores.shape), log_prior.expand(scores.shape)
    if isinstance(spec.carrier.empty_row, Refuse):
        check_rows(mask)
    factor = None if spec.evidence.factor is None else chart_scores(spec.evidence.factor, inputs, to_heads)
    evidence, weights = _weigh(spec, scores, mask, log_prior, factor, inputs)
    payload = _payload(spec, inputs)
    coefficient = coefficient_of(inputs.term, inputs.tensors, scores)
    return TermTrace(mask, scores, log_prior, evidence, weights, payload, coefficient)


def check_rows(mask: torch.Tensor) -> None:
    """Raises `EmptyRow` that names the first receiver without an admissible source."""
    empty = ~mask.any(-1)
    if empty.any():
        batch, head, row = empty.nonzero()[0].tolist()
        raise EmptyRow(
            f"receiver {row} (batch {batch}, head {head}) has no admissible source; declare "
            "carrier.empty_row, such as ZeroIncrement() or NullSource()."
        )


def _weigh(spec, scores, mask, log_prior, factor, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Evidence and anchored weights; the exponential link stays in the log domain: no overflow."""
    link, kind = spec.evidence.link, spec.anchor
    marginals = _marginals(spec, scores, inputs)
    null = null_logit(spec, scores, inputs)
    if isinstance(link, Exp) and factor is None:
        log_weights = (scores / link.temperature + log_prior).masked_fill(~mask, _NEGATIVE_INFINITY)
        if null is None:
            return log_weights.exp(), anchor_log(log_weights, kind, **marginals)
        return log_weights.exp(), anchor_log(torch.cat([log_weights, null], -1), kind)[..., :-1]
    evidence = log_prior.exp() * link_weights(link, scores) * (1.0 if factor is None else factor)
    evidence = evidence.masked_fill(~mask, 0.0)
    if null is None:
        return evidence, anchor(evidence, kind, mask=mask, **marginals)
    extended = torch.cat([evidence, link_weights(link, null)], -1)
    mask = torch.cat([mask, torch.ones_like(mask[..., :1])], -1)
    return evidence, anchor(extended, kind, mask=mask)[..., :-1]


def _marginals(spec: AttentionSpec, scores: torch.Tensor, inputs: Inputs) -> dict[str, torch.Tensor]:
    if not isinstance(spec.probe, Plan):
        return {}
    sides = (("row_sums", scores.shape[2]), ("column_sums", scores.shape[3]))
    named = [(side, getattr(spec.probe, side), length) for side, length in sides]
    return {
        side: inputs[name].expand(*scores.shape[:2], length)
        for side, name, length in named
        if name is not None
    }


def null_logit(spec: AttentionSpec, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor | None:
    """Returns the logits of the null source `[batch, heads, receivers, 1]`, or None if there is none."""
    if not isinstance(spec.carrier.empty_row, NullSource):
        return None
    logit = spec.carrier.empty_row.logit
    value = inputs[logit] if isinstance(logit, str) else torch.tensor(logit)
    return value.to(scores).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)


def _payload(spec: AttentionSpec, inputs: Inputs) -> torch.Tensor:
    if not isinstance(spec.payload, Source):
        return inputs[spec.payload.tensor]  # type: ignore[attr-defined]
    payload = HeadExpansion(spec, inputs, values=True)(inputs[spec.payload.tensor])
    if spec.payload.value_map is None:
        return payload
    return torch.einsum("hrv,bhmr->bhmv", inputs[spec.payload.value_map], payload)


def _aggregate(spec: AttentionSpec, trace: TermTrace) -> torch.Tensor:
    if isinstance(spec.payload, Pair):
        return torch.einsum("bhnm,bhnmd->bhnd", trace.weights, trace.payload)
    return trace.weights @ trace.payload


def apply_updates(steps: tuple[Update, ...], out: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """Returns the output from the aggregate `[batch, heads, receivers, value_dim]`, in its float type."""
    for step in steps:
        if isinstance(step, Gate):
            gate = tensors[step.tensor].to(out.dtype)
            out = out * (gate[..., None] if gate.dim() == 3 else gate)
        elif isinstance(step, Scale):
            out = step.factor * out
        elif isinstance(step, RmsNorm):
            out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + step.eps)
            out = out if step.weight is None else out * tensors[step.weight].to(out.dtype)
        elif isinstance(step, Residual):
            out = out + tensors[step.tensor].to(out.dtype)
        elif isinstance(step, Perturb):
            flat = out.flatten(2)
            mean, deviation = flat.mean(-1)[..., None, None], flat.std(-1)[..., None, None]
            out = out - (deviation * tensors[step.noise].to(out.dtype) + mean)
        else:
            raise TypeError(f"{step!r} is not an update that the interpreter knows.")
    return out
