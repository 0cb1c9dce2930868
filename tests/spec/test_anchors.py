from __future__ import annotations

import pytest
import torch

from undivided.spec import (
    ColumnSum,
    Entmax,
    GlobalSum,
    InfeasibleMarginals,
    NoAnchor,
    NotPositive,
    RowSum,
    Sinkhorn,
    Sparsemax,
    TopK,
    anchor,
    anchor_log,
    check_causal_marginals,
    reference_column_sums,
)

# Float64: what is equal in exact arithmetic differs by rounding only.
TIGHT = {"rtol": 1e-12, "atol": 1e-14}
CONVERGED = Sinkhorn(300)


def kernel(rows=6, columns=8):
    return torch.randn(2, rows, columns, dtype=torch.float64).exp()


def test_row_anchor_is_the_only_positive_unit_mass_row_with_its_ratios():
    weights = kernel()
    alpha = anchor(weights, RowSum())
    # Any positive vector with the same ratios is a multiple; of mass one there is one.
    other = weights * torch.rand(2, 6, 1, dtype=torch.float64).add(0.1)
    other = other / other.sum(-1, keepdim=True)
    torch.testing.assert_close(alpha, other, **TIGHT)
    torch.testing.assert_close(alpha / alpha[..., :1], weights / weights[..., :1], **TIGHT)


@pytest.mark.parametrize("kind", [RowSum(), ColumnSum(), GlobalSum(), NoAnchor(), TopK(3), CONVERGED])
def test_anchors_are_idempotent(kind):
    once = anchor(kernel(), kind)
    torch.testing.assert_close(anchor(once, kind), once, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("kind", "alpha"), [(Sparsemax(), 2.0), (Entmax(1.5), 1.5), (Entmax(1.2), 1.2)])
def test_entmax_is_idempotent_in_its_own_logarithm(kind, alpha):
    once = anchor_log(2 * torch.randn(4, 9, dtype=torch.float64), kind)
    assert (once == 0).any()
    torch.testing.assert_close(once.sum(-1), torch.ones(4, dtype=torch.float64), **TIGHT)
    again = anchor_log(once.pow(alpha - 1) / (alpha - 1), kind)
    torch.testing.assert_close(again, once, rtol=1e-10, atol=1e-12)


def test_sparsemax_is_the_euclidean_projection_onto_the_simplex():
    point = torch.randn(7, dtype=torch.float64)
    nearest = anchor_log(point, Sparsemax())
    others = torch.rand(1000, 7, dtype=torch.float64)
    others = others / others.sum(-1, keepdim=True)
    assert ((others - point).norm(dim=-1) > (nearest - point).norm()).all()


def test_entmax_near_one_is_softmax():
    scores = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(anchor_log(scores, Entmax(1.0001)), scores.softmax(-1), rtol=1e-3, atol=1e-4)


def test_rows_after_columns_repeated_is_the_sinkhorn_limit():
    weights = kernel(5, 5)
    alternated = weights
    for _ in range(300):
        alternated = anchor(anchor(alternated, ColumnSum()), RowSum())
    torch.testing.assert_close(anchor(weights, CONVERGED), alternated, rtol=1e-10, atol=1e-12)


def test_no_sweep_is_the_row_anchor():
    weights = kernel()
    torch.testing.assert_close(anchor(weights, Sinkhorn(0)), anchor(weights, RowSum()), **TIGHT)


def test_plan_has_its_marginals():
    weights = kernel(6, 8)
    rows = torch.rand(2, 6, dtype=torch.float64) + 0.1
    columns = torch.rand(2, 8, dtype=torch.float64) + 0.1
    columns = columns * rows.sum(-1, keepdim=True) / columns.sum(-1, keepdim=True)
    plan = anchor(weights, Sinkhorn(300, tolerance=1e-10), row_sums=rows, column_sums=columns)
    torch.testing.assert_close(plan.sum(-1), rows, **TIGHT)
    torch.testing.assert_close(plan.sum(-2), columns, rtol=1e-10, atol=1e-10)


def test_relaxed_columns_lie_between_softmax_and_transport():
    weights = kernel(6, 6)
    miss = [
        (anchor(weights, Sinkhorn(500, relaxation=r)).sum(-2) - 1).abs().max().item()
        for r in (1e-9, 0.3, 0.7, 1.0)
    ]
    assert miss == sorted(miss, reverse=True)
    torch.testing.assert_close(
        anchor(weights, Sinkhorn(50, relaxation=1e-12)), anchor(weights, RowSum()), rtol=1e-9, atol=1e-9
    )


def test_uniform_marginals_on_a_causal_square_leave_only_the_identity():
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    ones = torch.ones(4, dtype=torch.float64)
    plans = [
        anchor(kernel(4, 4)[0], Sinkhorn(sweeps), mask=mask, row_sums=ones, column_sums=ones)
        for sweeps in (10, 100, 1000)
    ]
    far = [(plan - torch.eye(4, dtype=torch.float64)).abs().max().item() for plan in plans]
    assert far[0] > far[1] > far[2]
    assert far[2] < 1e-2


def test_default_column_sums_on_a_causal_square_are_feasible():
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    columns = reference_column_sums(mask, torch.ones(7, dtype=torch.float64))
    expected = [sum(1 / (row + 1) for row in range(column, 7)) for column in range(7)]
    torch.testing.assert_close(columns, torch.tensor(expected, dtype=torch.float64), **TIGHT)
    check_causal_marginals(torch.ones(7, dtype=torch.float64), columns)
    plan = anchor(kernel(7, 7)[0], Sinkhorn(500, tolerance=1e-9), mask=mask)
    assert (plan[mask] > 0).all()


def test_top_k_keeps_the_earlier_of_equal_weights():
    weights = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.5]], dtype=torch.float64)
    assert anchor(weights, TopK(2)).tolist() == [[0.0, 0.5, 0.5, 0.0, 0.0]]


def test_top_k_is_not_a_limit_of_softmax():
    scores = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    cold = anchor_log(1e4 * scores, RowSum())
    assert cold.tolist() == [[0.5, 0.5, 0.0]]
    assert anchor_log(1e4 * scores, TopK(1)).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "kind",
    [
        RowSum(),
        ColumnSum(),
        GlobalSum(),
        TopK(2),
        Sparsemax(),
        Entmax(1.5),
        Sinkhorn(3),
        Sinkhorn(2, None, 0.5),
    ],
)
def test_gradients_of_anchors(kind):
    scores = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: anchor_log(2 * x, kind), scores)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda w: anchor(-w, RowSum()),
            NotPositive,
            r"the smallest weight is -.*; RowSum\(\) needs positive weights",
        ),
        (lambda w: anchor(0 * w, ColumnSum()), NotPositive, "all admissible weights of a sum are zero"),
        (
            lambda w: anchor(
                w, Sinkhorn(), row_sums=torch.ones(2, 6).double(), column_sums=torch.ones(2, 8).double()
            ),
            InfeasibleMarginals,
            "row_sums add up to 6, but column_sums to 8; give both the same mass, or relax the columns",
        ),
        (
            lambda w: anchor(w, Sinkhorn(), column_sums=torch.zeros(2, 8).double()),
            InfeasibleMarginals,
            "column_sums has 0; a marginal must be positive everywhere",
        ),
        (
            lambda w: anchor(w, Sinkhorn(1, tolerance=1e-12)),
            InfeasibleMarginals,
            "after 1 sweeps a column sum misses its marginal by .*, more than tolerance=1e-12",
        ),
        (
            lambda w: anchor(w, Sinkhorn(), mask=torch.zeros(6, 8, dtype=torch.bool)),
            InfeasibleMarginals,
            "a row or a column has no admissible pair",
        ),
        (
            lambda w: check_causal_marginals(torch.ones(3).double(), torch.tensor([0.5, 1.0, 1.5]).double()),
            InfeasibleMarginals,
            "the sources up to 0 take 0.5, but the receivers up to 0, which see no others, give 1",
        ),
        (
            lambda w: check_causal_marginals(torch.ones(3).double(), torch.full((2,), 1.5).double()),
            InfeasibleMarginals,
            "3 receivers on 2 sources: the first 1 see no source",
        ),
    ],
)
def test_impossible_anchors_say_why(call, error, message):
    with pytest.raises(error, match=message):
        call(kernel())
