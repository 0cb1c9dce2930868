from __future__ import annotations

import pytest
import torch

from undivided.claims import gcvit, load
from undivided.claims.gcvit import CopiedQueries, TwoBlocks, blocks, gate, pairs, reach
from undivided.data.images import digits
from undivided.layers.gcvit import GlobalWindowAttention

pytest.importorskip("timm")


def test_the_gate_passes_and_can_fail(monkeypatch):
    gate("cpu")
    attention = gcvit.grouped_attention

    def wrong(*arguments, backend, **options):
        return attention(*arguments, backend=backend, **options) * (1.01 if backend == "sdpa" else 1.0)

    monkeypatch.setattr(gcvit, "grouped_attention", wrong)
    with pytest.raises(AssertionError, match="error above 2 x eager"):
        gate("cpu")


def test_copied_queries_compute_the_same():
    shared, copied = GlobalWindowAttention(8, 2, 3), CopiedQueries(8, 2, 3)
    copied.load_state_dict(shared.state_dict())
    x, query = torch.randn(2, 54, 8), torch.randn(2, 9, 8)
    torch.testing.assert_close(copied(x, (6, 9), query), shared(x, (6, 9), query))


def test_a_block_that_does_not_move_is_the_same_in_timm():
    found = blocks(14, 16, 2)
    ours, theirs = found["local"], found[gcvit.UNSHIFTED]
    names = {"attn.position_bias.table": "attn.relative_position_bias_table"}
    theirs_state = theirs.state_dict()
    state = {name: theirs_state[names.get(name, name)] for name in ours.state_dict()}
    ours.load_state_dict(state)
    x = torch.randn(2, 14, 14, 16)
    torch.testing.assert_close(ours(x.flatten(1, 2), (14, 14), None), theirs(x).flatten(1, 2))


def test_the_rival_is_shifted_and_masked():
    found = blocks(14, 16, 2)
    assert found[gcvit.SHIFTED].shift_size == (3, 3) and found[gcvit.SHIFTED].attn_mask is not None
    assert found[gcvit.UNSHIFTED].shift_size == (0, 0)


@pytest.mark.parametrize(("kind", "share"), [("global", 1), ("shifted", 4 / 16), ("local", 1 / 16)])
def test_how_far_two_blocks_reach(kind, share):
    # A shifted window lies in four of those before it.
    assert reach(TwoBlocks(kind, dim=8)) == pytest.approx(share)


def test_pairs_stand_in_corners_and_the_last_is_the_class():
    images = pairs(digits(), 40)
    assert images.train_images.shape == (40, 1, 56, 56) and images.test_images.shape == (10, 1, 56, 56)
    shown = images.train_images.float().mean((0, 1))
    assert shown[:8, :8].any() and shown[-8:, -8:].any()
    assert not shown[8:48].any() and not shown[:, 8:48].any()
    assert set(images.train_labels.tolist()) == {0, 1}
    zeros = digits().train_images[digits().train_labels == 0][:, 0]
    is_zero = [bool((image == zeros).all((1, 2)).any()) for image in images.train_images[:, 0, -8:, -8:]]
    assert is_zero == (images.train_labels == 0).tolist()


def test_the_class_is_read_from_the_first_window_alone():
    model = TwoBlocks("local", dim=8)
    x = torch.randn(2, 1, 56, 56)
    other = x.clone()
    other[:, :, 14:] = 1.0
    torch.testing.assert_close(model(other), model(x))
    other[:, :, :14, :14] = 1.0
    assert not torch.allclose(model(other), model(x))


def test_the_claim_is_the_one_of_its_slug():
    assert load("gcvit").slug == "gcvit"
