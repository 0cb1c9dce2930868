from __future__ import annotations

import pytest
import torch

from undivided.claims import load, rala
from undivided.claims.rala import HEAD_DIM, arms, gate, plain, ranks
from undivided.ops import linear_attention

pytest.importorskip("timm")


def test_the_gate_passes_and_can_fail(monkeypatch):
    gate("cpu")
    attention = rala.linear_attention

    def wrong(*arguments, backend, **options):
        return attention(*arguments, backend=backend, **options) * (1.01 if backend == "composed" else 1.0)

    monkeypatch.setattr(rala, "linear_attention", wrong)
    with pytest.raises(AssertionError, match="error above 2 x eager"):
        gate("cpu")


def test_the_plain_rival_is_plain_linear_attention():
    query, key, value = (torch.randn(2, 3, 17, HEAD_DIM, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(plain(query, key, value), linear_attention(query, key, value, eps=0.0))


def test_arms_differ_in_weights_and_modulation_and_have_no_local_term():
    layers = {name: layer(16, 2) for name, layer in arms().items()}
    assert [(bool(getattr(x, "key_weight", None)), x.modulation) for x in layers.values()] == [
        (False, False), (True, False), (False, True), (True, True), (False, False)
    ]  # fmt: skip
    assert all(layer.lepe is None and layer.rope for layer in layers.values())


def test_ranks_are_read_from_all_layers():
    from undivided.claims._tiny_vit import tiny_vit
    from undivided.data.images import digits

    images = digits()
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 2}
    found = {name: ranks(tiny_vit(images, **sizes, attn_layer=layer), images.test_images[:4])
             for name, layer in arms().items()}  # fmt: skip
    assert all(0 < buffer <= 8 for name, (buffer, _) in found.items() if name != "softmax attention")
    assert found["softmax attention"][0] == 0
    assert all(1 <= output <= 16 for _, output in found.values())


def test_the_claim_is_the_one_of_its_slug():
    assert load("rala").slug == "rala"
