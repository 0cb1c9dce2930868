from __future__ import annotations

import torch

from undivided.claims.tic import _ARMS, CLAIM, _convolutional, flash, gate, reached, small_tic, unfolded
from undivided.ops import msa_conv_attention


def test_the_gate_passes():
    gate("cpu")


def test_both_rivals_compute_what_they_are_named_after():
    x = [torch.randn(1, 2, 5, 4, 3, dtype=torch.float64) for _ in range(3)]
    torch.testing.assert_close(unfolded(*x, 3), msa_conv_attention(*x, kernel_size=3))
    torch.testing.assert_close(flash(*x), msa_conv_attention(*x, kernel_size=9, border="mask"))


def test_the_claim_has_its_parts():
    assert list(CLAIM.parts) == ["speed", "models", "growth", "quality"]
    assert list(CLAIM.parts["models"]("cpu", True)) == []


def test_bodies_of_convolutions_have_the_layout_of_attention():
    x = torch.randn(1, 1, 28, 28)
    plain = small_tic(_ARMS["MSA-Conv"])
    for is_depthwise in (False, True):
        body = _convolutional(10, is_depthwise)
        assert body(x).shape == plain(x).shape
        assert not any(type(module).__name__ == "MSAConv" for module in body.modules())


def test_the_reach_of_convolutions_is_that_of_their_kernels():
    class Map(torch.nn.Conv2d):
        forward_features = torch.nn.Conv2d.forward

    one = Map(1, 1, 5, padding=2)
    torch.nn.init.ones_(one.weight)
    assert abs(reached(one, torch.randn(2, 1, 20, 20)) - 100 * 25 / 400) < 1e-4
