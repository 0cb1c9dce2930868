from __future__ import annotations

import pytest
import torch

from undivided.claims import _dma_quality as quality
from undivided.claims import dma as claim
from undivided.claims import load
from undivided.claims._dma_quality import Recall, arms, recall_accuracy
from undivided.claims._dma_tiles import deaths, trained_share
from undivided.claims._tiny_lm import tiny_lm
from undivided.ops.dynamic_mask.reference import kept_keys


def test_the_gate_passes_on_a_cpu_and_nothing_is_timed_there():
    claim.gate("cpu")
    for part in ("speed", "recall"):
        assert list(claim.CLAIM.parts[part]("cpu", False)) == []
    assert load("dma") is claim.CLAIM


def test_the_gate_fails_where_a_kernel_is_wrong(monkeypatch):
    attention = claim._attention

    def wrong(backend, keep):
        # Only the first call, the one that is checked, is off by a key.
        return attention(backend, keep + 1 if not calls.append(backend) and len(calls) == 1 else keep)

    calls: list[str] = []
    monkeypatch.setattr(claim, "_attention", wrong)
    with pytest.raises(AssertionError, match="error above"):
        claim.gate("cpu")


@pytest.mark.parametrize("keep", [50, 1000])
def test_the_blocks_of_the_rival_hold_the_kept_keys_and_no_block_without_one(keep):
    kept = kept_keys(torch.randn(1, 2, 600), 600, keep, None, True, "per_row")
    death = kept.int().sum(2) + torch.arange(600)
    mask = claim.live_blocks(death, 600, group=3)
    padded = torch.nn.functional.pad(kept, (0, 40, 0, 40))
    expected = padded.unflatten(-1, (5, 128)).unflatten(2, (5, 128)).any(5).any(3).repeat_interleave(3, dim=1)
    assert torch.equal(mask.to_dense().bool(), expected)
    n, m = torch.meshgrid(torch.arange(600), torch.arange(600), indexing="ij")
    for head in range(6):
        assert torch.equal(mask.mask_mod(0, head, n, m), kept[0, head // 3])


def test_keys_are_lost_when_better_ones_have_come():
    for bias in (torch.randn(90), torch.randn(90).round(), torch.zeros(90)):
        kept = kept_keys(bias[None, None], 90, 20, None, True, "per_row")[0, 0]
        assert torch.equal(deaths(bias, 20), kept.sum(0) + torch.arange(90))


def test_scattered_keys_leave_few_tiles_to_skip():
    shares = {row.what.split(", ")[1]: row.ours for row in claim.CLAIM.parts["tiles"]("cpu", True)}
    assert shares["random biases"] > 0.9 > shares["clustered biases"] > shares["a constant bias"]
    # Of 64 rows of tiles the window of 1024 reaches 9 tiles back.
    assert shares["a constant bias"] == sum(min(row + 1, 9) for row in range(64)) / (64 * 65 / 2)


def test_the_biases_of_an_untrained_model_are_a_sliding_window():
    model = tiny_lm(arms(16)[quality.DYNAMIC])
    share = trained_share(model, torch.randint(256, (1, 128)), 16)
    # Of 8 rows of tiles each but the first reaches one tile back.
    assert share == pytest.approx((2 * 8 - 1) / (8 * 9 / 2))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_bars_are_at_the_lengths_that_have_one():
    times = {"ours": 2.0, "ours, constant bias": 2.0, claim.FLASH: 7.0, claim.CUDNN: 5.0}
    found = {}
    claim_ceilings, claim.measured_ceilings = claim.measured_ceilings, lambda device: _Ceilings()
    try:
        for length in (32768, 8192, 4096):
            found[length] = [(row.required, row.holds) for row in claim._rows(length, times, backward=False)]
        backward = [row.required for row in claim._rows(32768, times, backward=True)]
    finally:
        claim.measured_ceilings = claim_ceilings
    assert found[32768] == [(4.0, False), (None, None), (None, None)]
    assert found[8192] == [(1.0, True), (None, None), (None, None)]
    assert found[4096] == [(None, None)] * 3 and backward == [None] * 3


class _Ceilings:
    def fraction(self, milliseconds, flops=None, bytes_moved=None):
        return 0.5


def test_a_model_that_sees_everything_begins_to_recall():
    problem = Recall(
        hidden_size=32, num_pairs=2, num_fillers=0, keep=4, steps=40, num_texts=1000, batch_size=64
    )
    accuracy, losses = recall_accuracy(problem, arms(4)[quality.FULL], 0, "cpu")
    assert losses[-1] < 0.95 * losses[0]
    assert 0 <= accuracy <= 1
    texts = problem.texts(3, 0)
    assert texts.ids.shape == (3, 10) and int(texts.ids.max()) < problem.vocabulary.size == 128


def test_recall_and_language_have_a_row_an_arm(monkeypatch):
    from undivided.data.text import DemoTexts

    monkeypatch.setattr(quality, "SEEDS", (0,))
    accuracies = {"sqa": 0.2, "dma": 0.5, "gqa": 0.9}
    monkeypatch.setattr(
        quality, "recall_accuracy", lambda problem, entry, seed, device: (accuracies[entry["mechanism"]], [])
    )
    rows = list(quality.recall_rows(Recall(), "cpu"))
    assert [(row.ours, row.ratio, row.holds) for row in rows] == [
        (0.2, None, None),
        (0.5, 2.5, True),
        (0.9, 4.5, None),
    ]
    words = "the keys that a query keeps are those that a learned bias ranks highest. " * 60
    monkeypatch.setattr("undivided.data.demo_texts", lambda: DemoTexts(words, {"2024-Biden-1": words[:900]}))
    monkeypatch.setitem(quality.LANGUAGE["cpu"], "steps", 2)
    rows = list(claim.CLAIM.parts["quality"]("cpu", False))
    assert [row.what.split(", ")[1] for row in rows] == [
        quality.WINDOW, quality.DYNAMIC, "biases of the trained model", quality.FULL,
    ]  # fmt: skip
    assert all(row.ours > 0 for row in rows) and rows[0].baseline is None and rows[1].required == 1.0
    assert 0.4 < rows[2].ours <= 1
