"""The reference interpreter: executes a specification as it is written, dense and in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from undivided.spec.anchors import anchor, anchor_log
from undivided.spec.carrier import (
    Blocks,
    Causal,
    DefaultPayload,
    GivenMask,
    HeadMap,
    Mask,
    NullSource,
    Refuse,
    Window,
)
from undivided.spec.coarse import coarse_grain
from undivided.spec.errors import EmptyRow, StatefulBaseline
from undivided.spec.evidence import (
    Additive,
    Alibi,
    Baseline,
    Chart,
    ChartTerm,
    Cosine,
    Distance,
    Dot,
    Elu1,
    Exp,
    Gelu,
    GivenScores,
    Identity,
    KeyBias,
    Link,
    LogCounts,
    Prior,
    Relative,
    Relu,
    Silu,
    Softplus,
)
from undivided.spec.regime import Plan
from undivided.spec.specification import (
    AttentionSpec,
    Gate,
    Pair,
    Perturb,
    Residual,
    RmsNorm,
    Scale,
    Term,
    Update,
)

Tensors = Mapping[str, torch.Tensor]


class TermTrace(NamedTuple):
    """One term of a mix, opened up; all tensors `[batch, heads, receivers, sources]` in float64.

    `mask` is boolean; `scores` are finite on it; `log_prior` is log kappa; `evidence` is w, zero outside the mask;
    `weights` is alpha; `payload` is `[batch, heads, sources, dim]`, or `[batch, heads, receivers, sources, dim]` for a
    payload of the pair; `coefficient` broadcasts to `[batch, heads, receivers, 1]`.
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
        return sum(
            (term.coefficient * term.weights).repeat_interleave(heads // term.weights.shape[1], dim=1)
            for term in self.terms
        )


def interpret(
    spec: AttentionSpec, tensors: Tensors, *, attention_mask: torch.Tensor | None = None
) -> Interpretation:
    """Executes a specification.

    Args:
        spec: the operator.
        tensors: the inputs that `spec.inputs` names; layouts are those of the nodes that read them.
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
    missing = [name for name in spec.inputs if name not in tensors]
    if missing:
        raise ValueError(
            f"the specification reads a tensor {missing[0]!r} that is not given; it needs {', '.join(spec.inputs)}."
        )
    exact = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    terms = tuple(_run_term(spec, term, exact, attention_mask) for term in spec.mix)
    heads = terms[0].weights.shape[1]
    out: torch.Tensor | None = None
    for trace in terms:
        if heads % trace.weights.shape[1]:
            raise ValueError(f"a term has {trace.weights.shape[1]} heads, which does not divide the {heads} of the first.")
        aggregate = trace.coefficient * _aggregate(spec, trace)
        aggregate = aggregate.repeat_interleave(heads // trace.weights.shape[1], dim=1)
        out = aggregate if out is None else out + aggregate
    assert out is not None  # a mix has at least one term
    if isinstance(spec.carrier.empty_row, DefaultPayload):
        empty = ~terms[0].mask.any(-1, keepdim=True)
        out = torch.where(empty, exact[spec.carrier.empty_row.tensor][:, None, :], out)
    for step in spec.update:
        out = _update(step, out, exact)
    return Interpretation(out, terms)


def attend_reference(
    spec: AttentionSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **tensors: torch.Tensor,
) -> torch.Tensor:
    """`interpret` for the common three inputs; further tensors by name. Returns the output only."""
    named = {"query": query, "key": key, "value": value, **tensors}
    return interpret(spec, named, attention_mask=attention_mask).out


class _Renamed:
    """The inputs as one term of the mix sees them."""

    def __init__(self, tensors: Tensors, term: Term) -> None:
        self.tensors = tensors
        self.term = term

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[self.term.renamed(name)]


def _run_term(spec: AttentionSpec, term: Term, tensors: Tensors, attention_mask: torch.Tensor | None) -> TermTrace:
    inputs = _Renamed(tensors, term)
    heads = _num_query_heads(spec, inputs)
    merge = spec.carrier.source_map
    log_counts: torch.Tensor | None = None
    if merge is not None:
        inputs, log_counts = _merge_sources(spec, inputs, term)
    to_heads = _HeadExpansion(spec.carrier.heads, heads, inputs)
    scores = _chart(spec.evidence.chart, inputs, to_heads)
    batch, _, num_rows, num_columns = scores.shape
    mask = torch.ones(num_rows, num_columns, dtype=torch.bool, device=scores.device)
    for rule in spec.carrier.masks:
        mask = mask & _mask(rule, num_rows, num_columns, inputs, scores.device)
    log_prior = torch.zeros(num_rows, num_columns, dtype=scores.dtype, device=scores.device)
    for factor in spec.evidence.baseline:
        log_prior = log_prior + _log_baseline(factor, num_rows, num_columns, inputs, scores.device)
    if log_counts is not None:
        log_prior = log_prior + log_counts
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = mask & attention_mask
    elif attention_mask is not None:
        mask = mask & (attention_mask > float("-inf"))
        log_prior = log_prior + attention_mask.double().masked_fill(~(attention_mask > float("-inf")), 0.0)
    mask, log_prior = mask.expand(scores.shape), log_prior.expand(scores.shape)

    empty = ~mask.any(-1)
    if isinstance(spec.carrier.empty_row, Refuse) and empty.any():
        where = [int(i) for i in empty.nonzero()[0]]
        raise EmptyRow(
            f"receiver {where[2]} of head {where[1]}, batch {where[0]} has no admissible source; declare "
            "carrier.empty_row, such as ZeroIncrement() or NullSource()."
        )
    evidence, weights = _weigh(spec, scores, mask, log_prior, inputs, to_heads)
    coefficient = torch.tensor(term.coefficient, dtype=scores.dtype, device=scores.device).reshape(1, 1, 1, 1)
    if term.times is not None:
        factor = tensors[term.times]
        if factor.dim() <= 1:
            factor = factor.reshape(1, -1, 1, 1)
        elif factor.dim() == 3:
            factor = factor[..., None]
        coefficient = coefficient * factor
    return TermTrace(mask, scores, log_prior, evidence, weights, _payload(spec, inputs, to_heads), coefficient)


def _weigh(spec, scores, mask, log_prior, inputs, to_heads):
    """Evidence and anchored weights; the exponential link stays in the log domain, where it cannot overflow."""
    link, kind = spec.evidence.link, spec.anchor
    marginals = {}
    if isinstance(spec.probe, Plan):
        for side in ("row_sums", "column_sums"):
            name = getattr(spec.probe, side)
            length = scores.shape[2] if side == "row_sums" else scores.shape[3]
            if name is not None:
                marginals[side] = inputs[name].expand(*scores.shape[:2], length)
    if isinstance(link, Exp) and spec.evidence.factor is None:
        log_weights = (scores / link.temperature + log_prior).masked_fill(~mask, float("-inf"))
        if isinstance(spec.carrier.empty_row, NullSource):
            logit = spec.carrier.empty_row.logit
            null = inputs[logit].reshape(1, -1, 1, 1) if isinstance(logit, str) else torch.full((1, 1, 1, 1), logit)
            null = null.to(scores).expand(*scores.shape[:3], 1)
            return log_weights.exp(), anchor_log(torch.cat([log_weights, null], -1), kind)[..., :-1]
        return log_weights.exp(), anchor_log(log_weights, kind, **marginals)
    evidence = log_prior.exp() * _link(link, scores)
    if spec.evidence.factor is not None:
        evidence = evidence * _chart(spec.evidence.factor, inputs, to_heads)
    evidence = evidence.masked_fill(~mask, 0.0)
    if isinstance(spec.carrier.empty_row, NullSource):
        logit = spec.carrier.empty_row.logit
        null = inputs[logit].reshape(1, -1, 1, 1) if isinstance(logit, str) else torch.full((1, 1, 1, 1), logit)
        extended = torch.cat([evidence, _link(link, null.to(scores)).expand(*scores.shape[:3], 1)], -1)
        return evidence, anchor(extended, kind)[..., :-1]
    return evidence, anchor(evidence, kind, mask=mask, **marginals)


class _HeadExpansion:
    """Repeats key-side tensors `[batch, key heads, ...]` to the query heads, by the head map."""

    def __init__(self, heads: HeadMap, num_query_heads: int, inputs: _Renamed) -> None:
        self.num_query_heads = num_query_heads
        self.key_heads = heads.key_heads
        self.assignment: torch.Tensor | None = None
        if isinstance(heads.assignment, str):
            self.assignment = inputs[heads.assignment]
        elif heads.assignment is not None:
            self.assignment = torch.tensor(heads.assignment)
        if self.assignment is not None and self.assignment.shape != (num_query_heads,):
            raise ValueError(
                f"the head map has shape {list(self.assignment.shape)}; it needs one key head for each of the "
                f"{num_query_heads} query heads."
            )

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        heads = tensor.shape[1]
        if heads == 1:
            return tensor.expand(-1, self.num_query_heads, *tensor.shape[2:])
        if self.key_heads is not None and heads != self.key_heads:
            raise ValueError(f"a key-side tensor has {heads} heads; the head map says {self.key_heads} (or 1, shared).")
        if self.assignment is not None:
            return tensor.index_select(1, self.assignment.to(tensor.device))
        if self.num_query_heads % heads:
            raise ValueError(f"{heads} key heads do not divide {self.num_query_heads} query heads; give an assignment.")
        return tensor.repeat_interleave(self.num_query_heads // heads, dim=1)


def _num_query_heads(spec: AttentionSpec, inputs: _Renamed) -> int:
    for term in spec.evidence.chart.terms:
        if isinstance(term, Dot | Cosine | Distance | Additive):
            heads = inputs[term.query].shape[1]
            break
        if isinstance(term, GivenScores):
            heads = inputs[term.tensor].shape[1]
            break
    else:
        raise ValueError("the chart has no term with receivers; add a Dot, another pair term, or GivenScores.")
    wanted = spec.carrier.heads.query_heads
    if wanted is not None and heads != wanted and len(spec.mix) == 1:
        raise ValueError(f"query has {heads} heads; the head map says {wanted}.")
    return heads


def _feature(x: torch.Tensor, name: str | None) -> torch.Tensor:
    if name == "elu1":
        return F.elu(x) + 1
    if name == "relu":
        return F.relu(x)
    if name == "softplus":
        return F.softplus(x)
    return x


def _chart(chart: Chart, inputs: _Renamed, to_heads: _HeadExpansion) -> torch.Tensor:
    scores = sum(_chart_term(term, inputs, to_heads) for term in chart.terms)
    assert isinstance(scores, torch.Tensor)  # a chart has at least one term
    return scores if chart.softcap is None else chart.softcap * torch.tanh(scores / chart.softcap)


def _chart_term(term: ChartTerm, inputs: _Renamed, to_heads: _HeadExpansion) -> torch.Tensor:
    if isinstance(term, GivenScores):
        return inputs[term.tensor]
    if isinstance(term, KeyBias):
        return to_heads(inputs[term.tensor])[:, :, None, :]
    assert isinstance(term, Dot | Cosine | Distance | Additive)  # the chart terms there are
    query, key = inputs[term.query], to_heads(inputs[term.key])
    if isinstance(term, Additive):
        return torch.einsum("hd,bhnmd->bhnm", inputs[term.vector], torch.tanh(query[:, :, :, None] + key[:, :, None]))
    if isinstance(term, Cosine):
        scale = query.shape[-1] ** 0.5 if term.scale is None else term.scale
        cosine = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        if term.temperature is not None:
            cosine = to_heads(inputs[term.temperature].reshape(1, -1, 1, 1)) * cosine
        return scale * cosine
    scale = query.shape[-1] ** -0.5 if term.scale is None else term.scale
    if isinstance(term, Distance):
        return -scale / 2 * (query[:, :, :, None] - key[:, :, None]).square().sum(-1)
    if term.key_map is not None:
        key = torch.einsum("hdr,bhmr->bhmd", inputs[term.key_map], key)
    return scale * (_feature(query, term.feature) @ _feature(key, term.feature).transpose(-2, -1))


def _link(link: Link, scores: torch.Tensor) -> torch.Tensor:
    if isinstance(link, Exp):
        return (scores / link.temperature).exp()
    functions = {Softplus: F.softplus, Relu: F.relu, Gelu: F.gelu, Silu: F.silu}
    if isinstance(link, Elu1):
        return F.elu(scores) + 1
    if isinstance(link, Identity):
        return scores
    return functions[type(link)](scores)


def _mask(rule: Mask, num_rows: int, num_columns: int, inputs: _Renamed, device: torch.device) -> torch.Tensor:
    if isinstance(rule, GivenMask):
        mask = inputs[rule.tensor]
        if mask.dtype != torch.bool:
            raise ValueError(f"{rule.tensor} has dtype {mask.dtype}; a mask is boolean, True where the pair is admissible.")
        return mask
    distance = _distance(num_rows, num_columns, device)
    if isinstance(rule, Causal):
        return distance <= 0
    if isinstance(rule, Window):
        return (distance >= -rule.before) & (distance <= rule.after)
    assert isinstance(rule, Blocks)  # the masks there are
    row = torch.arange(num_rows, device=device)[:, None] + (num_columns - num_rows)
    return row // rule.block_size == torch.arange(num_columns, device=device)[None, :] // rule.block_size


def _distance(num_rows: int, num_columns: int, device: torch.device) -> torch.Tensor:
    """Source position minus receiver position, aligned bottom right."""
    rows = torch.arange(num_rows, device=device)[:, None] + (num_columns - num_rows)
    return torch.arange(num_columns, device=device)[None, :] - rows


def _log_baseline(factor: Baseline, num_rows, num_columns, inputs: _Renamed, device) -> torch.Tensor:
    if isinstance(factor, Alibi):
        return -inputs[factor.slopes].reshape(-1, 1, 1) * _distance(num_rows, num_columns, device).abs()
    if isinstance(factor, Relative):
        table = inputs[factor.table]
        reach = (table.shape[-1] + 1) // 2
        index = _distance(num_rows, num_columns, device) + reach - 1
        if table.shape[-1] % 2 == 0 or index.min() < 0 or index.max() >= table.shape[-1]:
            raise ValueError(
                f"{factor.table} has {table.shape[-1]} entries; {num_rows} receivers and {num_columns} sources need an "
                f"odd number, {2 * max(num_rows, num_columns) - 1} or more."
            )
        return table[:, index]
    if isinstance(factor, LogCounts):
        counts = inputs[factor.tensor]
        return counts.reshape(*counts.shape[:-1], 1, counts.shape[-1])
    assert isinstance(factor, Prior)  # the baselines there are
    prior = inputs[factor.tensor]
    if prior.dim() > 3:
        raise StatefulBaseline(
            f"{factor.tensor} has shape {list(prior.shape)}; a baseline has no batch axis, since it is the same in every "
            "state. A bias that depends on the state is a term of the chart (GivenScores)."
        )
    return prior


def _merge_sources(spec: AttentionSpec, inputs: _Renamed, term: Term) -> tuple[_Renamed, torch.Tensor | None]:
    """Replaces keys and payload by the means of their classes; returns log counts as a prior, or None."""
    merge = spec.carrier.source_map
    assert merge is not None  # the caller asked
    assignment = inputs[merge.assignment]
    keys = {item.key for item in spec.evidence.chart.terms if isinstance(item, Dot | Cosine | Distance | Additive)}
    if isinstance(spec.payload, Pair) or not keys:
        raise ValueError("source_map needs a chart on keys and a payload of the source; it has no rule for others.")
    replaced, log_count = {}, None
    for name in sorted(keys | {spec.payload.tensor}):  # type: ignore[attr-defined]
        merged = coarse_grain(inputs[name], inputs[name], assignment, merge.num_classes)
        replaced[term.renamed(name)], log_count = merged.key, merged.log_count
    assert log_count is not None  # there is at least one key
    prior = log_count[:, None, None, :] if merge.log_counts else None
    return _Renamed({**inputs.tensors, **replaced}, term), prior


def _payload(spec: AttentionSpec, inputs: _Renamed, to_heads: _HeadExpansion) -> torch.Tensor:
    if isinstance(spec.payload, Pair):
        return inputs[spec.payload.tensor]
    payload = to_heads(inputs[spec.payload.tensor])  # type: ignore[attr-defined]
    value_map = spec.payload.value_map  # type: ignore[attr-defined]
    return payload if value_map is None else torch.einsum("hrv,bhmr->bhmv", inputs[value_map], payload)


def _aggregate(spec: AttentionSpec, trace: TermTrace) -> torch.Tensor:
    if isinstance(spec.payload, Pair):
        return torch.einsum("bhnm,bhnmd->bhnd", trace.weights, trace.payload)
    return trace.weights @ trace.payload


def _update(step: Update, out: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    if isinstance(step, Gate):
        gate = tensors[step.tensor]
        return out * (gate[..., None] if gate.dim() == 3 else gate)
    if isinstance(step, Scale):
        return step.factor * out
    if isinstance(step, RmsNorm):
        normed = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + step.eps)
        return normed if step.weight is None else normed * tensors[step.weight]
    if isinstance(step, Residual):
        return out + tensors[step.tensor]
    assert isinstance(step, Perturb)  # the updates there are
    flat = out.flatten(2)
    mean, deviation = flat.mean(-1)[..., None, None], flat.std(-1)[..., None, None]
    return out - (deviation * tensors[step.noise] + mean)
