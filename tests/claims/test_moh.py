from __future__ import annotations

import pytest
import torch

from undivided.claims import load
from undivided.claims._tiny_lm import tiny_lm
from undivided.claims.moh import FLASH, Problem, _rows, balanced_choice, break_even, gate, load_ratios
from undivided.ops import routed_attention


def test_the_choice_is_balanced_and_half_of_it_is_shared():
    for share, active in ((1.0, 32), (0.9, 29), (0.75, 24), (0.5, 16)):
        selected = balanced_choice(2, 32, 300, share, "cpu")
        assert selected.shape == (2, 32, 300) and selected.dtype == torch.bool
        assert (selected.sum(1) == active).all()
        assert selected[:, : active // 2].all()
    routed = selected[:, 8:].double().mean(dim=(0, 2))
    assert routed.min() > 0.2 and routed.max() < 0.5


def test_the_break_even_is_where_the_lines_meet():
    points = [(1.0, 4.0), (0.75, 3.0), (0.5, 2.0)]
    assert break_even(points, 3.5) == pytest.approx(0.875)
    assert break_even(points, 3.0) == pytest.approx(0.75)
    assert break_even(points, 2.2) == pytest.approx(0.55)
    assert break_even(points, 9.0) == 1.0
    assert break_even(points, 1.9) is None


def test_the_bar_is_at_half_of_the_heads_from_2048_tokens_on(monkeypatch):
    class Ceilings:
        def fraction(self, milliseconds, flops):
            return 0.5

    monkeypatch.setattr("undivided.claims.moh.measured_ceilings", lambda device: Ceilings())
    shares = (1.0, 0.9, 0.75, 0.5)
    times = {str(share): share for share in shares} | {FLASH: 0.8}
    long, short = (list(_rows(Problem(64, length, True, shares), times)) for length in (2048, 512))
    assert [row.required for row in long] == [1.5, None, None, None, None]
    assert [row.holds for row in long] == [True, None, None, None, None]
    assert all(row.required is None for row in short)
    assert long[0].ratio == pytest.approx(1.6) and "50% of the heads" in long[0].what
    assert "at which flash takes as long" in long[-1].what and long[-1].ours == pytest.approx(0.8)


def test_only_selected_pairs_are_counted():
    whole = Problem(64, 4, False, (1.0,)).flops(1.0)
    assert whole == 4 * 64 * 8 * 32 * 16
    assert Problem(64, 4, True, (1.0,)).flops(0.5) == whole * 0.5 * 10 / 16
    assert Problem(64, 4, False, (1.0,), trains=True).flops(1.0) == 3.5 * whole


def test_loads_are_counted_layer_by_layer():
    model = tiny_lm({"mechanism": "moh", "shared_heads": 1, "top_k": 1}).eval()
    for index, layer in enumerate(model.attention_layers()):
        layer.router.routed.weight.data.zero_()
        layer.router.routed.weight.data[index] = 10.0
    ratios = load_ratios(model, "a text of some length " * 20, 44)
    assert len(ratios) == 2 and min(ratios) >= 1
    with torch.no_grad():
        model.attention_layers()[0].router.routed.weight.zero_()
    # Without a difference the first routed head is always chosen, and the others never: one stands for none.
    assert load_ratios(model, "b" * 88, 44)[0] == 88
    assert load_ratios(tiny_lm(None), "b" * 88, 44) == []


def test_the_gate_passes_and_can_fail(monkeypatch):
    gate("cpu")
    wrong = lambda *x, backend, **options: (  # noqa: E731
        routed_attention(*x, backend=backend, **options) * (1.01 if backend == "sdpa" else 1)
    )
    monkeypatch.setattr("undivided.claims.moh.routed_attention", wrong)
    with pytest.raises(AssertionError, match="error above 2 x eager"):
        gate("cpu")


def test_the_claim_is_the_one_of_its_slug():
    assert load("moh").slug == "moh"
