"""The claim of RCMHA: its gate can fail, its eager rival is right, and its models read segment by segment."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from undivided import claims
from undivided.claims import rcmha
from undivided.claims._tiny_lm import train


def test_the_gate_passes_and_can_fail(monkeypatch):
    claim = claims.load("rcmha")
    claim.gate("cpu")
    right = rcmha._attention
    monkeypatch.setattr(
        rcmha, "_attention", lambda b: lambda **x: right(b)(**x) * (1.01 if b == "blocked" else 1.0)
    )
    with pytest.raises(AssertionError):
        claim.gate("cpu")


def test_the_loss_of_a_window_is_that_of_one_pass_with_a_memory_that_holds_it():
    model = rcmha._model("rcmha", 2, 0, 256)
    model.memory_length = 256
    ids = torch.randint(256, (2, 3 * rcmha._SEGMENT + 1))
    whole = model(ids[:, :-1])[0]
    expected = F.cross_entropy(whole.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(rcmha._segments_loss(model, ids), expected)


def test_models_learn_and_are_evaluated_on_what_they_have_not_seen():
    text = "the cat sat on the mat. " * 300
    model = rcmha._model("rcmha", 1, 0, 64)
    before = rcmha._evaluate(model, text, streams=4, most_bytes=2048)
    losses = train(model, text, steps=30, batch_size=4, length=129, seed=0, loss=rcmha._segments_loss)
    after = rcmha._evaluate(model, text, streams=4, most_bytes=2048)
    assert losses[-1] < losses[0]
    assert after[0] > before[0] + 20
    assert after[1] < before[1]
