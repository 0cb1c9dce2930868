from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")

from undivided.models.vision.tic import TiC  # noqa: E402

SMALL = dict(embed_dim=8, depths=(1, 2, 1, 1), head_dim=8, kernel_size=3, num_classes=5)


def test_nothing_but_weights_is_kept_and_no_size_is_in_them():
    model = TiC(**SMALL)
    assert dict(model.named_buffers()) == {}
    for side in (32, 56, 96):
        assert model(torch.randn(1, 3, side, side)).shape == (1, 5)


@pytest.mark.parametrize("inter_pool", ["none", "kv", "stage"])
@pytest.mark.parametrize("has_shifts", [False, True])
def test_every_arrangement_trains(inter_pool, has_shifts):
    model = TiC(**SMALL, inter_pool=inter_pool, has_shifts=has_shifts)
    model(torch.randn(2, 3, 48, 40)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    attention = [block.attn for stage in model.stages for block in stage.blocks]
    assert [layer.dilation[0] for layer in attention] == [1, 1, 2, 1, 1]
    shifts = [layer.shift.shift for layer in attention]
    assert shifts == (["half", 1, "half", "half", "half"] if has_shifts else [0] * 5)
    assert [stage.pooled is not None for stage in model.stages] == [inter_pool == "stage"] * 3 + [False]
    assert [layer.kv_pool for layer in attention] == ([2, 1, 2, 2, 1] if inter_pool == "kv" else [1] * 5)


def test_parameters_are_counted():
    # Of this library's own sizes: a change of them is meant, or a mistake.
    count = lambda **options: sum(p.numel() for p in TiC(**options).parameters())  # noqa: E731
    with torch.device("meta"):
        block = lambda c: 12 * c * c + 13 * c  # noqa: E731
        halving = lambda a, c: 9 * a * c + 3 * c  # noqa: E731
        pooled = lambda c: 4 * c * c + 6 * c  # noqa: E731
        widths = (64, 128, 256, 512)
        want = halving(3, 32) + halving(32, 64) + 2 * 512 + 512 * 1000 + 1000
        want += sum(depth * block(c) for depth, c in zip((2, 2, 6, 2), widths, strict=True))
        want += sum(halving(c, 2 * c) for c in widths[:3]) + sum(pooled(c) for c in widths[:3])
        assert count() == want


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="head_dim=32 does not divide embed_dim=48"):
        TiC(embed_dim=48)
    with pytest.raises(ValueError, match="inter_pool='max' is not one of 'none', 'kv', 'stage'"):
        TiC(inter_pool="max")
