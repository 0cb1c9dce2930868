from __future__ import annotations

import pytest
import torch

from undivided.claims import fsa as claim
from undivided.claims import load
from undivided.ops.block_map import block_mask


def test_the_gate_passes_on_a_cpu_and_nothing_is_timed_there():
    claim.gate("cpu")
    for part in ("speed", "layer"):
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
    nsa = claim.ARMS["NSA"]
    assert nsa["topk"] * nsa["block_size"] + nsa["window"] == claim.ARMS["window"]["window"] == 64
