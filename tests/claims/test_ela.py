from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
from undivided.claims import ela, load  # noqa: E402
from undivided.claims.ela import distance_of_strongest_gate, network, scenes  # noqa: E402
from undivided.layers.ela import ELA  # noqa: E402


def test_the_gate_holds_and_fails_where_a_result_is_wrong(monkeypatch):
    ela.gate("cpu")
    right = ela.strip_attention
    monkeypatch.setattr(
        ela, "strip_attention",
        lambda *a, backend, **b: right(*a, backend=backend, **b) * (1.0 if backend == "reference" else 1.01),
    )  # fmt: skip
    with pytest.raises(AssertionError, match="error above"):
        ela.gate("cpu")


def test_a_scene_has_its_shape_at_its_centre():
    images, labels, centres = scenes(64, seed=3)
    assert images.shape == (64, 1, 64, 64) and images.dtype == torch.uint8
    assert set(labels.tolist()) == {0, 1, 2, 3}
    assert centres.min() >= 4 and centres.max() <= 59
    frames = labels == 3
    for image, (y, x), is_frame in zip(images[:, 0], centres, frames, strict=True):
        patch = image[y - 4 : y + 5, x - 4 : x + 5].float()
        # A frame alone is empty in the middle.
        assert (patch[3:6, 3:6].mean() > 190) == (not is_frame)
    again = scenes(64, seed=3)
    assert all(torch.equal(a, b) for a, b in zip((images, labels, centres), again, strict=True))


def test_every_arm_is_a_network_with_its_module_in_four_blocks():
    for arm, attention in ela._arms().items():
        found = network(attention, 0)
        assert found(torch.randn(2, 1, 64, 64)).shape == (2, 4)
        modules = [getattr(found, f"layer{n}")[0].se for n in (1, 2, 3, 4)]
        assert all((module is None) == (arm == "no attention") for module in modules)
        if arm.startswith("ELA"):
            assert all(isinstance(module, ELA) and arm.endswith(module.version) for module in modules)


def test_the_distance_is_that_of_the_strongest_gate():
    class Peak(nn.Module):
        def forward(self, x):
            gates = torch.full_like(x, 0.2)
            gates[:, :, 2, 5] = 0.9
            return x * gates

    found = network(lambda channels, **options: Peak(), 0)
    # Branches start at zero, where a gate has nothing to multiply.
    nn.init.ones_(found.layer4[-1].bn2.weight)
    images, _, _ = scenes(4, seed=0)
    # Cell (2, 5) of 8 x 8 has its centre at 8 * 2.5 - 0.5 and 8 * 5.5 - 0.5.
    centres = torch.tensor([[19.5, 43.5], [19.5, 46.5], [23.5, 43.5], [19.5, 43.5]])
    assert distance_of_strongest_gate(found, images, centres) == pytest.approx(7 / 4)


@pytest.mark.parametrize(("name", "places"), [("resnet18", 8), ("mobilenetv2_035", 17)])
def test_bodies_differ_in_their_modules_alone(name, places):
    plain, gated = (ela.body(name, attention, 0) for attention in (None, ELA))
    modules = [module for module in gated.modules() if isinstance(module, ELA)]
    assert len(modules) == places
    extra = sum(p.numel() for module in modules for p in module.parameters())
    count = (sum(p.numel() for p in net.parameters()) for net in (gated, plain))
    assert next(count) - extra == next(count)
    assert gated(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_parts_and_bars():
    assert set(load("ela").parts) == {"speed", "localisation", "batches", "images"}
    assert ela.WITHIN == 1.3
