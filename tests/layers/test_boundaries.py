from __future__ import annotations

import math

import pytest
import torch

from undivided.layers.boundaries import (
    BoundaryPredictor,
    attention_ratios,
    boundary_labels,
    boundary_loss,
    decode_boundaries,
    fixed_boundaries,
    inner_gaps,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def maps(length, batch=2):
    return torch.rand(batch, length, length, dtype=torch.float64).tril()


@pytest.mark.parametrize("sliding_window", [None, 7])
def test_ratios_equal_a_double_loop(sliding_window):
    attention, window, length = maps(40), 3, 40
    found = attention_ratios(attention, window, sliding_window)
    for p in range(1, length):
        expected = 1.0
        if 2 * window <= p <= length - 2 * window:
            first = p + window - 1
            last = length if sliding_window is None else min(first + sliding_window, length)
            past = sum(float(attention[1, r, c]) for r in range(first, last) for c in range(p - window, p))
            future = sum(float(attention[1, r, c]) for r in range(first, last) for c in range(p, p + window))
            expected = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
        assert float(found[1, p - 1]) == pytest.approx(expected, rel=1e-9)


def test_a_ratio_does_not_know_which_side_is_which():
    attention = maps(30, 1)
    other = attention.clone()
    # Columns around gap 12, exchanged.
    other[:, :, 9:12], other[:, :, 12:15] = attention[:, :, 12:15], attention[:, :, 9:12]
    assert attention_ratios(attention, 3)[0, 11] == pytest.approx(float(attention_ratios(other, 3)[0, 11]))


def test_twice_the_mass_is_a_boundary():
    attention = torch.ones(1, 40, 40, dtype=torch.float64)
    attention[:, :, :20] = 2.0
    labels = boundary_labels(attention, 4)
    assert float(labels[0, 19]) == pytest.approx(0.5, abs=1e-6)
    assert float(labels[0, 9]) == pytest.approx(1 / (1 + 2**2), abs=1e-6)
    # Near the ends nothing is told: the ratio is 1.
    assert (labels[0, :7] == labels[0, 9]).all()


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_the_predictor_sees_its_window_alone(gated):
    predictor = BoundaryPredictor(12, window=3, num_heads=2, hidden=8, gated=gated).double()
    key = torch.randn(1, 3, 40, 4, dtype=torch.float64)
    logits = predictor(key)
    assert logits.shape == (1, 39)
    shifted = predictor(key[:, :, 5:])
    inner = slice(2, -2)
    torch.testing.assert_close(shifted[:, inner], logits[:, 5:][:, inner], **EXACT)
    # At the ends the missing keys are zeros.
    padded = predictor(torch.nn.functional.pad(key, (0, 0, 3, 3)))
    torch.testing.assert_close(padded[:, 3:-3], logits, **EXACT)
    changed = key.clone()
    changed[:, :, 20] += 1
    moved = (predictor(changed) != logits)[0].nonzero().flatten() + 1
    assert moved.tolist() == list(range(18, 24))


def test_the_predictor_in_parts_is_the_predictor(monkeypatch):
    predictor, key = BoundaryPredictor(8, 2, 2, 8).double(), torch.randn(2, 1, 33, 8, dtype=torch.float64)
    whole = predictor(key)
    monkeypatch.setattr("undivided.layers.boundaries._GAPS", 7)
    torch.testing.assert_close(predictor(key), whole, **EXACT)


def test_the_predictor_learns_one_text_by_heart():
    key = torch.randn(1, 2, 60, 8)
    target = (torch.rand(1, 59) < 0.2).float()
    predictor = BoundaryPredictor(16, num_heads=2, hidden=32)
    optimiser, mask = torch.optim.Adam(predictor.parameters(), lr=1e-2), inner_gaps(60, 4)
    for _ in range(60):
        loss = boundary_loss(predictor(key), target, mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = (predictor(key) > 0).float()
    assert (found == target)[:, mask].all()


def test_the_loss_is_focal_and_weighs_boundaries():
    logits, targets = torch.tensor([[0.3, -1.2, 2.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    mask = torch.tensor([True, True, False])
    p = [1 / (1 + math.exp(-0.3)), 1 / (1 + math.exp(1.2))]
    expected = ((1 - p[0]) ** 2 * 1.3 * -math.log(p[0]) + p[1] ** 2 * -math.log(1 - p[1])) / 2
    assert float(boundary_loss(logits, targets, mask)) == pytest.approx(expected, rel=1e-5)


def greedy(logits, threshold, most, nms, forced, window):
    """Boundaries of one row, one after the other."""
    length = len(logits) + 1
    chosen = list(forced)
    for value, gap in sorted(((-v, p + 1) for p, v in enumerate(logits.tolist()))):
        if len(chosen) >= most:
            break
        if -value <= threshold or not window <= gap <= length - window or (forced and gap > min(forced)):
            continue
        if all(abs(gap - other) > nms for other in chosen):
            chosen.append(gap)
    return [0, *sorted(chosen), length]


@pytest.mark.parametrize("nms", [0, 3, 8])
@pytest.mark.parametrize("most", [1, 5, 100])
@pytest.mark.parametrize("forced", [(), (200,)])
def test_decoding_is_the_greedy_choice(nms, most, forced):
    logits = 2 * torch.randn(3, 249)
    found = decode_boundaries(logits, 1.1, max_chunks=most, nms=nms, forced=forced, window=4)
    for row, values in zip(found.tolist(), logits, strict=True):
        expected = greedy(values, 1.1, most, nms, forced, 4)
        # Rows with fewer boundaries end in empty chunks.
        assert row == expected + [250] * (len(row) - len(expected))
        inner = expected[1:-1]
        assert len(inner) <= most
        assert all(b - a > nms for a, b in zip(inner, inner[1:], strict=False))


def test_the_threshold_is_of_the_logit():
    logits = torch.tensor([[0.0, 0.0, 0.9, 0.0, 0.0, 1.2, 0.0]])
    assert decode_boundaries(logits, 1.1, max_chunks=9, nms=1).tolist() == [[0, 6, 8]]
    assert decode_boundaries(logits - 9, 1.1, max_chunks=9, nms=1).tolist() == [[0, 8]]


def test_of_equal_neighbours_the_first_is_taken():
    assert decode_boundaries(torch.full((1, 10), 2.0), max_chunks=9, nms=2).tolist() == [[0, 1, 4, 7, 10, 11]]


def test_fixed_boundaries():
    assert fixed_boundaries(10, 4, 2).tolist() == [[0, 4, 8, 10]] * 2
    assert fixed_boundaries(8, 4).tolist() == [[0, 4, 8]]


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="num_heads=3 does not divide key_dim=16."):
        BoundaryPredictor(16, num_heads=3)
    with pytest.raises(ValueError, match="window=0 must be at least 1."):
        BoundaryPredictor(16, window=0)
    with pytest.raises(ValueError, match="key has 2 heads of 4, but key_dim=16."):
        BoundaryPredictor(16)(torch.zeros(1, 2, 20, 4))
    with pytest.raises(
        ValueError, match="key has 7 tokens, fewer than the 8 of a window of 4 on both sides."
    ):
        BoundaryPredictor(16)(torch.zeros(1, 2, 7, 8))
    with pytest.raises(ValueError, match="max_chunks=1 must be at least 2."):
        decode_boundaries(torch.zeros(1, 9), max_chunks=1, forced=(2, 5))
    with pytest.raises(ValueError, match="forced has 10, but gaps are before tokens 1 to 9."):
        decode_boundaries(torch.zeros(1, 9), max_chunks=1, forced=(10,))
