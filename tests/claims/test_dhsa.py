from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_model
from undivided.claims import _dhsa_quality, dhsa, load
from undivided.claims._core_quality import Setting
from undivided.data.recall import RecallVocabulary, recall_texts
from undivided.layers.boundaries import BoundaryPredictor

SMALL = {
    "budget": 64,
    "query_block": 16,
    "num_local": 16,
    "num_global": 8,
    "num_instruction": 8,
    "threshold": -1e9,
}


def test_the_gate_passes_and_can_fail(monkeypatch):
    dhsa.gate("cpu")
    monkeypatch.setattr(
        "undivided.claims.dhsa.dhsa_select",
        lambda *args, **options: torch.zeros(1, 1, 7, 4, dtype=torch.int32),
    )
    with pytest.raises((AssertionError, ValueError)):
        dhsa.gate("cpu")


@torch.no_grad()
def test_the_arms_are_what_their_names_say(monkeypatch):
    for name, value in (("HEADS", 4), ("GROUPS", 2), ("HEAD_DIM", 16), ("_OPTIONS", SMALL)):
        monkeypatch.setattr(dhsa, name, value)
    monkeypatch.setattr(dhsa, "seeded_predictor", lambda: BoundaryPredictor(32))
    model = tiny_model("gemma2", sliding_window=48, attn_logit_softcapping=None)
    model.set_attn_implementation("eager")
    ids = torch.randint(1, 256, (1, 150))
    full = model(ids).logits
    for name in ("eager", "SDPA", dhsa._FLASH):
        torch.testing.assert_close(
            dhsa._arm(model, name)(ids, use_cache=False).logits, full, rtol=1e-4, atol=1e-5
        )
    for share in ("selection", "boundaries", "none"):
        found = dhsa._arm(model, share)(ids, use_cache=False).logits
        torch.testing.assert_close(found[:, :40], full[:, :40], rtol=1e-4, atol=1e-5)
        assert (found - full)[:, 64:].abs().max() > 1e-3


def test_the_bars_are_those_of_the_paper():
    times = {"selection": 1.0, "SDPA": 2.0, "eager": 3.0}
    rows = list(dhsa._prompt_rows(8192, times, times, ("selection",)))
    bars = {row.what.split(",")[0] + row.what.split("against")[1]: row.required for row in rows}
    assert bars == {
        "prompt through the whole model SDPA": pytest.approx(1 / 0.85),
        "prompt through the whole model eager": pytest.approx(1 / 0.75),
        "peak memory of a prompt SDPA": None,
        "peak memory of a prompt eager": pytest.approx(1 / 0.65),
    }
    rows = list(dhsa._prompt_rows(32768, {"selection": 1.0, "SDPA": 2.0}, times, ("selection",)))
    assert [row.required for row in rows] == [2.0, None]


def test_the_quality_table_has_all_arms(monkeypatch):
    monkeypatch.setattr(_dhsa_quality, "LENGTH", 320)
    monkeypatch.setattr(_dhsa_quality, "_precision", lambda *arguments: iter(()))
    model = tiny_model("llama", max_position_embeddings=2048).eval()
    vocabulary = RecallVocabulary(1, tuple(range(2, 40)), tuple(range(40, 80)))
    needles = recall_texts(
        2, vocabulary, num_pairs=2, num_queries=2, num_fillers=300, haystack=torch.randint(80, 250, (900,))
    )
    own = Setting(model, torch.randint(1, 250, (2048,)), torch.randint(1, 250, (1, 320)), needles, 1)
    monkeypatch.setattr(_dhsa_quality, "setting", lambda device, quick: own)
    rows = list(_dhsa_quality.quality("cpu", True))
    losses = [row for row in rows if "above full attention" in row.what]
    assert len(losses) == 8
    assert len({round(row.ours, 9) for row in losses}) > 4
    assert sum("needles found" in row.what for row in rows) == 7
    assert rows[0].what.endswith("blocks of 64") and rows[0].ratio is None


def test_the_claim_is_loaded():
    assert set(load("dhsa").parts) == {"speed", "sharing", "steps", "blocks", "quality"}
