from __future__ import annotations

import math

import pytest
import torch

from tests.tiny import tiny_text
from undivided.claims._tiny_lm import (
    as_bytes,
    bits_per_byte,
    matching_width,
    mean_and_deviation,
    next_byte_loss,
    tiny_lm,
    train,
    train_tiny_lm,
)

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8, "num_hidden_layers": 1}
SCHEDULE = {"steps": 12, "batch_size": 4, "length": 32}


def test_learns_and_is_the_same_for_the_same_seed():
    text, heldout = tiny_text(4000), tiny_text(500, seed=1)
    first, second = (train_tiny_lm(None, text, heldout, seeds=(0, 1), **SCHEDULE, **SMALL) for _ in range(2))
    assert [run.losses for run in first] == [run.losses for run in second]
    assert first[0].losses != first[1].losses
    for run in first:
        assert len(run.losses) == 12
        assert run.losses[-1] < run.losses[0]
        assert run.bits_per_byte == pytest.approx(bits_per_byte(run.model, heldout, length=32))
        assert run.bits_per_byte < 8


def test_every_mechanism_sees_the_same_text_in_the_same_order():
    seen = []

    def keep(model, ids):
        seen.append(ids)
        return next_byte_loss(model, ids)

    for attention in (None, {"mechanism": "gqa"}):
        train(tiny_lm(attention, **SMALL), tiny_text(), steps=2, batch_size=2, length=16, loss=keep)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_a_layer_may_differ_from_the_others():
    model = tiny_lm([None, {"mechanism": "gqa"}], **(SMALL | {"num_hidden_layers": 2}))
    assert [type(layer).__name__ for layer in model.attention_layers()] == ["LlamaAttention", "GQAttention"]


def test_bits_of_a_model_that_knows_nothing_are_eight():
    model = tiny_lm(None, **SMALL)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert bits_per_byte(model, tiny_text(300), length=50) == pytest.approx(8.0, abs=1e-5)


def test_the_width_of_the_mlps_matches_a_number_of_parameters():
    for attention in (None, {"mechanism": "gda"}):
        width = matching_width(attention, 20_000, **SMALL)
        counts = [
            sum(p.numel() for p in tiny_lm(attention, **SMALL, intermediate_size=w).parameters())
            for w in (width - 1, width, width + 1)
        ]
        assert abs(counts[1] - 20_000) <= min(abs(counts[0] - 20_000), abs(counts[2] - 20_000))
    with pytest.raises(ValueError, match="parameters=100 is less than the .* MLPs of width 1"):
        matching_width(None, 100, **SMALL)


def test_bytes_and_statistics():
    assert as_bytes("aé").tolist() == [97, 195, 169]
    mean, deviation = mean_and_deviation([1.0, 2.0, 3.0])
    assert (mean, deviation) == (2.0, 1.0)
    assert mean_and_deviation([4.0]) == (4.0, 0.0)
    assert math.isfinite(deviation)
