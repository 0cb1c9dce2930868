"""Larger teachers and preferences: the rows, the pairs, and that a model learns to order them."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_llama
from undivided.claims import _upcycling
from undivided.claims._conversion_study import Scale
from undivided.claims._upcycling import ordered, ordered_rows, speech_pairs, teacher_rows

SIZES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def test_teachers_are_told_apart(monkeypatch):
    monkeypatch.setattr(_upcycling, "scale_of", lambda device, key_heads: Scale(SIZES, 2, 32, 4))
    rows = list(teacher_rows("cpu", quick=True))
    assert [row.required for row in rows] == [None, None, None, 1.0]
    assert len({row.ours for row in rows}) == 4


def texts():
    """Two thirds even tokens, then odd ones."""
    generator = torch.Generator().manual_seed(0)
    early = 2 * torch.randint(60, (48, 64), generator=generator)
    return torch.cat([early, 2 * torch.randint(60, (48, 64), generator=generator) + 1])


def test_pairs_like_the_end_of_a_text_and_are_held_out_evenly():
    pairs, judged = speech_pairs([7], texts(), 32, 8)
    assert len(pairs) + len(judged) == 40 and len(judged) == 8
    assert all(p.chosen[0] % 2 == 1 and p.rejected[0] % 2 == 0 and p.prompt == [7] for p in pairs + judged)
    assert not {tuple(p.chosen) for p in pairs} & {tuple(p.chosen) for p in judged}


def test_a_model_learns_to_order_held_out_pairs():
    pairs, judged = speech_pairs([7], texts(), 40, 8)
    model = tiny_llama()
    before = ordered(model, judged)
    rows = list(ordered_rows(model, pairs, judged, "tiny", learning_rate=3e-3))
    assert rows[0].baseline == pytest.approx(max(before, 1e-6)) and rows[0].required == 1.0
    assert rows[0].ours == ordered(model, judged)
    assert rows[1].ours > 0.9


def test_preferences_need_a_gpu():
    assert list(_upcycling.preference_rows("cpu", True)) == []
