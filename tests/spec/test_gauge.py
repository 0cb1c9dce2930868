from __future__ import annotations

import pytest
import torch

from undivided.spec import (
    AttentionSpec,
    Carrier,
    Causal,
    Chart,
    Column,
    ColumnSum,
    Dot,
    Evidence,
    GivenScores,
    Global,
    GlobalSum,
    NoAnchor,
    NotPositive,
    Plan,
    Raw,
    Row,
    RowSum,
    Sinkhorn,
    Support,
    TopK,
    Values,
    anchor,
    canonical,
    equivalent,
    gauge_orbit,
    interpret,
    random_gauge,
    rope_gauge,
    score_gauge,
    standard,
)
from undivided.spec.anchors import anchor_log

CONVERGED = Sinkhorn(500)
REGIMES = [
    (Row(), RowSum()),
    (Column(), ColumnSum()),
    (Plan(), CONVERGED),
    (Global(), GlobalSum()),
    (Raw(), NoAnchor()),
]


def kernel(rows=5, columns=7):
    return torch.randn(2, rows, columns, dtype=torch.float64).exp()


def tensors():
    return {name: torch.randn(2, 3, 5, 6, dtype=torch.float64) for name in ("query", "key", "value")}


@pytest.mark.parametrize(("probe", "kind"), REGIMES)
def test_the_anchor_is_the_same_along_the_whole_gauge_orbit(probe, kind):
    x = tensors()
    spec = AttentionSpec(probe=probe, anchor=kind)
    alpha = interpret(spec, x).weights
    for other in gauge_orbit(spec, x, 3, torch.Generator().manual_seed(1)):
        torch.testing.assert_close(anchor(other, kind), alpha, rtol=1e-9, atol=1e-12)
        if probe != Raw():
            assert not torch.allclose(other, interpret(spec, x).terms[0].evidence)


@pytest.mark.parametrize("probe", [Row(), Column(), Plan(), Global(), Raw(), Support()])
def test_invariants_agree_within_a_class_and_differ_between_classes(probe):
    weights = kernel()
    invariant = canonical(probe, weights)
    torch.testing.assert_close(
        canonical(probe, random_gauge(probe, weights)), invariant, rtol=1e-10, atol=1e-12
    )
    assert not torch.allclose(canonical(probe, kernel()), invariant)


def test_gauges_are_nested_as_their_probes_are():
    weights = kernel()
    by_rows = random_gauge(Row(), weights)
    torch.testing.assert_close(canonical(Plan(), by_rows), canonical(Plan(), weights), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(canonical(Column(), by_rows), canonical(Column(), weights))


def test_values_see_the_aggregate_only():
    weights, payload = kernel(), torch.randn(2, 7, 3, dtype=torch.float64)
    other = random_gauge(Values(), weights, payload=payload)
    torch.testing.assert_close(other @ payload, weights @ payload, rtol=1e-11, atol=1e-11)
    assert (other - weights).abs().max() > 0.1
    with pytest.raises(ValueError, match="payload is None; the gauge of Values"):
        random_gauge(Values(), weights)


def test_top_k_support_survives_monotone_maps():
    weights = kernel()
    kept = anchor(weights, TopK(3)) > 0
    assert torch.equal(anchor(random_gauge(Support(), weights), TopK(3)) > 0, kept)


def test_row_field_never_matters_to_softmax_and_column_field_is_a_prior():
    scores = torch.randn(5, 7, dtype=torch.float64)
    u, c, tau = torch.randn(5, 1).double(), torch.randn(1, 7).double(), 0.6
    alpha = anchor_log(scores / tau, RowSum())
    shifted = anchor_log((scores + u) / tau, RowSum())
    torch.testing.assert_close(shifted, alpha, rtol=1e-13, atol=1e-15)
    with_column = anchor_log((scores + c) / tau, RowSum())
    assert (with_column - alpha).abs().max() > 1e-2
    prior = alpha * (c / tau).exp()
    torch.testing.assert_close(with_column, prior / prior.sum(-1, keepdim=True), rtol=1e-13, atol=1e-15)


def test_plan_anchor_sees_neither_field():
    scores = torch.randn(5, 7, dtype=torch.float64)
    fields = torch.randn(5, 1).double() + torch.randn(1, 7).double()
    torch.testing.assert_close(
        anchor_log(scores + fields, CONVERGED), anchor_log(scores, CONVERGED), rtol=1e-10, atol=1e-12
    )


def test_specifications_that_differ_by_a_gauge_are_equivalent():
    x = {**tensors(), "row_field": torch.randn(2, 3, 5, 1).double().expand(2, 3, 5, 5)}
    with_field = AttentionSpec(evidence=Evidence(Chart((Dot(), GivenScores("row_field")))))
    assert equivalent(standard(), with_field, x).holds
    other = AttentionSpec(evidence=Evidence(Chart((Dot(scale=1.0),))))
    found = equivalent(standard(), other, x)
    assert not found.holds and found.deviation > 1e-3
    assert not equivalent(standard(), standard(is_causal=True), x).holds
    by_column = AttentionSpec(evidence=with_field.evidence, probe=Column(), anchor=ColumnSum())
    assert not equivalent(AttentionSpec(probe=Column(), anchor=ColumnSum()), by_column, x).holds
    with pytest.raises(ValueError, match="only specifications of one probe and one number of terms compare"):
        equivalent(standard(), by_column, x)


def test_masked_specifications_compare_on_their_mask():
    x = {**tensors(), "row_field": torch.randn(2, 3, 5, 1).double().expand(2, 3, 5, 5)}
    carrier = Carrier((Causal(),))
    with_field = AttentionSpec(
        carrier, Evidence(Chart((Dot(), GivenScores("row_field")))), Plan(), Sinkhorn()
    )
    assert equivalent(AttentionSpec(carrier, probe=Plan(), anchor=Sinkhorn()), with_field, x).holds


def test_ratios_of_a_signed_kernel_are_refused():
    with pytest.raises(NotPositive, match="ratios need positive weights"):
        canonical(Row(), torch.randn(3, 4))


def test_general_linear_gauge_leaves_scores():
    x = tensors()
    matrix = torch.randn(6, 6).double() + 2 * torch.eye(6).double()
    query, key = score_gauge(x["query"], x["key"], matrix)
    out = interpret(standard(), {**x, "query": query, "key": key}).out
    torch.testing.assert_close(out, interpret(standard(), x).out, rtol=1e-9, atol=1e-10)


def rotated(x, interleaved):
    """Rotary embedding of `[..., length, dim]`: pair p turns by position * 100^(-p / pairs)."""
    pairs = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 100.0 ** -(torch.arange(pairs).double() / pairs)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_positions_leave_a_scaled_rotation_a_pair(interleaved):
    x = tensors()

    def out(matrix):
        query, key = score_gauge(x["query"], x["key"], matrix)
        turned = {"query": rotated(query, interleaved), "key": rotated(key, interleaved)}
        return interpret(standard(), {**x, **turned}).out

    expected = out(torch.eye(6).double())
    per_pair = rope_gauge(torch.randn(3).double(), torch.rand(3).double() + 0.5, interleaved=interleaved)
    torch.testing.assert_close(out(per_pair), expected, rtol=1e-10, atol=1e-11)
    generic = torch.randn(6, 6).double() + 2 * torch.eye(6).double()
    assert (out(generic) - expected).abs().max() > 1e-2
    wrong_layout = rope_gauge(torch.randn(3).double(), torch.ones(3).double(), interleaved=not interleaved)
    assert (out(wrong_layout) - expected).abs().max() > 1e-2
