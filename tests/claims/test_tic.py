from __future__ import annotations

import torch

from undivided.claims.tic import CLAIM, flash, gate, unfolded
from undivided.ops import msa_conv_attention


def test_the_gate_passes():
    gate("cpu")


def test_both_rivals_compute_what_they_are_named_after():
    x = [torch.randn(1, 2, 5, 4, 3, dtype=torch.float64) for _ in range(3)]
    torch.testing.assert_close(unfolded(*x, 3), msa_conv_attention(*x, kernel_size=3))
    torch.testing.assert_close(flash(*x), msa_conv_attention(*x, kernel_size=9, border="mask"))


def test_the_claim_has_its_parts():
    assert list(CLAIM.parts) == ["speed", "models", "quality"]
    assert list(CLAIM.parts["models"]("cpu", True)) == []
