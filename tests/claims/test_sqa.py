from __future__ import annotations

import pytest
import torch

from undivided.claims import load
from undivided.claims import sqa as claim
from undivided.claims._tiny_lm import tiny_lm
from undivided.claims.sqa import ARMS, HEADS, counted_operations, dense_model, gate, window_blocks
from undivided.layers.sqa import SQAttention
from undivided.ops import dense_attention


def test_operations_counted_are_those_of_the_formula_and_their_ratio_is_exact():
    for query_heads, key_heads in ARMS.values():
        assert counted_operations(query_heads, key_heads, 64) == 4 * 64**2 * query_heads * 16
    assert counted_operations(*ARMS["GQA"]) == HEADS // 4 * counted_operations(*ARMS["xSQA"])


def test_the_dense_models_have_the_sizes_that_the_paper_gives():
    # Millions of parameters, as the authors round them.
    paper = {"MHA": 12, "GQA": 11.2, "MQA": 11, "SQA": 10.7, "sSQA": 10.9, "xSQA": 10.4, "xSMQA": 10.2}
    with torch.device("meta"):
        for name, millions in paper.items():
            own = sum(parameter.numel() for parameter in dense_model(*ARMS[name]).parameters()) / 1e6
            assert own == pytest.approx(millions, abs=0.08), name


def test_the_blocks_of_the_rival_are_the_window():
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b, h, n, m):
        return (m <= n) & (m > n - 128)

    expected = create_block_mask(seen, None, None, 640, 640, "cpu").to_dense()
    assert torch.equal(window_blocks(640, 128, "cpu").to_dense(), expected)


def test_counting_on_a_cpu_yields_rows_that_hold():
    rows = list(claim._counted())
    assert {row.what.split(", ")[1].split(" ")[0]: row.ratio for row in rows} == {
        "lSQA": 16 / 12,
        "SQA": 2.0,
        "sSQA": 2.0,
        "xSQA": 4.0,
        "xSMQA": 4.0,
    }
    assert all(row.holds for row in rows)


def test_quality_has_a_row_an_arm(monkeypatch):
    from undivided.data.text import DemoTexts

    words = "the heads of a model read what the keys of a model hold. " * 60
    monkeypatch.setattr("undivided.data.demo_texts", lambda: DemoTexts(words, {"2024-Biden-1": words[:900]}))
    monkeypatch.setattr(claim, "_SEEDS", (0,))
    monkeypatch.setitem(claim._QUALITY["cpu"], "steps", 2)
    rows = list(claim._quality("cpu", quick=False))
    names = [row.what.split(", ")[1] for row in rows]
    assert names[0] == "GQA" and sorted(names) == sorted(ARMS)
    assert [row.baseline is None for row in rows] == [True] + [False] * (len(ARMS) - 1)
    assert all(row.what.startswith("bits a byte") and row.ours > 0 for row in rows)


def test_the_models_are_run_forward_and_backward_at_every_length(monkeypatch):
    from contextlib import nullcontext

    def counted(calls, samples):
        return {name: (call(), samples)[1] * 2.0 for name, call in calls.items()}

    def small(query_heads, key_heads, window=None):
        entry = {"mechanism": "sqa", "num_query_heads": query_heads, "num_key_value_heads": key_heads}
        return tiny_lm(
            entry | {"window": window}, vocab_size=10_000, num_attention_heads=16, num_hidden_layers=1
        )

    monkeypatch.setattr(claim, "_medians", counted)
    monkeypatch.setattr(claim, "_kernels", lambda name: nullcontext())
    monkeypatch.setattr(claim, "dense_model", small)
    monkeypatch.setattr(claim, "LONG", 8)
    monkeypatch.setattr(claim, "BATCHES", {8: 1, 1024: 1})
    forward = list(claim._forward((8, 1024), "cpu"))
    # Up to the long length all arms and two windows, beyond it the arms with a bar and the windows; less the baseline.
    assert len(forward) == len(ARMS) + 1 + 4
    bars = {row.what.split(", ")[1].split(" ")[0]: row.required for row in forward if row.required}
    assert bars == {"xSQA": 3.0, "SQA": 1.9}
    trained = list(claim._forward_and_backward((8, 1024), "cpu"))
    assert len(trained) == 2 + 2
    assert all(row.what.startswith("whole model forward and backward") for row in trained)


def test_the_gate_passes_and_a_wrong_layer_fails_it(monkeypatch):
    gate("cpu")
    attend = SQAttention.attend
    monkeypatch.setattr(SQAttention, "attend", lambda self, *x: 1.01 * attend(self, *x))
    with pytest.raises(AssertionError, match="not close"):
        gate("cpu")


def test_the_gate_fails_on_a_wrong_kernel_and_a_wrong_preset(monkeypatch):
    def wrong(*x, backend="auto", **options):
        return (1.01 if backend == "auto" else 1) * dense_attention(*x, backend=backend, **options)

    monkeypatch.setattr(claim, "_check_layer", lambda *arguments: None)
    with monkeypatch.context() as patch:
        patch.setattr(claim, "dense_attention", wrong)
        with pytest.raises(AssertionError, match="error above 2 x eager"):
            gate("cpu")
    monkeypatch.setitem(ARMS, "SQA", (8, 2))
    with pytest.raises(ValueError, match=r'preset="sqa" is not \(8, 2\) of 16 heads'):
        gate("cpu")


def test_the_claim_is_the_one_of_its_slug():
    assert load("sqa").slug == "sqa"
