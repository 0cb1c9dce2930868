"""The losses of distillation."""

from __future__ import annotations

import pytest
import torch

from undivided.training import distillation_loss, feature_loss, losses


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_is_zero_and_flat_where_student_and_teacher_agree():
    teacher = logits(2, 5, 7)
    student = (teacher + 3.0).requires_grad_()
    loss = distillation_loss(student, teacher)
    loss.backward()
    assert abs(loss.item()) < 1e-14
    assert student.grad.abs().max() < 1e-14


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_is_the_mean_divergence_over_the_mask(temperature, monkeypatch):
    monkeypatch.setattr(losses, "_ROWS", 3)
    student, teacher = logits(2, 5, 7, seed=1), logits(2, 5, 7, seed=2)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    p, q = ((x / temperature).softmax(-1)[mask] for x in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, mask, temperature=temperature), expected)


def test_gradient_reaches_the_student_alone():
    student, teacher = logits(1, 3, 5).requires_grad_(), logits(1, 3, 5, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, teacher.detach()), student)
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None


def test_nothing_to_learn_is_a_zero_loss():
    loss = distillation_loss(logits(1, 3, 5).requires_grad_(), logits(1, 3, 5, seed=1), torch.zeros(1, 3) > 0)
    assert loss.item() == 0.0


def test_feature_loss_weighs_layers_alike_whatever_their_size():
    student, teacher = logits(2, 5, 7, seed=1), logits(2, 5, 7, seed=2)
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    loss = feature_loss(student, teacher, mask)
    torch.testing.assert_close(feature_loss(100 * student, 100 * teacher, mask), loss)
    expected = (student - teacher)[mask].square().sum() / teacher[mask].square().sum()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distillation_loss(logits(1, 3, 5), logits(1, 3, 6)), "the same vocabulary"),
        (lambda: distillation_loss(logits(1, 3, 5), logits(1, 3, 5), torch.ones(1, 2)), r"must be \[1, 3\]"),
        (lambda: distillation_loss(logits(1, 3, 5), logits(1, 3, 5), temperature=0), "temperature=0 must be"),
        (lambda: feature_loss(logits(1, 3, 5), logits(1, 4, 5)), "must have one shape"),
    ],
)
def test_says_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
