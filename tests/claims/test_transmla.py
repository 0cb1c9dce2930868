"""The claim of TransMLA, run on a tiny model in the place of SmolLM2-135M."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_llama, tiny_text, tiny_tokenizer
from undivided.claims import load
from undivided.claims import transmla as claim
from undivided.models.checkpoint import Checkpoint


@pytest.fixture
def runs(tmp_path) -> claim.Study:
    model = tiny_llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=3, head_dim=64)
    source = Checkpoint(model=model, tokenizer=tiny_tokenizer(), path=tmp_path, name="tiny")
    calibration = torch.randint(1, 200, (4, 32))
    return claim.Study(source, calibration, [tiny_text(200), tiny_text(300, seed=1)], tokens=200)


def test_measures_stages_sizes_and_what_each_step_is_worth(runs, monkeypatch) -> None:
    monkeypatch.setattr(claim, "study", lambda device, quick: runs)
    rows = list(load("transmla").measure("cpu", True))
    assert [row.what for row in rows[:4]] == ["partial positions, no training"] * 4
    assert rows[4].baseline == rows[0].ours
    assert rows[4].ours == min(row.ours for row in rows[:4])
    assert rows[4].holds is True
    assert ["352" in row.shape or "of 384" in row.shape for row in rows[5:]] == [True] * 7
    assert [row.required for row in rows[5:]] == [None] * 3 + [1.0] * 4
    assert {row.ours for row in rows[8:]} == {rows[6].ours}
    assert len({row.baseline for row in rows[8:]}) == 4


def test_without_rotation_the_first_head_keeps_positions(runs) -> None:
    plain = runs.axes(32, None)[0]
    assert plain.count_nonzero() == 192
    assert plain[:64, :32].count_nonzero() == 32


def test_perplexity_weighs_texts_by_their_tokens(runs) -> None:
    both = runs.perplexity(runs.source.model)
    alone = [
        claim.Study(runs.source, runs.calibration, [text], runs.tokens).perplexity(runs.source.model)
        for text in runs.texts
    ]
    assert min(alone) < both < max(alone)
