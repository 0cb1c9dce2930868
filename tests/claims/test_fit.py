from __future__ import annotations

import pytest
import torch

from undivided.claims.fit import CLAIM, FlashViT, gate, levels, pairs, seconds_and_gib
from undivided.layers.fit import TransformerLayer


def test_the_gate_passes_and_fails_where_a_layer_is_another(monkeypatch):
    gate("cpu")
    forward = TransformerLayer.forward
    calls = []

    def sometimes(self, x, **options):
        calls.append(1)
        out = forward(self, x, **options)
        return out + 1e-3 * out.sin() if len(calls) == 12 else out

    monkeypatch.setattr(TransformerLayer, "forward", sometimes)
    with pytest.raises(AssertionError, match="FIT"):
        gate("cpu")


def test_a_step_changes_the_weights():
    model = FlashViT(6, 8, 2, 1, 3)
    before = model.stem.weight.clone()
    seconds, memory = seconds_and_gib(lambda: model, torch.randn(1, 2, 3, 3), 1)
    assert seconds > 0 and memory == 0
    assert not torch.equal(model.stem.weight, before)


def test_images_become_rows_of_levels():
    x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    ids = levels(x, 8)
    assert ids.shape == (1, 8, 8) and ids.min() == 0 and ids.max() == 15
    assert (ids.flatten().diff() >= 0).all()
    assert levels(torch.zeros(2, 1, 28, 28), 14).shape == (2, 14, 14)


def test_marks_are_in_different_groups_and_the_label_says_whether_they_are_alike():
    x, y = pairs(200, torch.Generator().manual_seed(0))
    marks = x > 1.5
    assert (marks.any(-1).any(-1).sum(1) == 2).all() and (marks.sum((1, 2, 3)) == 2).all()
    assert torch.equal((marks.sum((1, 2)) == 2).any(-1), y.bool())
    assert 60 < y.sum() < 140


def test_the_claim_has_its_parts():
    assert list(CLAIM.parts) == ["speed", "slope", "quality", "pairs"]
