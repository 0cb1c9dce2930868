from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from undivided.claims import hilo, load
from undivided.claims.hilo import (
    EAGER,
    FUSED,
    HILO,
    LOCAL,
    PLAIN,
    REDUCED,
    LocalWindowAttention,
    SpatialReductionAttention,
    eager,
    energy_share,
    gate,
    high_frequencies,
    layers,
    speed_rows,
)
from undivided.cost.vision import multiply_adds
from undivided.layers._vision import to_map, to_tokens
from undivided.layers.hilo import HiLoAttention

pytest.importorskip("timm")


class OnMaps(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(*to_tokens(x))


@pytest.mark.parametrize("form", [EAGER, FUSED])
def test_the_rivals_do_the_work_that_the_authors_count(form):
    with torch.device("meta"):
        found = {name: layer for (name, its), layer in layers().items() if its == form}
    counts = {name: multiply_adds(OnMaps(layer), (768, 14, 14)).total for name, layer in found.items()}
    # Theirs counts the LayerNorm of spatial reduction too, 5 x 49 x 768.
    theirs = {HILO: 298.3, REDUCED: 419.6, LOCAL: 477.2, PLAIN: 521.4}
    assert {name: count / 1e6 for name, count in counts.items()} == pytest.approx(theirs, rel=1e-3)


def test_local_windows_are_those_of_high_frequency_heads_alone():
    windows, layer = LocalWindowAttention(12, 3, eager, 2), HiLoAttention(12, 3, 2, alpha=0.0, qkv_bias=True)
    layer.load_state_dict({f"hifi_{name}": value for name, value in windows.state_dict().items()})
    x = torch.randn(2, 24, 12)
    torch.testing.assert_close(windows(x, (4, 6)), layer(x, (4, 6)))


def test_spatial_reduction_attends_to_normalised_patches():
    layer, x = SpatialReductionAttention(12, 3, eager), torch.randn(2, 24, 12)
    patches = layer.norm(F.conv2d(to_map(x, (4, 6)), *layer.reduction.parameters(), stride=2).flatten(2).mT)
    mha = nn.MultiheadAttention(12, 3, batch_first=True)
    weights = torch.cat([layer.q.weight, layer.kv.weight]), torch.cat([layer.q.bias, layer.kv.bias])
    with torch.no_grad():
        mha.in_proj_weight.copy_(weights[0]), mha.in_proj_bias.copy_(weights[1])
        mha.out_proj.load_state_dict(layer.proj.state_dict())
    torch.testing.assert_close(layer(x, (4, 6)), mha(x, patches, patches, need_weights=False)[0])


def test_the_gate_passes_and_can_fail(monkeypatch):
    gate("cpu")
    monkeypatch.setattr(hilo, "eager", lambda query, key, value: 1.01 * eager(query, key, value))
    with pytest.raises(AssertionError, match="error above 2 x eager"):
        gate("cpu")


def test_bars_are_of_both_forms_on_a_cpu():
    times = {
        (name, form): time
        for form, factor in ((EAGER, 2.0), (FUSED, 1.0))
        for name, time in ((HILO, factor), (REDUCED, 1.3 * factor), (LOCAL, 1.3 * factor))
    }
    rows = list(speed_rows(times, 8, "some tokens", "cpu"))
    assert [(row.required, row.holds) for row in rows] == 2 * [(1.2, True), (1.4, False)] + 3 * [(None, None)]
    assert rows[0].ours == 4000 and rows[0].ratio == pytest.approx(1.3)
    assert [row.ratio for row in rows[4:]] == pytest.approx([2.0, 2.0, 2.0])
    assert all(row.required is None for row in speed_rows(times, 8, "some tokens", "cuda"))


def test_one_thread_and_all_are_measured_and_all_are_set_again(monkeypatch):
    threads = torch.get_num_threads()
    times = {key: 1.0 for key in layers(24, 4)}
    monkeypatch.setattr(hilo, "_times", lambda *arguments: times)
    monkeypatch.setattr(hilo, "layers", lambda: {})
    shapes = {row.shape.rpartition(", ")[2] for row in hilo._speed("cpu", quick=False)}
    assert shapes == {"1 thread", f"{threads} threads" if threads > 1 else "1 thread"}
    assert torch.get_num_threads() == threads
    assert list(hilo._speed_64("cpu", quick=True)) == []


def test_energy_is_shared_out_by_frequency():
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    stripes = lambda period: torch.cos(2 * torch.pi * column / period).expand(2, 3, 8, 8)  # noqa: E731
    # Four waves of eight places are the highest frequency, one the lowest but that of a constant.
    assert energy_share(stripes(2)) == pytest.approx(1.0)
    assert energy_share(stripes(8)) == pytest.approx(0.0, abs=1e-6)
    assert energy_share(stripes(2) + 1.0) == pytest.approx(0.5)
    both = stripes(8) + torch.cos(torch.pi * row)
    assert energy_share(both) == pytest.approx(1 / 1.5)


def test_frequencies_are_read_from_both_kinds_of_heads():
    from undivided.models.vision.litv2 import LITv2

    torch.manual_seed(0)
    model = LITv2(
        in_chans=1, num_classes=3, embed_dim=16, patch_size=1, depths=(1,), num_heads=(4,), window_size=(2,), alpha=0.5
    )  # fmt: skip
    images = torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8)
    high, low = high_frequencies(model, images)
    # Untrained low-frequency heads give all tokens about the same mean.
    assert 0 < low < high < 1
    assert not any(module._forward_hooks for module in model.modules())


def test_the_claim_is_the_one_of_its_slug():
    assert load("hilo").slug == "hilo"


def test_published_sizes_stand_beside_models_that_timm_has():
    import timm

    import undivided.models.vision  # noqa: F401

    for ours, rivals in hilo.RIVALS.items():
        assert timm.is_model(f"undivided_litv2_{ours}")
        assert all(timm.is_model(name) for name in rivals)
