from __future__ import annotations

import pytest
import torch

from undivided.spec import (
    Sinkhorn,
    decompose_scores,
    effective_rank,
    low_rank_factors,
    score_shares,
    truncate_interaction,
)
from undivided.spec.anchors import anchor_log

TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def scores(*shape):
    return torch.randn(*(shape or (2, 6, 8)), dtype=torch.float64)


def recomposed(parts):
    return parts.row_field[..., None] + parts.column_field[..., None, :] + parts.interaction


def test_on_a_rectangle_it_is_double_centring():
    s = scores()
    parts = decompose_scores(s)
    centred = s - s.mean(-1, keepdim=True)
    centred = centred - centred.mean(-2, keepdim=True)
    torch.testing.assert_close(parts.interaction, centred, **TIGHT)
    torch.testing.assert_close(parts.row_field, s.mean(-1), **TIGHT)
    torch.testing.assert_close(recomposed(parts), s, **TIGHT)
    assert parts.interaction.sum(-1).abs().max() < 1e-11 and parts.interaction.sum(-2).abs().max() < 1e-11


def test_interaction_is_idempotent_and_blind_to_fields():
    s = scores()
    interaction = decompose_scores(s).interaction
    torch.testing.assert_close(decompose_scores(interaction).interaction, interaction, **TIGHT)
    shifted = s + scores(2, 6, 1) + scores(2, 1, 8)
    torch.testing.assert_close(decompose_scores(shifted).interaction, interaction, **TIGHT)


def test_plan_of_the_scores_is_the_plan_of_the_interaction():
    s, kind = scores(), Sinkhorn(500)
    torch.testing.assert_close(
        anchor_log(s, kind), anchor_log(decompose_scores(s).interaction, kind), rtol=1e-9, atol=1e-12
    )


def test_product_weights_centre_by_their_marginals():
    s = scores()
    rows, columns = torch.rand(6, dtype=torch.float64) + 0.1, torch.rand(8, dtype=torch.float64) + 0.1
    parts = decompose_scores(s, weights=rows[:, None] * columns[None, :])
    p, q = rows / rows.sum(), columns / columns.sum()
    row_mean, column_mean = (s * q).sum(-1, keepdim=True), (s * p[:, None]).sum(-2, keepdim=True)
    expected = s - row_mean - column_mean + (row_mean * p[:, None]).sum(-2, keepdim=True)
    torch.testing.assert_close(parts.interaction, expected, **TIGHT)


@pytest.mark.parametrize("weighted", [False, True])
def test_residual_of_a_masked_fit_is_orthogonal_to_every_row_and_column(weighted):
    s = scores(2, 7, 7)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    weights = (
        torch.rand(7, 7, dtype=torch.float64) + 0.1 if weighted else torch.ones(7, 7, dtype=torch.float64)
    )
    # What the mask excludes must not matter, not even as NaN.
    parts = decompose_scores(s.masked_fill(~mask, torch.nan), mask, weights)
    residual = weights * parts.interaction
    assert residual.sum(-1).abs().max() < 1e-11 and residual.sum(-2).abs().max() < 1e-11
    torch.testing.assert_close(recomposed(parts)[:, mask], s[:, mask], **TIGHT)
    assert (parts.interaction[:, ~mask] == 0).all()


def test_filling_masked_scores_with_zeros_and_centring_is_another_matrix():
    s = scores(7, 7)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    filled = decompose_scores(s.masked_fill(~mask, 0.0)).interaction
    assert (filled - decompose_scores(s, mask).interaction)[mask].abs().max() > 0.1


def test_each_connected_block_has_one_free_constant():
    two = torch.block_diag(torch.ones(2, 3), torch.ones(4, 2)).bool()
    assert decompose_scores(scores(6, 5), two).free_constants == 2
    assert decompose_scores(scores(6, 5)).free_constants == 1
    assert decompose_scores(scores(6, 6), torch.eye(6, dtype=torch.bool)).free_constants == 6
    field = decompose_scores(scores(6, 5), two).column_field
    torch.testing.assert_close(field[:3].sum() + 1, field[3:].sum() + 1, **TIGHT)
    assert field[:3].sum().abs() < 1e-12


def test_shares_of_pure_parts():
    row, column = scores(6, 1).expand(6, 8), scores(1, 8).expand(6, 8)
    interaction = decompose_scores(scores(6, 8)).interaction
    for part, name in ((row, "row"), (column, "column"), (interaction, "interaction")):
        assert getattr(score_shares(part + 3), name) == pytest.approx(1.0, abs=1e-12)
    assert sum(score_shares(torch.full((6, 8), 2.0))) == 0
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    assert sum(score_shares(scores(8, 8), mask)) == pytest.approx(1.0, abs=1e-12)
    assert score_shares(scores(1, 8).expand(8, 8), mask).interaction == pytest.approx(0.0, abs=1e-12)


def test_truncation_error_is_the_tail_of_the_singular_values():
    s = scores(6, 8)
    interaction = decompose_scores(s).interaction
    values = torch.linalg.svdvals(interaction)
    for rank in range(6):
        error = (truncate_interaction(s, rank) - s).square().sum()
        torch.testing.assert_close(error, values[rank:].square().sum(), **TIGHT)


def test_no_random_pair_of_factors_beats_the_truncation():
    interaction, rank = decompose_scores(scores(6, 8)).interaction, 2
    left, right = low_rank_factors(interaction, rank)
    best = (left @ right.T - interaction).norm()
    candidates = torch.randn(1000, 6, rank, dtype=torch.float64)
    # Each left factor with the right factor that suits it best.
    fitted = candidates @ torch.linalg.lstsq(candidates, interaction.expand(1000, 6, 8)).solution
    assert ((fitted - interaction).flatten(1).norm(dim=1) > best).all()


def test_extracted_query_and_key_reproduce_the_scores():
    query, key = scores(9, 3), scores(7, 3)
    left, right = low_rank_factors(query @ key.T, 3)
    torch.testing.assert_close(left @ right.T, query @ key.T, **TIGHT)
    assert left.shape == (9, 3) and right.shape == (7, 3)
    torch.testing.assert_close(left.T @ left, right.T @ right, **TIGHT)


def test_masked_truncation_keeps_the_fields_and_full_rank_is_exact():
    s = scores(2, 6, 6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(truncate_interaction(s, 6, mask), s, **TIGHT)
    fields = truncate_interaction(s, 0, mask)
    parts = decompose_scores(s, mask)
    torch.testing.assert_close(fields, parts.row_field[..., None] + parts.column_field[..., None, :], **TIGHT)
    with pytest.raises(ValueError, match="scores has entries that are not finite; give them unmasked"):
        truncate_interaction(s.masked_fill(~mask, float("-inf")), 1, mask)
    with pytest.raises(ValueError, match="rank=-1 must be 0 or more"):
        truncate_interaction(s, -1)


def test_effective_rank_counts_components():
    q, _ = torch.linalg.qr(scores(8, 8))
    matrix = q[:, :3] @ torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)) @ q[:, 3:6].T
    assert [int(effective_rank(matrix, e)) for e in (0.5, 0.64, 0.65, 0.92, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert effective_rank(torch.zeros(3, 4)) == 0
    with pytest.raises(ValueError, match=r"energy=1.5 must lie in \(0, 1\]"):
        effective_rank(matrix, 1.5)


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match="weights has -1; a weight is 0 or more"):
        decompose_scores(scores(3, 3), weights=-torch.ones(3, 3))
