"""Anchors: the representative that acts, computed as it is written, for any float type."""

from __future__ import annotations

import torch

from undivided.spec.errors import InfeasibleMarginals, NotPositive
from undivided.spec.regime import (
    Anchor,
    ColumnSum,
    Entmax,
    GlobalSum,
    NoAnchor,
    RowSum,
    Sinkhorn,
    Sparsemax,
    TopK,
)

_NEGATIVE_INFINITY = float("-inf")


def anchor(
    weights: torch.Tensor,
    kind: Anchor,
    *,
    mask: torch.Tensor | None = None,
    row_sums: torch.Tensor | None = None,
    column_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """The representative `alpha` of a kernel of weights.

    Args:
        weights: `[..., receivers, sources]`; what `mask` excludes is not read.
        kind: the anchor, such as `RowSum()` or `Sinkhorn(20)`.
        mask: boolean, broadcasts to `weights`, True where the pair is admissible.
        row_sums: marginal of a Sinkhorn anchor, `[..., receivers]`; default one each.
        column_sums: the other, `[..., sources]`; default those of the uniform row kernel on the mask.

    Returns:
        `alpha`, like `weights`, zero outside the mask. A row without admissible pairs is zero.

    Raises:
        NotPositive: the anchor needs positive weights and one is not.
        InfeasibleMarginals: a Sinkhorn anchor cannot meet its marginals.
    """
    mask = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask.expand(weights.shape)
    inside = weights.masked_fill(~mask, 0.0)
    if isinstance(kind, NoAnchor):
        return inside
    # While a CUDA graph is captured there are no numbers yet to look at.
    can_look = not (weights.is_cuda and torch.cuda.is_current_stream_capturing())
    if can_look and (inside < 0).any():
        raise NotPositive(f"the smallest weight is {inside.min().item():g}; {kind!r} needs positive weights.")
    # Dividing by a sum keeps the gradient finite where a weight is exactly zero; the logarithm would not.
    sums = {RowSum: (-1,), ColumnSum: (-2,), GlobalSum: (-2, -1)}
    if type(kind) in sums:
        total = inside.sum(dim=sums[type(kind)], keepdim=True)
        admissible = _any(mask, sums[type(kind)])
        if can_look and (admissible & (total == 0)).any():
            raise NotPositive(f"all admissible weights of a sum are zero; {kind!r} cannot divide by it.")
        return inside / torch.where(admissible, total, torch.ones_like(total))
    safe = torch.where(mask & (inside > 0), inside, torch.ones_like(inside))
    log_weights = safe.log().masked_fill(~mask | (inside <= 0), _NEGATIVE_INFINITY)
    return anchor_log(log_weights, kind, row_sums=row_sums, column_sums=column_sums)


def anchor_log(
    log_weights: torch.Tensor,
    kind: Anchor,
    *,
    row_sums: torch.Tensor | None = None,
    column_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same for a positive kernel given by its logarithm, -inf outside the mask."""
    if isinstance(kind, RowSum):
        return _softmax(log_weights, (-1,))
    if isinstance(kind, ColumnSum):
        return _softmax(log_weights, (-2,))
    if isinstance(kind, GlobalSum):
        return _softmax(log_weights, (-2, -1))
    if isinstance(kind, NoAnchor):
        return log_weights.exp()
    if isinstance(kind, Sinkhorn):
        return sinkhorn(log_weights, kind, row_sums, column_sums)
    if isinstance(kind, TopK):
        return _softmax(_keep_largest(log_weights, kind.k), (-1,))
    if isinstance(kind, Sparsemax):
        return _entmax(log_weights, 2.0)
    if isinstance(kind, Entmax):
        return _entmax(log_weights, kind.alpha)
    raise TypeError(f"kind={kind!r} is not an anchor.")


def sinkhorn(
    log_weights: torch.Tensor,
    kind: Sinkhorn,
    row_sums: torch.Tensor | None = None,
    column_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """The plan `diag(e^f) W diag(e^g)` after `num_iterations` sweeps and a last row step.

    `f = log a - LSE_i(log w + g)`, `g = relaxation * (log b - LSE_r(log w + f))`, from `g = 0`.

    Raises:
        InfeasibleMarginals: the total masses differ, a marginal is not positive, a row or column has no
        admissible
            pair, or the tolerance of `kind` is not met.

    Source: Sinkhorn Distances (arXiv 1306.0895), section 4; unbalanced: arXiv 1607.05816, section 4.
    """
    mask = log_weights > _NEGATIVE_INFINITY
    if not (mask.any(-1).all() and mask.any(-2).all()):
        raise InfeasibleMarginals("a row or a column has no admissible pair, so no plan gives it mass.")
    if row_sums is None:
        row_sums = torch.ones_like(log_weights[..., 0])
    if column_sums is None:
        column_sums = reference_column_sums(mask, row_sums)
    check_marginals(row_sums, column_sums, balanced=kind.relaxation == 1)
    log_rows, log_columns = row_sums.log()[..., :, None], column_sums.log()[..., None, :]
    column_field = torch.zeros_like(log_weights[..., :1, :])
    for _ in range(kind.num_iterations):
        row_field = log_rows - torch.logsumexp(log_weights + column_field, dim=-1, keepdim=True)
        column_error = log_columns - torch.logsumexp(log_weights + row_field, dim=-2, keepdim=True)
        column_field = kind.relaxation * column_error
    row_field = log_rows - torch.logsumexp(log_weights + column_field, dim=-1, keepdim=True)
    plan = (log_weights + row_field + column_field).exp()
    if kind.tolerance is not None:
        miss = (plan.sum(-2) - column_sums).abs().max().item()
        if miss > kind.tolerance:
            raise InfeasibleMarginals(
                f"after {kind.num_iterations} sweeps a column sum misses its marginal by {miss:.2e}, more "
                f"than tolerance={kind.tolerance:g}; the marginals may be infeasible on this mask, or need "
                "more sweeps."
            )
    return plan


def reference_column_sums(mask: torch.Tensor, row_sums: torch.Tensor) -> torch.Tensor:
    """Column sums of the uniform row kernel on a mask: positive marginals that a plan on this mask can have.

    On a causal square `b_i = sum_{r >= i} 1 / (r + 1)`: uniform ones would force the identity, the only
    lower-triangular doubly stochastic matrix.
    """
    shares = mask.to(row_sums.dtype)
    return (shares / shares.sum(-1, keepdim=True).clamp(min=1) * row_sums[..., None]).sum(-2)


def check_marginals(row_sums: torch.Tensor, column_sums: torch.Tensor, balanced: bool = True) -> None:
    """Raises `InfeasibleMarginals` unless both are positive and, if `balanced`, have the same total mass."""
    for name, sums in (("row_sums", row_sums), ("column_sums", column_sums)):
        if not (sums > 0).all():
            raise InfeasibleMarginals(
                f"{name} has {sums.min().item():g}; a marginal must be positive everywhere."
            )
    if balanced:
        rows, columns = row_sums.sum(-1), column_sums.sum(-1)
        slack = 64 * torch.finfo(rows.dtype).eps * max(row_sums.shape[-1], column_sums.shape[-1])
        if ((rows - columns).abs() > slack * rows).any():
            raise InfeasibleMarginals(
                f"row_sums add up to {rows.flatten()[0].item():g}, but column_sums to "
                f"{columns.flatten()[0].item():g}; give both the same mass, or relax the columns."
            )


def check_causal_marginals(row_sums: torch.Tensor, column_sums: torch.Tensor) -> None:
    """Raises `InfeasibleMarginals` unless a plan on the causal mask (bottom right) has these sums.

    Sources up to i must take all the mass of the receivers that see no later source:
    `sum_{j <= i} b_j >= sum_{r + M - N <= i} a_r` for every i.
    """
    check_marginals(row_sums, column_sums)
    num_rows, num_columns = row_sums.shape[-1], column_sums.shape[-1]
    if num_rows > num_columns:
        raise InfeasibleMarginals(
            f"{num_rows} receivers on {num_columns} sources: the first {num_rows - num_columns} see no "
            "source."
        )
    offset = num_columns - num_rows
    supply, demand = column_sums.cumsum(-1)[..., offset:], row_sums.cumsum(-1)
    slack = 64 * torch.finfo(demand.dtype).eps * num_columns * demand[..., -1:]
    short = supply < demand - slack
    if short.any():
        position = int(short.reshape(-1, num_rows).any(0).nonzero()[0, 0])
        raise InfeasibleMarginals(
            f"the sources up to {position + offset} take "
            f"{supply.reshape(-1, num_rows)[0, position].item():g}, but the receivers up to {position}, "
            f"which see no others, give {demand.reshape(-1, num_rows)[0, position].item():g}."
        )


def _any(mask: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    for dim in dims:
        mask = mask.any(dim=dim, keepdim=True)
    return mask


def _softmax(logits: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    inside = logits > _NEGATIVE_INFINITY
    some = _any(inside, dims)
    # An empty row is replaced before the exponential, not after: NaN times zero would stay in the gradient.
    safe = torch.where(inside, logits, torch.zeros_like(logits))
    top = logits.amax(dims, keepdim=True).detach()
    weights = (
        (safe - torch.where(some, top, torch.zeros_like(top))).masked_fill(~inside, _NEGATIVE_INFINITY).exp()
    )
    return weights / weights.sum(dims, keepdim=True).masked_fill(~some, 1.0)


def _keep_largest(log_weights: torch.Tensor, k: int) -> torch.Tensor:
    # A stable sort keeps the earlier of two equal weights; topk leaves the choice open.
    order = torch.sort(log_weights, dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(log_weights, dtype=torch.bool).scatter(-1, order[..., :k], True)
    return log_weights.masked_fill(~kept, _NEGATIVE_INFINITY)


def _entmax(log_weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """`p_i = [(alpha - 1) z_i - theta]_+^(1 / (alpha - 1))` with theta such that p sums to one.

    Source: Sparse Sequence-to-Sequence Models (arXiv 1905.05702), section 3.
    """
    inside = log_weights > _NEGATIVE_INFINITY
    has_source = inside.any(-1, keepdim=True)
    top = torch.where(has_source, log_weights, torch.zeros_like(log_weights)).amax(-1, keepdim=True).detach()
    # Outside the mask any number far enough below the largest leaves p = 0 and keeps infinities out.
    scores = (alpha - 1) * torch.where(
        inside, log_weights - top, torch.full_like(log_weights, -2 / (alpha - 1))
    )
    power = 1 / (alpha - 1)
    with torch.no_grad():
        low, high = torch.full_like(scores[..., :1], -1.0), torch.zeros_like(scores[..., :1])
        for _ in range(60):
            middle = (low + high) / 2
            too_much = (scores - middle).clamp(min=0).pow(power).sum(-1, keepdim=True) > 1
            low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
        theta = (low + high) / 2
        slope = power * (scores - theta).clamp(min=0).pow(power - 1).masked_fill(scores <= theta, 0.0).sum(
            -1, keepdim=True
        )
    # One Newton step, differentiated through the scores only, gives theta its exact gradient.
    theta = theta + ((scores - theta).clamp(min=0).pow(power).sum(-1, keepdim=True) - 1) / slope.clamp(
        min=1e-300
    )
    return (scores - theta).clamp(min=0).pow(power).masked_fill(~inside, 0.0)
