from __future__ import annotations

import torch

from undivided.claims._sparsifiner_quality import (
    Chooser,
    Linformer,
    chance,
    mass_on_chosen,
    nearness,
    pruned_share,
    true_logits,
)
from undivided.claims.sparsifiner import CLAIM, gate
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
        shares[name] = mass_on_chosen(layer, torch.randn(2, 10, 16))
    assert 0 < shares["random"] < shares["oracle"] < 1


def test_multiply_adds_and_the_savings_of_the_abstract():
    rows = list(CLAIM.parts["flops"]("cpu", False))
    first = rows[0]
    assert first.baseline == 29.805312
    assert round(100 * (1 - first.ours / first.baseline), 1) == 48.7
    whole = rows[-1]
    assert 1 < whole.ratio < 1.06


def test_a_linformer_with_a_row_a_token_is_the_attention_it_came_from():
    from timm.layers import Attention

    source, x = Attention(16, 2, qkv_bias=True), torch.randn(2, 10, 16)
    torch.testing.assert_close(Linformer(source, 10, 10)(x), source(x))
    assert Linformer(source, 10, 3).key_rows.sum(1).tolist() == [1.0] * 3


def test_pruning_saves_as_many_pairs_as_it_is_told():
    share = pruned_share(0.6, 4)
    assert abs((1 + 3 * share**2) / 4 - 0.4) < 1e-12


def test_parts_and_their_devices():
    assert list(CLAIM.parts) == ["flops", "speed", "tiles", "quality"]
    assert list(CLAIM.parts["tiles"]("cpu", True)) == []
