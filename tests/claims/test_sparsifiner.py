from __future__ import annotations

import torch

from undivided.claims.sparsifiner import CLAIM, Chooser, _recall, chance, gate, nearness, true_logits
from undivided.layers.sparsifiner import SparsifinerAttention


def test_the_gate_passes():
    gate("cpu")


def test_the_nearest_keys_are_the_token_itself_its_neighbours_and_the_class_token():
    q = torch.zeros(1, 1, 10, 4)
    indices = Chooser(6, nearness)(q, q).indices[0, 0]
    assert indices[4].tolist() == [0, 2, 4, 5, 6, 8]


def test_the_oracle_has_the_largest_share_of_the_weights():
    torch.manual_seed(0)
    layer = SparsifinerAttention(16, 2, 10)
    with torch.no_grad():
        layer.qkv.weight.mul_(8)
    shares = {}
    for name, score in (("oracle", true_logits), ("random", chance)):
        layer.predictor = Chooser(3, score)
        shares[name] = _recall(layer, torch.randn(2, 10, 16))
    assert 0 < shares["random"] < shares["oracle"] < 1


def test_multiply_adds_and_the_savings_of_the_abstract():
    rows = list(CLAIM.parts["flops"]("cpu", False))
    first = rows[0]
    assert first.baseline == 29.805312
    assert round(100 * (1 - first.ours / first.baseline), 1) == 48.7
    whole = rows[-1]
    assert 1 < whole.ratio < 1.06
