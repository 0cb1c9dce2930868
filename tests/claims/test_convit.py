from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")
from undivided.claims import convit, load  # noqa: E402
from undivided.claims.convit import FUSED, fraction_of, mean_distance, mean_gates, operands, small_model  # noqa: E402
from undivided.data.images import ImageSet  # noqa: E402
from undivided.layers.convit import GPSA  # noqa: E402


@pytest.fixture
def images():
    labels = torch.arange(60) % 3
    grey = torch.randint(0, 255, (60, 1, 8, 8), dtype=torch.uint8)
    return ImageSet("grey", grey, labels, grey, labels)


def test_the_gate_holds_and_fails_where_a_result_is_wrong(monkeypatch):
    convit.gate("cpu")
    right = convit.gated_positional_attention

    def wrong(*arguments, backend, **tensors):
        out = right(*arguments, backend=backend, **tensors)
        return out if backend == "reference" else 1.01 * out

    monkeypatch.setattr(convit, "gated_positional_attention", wrong)
    with pytest.raises(AssertionError, match="error above"):
        convit.gate("cpu")


def test_a_fraction_has_as_many_images_of_each_class_and_is_that_of_its_seed(images):
    some = fraction_of(images, 0.2, seed=1)
    assert some.train_labels.bincount().tolist() == [4, 4, 4]
    assert torch.equal(some.train_images, fraction_of(images, 0.2, seed=1).train_images)
    assert not torch.equal(some.train_images, fraction_of(images, 0.2, seed=2).train_images)
    assert len(some.test_images) == len(images.test_images)


def test_arms_differ_in_what_they_are_named_after_alone(images, monkeypatch):
    monkeypatch.setitem(convit._SIZES, "patch_size", 2)
    plain, full, free, fixed = (small_model(arm, images, 0) for arm in convit._ARMS)
    sizes = [sum(p.numel() for p in found.parameters()) for found in (plain, full)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    assert mean_gates(full) == pytest.approx([torch.tensor(1.0).sigmoid().item()] * 3)
    assert mean_gates(fixed) == [0.5] * 3
    eye = torch.eye(144)
    starts = [next(layer for layer in found.modules() if isinstance(layer, GPSA)) for found in (full, free)]
    assert torch.equal(starts[0].v.weight, eye) and not torch.equal(starts[1].v.weight, eye)
    for found in (plain, full, free, fixed):
        assert found(torch.randn(2, 1, 8, 8)).shape == (2, 3)


def test_heads_that_look_at_one_token_look_as_far_as_it_is(images, monkeypatch):
    monkeypatch.setitem(convit._SIZES, "patch_size", 2)
    found = small_model("ConViT", images, 0)
    with torch.no_grad():
        for layer in (layer for layer in found.modules() if isinstance(layer, GPSA)):
            layer.gating_param.fill_(30.0)
            # Each head at its own token: a very sharp maximum there.
            layer.pos_proj.weight.copy_(torch.tensor([0.0, 0.0, -50.0]).expand(9, 3))
    assert mean_distance(found, images.test_images[:4]) == pytest.approx(0.0, abs=1e-6)
    assert mean_distance(small_model("ConViT", images, 0), images.test_images[:4]) > 0.5


def test_models_compile_block_by_block_and_stay_the_same(monkeypatch):
    from undivided.models.vision.convit import ConViT

    found = ConViT(32, 8, embed_dim=36, num_heads=9, depth=3, gpsa_layers=2, num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = found(x)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        convit.compile_blocks(found, backend="eager")
        torch.testing.assert_close(found(x), want)
    # One graph for the blocks with positions, one for those without.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_operands_lie_as_a_layer_hands_them_over():
    x = operands(2, 3, (4, 5), 8, "cpu", torch.float32)
    assert x["query"].shape == (2, 3, 20, 8) and x["query"].stride() == (1440, 8, 72, 1)
    assert x["position_weight"].shape == (3, 3)


def test_the_bar_is_on_whole_models_against_deit(monkeypatch):
    class Ceilings:
        def fraction(self, milliseconds, flops):
            return 0.5

    monkeypatch.setattr(convit, "measured_ceilings", lambda device: Ceilings())
    x = operands(2, 3, (4, 5), 8, "cpu", torch.float32)
    rows = list(convit._rows("attention", "some shape", x, (4, 5), {FUSED: 1.0, "rival": 2.0}, 1.0))
    assert [(row.ratio, row.required, row.fraction_of_ceiling) for row in rows] == [(2.0, None, 0.5)]
    assert convit.REQUIRED == 0.85 and load("convit").devices == ("cuda",)
    assert set(load("convit").parts) == {"speed", "larger", "quality"}
