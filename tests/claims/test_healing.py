"""The rows of healing and alignment, on tiny models."""

from __future__ import annotations

import pytest
import torch

from tests.claims.test_tpla import study
from tests.tiny import tiny_llama, tiny_text, tiny_tokenizer
from undivided.claims import _healing, transmla
from undivided.claims._tiny_lm import train
from undivided.models.checkpoint import Checkpoint


@pytest.fixture(autouse=True)
def short_text(monkeypatch):
    text = type("Texts", (), {"calibration": tiny_text(2000)})
    monkeypatch.setattr(_healing, "demo_texts", lambda: text)


def test_alignment_gives_back_what_cutting_costs():
    one = study()
    tokens = torch.tensor(one.tokenizer(tiny_text(2000)).input_ids)
    train(one.model, tokens, steps=60, batch_size=8, length=24)
    rows = list(_healing.aligned(one, "tiny", (3000, 6000), batch_size=4))
    assert [row.baseline_name for row in rows] == ["MLA", "MLA", "pca without training"]
    assert len({row.what for row in rows}) == 3
    assert rows[2].ours == rows[1].ours and rows[2].holds
    assert rows[1].ours - rows[1].baseline < 0.7 * (rows[2].baseline - rows[1].baseline)


def test_healing_reports_what_is_left_of_the_gap(tmp_path):
    ids = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(0))
    source = Checkpoint(tiny_llama(), tiny_tokenizer(), tmp_path, "tiny")
    train(source.model, torch.tensor(source.tokenizer(tiny_text(2000)).input_ids), steps=60, length=24)
    source.model.eval()
    runs = transmla.Study(source, ids, [tiny_text(300, seed=1)], 200)
    model = runs.compressions(4, 2)(8)
    rows = list(_healing.healed_mla(runs.source, model, runs.perplexity, "tiny", tokens=20_000, length=32))
    values = [row.ours for row in rows[:-1]]
    assert len(values) == 6 and values[-1] < values[0]
    left = rows[-1]
    assert left.required == 10.0
    assert left.ratio == pytest.approx(
        (values[0] - left_baseline(rows)) / (max(values[-1] - left_baseline(rows), 1e-3))
    )


def left_baseline(rows):
    return rows[0].baseline
