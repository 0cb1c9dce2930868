from __future__ import annotations

import pytest
import torch

from undivided.claims import _nat_shape, _neighborhood, _window_quality, fna, gna
from undivided.claims._neighborhood import Problem, own, seen_in_rows
from undivided.ops.neighborhood import Neighborhood


class Ceilings:
    def fraction(self, milliseconds, **work):
        return 0.5


@pytest.fixture
def pretended(monkeypatch):
    """Rivals that take 1, 2, 3, ... milliseconds, ours the first; nothing runs."""
    times = lambda problem, rivals: {name: 1.0 + place for place, name in enumerate(rivals)}  # noqa: E731
    for claim in (gna, fna):
        monkeypatch.setattr(claim, "forwards", times)
        monkeypatch.setattr(claim, "backwards", times)
    monkeypatch.setattr(gna, "flex_in_rows", lambda problem: None)
    monkeypatch.setattr(gna, "measured_ceilings", lambda device: Ceilings())


@pytest.mark.parametrize("claim", [gna, fna], ids=["gna", "fna"])
def test_the_gate_passes_on_a_cpu(claim, monkeypatch):
    monkeypatch.setitem(_neighborhood.GATES, "map", Neighborhood.of((9, 10), (3, 4), (2, 1)))
    claim.gate("cpu")


def test_a_wrong_result_does_not_pass_the_gate(monkeypatch):
    right = own

    def wrong(problem, backend, **options):
        run = right(problem, backend, **options)
        return run if backend == "reference" else lambda **x: [1.01 * found for found in run(**x)]

    monkeypatch.setattr(_neighborhood, "own", wrong)
    monkeypatch.setitem(_neighborhood.GATES, "map", Neighborhood.of((9, 10), (3, 4)))
    with pytest.raises(AssertionError):
        gna.gate("cpu")


def test_the_simulated_bounds_hold():
    rows = list(gna._bounds("cpu", quick=False))
    assert len(rows) == len(gna.BOUNDS) + 2 + len(gna.MODELS)
    assert all(row.holds for row in rows if row.required is not None)
    assert [row.ours for row in rows if row.required is None] == [4.0, 7.11]


def test_the_bars_are_those_of_the_claim(pretended):
    bars = {}
    for row in gna._speed("cuda", quick=False):
        if row.required is not None:
            bars.setdefault(row.required, []).append(row.what)
    assert len(bars[gna.PERFECT]) == 2 and all("simulated bound" in what for what in bars[gna.PERFECT])
    assert len(bars[gna.OVER_CUDNN]) == 2 and all("against cuDNN" in what for what in bars[gna.OVER_CUDNN])
    assert bars[gna.OF_IDEAL] == ["forward, HunyuanVideo, share of the ideal of 11.11"]
    assert [what.split(",")[0] for what in bars[gna.OVER_FLEX]] == ["forward", "backward"]
    assert len(bars[1.0]) == 6


def test_nothing_is_timed_without_a_gpu():
    for claim in (gna, fna):
        assert not [
            row
            for name, part in claim._PARTS.items()
            if name not in ("bounds", "memory", "quality")
            for row in part("cpu", False)
        ]


def test_the_table_of_forms_has_a_row_a_form_and_their_means(pretended):
    rows = list(
        fna._table(
            [fna._problem((64, 64), 7, heads=2, head_dim=32), fna._problem((9, 9), 5, heads=2, head_dim=32)]
        )
    )
    times = {row.what: row for row in rows if row.unit == "ms" and "64 x 64" in row.shape}
    # Naive takes 1, GEMM 2 and fused 3 of the pretended milliseconds.
    assert times["forward, GEMM against naive"].ratio == 1 / 2
    assert times["forward and backward, fused against naive"].ratio == 2 / 6
    assert times["forward, fused against cuDNN"].required == 1.0
    means = {row.what: row for row in rows if row.unit == "x"}
    assert means["forward, mean gain of fused over naive"].baseline == fna.PAPER["fused", 2, torch.float16]
    assert means["forward, mean gain of fused over naive, against the bar"].holds is False
    assert not any("cuDNN" in row.what for row in rows if "9 x 9" in row.shape)
    wins = {row.what: row.ours for row in rows if row.unit == "%"}
    assert wins["forward, share of problems where fused is at least as fast as cuDNN"] == 100
    assert wins["forward, share of problems where fused is at least as fast as naive"] == 0


def test_memory_and_intensity_have_rows_on_a_cpu():
    rows = list(fna._memory("cpu", quick=False))
    assert [round(row.ratio, 2) for row in rows] == [169.0, 2.32, 3969.0, 32.01]


def test_the_ideal_counts_the_pairs_of_the_mask():
    for grid in (Neighborhood.of((6, 8), (3, 4), 1, (2, 1), (True, False)), Neighborhood.of((11,), 4)):
        problem = Problem("some", grid, 1, 8)
        mask = grid.mask(torch.device("cpu"))
        assert problem.ideal == pytest.approx(mask.numel() / mask.sum().item())
        assert problem.flops == pytest.approx(4 * mask.sum().item() * 8)


def test_the_rival_in_rows_sees_the_windows():
    for grid in (
        Neighborhood.of((5, 6), (3, 4), (1, 2), 1, (True, False)),
        Neighborhood.of((3, 4, 5), (2, 3, 5)),
    ):
        token = torch.arange(grid.num_tokens)
        seen = seen_in_rows(grid)(None, None, token[:, None], token[None, :])
        assert torch.equal(seen, grid.mask(torch.device("cpu")))


def test_models_of_nats_shape_are_the_same_by_every_form():
    torch.manual_seed(0)
    block = _nat_shape.Block(32, 2).double()
    x = torch.randn(1, 14, 15, 32, dtype=torch.float64)
    found = []
    for backend in ("composed", "reference"):
        _nat_shape.attend_by(block, backend)
        found.append(block(x))
    torch.testing.assert_close(*found)
    with torch.device("meta"):
        model = _nat_shape.NATShaped(is_dilated=True)
    assert 27e6 < sum(parameter.numel() for parameter in model.parameters()) < 29e6
    blocks = [layer for layer in model.layers if isinstance(layer, _nat_shape.Block)]
    assert (
        len(blocks) == 30
        and blocks[1].attention.dilation == (8, 8)
        and blocks[4].attention.dilation == (4, 4)
    )


def test_strides_are_trained_and_have_rows(monkeypatch):
    monkeypatch.setattr(_window_quality, "SEEDS", (0, 1))
    rows = list(_window_quality.strides("cpu", quick=True))
    assert [row.what for row in rows if row.baseline is None] == [
        f"test {title}, windows of 4 x 4, blocks" for title in ("loss", "accuracy")
    ]
    assert len(rows) == 6 and all(0 < row.ours < 100 for row in rows)
    assert not list(_window_quality.forms("cpu", quick=True))
