from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.tiny import tiny_model
from undivided.claims import _core_quality, core_context, load
from undivided.claims._sink_window import with_sink_window
from undivided.data.recall import RecallVocabulary, recall_texts
from undivided.ops import dense_attention
from undivided.ops.core_context import visible, visible_cores


def test_pairs_are_those_of_the_mask():
    assert core_context.pairs(5, group_size=2, window=2) == 1 + 2 + 3 + (1 + 2) + (1 + 3)
    for length, group_size, window in ((50, 4, 10), (70, 16, 21)):
        cores = visible_cores(length, group_size, window)
        mask = visible(length, length, cores, length, group_size, window, torch.device("cpu"))
        assert core_context.pairs(length, group_size, window) == int(mask.sum())


def test_the_gate_passes_and_can_fail(monkeypatch):
    core_context.gate("cpu")
    everything = lambda queries, keys, cores, *sizes: torch.ones(queries, cores + keys, dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr("undivided.ops.core_context.sdpa.visible", everything)
    with pytest.raises(AssertionError, match="error above"):
        core_context.gate("cpu")


def test_the_cache_is_what_was_filled(monkeypatch):
    monkeypatch.setattr(core_context, "HEAD_DIM", 8)
    monkeypatch.setattr(core_context, "MHA", (16, 16))
    monkeypatch.setattr(core_context, "GQA", (16, 8))
    monkeypatch.setattr(core_context, "_CACHED", 16384)
    rows = list(core_context._memory("cpu"))
    kinds = ["query", "query", "kv"]
    assert [row.what for row in rows] == [f'cache of a layer, core_heads="{kind}"' for kind in kinds]
    cores, single, waiting = (16384 - 1024) // 16, 1024, 1024 * 4
    # One head.
    assert rows[0].ours * 2**20 == pytest.approx(2 * (2 * 8 * (cores + single) + waiting / 2))
    assert rows[0].baseline * 2**20 == pytest.approx(2 * 2 * 8 * 16384)
    assert rows[0].required == pytest.approx(1 / 0.07)


def test_a_window_with_sinks_sees_sinks_and_window():
    model = tiny_model("llama", dtype=torch.float64)
    host = with_sink_window(model, 3, 2)
    layer = host.attention_layers()[0]
    query, key, value = (torch.randn(1, heads, 9, 8, dtype=torch.float64) for heads in (4, 2, 2))
    seen = torch.zeros(9, 9, dtype=torch.bool)
    for row in range(9):
        seen[row, [j for j in range(row + 1) if j < 2 or j > row - 3]] = True
    expected = dense_attention(query, key, value, attn_mask=seen, backend="reference")
    torch.testing.assert_close(layer.attend(query, key, value, None), expected)
    with pytest.raises(
        ValueError, match="the baseline reads whole texts without padding and without a cache."
    ):
        layer.attend(query[:, :, :1], key, value, None)


@pytest.fixture
def table(monkeypatch):
    for name, value in (("LENGTH", 64), ("GROUP", 4)):
        monkeypatch.setattr(_core_quality, name, value)
    model = tiny_model("llama").eval()
    vocabulary = RecallVocabulary(1, tuple(range(2, 40)), tuple(range(40, 80)))
    needles = recall_texts(
        4, vocabulary, num_pairs=2, num_queries=2, num_fillers=50, haystack=torch.randint(80, 250, (500,))
    )
    own = _core_quality.Setting(
        model,
        torch.randint(1, 250, (600,)),
        torch.randint(1, 250, (2, 64)),
        {0.1: needles, 0.9: needles},
        1,
        16,
    )
    assert own.budget == 32
    monkeypatch.setattr(_core_quality, "setting", lambda *arguments: own)
    return own


def test_the_quality_table_trains_attention_alone_and_has_its_bars(table):
    own, model = table, table.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = list(_core_quality.quality("cpu", True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    bars = {row.baseline_name: row.required for row in rows if row.required is not None}
    assert bars == {"full attention": 0.97, _core_quality._STREAMING: 1.0}
    assert sum("after 1 steps" in row.what for row in rows) == 3 + 3
    assert sum("as it is" in row.what for row in rows) == 7 + 8 + 9
    tuned = _core_quality._tuned(own, _core_quality._arms(own)["core context"])
    for name, tensor in tuned.native.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("self_attn" not in name), name


def test_pooling_and_whole_contexts_are_measured_on_a_gpu_alone(table):
    assert list(_core_quality.pooling("cpu", True)) == list(_core_quality.long("cpu", True)) == []
    rows = list(_core_quality.pooling("cuda", True))
    assert ["mean" in rows[0].what, "max" in rows[1].what, "PEFT" in rows[2].what] == [True] * 3
    assert len({row.baseline for row in rows}) == 1
    rows = list(_core_quality.long("cuda", True))
    found = [row.what.split(",")[0] for row in rows[:4]]
    assert found == 2 * ["loss of tokens 16 to 32"] + 2 * ["loss of tokens 32 to 64"]
    assert sum("at depth 0.9" in row.what for row in rows) == 3


def test_the_claim_is_loaded_and_names_its_bars():
    claim = load("core_context")
    assert set(claim.parts) == {"speed", "model", "quality", "pooling", "long"}
    assert core_context.BARS == {32768: 3.5, 65536: 5.7}
    assert dataclasses.is_dataclass(claim)
