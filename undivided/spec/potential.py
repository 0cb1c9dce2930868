"""Potential, free energy and divergence of a row: they exist for positive row-anchored kernels only."""

from __future__ import annotations

import torch

from undivided.spec.errors import NotPositive
from undivided.spec.evaluation import Tensors
from undivided.spec.evidence import Exp
from undivided.spec.interpreter import interpret
from undivided.spec.specification import AttentionSpec


def effective_potential(spec: AttentionSpec, tensors: Tensors) -> torch.Tensor:
    """Potential of a Gibbs specification, `U_ri = -s_ri - tau log pi_ri`: `alpha = softmax(-U / tau)`.

    Args:
        spec: a specification with `is_gibbs`.
        tensors: its inputs.

    Returns:
        `[batch, heads, receivers, sources]`, float64, +inf outside the mask; pi is kappa normalised over the
        row.

    Raises:
        NotPositive: the specification is not one row-anchored exponential kernel (a signed mix, say).
    """
    if not spec.is_gibbs or not isinstance(spec.evidence.link, Exp):
        raise NotPositive(
            "a potential exists only for one positive row-anchored kernel with the exponential link; this "
            f"has link={spec.evidence.link!r}, anchor={spec.anchor!r} and {len(spec.mix)} terms."
        )
    trace = interpret(spec, tensors).terms[0]
    log_prior = torch.log_softmax(trace.log_prior.masked_fill(~trace.mask, float("-inf")), dim=-1)
    potential = -trace.scores - spec.evidence.link.temperature * log_prior
    return potential.masked_fill(~trace.mask, float("inf"))


def free_energy(
    weights: torch.Tensor, scores: torch.Tensor, log_prior: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Free energy of a row: `F[p] = -sum_i p_i s_i + tau KL(p || pi)`.

    Softmax with prior is its only minimiser: `F[p] + tau log Z = tau KL(p || alpha)`, `Z = sum_i pi_i e^(s_i
    / tau)`.

    Args:
        weights: p, rows of mass one, `[..., sources]`.
        scores: `[..., sources]`.
        log_prior: log pi, rows of mass one, `[..., sources]`.
        temperature: tau.

    Returns:
        `[...]`.

    Raises:
        NotPositive: a weight is negative.

    Source: Geometric Attention (arXiv 2601.11618 v1), abstract (Gibbs weights).
    """
    return temperature * divergence(weights, log_prior) - (weights * scores).sum(-1)


def divergence(weights: torch.Tensor, log_reference: torch.Tensor) -> torch.Tensor:
    """`KL(p || q) = sum_i p_i (log p_i - log q_i)` of rows, zero where `p_i` is zero.

    Args:
        weights: p, `[..., sources]`.
        log_reference: log q, `[..., sources]`.

    Returns:
        `[...]`; infinite where p has mass and q has none.

    Raises:
        NotPositive: a weight is negative; then there is no divergence.
    """
    if (weights < 0).any():
        raise NotPositive(
            f"the smallest weight is {weights.min().item():g}; a divergence needs weights of 0 or more."
        )
    # Zero weights are cut out before the logarithm, so that neither the value nor the gradient is NaN.
    some = weights > 0
    logs = torch.where(some, weights, torch.ones_like(weights)).log()
    difference = torch.where(some, logs - log_reference, torch.zeros_like(logs))
    return (weights * difference).sum(-1)


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """`-sum_i p_i log p_i` of rows `[..., sources]`; raises `NotPositive` for negative weights."""
    return -divergence(weights, torch.zeros_like(weights))
