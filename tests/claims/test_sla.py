from __future__ import annotations

import pytest
import torch

from undivided.claims import _four_russians, _sla_quality, load
from undivided.claims import _tiny_dit as dit
from undivided.claims._wan_shape import WanShaped
from undivided.claims.sla import gate
from undivided.convert.sla import convert_sla
from undivided.layers.sla import SparseLinearAttention


def test_the_gate_passes_on_a_cpu():
    gate("cpu")


def test_a_wrong_projection_does_not_pass_the_gate(monkeypatch):
    from undivided.claims import sla

    right = sla.sparse_linear_attention

    def wrong(*tensors, backend="auto", **options):
        out = right(*tensors, backend=backend, **options)
        return out * 1.01 if backend == "auto" else out

    monkeypatch.setattr(sla, "sparse_linear_attention", wrong)
    with pytest.raises(AssertionError, match="error above"):
        gate("cpu")


@pytest.mark.parametrize("group", [2, 4])
def test_subsets_add_up_to_the_product_with_the_map(group, device):
    seen = torch.rand(2, 5, 8, device=device) < 0.5
    sums = torch.randn(2, 8, 37, device=device)
    tables = _four_russians.subset_tables(sums, group)
    assert tables.shape == (2, 8 // group, 2**group, 37)
    found = _four_russians.add_subsets(tables, _four_russians.subset_codes(seen, group))
    torch.testing.assert_close(found, seen.float() @ sums, rtol=1e-5, atol=1e-5)


def test_a_model_of_wans_shape_is_the_same_with_all_blocks():
    torch.manual_seed(0)
    model = WanShaped(layers=2, width=32, heads=2, mlp=48).double()
    grid = (2, 3, 5)
    x, text, time = torch.randn(1, 30, 32), torch.randn(1, 4, 32), torch.randn(6, 32)
    inputs = [tensor.double() for tensor in (x, text, time)]
    before = model(*inputs, grid)
    _, report = convert_sla(model, topk=1.0, query_block_size=16, block_size=16)
    torch.testing.assert_close(model(*inputs, grid), before)
    assert report["converted"] == ["blocks.0.attention", "blocks.1.attention"]


def test_rotations_depend_on_each_axis_alone():
    model = WanShaped(layers=1, width=24, heads=1, mlp=8)
    cos, sin = model.tables((2, 3, 4), torch.device("cpu"), torch.float64)
    assert cos.shape == (1, 24, 1, 24)
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))
    table = cos.view(2, 3, 4, 24)
    assert (table[:, :1, :1, :8] == table[..., :8]).all() and (
        table[:1, :, :1, 8:16] == table[..., 8:16]
    ).all()


def test_images_and_fine_tuning_arms_are_what_they_say():
    images = dit.textured_shapes(4, 16, 0, "cpu")
    assert images.shape == (4, 3, 16, 16) and torch.equal(images, dit.textured_shapes(4, 16, 0, "cpu"))
    assert images.std() > 0.5
    for name, change in _sla_quality.arms(0.25, 8).items():
        model = change(dit.TinyDiT(16, 2, 32, 1, 2))
        out = model(images, torch.rand(4))
        assert out.shape == images.shape
        core = model.blocks[0].attention.core
        learns = isinstance(core, SparseLinearAttention) and core.proj.weight.requires_grad
        assert learns == name.startswith("SLA"), name


def test_quality_has_a_row_an_arm(monkeypatch):
    monkeypatch.setattr(_sla_quality, "SEEDS", (0,))
    monkeypatch.setitem(_sla_quality.SIZES["cpu"], "images", 32)
    rows = list(load("sla").parts["quality"]("cpu", True))
    losses = [row for row in rows if row.what.startswith("flow-matching loss after fine-tuning, ")]
    assert len(losses) == len(_sla_quality.arms(0.25, 8)) + 1
    assert [row.required for row in rows if row.required] == [_sla_quality.NEAR, 1.0]
    steps = [row.what for row in rows if "of SLA after" in row.what]
    assert len(steps) == 3 and "after 0 steps" in steps[0]


def test_a_stable_rank_counts_equal_directions():
    assert dit.stable_rank(torch.eye(5)[None]) == pytest.approx(5.0)
    assert dit.stable_rank(torch.ones(1, 4, 4)) == pytest.approx(1.0)
