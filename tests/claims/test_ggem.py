from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
from undivided.claims import ggem, load  # noqa: E402
from undivided.claims.ggem import (
    contrast,
    correlation_of_heads,
    paired,
    pooled,
    recall_and_precision,
    small_model,
)  # noqa: E402
from undivided.data.images import ImageSet  # noqa: E402
from undivided.layers.ggem import GGeMPool  # noqa: E402


def test_the_gate_holds_and_fails_where_a_result_is_wrong(monkeypatch):
    ggem.gate("cpu")
    right = ggem.generalised_mean
    monkeypatch.setattr(
        ggem, "generalised_mean",
        lambda *a, backend, **b: right(*a, backend=backend, **b) * (1.0 if backend == "reference" else 1.01),
    )  # fmt: skip
    with pytest.raises(AssertionError, match="error above"):
        ggem.gate("cpu")


def test_arms_start_from_the_same_weights_and_differ_in_their_pooling():
    grey = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    images = ImageSet("grey", grey, torch.arange(4), grey, torch.arange(4))
    found = {arm: small_model(arm, images, 3) for arm in ggem._ARMS}
    start = found[ggem.MEAN].state_dict()
    for arm, groups in ggem._ARMS.items():
        assert found[arm](torch.randn(2, 1, 8, 8)).shape == (2, 4)
        pools = [module for module in found[arm].modules() if isinstance(module, GGeMPool)]
        assert [pool.num_groups for pool in pools] == ([groups] if groups else [])
        if groups:
            shared = {name: value for name, value in found[arm].state_dict().items() if name in start}
            assert all(torch.equal(value, start[name]) for name, value in shared.items())


def test_paired_differences_have_the_interval_of_students_t():
    ours, others = [2.0, 3.0, 4.0, 5.0], [1.0, 1.0, 3.0, 3.0]
    mean, deviation, lower = paired(ours, others)
    assert mean == 1.5 and deviation == pytest.approx((1 / 3) ** 0.5)
    assert lower == pytest.approx(1.5 - 2.262 * deviation / 2)
    assert len(ggem._SEEDS) == 10


def test_an_arm_without_classes_gives_the_vector_that_is_classified():
    grey = torch.randint(255, (4, 1, 8, 8), dtype=torch.uint8)
    images = ImageSet("grey", grey, torch.arange(4), grey, torch.arange(4))
    for arm in ggem._ARMS:
        model = small_model(arm, images, 3, num_classes=0).eval()
        torch.testing.assert_close(pooled(model, images), model(ggem_input(grey)))
        assert pooled(model, images).shape == (4, 96)


def ggem_input(grey):
    return grey.float() / 127.5 - 1


def test_heads_that_say_the_same_are_alike():
    one, other = torch.randn(500, 1), torch.randn(500, 1)
    assert correlation_of_heads(torch.cat([one, one, -one, one], 1), 2) == pytest.approx(1.0)
    assert correlation_of_heads(torch.cat([one, one, other, other], 1), 2) < 0.15


def test_images_are_found_by_the_direction_of_their_vectors():
    labels = torch.tensor([0, 0, 1, 1])
    axes = torch.tensor([[1.0, 0.0], [3.0, 0.1], [0.0, 1.0], [0.1, 2.0]])
    assert recall_and_precision(axes, labels) == (100.0, 100.0)
    recall, precision = recall_and_precision(axes, torch.tensor([0, 1, 0, 1]))
    assert recall == 0.0 and precision == pytest.approx(100 * (1 / 2 + 1 / 3) / 2)
    alike = contrast(nn.Identity(), axes, labels)
    assert alike < 0.01 < contrast(nn.Identity(), axes, torch.tensor([0, 1, 0, 1]))


def test_parts_and_bars():
    assert set(load("ggem").parts) == {"speed", "quality", "retrieval"}
    assert (ggem.BANDWIDTH, ggem.SHARE) == (0.7, 0.01)
