from __future__ import annotations

import pytest
import torch

from undivided.claims import _latent_prefill
from undivided.claims._latent_prefill import Prompt, gate, prefill_rows, prompt_rows

SMALL = Prompt(16, 48, heads=2, key_dim=24, value_dim=16)


def test_rows_are_of_the_pairs_that_the_mask_leaves(monkeypatch):
    ceilings = _latent_prefill.measured_ceilings("cpu")
    monkeypatch.setattr(_latent_prefill, "measured_ceilings", lambda device: ceilings)
    seen = sum(32 + n + 1 for n in range(16))
    assert SMALL.flops() == 2 * 2 * seen * (24 + 16)
    (row,) = prompt_rows(SMALL, "cpu", torch.float32)
    assert row.what == "rate of prefill attention" and row.unit == "TFLOPS"
    assert row.shape == "2 heads, keys of 24, values of 16, 16 tokens behind 32 cached, float32"


def test_a_mask_aligned_upper_left_does_not_pass():
    inputs = SMALL.inputs("cpu", torch.float32)

    def upper_left():
        return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)

    gate(SMALL, inputs, lambda: _latent_prefill.dense_attention(*inputs, is_causal=True), "ours")
    with pytest.raises(AssertionError, match="upper left, 2 heads"):
        gate(SMALL, inputs, upper_left, "upper left")


def test_the_quick_run_is_shorter(monkeypatch):
    monkeypatch.setattr(_latent_prefill, "prompt_rows", lambda prompt, *given: [prompt])
    assert len(list(prefill_rows("cpu", True))) == 1 < len(list(prefill_rows("cpu", False)))
