"""The language of attention operators: specifications, their exact meaning, and what can be said about them.

spec = AttentionSpec(carrier=Carrier(masks=(Causal(),)))
interpret(spec, {"query": q, "key": k, "value": v}).out      # dense, float64: what is meant
lower(spec)({"query": q, "key": k, "value": v})              # the fastest operator that computes it
print(spec.to_json(indent=2))
"""

from __future__ import annotations

from undivided.spec.anchors import anchor, anchor_log, check_causal_marginals, reference_column_sums
from undivided.spec.carrier import (
    Blocks,
    Carrier,
    Causal,
    DefaultPayload,
    GivenMask,
    HeadMap,
    Merge,
    NullSource,
    Refuse,
    Window,
    ZeroIncrement,
)
from undivided.spec.coarse import coarse_grain, coarse_log_weights, double_carrier, push_forward
from undivided.spec.commitments import COMMITMENTS, Trace, check_commitments, link_law
from undivided.spec.decomposition import (
    decompose_scores,
    effective_rank,
    low_rank_factors,
    score_shares,
    truncate_interaction,
)
from undivided.spec.errors import EmptyRow, InfeasibleMarginals, NotPositive, StatefulBaseline
from undivided.spec.evidence import (
    Additive,
    Alibi,
    Chart,
    Cosine,
    Distance,
    Dot,
    Elu1,
    Evidence,
    Exp,
    Gelu,
    GivenScores,
    Identity,
    KeyBias,
    LogCounts,
    Prior,
    Relative,
    Relu,
    Silu,
    Softplus,
)
from undivided.spec.explain import explain
from undivided.spec.gauge import canonical, equivalent, gauge_orbit, random_gauge, rope_gauge, score_gauge
from undivided.spec.interpreter import Interpretation, TermTrace, interpret
from undivided.spec.lowering import TARGETS, Lowered, attend, lower
from undivided.spec.potential import divergence, effective_potential, entropy, free_energy
from undivided.spec.regime import (
    Column,
    ColumnSum,
    Entmax,
    Global,
    GlobalSum,
    NoAnchor,
    Plan,
    Raw,
    Row,
    RowSum,
    Sinkhorn,
    Sparsemax,
    Support,
    TopK,
    Values,
)
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
    standard,
)
from undivided.spec.systems import SYSTEMS, SpecifiedSystem, system

__all__ = [
    "COMMITMENTS", "SYSTEMS", "TARGETS", "Additive", "Alibi", "AttentionSpec", "Blocks", "Carrier",
    "Causal", "Chart", "Column", "ColumnSum", "Cosine", "DefaultPayload", "Distance", "Dot", "Elu1",
    "EmptyRow", "Entmax", "Evidence", "Exp", "Gate", "Gelu", "GivenMask", "GivenScores", "Global",
    "GlobalSum", "HeadMap", "Identity", "InfeasibleMarginals", "Interpretation", "KeyBias", "LogCounts",
    "Lowered", "Merge", "NoAnchor", "NotPositive", "NullSource", "Pair", "Perturb", "Plan", "Prior",
    "Raw", "Refuse", "Relative", "Relu", "Residual", "RmsNorm", "Row", "RowSum", "Scale", "Silu",
    "Sinkhorn", "Softplus", "Source", "Sparsemax", "SpecifiedSystem", "StatefulBaseline", "Support",
    "Term", "TermTrace", "TopK", "Trace", "Values", "Window", "ZeroIncrement", "anchor", "anchor_log",
    "attend", "canonical", "check_causal_marginals", "check_commitments", "coarse_grain",
    "coarse_log_weights", "decompose_scores", "divergence", "double_carrier", "effective_potential",
    "effective_rank", "entropy", "equivalent", "explain", "free_energy", "gauge_orbit", "interpret",
    "link_law", "low_rank_factors", "lower", "push_forward", "random_gauge", "reference_column_sums",
    "rope_gauge", "score_gauge", "score_shares", "standard", "system", "truncate_interaction",
]  # fmt: skip
