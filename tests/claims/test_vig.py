from __future__ import annotations

import pytest
import torch
from torch import nn

from undivided.claims import load, vig
from undivided.claims._timing import Timing
from undivided.claims.vig import FUSED, MERGED, TWO_CALLS, deit, enlarged, gate
from undivided.data.images import digits

pytest.importorskip("timm")


def test_the_gate_passes_and_can_fail(monkeypatch):
    gate("cpu")
    scan = vig.gated_scan

    def wrong(*, backend, **x):
        return scan(**x, backend=backend) * (1.01 if backend == "chunked" else 1.0)

    monkeypatch.setattr(vig, "gated_scan", wrong)
    with pytest.raises(AssertionError, match="error above 2 x eager"):
        gate("cpu")


def test_the_bar_is_of_two_calls_at_the_batch_of_training():
    found = {"merged": 1.0, TWO_CALLS: 2.0, "stacked": 1.2}
    rows = [
        row
        for batch in (64, 1)
        for row in vig._against("scan", "some tokens", found, "ms", [TWO_CALLS, "stacked"], batch)
    ]
    assert [(row.required, row.holds) for row in rows] == [(MERGED, True)] + 3 * [(None, None)]
    assert rows[0].ratio == pytest.approx(2.0)
    (alone,) = vig._against("scan", "some tokens", found, "ms", [], 64)
    assert alone.baseline is None and alone.ours == 1.0


@pytest.mark.parametrize("fused", [True, False])
def test_both_forms_of_deit_compute_the_same(fused):
    torch.manual_seed(0)
    model = deit("deit_tiny_patch16_224", 32, fused=fused, embed_dim=24, depth=2).eval()
    assert [block.attn.fused_attn for block in model.blocks] == 2 * [fused]
    x = torch.randn(2, 3, 32, 32)
    want = model(x)
    for block in model.blocks:
        block.attn.fused_attn = not fused
    torch.testing.assert_close(model(x), want)


def test_times_become_images_a_second_and_bars_are_of_eager_attention(monkeypatch):
    class Time:
        def __init__(self, median):
            self.median = median

    monkeypatch.setattr(
        vig, "time_rivals", lambda calls, *_, **__: {n: Time(1.0 + i) for i, n in enumerate(calls)}
    )
    monkeypatch.setattr(vig, "_peak", lambda call: 10.0)
    monkeypatch.setattr(vig, "deit", lambda *_, **__: nn.Identity())
    monkeypatch.setattr("timm.create_model", lambda *_, **__: nn.Identity())
    monkeypatch.setattr(vig.torch, "device", lambda *_: torch.no_grad())
    draw = torch.randn
    monkeypatch.setattr(vig.torch, "randn", lambda *shape, **_: draw(1))
    rows = list(
        vig._against_deit(
            "tiny", 1024, 16, torch.float32, (vig.EAGER, FUSED), speed=vig.SPEED, memory=vig.MEMORY
        )
    )
    assert [row.required for row in rows] == [vig.SPEED, None, vig.MEMORY, None]
    assert rows[0].ours == 16000 and rows[0].ratio == 2.0 and rows[1].ratio == 3.0 and not rows[2].holds


def test_larger_images_are_the_same_images():
    images = digits()
    larger = enlarged(images, 2).test_images
    assert larger.shape[-2:] == (16, 16) and enlarged(images, 1) is images
    back = nn.functional.avg_pool2d(larger.float(), 2)
    # Interpolation blurs; another order or another place of the images would cost several times as much.
    assert (back - images.test_images).abs().mean() < 0.5 * (back.flip(0) - images.test_images).abs().mean()


def test_small_models_differ_in_their_attention_alone():
    from undivided.claims._tiny_vit import tiny_vit

    sizes = {"embed_dim": 96, "depth": 1, "num_heads": 3, "patch_size": 2, "mlp_ratio": 2.0}
    counts = []
    for options in vig._ARMS.values():
        model = tiny_vit(digits(), **sizes, **options, dynamic_img_size=True)
        assert model(torch.randn(1, 1, 16, 16)).shape == (1, 10)
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts[0] == pytest.approx(counts[1], rel=0.1)


def test_the_claim_is_the_one_of_its_slug():
    assert load("vig").slug == "vig"


def test_times_that_grow_with_the_tokens_and_with_their_square_have_the_powers_one_and_two(monkeypatch):
    def timed(calls, device, seconds):
        sizes = {name: call().shape[1] for name, call in calls.items()}
        powers = {"ViG": 1, "softmax attention": 2}
        return {
            name: Timing(1e-3 * size ** powers[name], 0.0, 0.0, 1, "made up") for name, size in sizes.items()
        }

    monkeypatch.setattr(vig, "time_rivals", timed)
    *rows, power = vig._scaling("cpu", quick=True)
    assert [row.ours for row in rows] == pytest.approx([0.196, 0.784])
    assert (power.ours, power.baseline, power.holds) == (pytest.approx(1.0), pytest.approx(2.0), True)
    assert list(vig._scaling("cuda", quick=True)) == []
