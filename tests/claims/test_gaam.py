"""The claim of GAAM: its gate passes and can fail, and its heads learn from frozen features."""

from __future__ import annotations

import pytest
import torch

from undivided import claims
from undivided.claims import gaam
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
    features = gaam._frozen_features(images, 0, 30, "cpu")
    assert features[0].shape == (len(images.train_images), 8, 64)
    assert not features[0].requires_grad
    torch.manual_seed(0)
    head = gaam.LayerwiseGAT(8, 64, 10, attention="none", channels=16)
    assert gaam._accuracy(head, features, 60, 0) > 20
