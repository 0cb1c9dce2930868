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
    for share in ("selection", "boundaries", "none", "selection, no softcap"):
        found = dhsa._arm(model, share)(ids, use_cache=False).logits
        torch.testing.assert_close(found[:, :40], full[:, :40], rtol=1e-4, atol=1e-5)
        assert (found - full)[:, 64:].abs().max() > 1e-3


def test_the_bars_are_those_of_the_paper():
    times = {"selection": 1.0, "selection, no softcap": 0.5, "SDPA": 2.0, "eager": 3.0}
    rivals = ("SDPA", "eager")
    rows = list(dhsa._prompt_rows(8192, times, times, ("selection",), rivals))
    assert {("SDPA" in row.what, "no softcap" in row.what, row.ours) for row in rows} == {
        (True, True, 0.5), (False, False, 1.0),
    }  # fmt: skip
    bars = {row.what.split(",")[0] + row.what.split("against")[1]: row.required for row in rows}
    assert bars == {
        "prompt through the whole model SDPA": pytest.approx(1 / 0.85),
        "prompt through the whole model eager": pytest.approx(1 / 0.75),
        "peak memory of a prompt SDPA": None,
        "peak memory of a prompt eager": pytest.approx(1 / 0.65),
    }
    rows = list(dhsa._prompt_rows(32768, times, times, ("selection",), ("SDPA",)))
    assert [row.required for row in rows] == [2.0, None]


def test_the_quality_table_has_all_arms(monkeypatch):
    monkeypatch.setattr(_dhsa_quality, "LENGTH", 320)
    model = tiny_model("llama", max_position_embeddings=2048).eval()
    vocabulary = RecallVocabulary(1, tuple(range(2, 40)), tuple(range(40, 80)))
    needles = recall_texts(
        2, vocabulary, num_pairs=2, num_queries=2, num_fillers=300, haystack=torch.randint(80, 250, (900,))
    )
    blocks, ends = torch.randint(1, 250, (1, 320)), torch.arange(30)
    own = Setting(model, torch.randint(1, 250, (2048,)), blocks, {0.1: needles}, 1, sentence_ends=ends)
    monkeypatch.setattr(_dhsa_quality, "setting", lambda device, quick: own)
    rows = list(_dhsa_quality.quality("cpu", True))
    losses = [row for row in rows if "above full attention" in row.what]
    assert len(losses) == 8
    assert len({round(row.ours, 9) for row in losses}) > 4
    assert sum("needles found" in row.what for row in rows) == 7
    assert losses[0].what.endswith("blocks of 64") and losses[0].ratio is None
    names = ["chance, the share of boundaries", "ends of sentences and lines", "blocks of 16"]
    assert [row.baseline_name for row in rows[:3]] == names
    assert len({row.ours for row in rows[:3]}) == 1 and all(0 < row.baseline < 1 for row in rows[:3])


@torch.no_grad()
def test_a_timed_step_chooses_and_attends_the_same_every_time():
    query, key, value = (torch.randn(2, heads, tokens, 8) for heads, tokens in ((4, 1), (2, 300), (2, 300)))
    for options in ({"boundaries": "fixed", "budget": 256}, {"mode": "topk", "density": 0.2}):
        call = dhsa.step_behind(query, key, value, **options)
        out = call()
        assert out.shape == (2, 4, 1, 8)
        full = dhsa.dense_attention(query, key, value)
        assert not torch.allclose(out, full) and (out - full).abs().max() < 1.5
        torch.testing.assert_close(call(), out, rtol=1e-3, atol=1e-3)


def test_losses_of_steps_are_compared_with_those_of_all_keys(monkeypatch):
    monkeypatch.setattr(_dhsa_quality, "LENGTH", 320)
    own = Setting(
        tiny_model("llama", max_position_embeddings=2048).eval(), None, torch.randint(1, 250, (2, 320)), {}, 1
    )
    monkeypatch.setattr(_dhsa_quality, "setting", lambda device, quick: own)
    rows = list(_dhsa_quality.decoding("cpu", True))
    assert len(rows) == 4
    # A budget for all of a text is no choice.
    assert rows[1].ours == pytest.approx(rows[1].baseline)
    assert rows[0].ours != rows[0].baseline


def test_the_claim_is_loaded():
    parts = {"speed", "sharing", "steps", "blocks", "decode", "quality", "decode_quality"}
    assert set(load("dhsa").parts) == parts
