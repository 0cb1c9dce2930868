"""Scores as row field, column field and interaction; the interaction's best approximations of low rank."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ScoreParts(NamedTuple):
    """`s_ri = row_field_r + column_field_i + interaction_ri` on the admissible pairs.

    The split between the fields has one free constant in each connected component of the mask
    (`free_constants`); the column field is the one that sums to zero in every component. The interaction has
    no freedom.
    """

    row_field: torch.Tensor
    column_field: torch.Tensor
    interaction: torch.Tensor
    free_constants: torch.Tensor


class ScoreShares(NamedTuple):
    """Shares of the variance of the scores; they add up to one (to zero for constant scores)."""

    row: torch.Tensor
    column: torch.Tensor
    interaction: torch.Tensor


def decompose_scores(
    scores: torch.Tensor, mask: torch.Tensor | None = None, weights: torch.Tensor | None = None
) -> ScoreParts:
    """Least-squares fit of a row and a column field on the admissible pairs; the rest is the interaction.

    `min_{u, c} sum_ri w_ri (s_ri - u_r - c_i)^2`. On a full rectangle the interaction is the doubly centred
    matrix `J S J`; with product weights it is centred by their marginals. A mask needs the fit: centring a
    matrix with zeros (or anything else) in the place of what the mask excludes gives another residual.

    Args:
        scores: `[..., receivers, sources]`; what is not admissible is not read.
        mask: boolean, broadcasts to `scores`, True where the pair is admissible; default all.
        weights: not negative, broadcasts to `scores`; default one.

    Returns:
        Fields `[..., receivers]` and `[..., sources]`, interaction like `scores` (zero where not admissible),
        and the number of free constants. In the dtype of `scores`; the fit is float64.

    Raises:
        ValueError: a weight is negative.

    Source: Geometric Attention (arXiv 2601.11618 v1), abstract (quotient by unary fields).
    """
    weights = _pair_weights(scores, mask, weights)
    exact = torch.where(
        weights > 0, scores.double(), torch.zeros((), dtype=torch.float64, device=scores.device)
    )
    row_total, column_total = weights.sum(-1), weights.sum(-2)
    per_row = torch.where(row_total > 0, 1 / row_total.clamp(min=1e-300), torch.zeros_like(row_total))
    row_sums, column_sums = (weights * exact).sum(-1), (weights * exact).sum(-2)
    # Eliminating the row field leaves a graph Laplacian on the sources, singular once for each component.
    laplacian = torch.diag_embed(column_total) - weights.transpose(-2, -1) @ (per_row[..., None] * weights)
    values, vectors = torch.linalg.eigh(laplacian)
    nothing = values <= 1e-10 * column_total.amax(-1, keepdim=True).clamp(min=1e-300)
    inverse = torch.where(nothing, torch.zeros_like(values), 1 / values.masked_fill(nothing, 1.0))
    right = column_sums - ((per_row * row_sums)[..., None, :] @ weights)[..., 0, :]
    along = (vectors.transpose(-2, -1) @ right[..., None]) * inverse[..., None]
    column_field = (vectors @ along)[..., 0]
    row_field = per_row * (row_sums - (weights @ column_field[..., None])[..., 0])
    interaction = exact - row_field[..., None] - column_field[..., None, :]
    interaction = torch.where(weights > 0, interaction, torch.zeros_like(interaction))
    dtype = scores.dtype
    return ScoreParts(row_field.to(dtype), column_field.to(dtype), interaction.to(dtype), nothing.sum(-1))


def score_shares(
    scores: torch.Tensor, mask: torch.Tensor | None = None, weights: torch.Tensor | None = None
) -> ScoreShares:
    """Shares of the weighted variance of the scores in row field, column field and interaction.

    On a masked carrier the two fields overlap, so they are taken in order: the row share is what row means
    explain (softmax does not see it), the column share what columns explain beyond, the interaction the rest.

    Args:
        scores: `[..., receivers, sources]`; what is not admissible is not read.
        mask: as in `decompose_scores`.
        weights: as in `decompose_scores`.

    Returns:
        Three tensors `[...]`.
    """
    weights = _pair_weights(scores, mask, weights)
    parts = decompose_scores(scores.double(), weights > 0, weights)
    exact = torch.where(
        weights > 0, scores.double(), torch.zeros((), dtype=torch.float64, device=scores.device)
    )
    mass = weights.sum((-2, -1), keepdim=True).clamp(min=1e-300)
    centred = exact - (weights * exact).sum((-2, -1), keepdim=True) / mass
    row_mean = (weights * centred).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    total = (weights * centred.square()).sum((-2, -1))
    row = (weights * row_mean.square()).sum((-2, -1))
    interaction = (weights * parts.interaction.square()).sum((-2, -1))
    per = torch.where(total > 0, 1 / total.clamp(min=1e-300), torch.zeros_like(total))
    return ScoreShares(row * per, (total - row - interaction).clamp(min=0) * per, interaction * per)


def truncate_interaction(
    scores: torch.Tensor, rank: int, mask: torch.Tensor | None = None, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Scores whose interaction is replaced by its best approximation of a given rank; the fields stay.

    The fields are fitted on the admissible pairs; what they leave of the whole rectangle is truncated by its
    singular values, `error^2 = sum_{k > rank} sigma_k^2`.

    Args:
        scores: `[..., receivers, sources]`, finite everywhere, also where the mask excludes.
        rank: number of components kept, 0 or more.
        mask: as in `decompose_scores`.
        weights: as in `decompose_scores`.

    Returns:
        Scores like `scores`.

    Raises:
        ValueError: `rank` is negative, or a score is not finite.

    Source: Geometric Attention (arXiv 2601.11618 v1), abstract (rank-r normal form); Eckart and Young (1936).
    """
    if rank < 0:
        raise ValueError(f"rank={rank} must be 0 or more.")
    if not scores.isfinite().all():
        raise ValueError("scores has entries that are not finite; give them unmasked, and the mask as mask.")
    parts = decompose_scores(scores.double(), mask, weights)
    fields = parts.row_field[..., None] + parts.column_field[..., None, :]
    left, right = low_rank_factors(scores.double() - fields, rank)
    return (fields + left @ right.transpose(-2, -1)).to(scores.dtype)


def low_rank_factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Query `U sqrt(S)` and key `V sqrt(S)`: their product is the best approximation of a given rank.

    Args:
        matrix: `[..., receivers, sources]`.
        rank: number of components.

    Returns:
        `[..., receivers, rank]` and `[..., sources, rank]` (fewer if the matrix is smaller).
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[..., :rank].sqrt()
    return left[..., :rank] * root[..., None, :], right[..., :rank, :].transpose(-2, -1) * root[..., None, :]


def effective_rank(matrix: torch.Tensor, energy: float = 0.9) -> torch.Tensor:
    """The least number of components that hold a share of the energy `sum sigma_k^2`; 0 for zeros.

    Args:
        matrix: `[..., receivers, sources]`.
        energy: share, in (0, 1].

    Returns:
        Integers `[...]`.

    Raises:
        ValueError: `energy` is not in (0, 1].
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy={energy} must lie in (0, 1].")
    return components_for(torch.linalg.svdvals(matrix.double()), energy)


def components_for(values: torch.Tensor, energy: float) -> torch.Tensor:
    """The same from singular values `[..., k]` in falling order."""
    squares = values.square()
    total = squares.sum(-1, keepdim=True)
    # The share is compared with what is missing, so that energy=1 does not hang on the last rounding.
    missing = total - squares.cumsum(-1)
    slack = 1e-14 * total
    return ((missing > (1 - energy) * total + slack).sum(-1) + 1).masked_fill(total[..., 0] == 0, 0)


def _pair_weights(
    scores: torch.Tensor, mask: torch.Tensor | None, weights: torch.Tensor | None
) -> torch.Tensor:
    """Weights in float64, zero outside the mask; not expanded over leading axes that they do not have."""
    if weights is None:
        weights = torch.ones(scores.shape[-2:], dtype=torch.float64, device=scores.device)
    if (weights < 0).any():
        raise ValueError(f"weights has {weights.min().item():g}; a weight is 0 or more.")
    weights = weights.double().expand(*weights.shape[:-2], *scores.shape[-2:])
    return weights if mask is None else weights * mask.to(weights)
