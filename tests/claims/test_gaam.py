"""The claim of GAAM: its gate passes and can fail, and its heads learn from frozen features."""

from __future__ import annotations

import pytest
import torch

from undivided import claims
from undivided.claims import _gaam_quality, gaam
from undivided.data import digits


def test_the_gate_passes_and_can_fail(monkeypatch):
    claim = claims.load("gaam")
    claim.gate("cpu")
    wrong = gaam._gated
    monkeypatch.setattr(
        gaam, "_gated", lambda b: lambda **x: wrong(b)(**x) * (1.01 if b == "composed" else 1.0)
    )
    with pytest.raises(AssertionError):
        claim.gate("cpu")


def test_heads_learn_from_features_that_stay():
    images = digits()
    features = _gaam_quality._frozen_features(images, 0, 30, "cpu")
    assert features[0].shape == (len(images.train_images), 8, 64)
    assert not features[0].requires_grad
    torch.manual_seed(0)
    head = _gaam_quality.LayerwiseGAT(8, 64, 10, attention="none", channels=16)
    assert _gaam_quality._accuracy(head, features, 60, 0) > 20


def test_every_arm_has_a_row_and_drift_is_drift(monkeypatch):
    monkeypatch.setattr(_gaam_quality, "_accuracy", lambda head, features, *rest: float(features[2].std()))
    rows = list(_gaam_quality.drift("cpu", True))
    arms = [row for row in rows if row.what.startswith("test accuracy")]
    assert len(arms) == 2 * len(_gaam_quality._ARMS)
    assert arms[0].ours > 1.5 * arms[-1].ours
    assert {row.required for row in arms if "DAAM, " in row.what and "weights" in row.what} >= {None, 1.0}
    weights = next(row for row in rows if row.what.startswith("weights"))
    assert (weights.ours, weights.baseline) == (2 * 2 * 64, 4 * 64 * 64 + 4 * 64)


def test_importance_is_compared_with_gradients():
    (row,) = _gaam_quality.importance("cpu", True)
    assert 0.5 <= row.ours <= 1 and 0.5 <= row.baseline <= 1
    score, positive = torch.tensor([0.1, 0.9, 0.8, 0.2]), torch.tensor([False, True, True, False])
    assert _gaam_quality._area(score, positive) == _gaam_quality._area(-score, positive) == 1.0
    assert _gaam_quality._area(torch.zeros(4), positive) == 0.5
