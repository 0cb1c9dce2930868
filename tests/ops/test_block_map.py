from __future__ import annotations

import pytest
import torch

from undivided.ops import block_map
from undivided.ops.block_map import (
    block_bounds,
    block_mask,
    block_sequences,
    causal_blocks,
    invert,
    num_blocks,
    pool_blocks,
    same_sequence,
    score_blocks,
    select_mass,
    select_topk,
    token_blocks,
)

PACKED = torch.tensor([0, 13, 13, 30, 45], dtype=torch.int32)


def scores_with_ties(rows=11, blocks=37):
    scores = torch.randn(2, 3, rows, blocks)
    scores[..., 5:20] = scores[..., 5:6]
    scores[0, 0, 2, 3:] = float("-inf")
    return scores


def test_a_short_last_block_is_divided_by_its_own_length():
    x = torch.randn(2, 3, 45, 4, dtype=torch.float64)
    pooled = pool_blocks(x, 8)
    assert pooled.shape == (2, 3, 6, 4)
    torch.testing.assert_close(pooled[:, :, 5], x[:, :, 40:].mean(2))
    torch.testing.assert_close(pooled[:, :, 1], x[:, :, 8:16].mean(2))
    # A length below one block.
    torch.testing.assert_close(pool_blocks(x[:, :, :3], 8), x[:, :, :3].mean(2, keepdim=True))


def test_blocks_are_cut_inside_packed_sequences():
    bounds = block_bounds(45, 8, PACKED.device, PACKED).tolist()
    assert bounds[:7] == [[0, 8], [8, 13], [13, 21], [21, 29], [29, 30], [30, 38], [38, 45]]
    assert bounds[7:] == [[45, 45]] * (num_blocks(45, 8, PACKED) - 7)
    assert block_sequences(45, 8, PACKED.device, PACKED)[:7].tolist() == [0, 0, 2, 2, 2, 3, 3]
    owner = token_blocks(45, 8, PACKED.device, PACKED)
    x = torch.randn(1, 2, 45, 3)
    pooled = pool_blocks(x, 8, cu_seqlens=PACKED)
    for block, (first, last) in enumerate(bounds[:7]):
        assert owner[first:last].eq(block).all()
        torch.testing.assert_close(pooled[:, :, block], x[:, :, first:last].mean(2))
    assert not pooled[:, :, 7:].any()
    allowed = same_sequence(45, 8, 8, PACKED.device, PACKED)
    assert allowed.sum(1).tolist() == [2, 2, 3, 3, 3, 2, 2, 0, 0]


@pytest.mark.parametrize(
    ("queries", "keys", "rows", "columns"), [(45, 45, 8, 4), (9, 30, 4, 8), (30, 9, 8, 4)]
)
def test_causal_blocks_hold_a_pair_that_is_seen(queries, keys, rows, columns):
    seen = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    expected = torch.zeros(num_blocks(queries, rows), num_blocks(keys, columns), dtype=torch.bool)
    for n, m in seen.nonzero().tolist():
        expected[n // rows, m // columns] = True
    assert torch.equal(causal_blocks(queries, keys, rows, columns, expected.device), expected)


def test_heads_of_a_group_share_their_keys_in_scores():
    rows, columns = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    scores = score_blocks(rows, columns)
    torch.testing.assert_close(scores[0, 3], rows[0, 3] @ columns[0, 1].T)


def test_the_highest_are_chosen_and_the_first_among_equals():
    scores = torch.tensor([[[[1.0, 3.0, 2.0, 3.0, 3.0]]]])
    assert select_topk(scores, 2).index.tolist() == [[[[1, 3]]]]
    assert select_topk(scores, 4).index.tolist() == [[[[1, 2, 3, 4]]]]


def test_counts_are_by_row_and_at_least_one():
    scores = torch.randn(2, 3, 4, 6)
    wanted = torch.randint(0, 5, (2, 3, 4), dtype=torch.int32)
    index, counts = select_topk(scores, wanted)
    assert torch.equal(counts, wanted.clamp(min=1))
    assert torch.equal(block_mask((index, counts), 6).sum(-1).int(), counts)
    by_head = select_topk(scores, torch.tensor([1, 2, 3])[:, None])
    assert by_head.counts[:, :, 0].tolist() == [[1, 2, 3]] * 2


def test_only_allowed_blocks_are_chosen_and_some_always():
    scores = torch.randn(1, 2, 8, 8)
    allowed, always = causal_blocks(64, 64, 8, 8, scores.device), torch.eye(8, dtype=torch.bool)
    index, counts = select_topk(scores, 3, allowed=allowed, always=always)
    chosen = block_mask((index, counts), 8)
    assert not (chosen & ~allowed).any() and (chosen | ~always).all()
    assert counts[0, 0].tolist() == [1, 2, 3, 3, 3, 3, 3, 3]
    nothing = select_topk(scores, 3, allowed=torch.zeros(8, 8, dtype=torch.bool))
    assert not nothing.counts.any() and (nothing.index == -1).all()


def test_mass_takes_the_fewest_blocks_that_reach_it():
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    scores = weights[[2, 0, 3, 1]].log()[None, None, None]
    for mass, expected in ((0.4, [1]), (0.6, [1, 3]), (0.9, [0, 1, 3]), (1.0, [0, 1, 2, 3])):
        index, counts = select_mass(scores, mass)
        assert index[0, 0, 0, : counts.item()].tolist() == expected
    always = torch.tensor([True, False, True, False])
    assert select_mass(scores, 0.1, always=always).index[0, 0, 0].tolist() == [0, 2, -1, -1]
    assert select_mass(scores, 0.4, always=always).index[0, 0, 0].tolist() == [0, 1, 2, -1]
    assert select_mass(scores, 0.9, max_blocks=2).counts.item() == 2


def test_nothing_has_a_gradient():
    x = torch.randn(1, 1, 16, 4, requires_grad=True)
    pooled = pool_blocks(x, 4)
    assert not pooled.requires_grad and not score_blocks(pooled, pooled).requires_grad


def test_the_inverse_describes_the_same_map():
    lists = select_topk(scores_with_ties(), torch.randint(1, 9, (2, 3, 11)))
    mask = block_mask(lists, 37)
    offsets, rows = invert(*lists, 37)
    for b, h in ((0, 0), (1, 2)):
        for block in range(37):
            own = rows[b, h, offsets[b, h, block] : offsets[b, h, block + 1]]
            assert own.tolist() == mask[b, h, :, block].nonzero().flatten().tolist()


def test_kernels_choose_and_invert_as_sorting_does(device):
    from undivided.ops.block_map import triton

    scores = scores_with_ties(3)[:, :1].contiguous().to(device)
    scores[1, 0, 1, ::2] = 0.0
    scores[1, 0, 1, 1::2] = -0.0
    wanted = torch.randint(1, 9, (2, 1, 3)).int().to(device)
    expected = select_topk(scores.cpu(), wanted.cpu(), max_blocks=9)
    index, counts, classes = triton.select(scores, wanted, 9, 4, "classes")
    assert torch.equal(index.cpu(), expected.index) and torch.equal(counts.cpu(), expected.counts)
    mask = block_mask(expected, 37)
    assert torch.equal(classes.cpu() == 1, mask)
    order = scores.cpu().sort(dim=-1, descending=True, stable=True).indices[..., -4:]
    lowest = torch.zeros_like(mask).scatter(-1, order, True)
    assert torch.equal(classes.cpu() == -1, lowest)
    for kind, seen in (("between", ~mask & ~lowest), ("beside", ~mask), ("everywhere", mask | ~mask)):
        _, _, shares = triton.select(scores, wanted, 9, 4, kind, torch.float16, 0.25)
        assert torch.equal(shares.cpu(), 0.25 * seen.half())
    few = triton.select(scores, 3, 3)
    assert torch.equal(few[0].cpu(), select_topk(scores.cpu(), 3).index) and few[2] is None

    offsets, rows = invert(*expected, 37)
    found = triton.invert(mask.to(device), offsets.to(device), rows.shape[2])
    for b in range(2):
        last = offsets[b, 0, -1]
        assert torch.equal(found[b, 0, :last].cpu(), rows[b, 0, :last])


@pytest.mark.gpu
def test_on_a_gpu_all_of_it_is_as_on_a_cpu_and_never_waits():
    scores = scores_with_ties(64, 512)
    wanted = torch.randint(1, 40, (2, 3, 64))
    expected = select_topk(scores, wanted, max_blocks=40)
    device_scores, device_wanted = scores.cuda(), wanted.cuda()

    def chosen():
        lists = select_topk(device_scores, device_wanted, max_blocks=40)
        return lists, invert(*lists, 512)

    chosen()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists, (offsets, rows) = chosen()
    graph.replay()
    assert torch.equal(lists.index.cpu(), expected.index) and torch.equal(lists.counts.cpu(), expected.counts)
    wanted_offsets, wanted_rows = invert(*expected, 512)
    assert torch.equal(offsets.cpu(), wanted_offsets)
    last = wanted_offsets[1, 2, -1]
    assert torch.equal(rows[1, 2, :last].cpu(), wanted_rows[1, 2, :last])


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.block_map import triton

for blocks in (16, 512):
    scores = torch.zeros(1, 2, 8, blocks)
    triton.select(scores, torch.ones(1, 2, 8, dtype=torch.int32), 4)
triton.select(scores, 4, 4, 2, "between", torch.bfloat16, 0.25)
triton.invert(scores.bool(), torch.zeros(1, 2, blocks + 1, dtype=torch.int32), 32)
"""


def test_every_kernel_compiles_for_hopper(run_python):
    lines = run_python(COMPILES).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["_select_kernel"] * 3 + ["_invert_kernel"]


def test_bad_input_is_named():
    scores = torch.randn(1, 1, 2, 3)
    for call, message in (
        (lambda: select_topk(scores, 0), "topk=0 must be at least 1: a row without a block has no output"),
        (lambda: select_topk(scores, 1, max_blocks=0), "max_blocks=0 must be at least 1"),
        (lambda: select_topk(scores[0], 1), r"scores has shape \[1, 2, 3\]; it needs 4 axes"),
        (lambda: select_mass(scores, 0.0), r"mass=0.0 must be in \(0, 1\]"),
        (lambda: select_topk(scores, 1, allowed=torch.ones(2, 2) > 0), r"allowed has shape \[2, 2\]; it must broad"),
        (lambda: pool_blocks(scores, 0), "block_size=0 must be at least 1"),
        (lambda: score_blocks(scores.expand(1, 3, 2, 3), scores.expand(1, 2, 2, 3)), "key_blocks has 2 heads, which"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    index = torch.tensor([[[[2, 1]]]], dtype=torch.int32)
    counts = torch.tensor([[[2]]], dtype=torch.int32)
    for bad, message in (
        ((index, counts, 3), "index must be ascending in each list"),
        ((index.flip(-1), counts, 2), "index lists block 2, but there are 2 key blocks"),
        ((index.flip(-1), counts + 1, 3), "counts has 3; lists of 2 entries allow 0 to 2"),
        ((index, counts[0], 3), r"counts has shape \[1, 1\]; index needs \[1, 1, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            invert(*bad)
    with pytest.raises(TypeError, match="index has dtype torch.int64; use int32"):
        invert(index.long(), counts, 3)
    with pytest.raises(TypeError, match="topk has dtype torch.float32; counts are integers"):
        select_topk(scores, torch.ones(1))


def test_all_names_are_there():
    for name in block_map.__all__:
        assert hasattr(block_map, name)
