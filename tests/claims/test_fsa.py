from __future__ import annotations

import pytest
import torch

from undivided.claims import _dma_quality, load
from undivided.claims import _fsa_layer as parts
from undivided.claims import fsa as claim
from undivided.claims._dma_quality import NATIVE, WINDOW, Recall, arms
from undivided.data.text import DemoTexts
from undivided.ops.block_map import block_mask


def test_the_gate_passes_on_a_cpu_and_nothing_is_timed_there():
    claim.gate("cpu")
    for part in ("speed", "grid", "choices", "layer", "model", "recall"):
        assert list(claim.CLAIM.parts[part]("cpu", False)) == []
    assert load("fsa") is claim.CLAIM


def test_lists_have_the_first_block_and_the_two_local_ones_and_none_of_the_future():
    lists = claim.draw_lists(2, 400, "cpu", topk=5)
    mask = block_mask(lists, 7)
    own = torch.arange(400) // 64
    assert mask[..., 0].all()
    for block in (own, (own - 1).clamp(min=0)):
        assert mask.gather(-1, block[None, None, :, None].expand(1, 2, -1, 1)).all()
    assert not (mask & (torch.arange(7) > own[:, None])).any()
    assert torch.equal(lists.counts, (own + 1).clamp(max=5).int().expand(1, 2, 400))


class _Ceilings:
    def fraction(self, milliseconds, *, flops):
        # Of a rate of 1e15 operations a second.
        return flops / 1e12 / milliseconds


@pytest.mark.parametrize("group", [1, 8])
def test_bars_are_at_group_one_and_against_full_attention(group, monkeypatch):
    monkeypatch.setattr(claim, "measured_ceilings", lambda device: _Ceilings())
    forward = {"ours": 2.0, claim.CUDNN: 5.0, claim.OWN_ORDER: 9.0, claim.RELEASE: 6.0}
    backward = {name: 2 * time for name, time in forward.items()}
    rows = list(claim._group_rows(group, forward, backward, claim.RELEASE))
    required = {(row.what.split(",")[0].split()[-1], row.baseline_name): row.required for row in rows}
    assert required["forward", claim.CUDNN] == required["backward", claim.CUDNN] == 1.0
    assert required["forward", claim.RELEASE] == (3.5 if group == 1 else None)
    assert required["backward", claim.RELEASE] is None and required["forward", claim.OWN_ORDER] is None
    # Four products of 32 heads of 128 over at most 1024 keys a token.
    assert 0.5e12 < rows[0].fraction_of_ceiling * 2 * 1e12 < 4 * 128 * 32 * 32768 * 1024
    average = claim._average({1: (forward, backward), 2: (forward, backward)}, claim.RELEASE)
    assert (average.ours, average.required, average.holds) == (3.0, 2.0, True)


def test_the_arms_have_as_many_keys():
    nsa = parts.ARMS["NSA"]
    assert nsa["topk"] * nsa["block_size"] + nsa["window"] == parts.ARMS["window"]["window"] == 64
    for keep in (16, Recall().keep, 64):
        nsa = arms(keep)[NATIVE]
        assert nsa["topk"] * nsa["block_size"] + nsa["window"] == arms(keep)[WINDOW]["window"] == keep


def test_lists_may_be_the_same_for_all_tokens_or_chosen_by_compressed_attention():
    index, counts = claim.draw_lists(1, 1024, "cpu", topk=5, is_skewed=True)
    assert (counts[..., 320:] == 5).all()
    assert (index[0, 0, 384:, :3] == torch.arange(3)).all() and index[0, 0, 1023].tolist() == [
        0,
        1,
        2,
        14,
        15,
    ]
    assert int(claim.draw_lists(1, 1024, "cpu", topk=3, block_size=128).index.max()) == 7
    query, key = torch.randn(1, 4, 1200, 8), torch.randn(1, 2, 1200, 8)
    index, counts = claim.chosen_lists(query, key)
    assert index.shape == (1, 2, 1200, 16) and (index[..., 0] == 0).all() and int(counts.max()) == 16


def test_the_mask_of_the_rival_is_that_of_the_lists():
    lists = claim.draw_lists(2, 400, "cpu", topk=3)
    listed = block_mask(lists, 7)[0]
    place = torch.arange(400)
    exact = listed[:, :, place // 64] & (place <= place[:, None])
    mask = claim.flex_mask(lists, 400, group=3)
    n, m = torch.meshgrid(place, place, indexing="ij")
    for head in range(6):
        assert torch.equal(mask.mask_mod(0, head, n, m), exact[head // 3])
    padded = torch.nn.functional.pad(exact, (0, 112, 0, 112)).unflatten(-1, (4, 128)).unflatten(1, (4, 128))
    visited = mask.to_dense().bool()[0]
    # A visited tile may hold a block of the future alone, beside its own: none with a key is left out.
    assert (visited >= padded.any(4).any(2).repeat_interleave(3, dim=0)).all() and not visited.all()


def test_the_crossing_lies_between_the_measured_lengths():
    assert claim.crossing(8192, 0.5, 16384, 2.0) == pytest.approx(8192 * 2**0.5)
    assert claim.crossing(8192, 1 - 1e-9, 16384, 2.0) == pytest.approx(8192)


def test_recall_and_language_have_a_row_an_arm(monkeypatch):
    shares = {"sqa": 0.25, "nsa": 0.5, "gqa": 1.0}
    monkeypatch.setattr(
        _dma_quality, "recall_accuracy", lambda problem, entry, seed, device: (shares[entry["mechanism"]], [])
    )
    rows = list(parts.recall_rows("cuda", True))
    assert [(row.ours, row.ratio, row.holds) for row in rows] == [
        (0.25, None, None),
        (0.5, 2.0, True),
        (1.0, 4.0, None),
    ]
    words = "the blocks that a token attends are those that its compressed keys rank highest. " * 60
    monkeypatch.setattr("undivided.data.demo_texts", lambda: DemoTexts(words, {"2024-Biden-1": words[:900]}))
    monkeypatch.setitem(parts.SIZES["cpu"], "steps", 2)
    rows = list(claim.CLAIM.parts["quality"]("cpu", False))
    assert [row.what.split(", ")[1] for row in rows] == list(parts.ARMS)
    assert rows[0].baseline is None and rows[1].required == 1.0 and rows[2].required is None
