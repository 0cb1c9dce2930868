from __future__ import annotations

import dataclasses
import json

import pytest

from undivided.spec import (
    SYSTEMS,
    Alibi,
    AttentionSpec,
    Blocks,
    Carrier,
    Causal,
    Chart,
    Column,
    ColumnSum,
    Cosine,
    DefaultPayload,
    Dot,
    Entmax,
    Evidence,
    Exp,
    Gate,
    GivenMask,
    HeadMap,
    Identity,
    KeyBias,
    Merge,
    NoAnchor,
    NotPositive,
    NullSource,
    Pair,
    Plan,
    Prior,
    Raw,
    RmsNorm,
    RowSum,
    Scale,
    Sinkhorn,
    Softplus,
    StatefulBaseline,
    Support,
    Term,
    TopK,
    Window,
    explain,
    standard,
)

VARIED = [
    standard(),
    standard(is_causal=True),
    AttentionSpec(Carrier((Window(3, 2), Blocks(4)), HeadMap(4, 2, (0, 1, 1, 1))), Evidence(link=Softplus())),
    AttentionSpec(Carrier((GivenMask(state_free=False),), empty_row=NullSource("sink"))),
    AttentionSpec(Carrier((GivenMask(),), empty_row=DefaultPayload()), anchor=Entmax(1.25)),
    AttentionSpec(evidence=Evidence(Chart((Dot(scale=0.5), KeyBias()), 30.0), (Alibi(), Prior()), Exp(2.0))),
    AttentionSpec(
        evidence=Evidence(Cosine(temperature="t")), probe=Plan(column_sums="b"), anchor=Sinkhorn(7, 1e-3)
    ),
    AttentionSpec(Carrier(source_map=Merge("classes", 5)), probe=Support(), anchor=TopK(3)),
    AttentionSpec(
        evidence=Evidence(link=Identity(), factor=Chart()), probe=Raw(), anchor=NoAnchor(), payload=Pair()
    ),
    AttentionSpec(
        mix=(Term(), Term(-0.5, "lam", (("query", "noise"),))), update=(Gate(), RmsNorm(None), Scale(0.8))
    ),
]
ALL = VARIED + [system.spec for system in SYSTEMS.values()]


@pytest.mark.parametrize("spec", ALL)
def test_json_round_trip_is_the_identity(spec):
    read = AttentionSpec.from_json(spec.to_json())
    assert read == spec
    assert hash(read) == hash(spec)
    assert AttentionSpec.from_json(spec.to_json(indent=2)) == spec


def test_specifications_that_differ_are_different_keys():
    assert len(set(VARIED)) == len(VARIED)


def test_json_leaves_out_defaults():
    assert json.loads(standard().to_json()) == {"kind": "AttentionSpec"}


def test_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        standard().anchor = ColumnSum()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "Sofmax"}', "kind 'Sofmax' is not one of Additive, "),
        (
            '{"kind": "AttentionSpec", "ancor": {"kind": "RowSum"}}',
            "AttentionSpec has no field 'ancor'; it has anchor,",
        ),
        ('{"kind": "RowSum"}', "the JSON holds a RowSum, not an AttentionSpec."),
        ("[1", "Expecting"),
    ],
)
def test_json_that_says_something_else_is_refused(text, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        AttentionSpec.from_json(text)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: AttentionSpec(probe=Column()),
            ValueError,
            r"anchor=RowSum\(\) does not choose .*; it needs Row\(\)",
        ),
        (
            lambda: AttentionSpec(evidence=Evidence(link=Identity())),
            NotPositive,
            r"needs positive weights, but link=Identity\(\).* use anchor=NoAnchor\(\)",
        ),
        (
            lambda: AttentionSpec(anchor="rows"),
            TypeError,
            "anchor of AttentionSpec holds 'rows'; it needs a Anchor",
        ),
        (lambda: AttentionSpec(mix=()), ValueError, "mix is empty"),
        (
            lambda: Evidence(
                Chart(()),
            ),
            ValueError,
            "terms is empty",
        ),
        (
            lambda: Evidence(Chart((RowSum(),))),
            TypeError,
            "terms of Chart holds RowSum.*; it needs a ChartTerm",
        ),
        (lambda: Exp(0.0), ValueError, "temperature=0.0 must be positive"),
        (lambda: Window(-1), ValueError, "before=-1"),
        (lambda: TopK(0), ValueError, "k=0 must be at least 1"),
        (lambda: Entmax(1.0), ValueError, r"alpha=1.0 must lie in \(1, 2\]; for 1 use RowSum"),
        (lambda: Sinkhorn(relaxation=0.0), ValueError, r"relaxation=0.0 must lie in \(0, 1\]"),
        (lambda: Dot(feature="exp"), ValueError, "feature='exp' is not one of elu1, relu, softplus"),
        (
            lambda: AttentionSpec(Carrier(empty_row=NullSource()), probe=Support(), anchor=TopK(2)),
            ValueError,
            r"empty_row=NullSource\(logit=0.0\) needs anchor=RowSum\(\)",
        ),
        (
            lambda: AttentionSpec(Carrier((Causal(),), source_map=Merge())),
            ValueError,
            r"masks has Causal\(\), which counts positions; merged sources have none",
        ),
    ],
)
def test_contradictions_are_refused_with_a_sentence(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_baseline_that_reads_the_state_is_refused():
    with pytest.raises(
        StatefulBaseline, match='reads "key_bias", which the chart reads; add it to the chart'
    ):
        Evidence(Chart((Dot(), KeyBias("key_bias"))), (Prior("key_bias"),))


def test_inputs_are_named_once_and_after_renaming():
    spec = SYSTEMS["gda"].spec
    assert spec.inputs == ("query", "key", "lambda", "value", "norm_weight", "query_noise", "key_noise")
    assert "alibi_slopes" in SYSTEMS["alibi"].spec.inputs


@pytest.mark.parametrize(
    ("spec", "causal"),
    [
        (standard(is_causal=True), True),
        (standard(), False),
        (AttentionSpec(Carrier((Window(4),))), True),
        (AttentionSpec(Carrier((Window(4, 1),))), False),
        (AttentionSpec(Carrier((Causal(),)), probe=Plan(), anchor=Sinkhorn()), False),
        (AttentionSpec(Carrier((Causal(),)), probe=Column(), anchor=ColumnSum()), False),
    ],
)
def test_column_and_plan_anchors_are_never_causal(spec, causal):
    assert spec.is_causal is causal


def test_only_one_positive_exponential_row_kernel_is_gibbs():
    gibbs = {slug for slug, system in SYSTEMS.items() if system.spec.is_gibbs}
    assert "gqa" in gibbs and "mla" in gibbs
    assert not gibbs & {"gda", "tpla", "slot", "sinkhorn", "linear"}


def test_explain_shows_exactly_what_differs():
    differing = {line.declaration for line in explain(SYSTEMS["gda"].spec) if line.differs}
    assert differing == {"mix z", "update"}
    assert not any(line.differs for line in explain(standard(is_causal=True)))
    chart = next(line for line in explain(SYSTEMS["mla"].spec) if line.declaration == "chart s")
    assert chart.this == "(query . key_up latent + query_rope . rope_key) * 0.07217"
    assert chart.standard == "query . key / sqrt(dim of query)"
