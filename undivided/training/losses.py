"""What a student is pulled towards: the teacher's next-token distribution, and its features."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Rows of logits turned into float32 log-probabilities at once: 2048 x 49K words are 400 MB, twice.
_ROWS = 2048


def distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Mean divergence of the student's next-token distribution from the teacher's, in nats.

    `T^2 / n * sum_t KL(softmax(teacher_t / T) || softmax(student_t / T))` over the n positions of the mask. In
    float32 at least, a slice of rows at a time, recomputed in the backward pass.

    Args:
        student: logits `[..., length, vocabulary]`.
        teacher: logits of the same shape; no gradient flows into them.
        mask: boolean `[..., length]`, the positions that count; default all.
        temperature: T.

    Returns:
        A scalar; zero where no position counts.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (arXiv 1503.02531), section 2.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} must have one shape: "
            "the same tokens and the same vocabulary."
        )
    if mask is not None and mask.shape != student.shape[:-1]:
        raise ValueError(
            f"mask {list(mask.shape)} must be {list(student.shape[:-1])}, one entry a position of the logits."
        )
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive.")
    rows = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    weights = rows[0].new_ones(len(rows[0])) if mask is None else mask.flatten().to(student.dtype)
    weights = weights.to(torch.promote_types(student.dtype, torch.float32))
    total = sum(
        # Nothing is drawn at random in it, and a CUDA graph could not keep a generator's state.
        checkpoint(_weighted_divergence, s, t, w, temperature, use_reentrant=False, preserve_rng_state=False)
        for s, t, w in zip(rows[0].split(_ROWS), rows[1].split(_ROWS), weights.split(_ROWS), strict=True)
    )
    return temperature**2 * total / weights.sum().clamp(min=1)


def _weighted_divergence(
    student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, temperature: float
) -> torch.Tensor:
    log_p, log_q = (F.log_softmax(x.to(weights.dtype) / temperature, dim=-1) for x in (teacher, student))
    return weights @ (log_p.exp() * (log_p - log_q)).sum(-1)


def feature_loss(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared error of features relative to the size of the teacher's, so that all layers weigh alike.

    `sum_t ||student_t - teacher_t||^2 / sum_t ||teacher_t||^2` over the positions of the mask.

    Args:
        student: features `[..., length, width]`.
        teacher: features of the same shape; no gradient flows into them.
        mask: boolean `[..., length]`; default all positions.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student features {list(student.shape)} and teacher features {list(teacher.shape)} must have one shape."
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    error, size = (student - teacher).square().sum(-1), teacher.square().sum(-1)
    if mask is not None:
        error, size = error * mask, size * mask
    return error.sum() / size.sum().clamp(min=torch.finfo(dtype).tiny)
