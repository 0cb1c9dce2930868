"""Scores, links, masks and baselines of a specification, evaluated densely for any float type."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from undivided.spec.carrier import Blocks, Causal, GivenMask, Mask, Window
from undivided.spec.errors import StatefulBaseline
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
    PairTerm,
    Prior,
    Relative,
    Relu,
    Silu,
    Softplus,
)
from undivided.spec.specification import AttentionSpec, Term

Tensors = Mapping[str, torch.Tensor]
_LINKS: tuple[tuple[type[Link], Callable[[torch.Tensor], torch.Tensor]], ...] = (
    (Softplus, F.softplus),
    (Relu, F.relu),
    (Gelu, F.gelu),
    (Silu, F.silu),
)


class Inputs:
    """The inputs as one term of the mix sees them."""

    def __init__(self, tensors: Tensors, term: Term) -> None:
        self.tensors = tensors
        self.term = term

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[self.term.renamed(name)]

    def replaced(self, changes: Tensors) -> Inputs:
        """Returns inputs in which the tensors that the specification calls by these names are others."""
        return Inputs({**self.tensors, **{self.term.renamed(k): v for k, v in changes.items()}}, self.term)


class HeadExpansion:
    """Repeats key-side tensors `[batch, key heads, ...]` to the query heads, by the head map of a carrier."""

    def __init__(self, spec: AttentionSpec, inputs: Inputs, *, values: bool = False) -> None:
        heads = spec.carrier.heads
        self.num_query_heads = _num_query_heads(spec, inputs)
        own = values and heads.value_assignment is not None
        self.key_heads = None if own else heads.key_heads
        assignment = heads.value_assignment if own else heads.assignment
        self.assignment = inputs[assignment] if isinstance(assignment, str) else assignment
        if self.assignment is not None and len(self.assignment) != self.num_query_heads:
            raise ValueError(
                f"the head map assigns {len(self.assignment)} heads; query has {self.num_query_heads}, each "
                "needs one."
            )

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        heads = tensor.shape[1]
        if heads == 1:
            return tensor.expand(-1, self.num_query_heads, *tensor.shape[2:])
        if self.key_heads is not None and heads != self.key_heads:
            raise ValueError(
                f"a key-side tensor has {heads} heads; the head map says {self.key_heads} (or 1, shared)."
            )
        if self.assignment is not None:
            return tensor.index_select(1, torch.as_tensor(self.assignment, device=tensor.device))
        if self.num_query_heads % heads:
            raise ValueError(
                f"{heads} key heads do not divide {self.num_query_heads} query heads; give an assignment."
            )
        repeats = self.num_query_heads // heads
        return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=1)


def _num_query_heads(spec: AttentionSpec, inputs: Inputs) -> int:
    names = [term.query for term in spec.evidence.chart.terms if isinstance(term, PairTerm)]
    names += [term.tensor for term in spec.evidence.chart.terms if isinstance(term, GivenScores)]
    if not names:
        raise ValueError(
            "the chart has no term with receivers; add a Dot, another pair term, or GivenScores."
        )
    heads = inputs[names[0]].shape[1]
    wanted = spec.carrier.heads.query_heads
    # A later term of a mix may have fewer heads, each serving a group.
    if wanted is not None and heads != wanted and not inputs.term.tensors:
        raise ValueError(f"{names[0]} has {heads} heads; the head map says {wanted}.")
    return heads


def chart_scores(chart: Chart, inputs: Inputs, to_heads: HeadExpansion) -> torch.Tensor:
    """Returns the scores `[batch, heads, receivers, sources]` of a chart."""
    scores = _term_scores(chart.terms[0], inputs, to_heads)
    for term in chart.terms[1:]:
        scores = scores + _term_scores(term, inputs, to_heads)
    return scores if chart.softcap is None else chart.softcap * torch.tanh(scores / chart.softcap)


def _term_scores(term: ChartTerm, inputs: Inputs, to_heads: HeadExpansion) -> torch.Tensor:
    if isinstance(term, GivenScores):
        return inputs[term.tensor]
    if isinstance(term, KeyBias):
        return to_heads(inputs[term.tensor])[:, :, None, :]
    if isinstance(term, Additive):
        query, key = inputs[term.query], to_heads(inputs[term.key])
        mixed = torch.tanh(query[:, :, :, None] + key[:, :, None])
        return torch.einsum("hd,bhnmd->bhnm", inputs[term.vector], mixed)
    if isinstance(term, Cosine):
        query, key = inputs[term.query], to_heads(inputs[term.key])
        cosine = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        if term.temperature is not None:
            cosine = to_heads(inputs[term.temperature].reshape(1, -1, 1, 1)) * cosine
        return (query.shape[-1] ** 0.5 if term.scale is None else term.scale) * cosine
    if isinstance(term, Distance):
        query, key = inputs[term.query], to_heads(inputs[term.key])
        return -dot_scale(term, query) / 2 * (query[:, :, :, None] - key[:, :, None]).square().sum(-1)
    if isinstance(term, Dot):
        query, key = inputs[term.query], mapped_key(term, inputs, to_heads)
        return dot_scale(term, query) * (
            _feature(query, term.feature) @ _feature(key, term.feature).transpose(-2, -1)
        )
    raise TypeError(f"{term!r} is not a chart term that the interpreter knows.")


def dot_scale(term: Dot | Distance, query: torch.Tensor) -> float:
    """Returns the factor of a dot product: the term's, or `dim ** -0.5` of the query."""
    return query.shape[-1] ** -0.5 if term.scale is None else term.scale


def mapped_key(term: Dot, inputs: Inputs, to_heads: HeadExpansion) -> torch.Tensor:
    """Returns the keys of a dot product at the query heads, expanded from a latent by the term's map."""
    key = to_heads(inputs[term.key])
    return key if term.key_map is None else torch.einsum("hdr,bhmr->bhmd", inputs[term.key_map], key)


def _feature(x: torch.Tensor, name: str | None) -> torch.Tensor:
    if name is None:
        return x
    return F.elu(x) + 1 if name == "elu1" else F.relu(x) if name == "relu" else F.softplus(x)


def link_weights(link: Link, scores: torch.Tensor) -> torch.Tensor:
    """Returns `psi(s)`."""
    if isinstance(link, Exp):
        return (scores / link.temperature).exp()
    if isinstance(link, Elu1):
        return F.elu(scores) + 1
    if isinstance(link, Identity):
        return scores
    for kind, function in _LINKS:
        if isinstance(link, kind):
            return function(scores)
    raise TypeError(f"{link!r} is not a link that the interpreter knows.")


def carrier_mask(
    rules: tuple[Mask, ...], num_rows: int, num_columns: int, inputs: Inputs, device: torch.device
) -> torch.Tensor:
    """Returns the boolean mask of all rules; broadcasts to `[batch, heads, receivers, sources]`."""
    mask = torch.ones(num_rows, num_columns, dtype=torch.bool, device=device)
    for rule in rules:
        mask = mask & _mask(rule, num_rows, num_columns, inputs, device)
    return mask


def _mask(rule: Mask, num_rows: int, num_columns: int, inputs: Inputs, device: torch.device) -> torch.Tensor:
    if isinstance(rule, GivenMask):
        given = inputs[rule.tensor]
        if given.dtype != torch.bool:
            raise ValueError(
                f"{rule.tensor} has dtype {given.dtype}; a mask is boolean, True where a pair is admissible."
            )
        return given
    distance = _distance(num_rows, num_columns, device)
    if isinstance(rule, Causal):
        return distance <= 0
    if isinstance(rule, Window):
        return (distance >= -rule.before) & (distance <= rule.after)
    if isinstance(rule, Blocks):
        columns = torch.arange(num_columns, device=device)
        rows = torch.arange(num_columns - num_rows, num_columns, device=device)
        return rows[:, None] // rule.block_size == columns[None, :] // rule.block_size
    raise TypeError(f"{rule!r} is not a mask that the interpreter knows.")


def _distance(num_rows: int, num_columns: int, device: torch.device) -> torch.Tensor:
    """Source position minus receiver position, aligned bottom right."""
    rows = torch.arange(num_columns - num_rows, num_columns, device=device)
    return torch.arange(num_columns, device=device)[None, :] - rows[:, None]


def log_baseline(
    factors: tuple[Baseline, ...], num_rows: int, num_columns: int, inputs: Inputs, like: torch.Tensor
) -> torch.Tensor:
    """Returns log kappa, which broadcasts to `[batch, heads, receivers, sources]`."""
    total = torch.zeros(num_rows, num_columns, dtype=like.dtype, device=like.device)
    for factor in factors:
        total = total + _log_factor(factor, num_rows, num_columns, inputs, like.device)
    return total


def _log_factor(factor: Baseline, num_rows: int, num_columns: int, inputs: Inputs, device: torch.device):
    if isinstance(factor, Alibi):
        return -inputs[factor.slopes].reshape(-1, 1, 1) * _distance(num_rows, num_columns, device).abs()
    if isinstance(factor, Relative):
        table = inputs[factor.table]
        index = _distance(num_rows, num_columns, device) + (table.shape[-1] - 1) // 2
        if table.shape[-1] % 2 == 0 or index.min() < 0 or index.max() >= table.shape[-1]:
            raise ValueError(
                f"{factor.table} has {table.shape[-1]} entries; {num_rows} receivers on {num_columns} "
                f"sources need an odd number, {2 * num_columns - 1} or more."
            )
        return table[:, index]
    if isinstance(factor, LogCounts):
        return inputs[factor.tensor].unsqueeze(-2)
    if isinstance(factor, Prior):
        prior = inputs[factor.tensor]
        if prior.dim() > 3:
            raise StatefulBaseline(
                f"{factor.tensor} has shape {list(prior.shape)}; a baseline has no batch axis, because it is "
                "the same in every state. A bias that depends on the state is a term of the chart "
                "(GivenScores)."
            )
        return prior
    raise TypeError(f"{factor!r} is not a baseline that the interpreter knows.")
