from __future__ import annotations

import pytest
import torch

from undivided.layers.head_maps import (
    RULES,
    allocate_query_heads,
    head_counts,
    head_map_of,
    uniform_head_map,
)


def counts(norms, num_heads, rule="kd", **options):
    norms = torch.tensor(norms)
    return head_counts(allocate_query_heads(norms, num_heads, rule, **options), norms.shape[-1]).tolist()


def by_loops(norms, num_heads):
    """KDGQA's allocation as one writes it down, number by number."""
    low, high = min(norms), max(norms)
    scaled = [(s - low) / (high - low) for s in norms]
    n = [round(u / sum(scaled) * num_heads) for u in scaled]
    while sum(n) > num_heads:
        n[n.index(max(n))] -= 1
    while sum(n) < num_heads:
        n[n.index(min(n))] += 1
    return n


@pytest.mark.parametrize(
    ("norms", "num_heads", "expected"),
    [
        ([1.0, 2.0, 3.0], 6, [0, 2, 4]),
        # Shares 0, 4/3, 8/3, 4: rounded they are 0, 1, 3, 4.
        ([1.0, 2.0, 3.0, 4.0], 8, [0, 1, 3, 4]),
        # Shares 0, 1.5, 1.5, 3 go to even numbers, 0, 2, 2, 3: one too many, from the largest.
        ([0.0, 1.0, 1.0, 2.0], 6, [0, 2, 2, 2]),
        # Shares 0, 2.5, 2.5 go to even numbers, 0, 2, 2: the head that is missing goes to the smallest.
        ([0.0, 1.0, 1.0], 5, [1, 2, 2]),
        # Two key heads: the weaker one is always left out.
        ([5.0, 4.99], 8, [8, 0]),
        ([3.0, 3.0, 3.0], 6, [2, 2, 2]),
        ([7.0], 6, [6]),
    ],
)
def test_hand_values_of_kdgqa(norms, num_heads, expected):
    assert counts(norms, num_heads) == expected


def test_hand_values_of_dgqa():
    cache = torch.tensor([1.0, 1.0, 1.0])
    # |c - s| = 1, 2, 3.
    assert counts([2.0, 3.0, 4.0], 6, "dgqa_diff", cache=cache) == [1, 2, 3]
    assert counts([0.0, 3.0, -2.0], 6, "dgqa_diff", cache=cache) == [1, 2, 3]
    # 0.5 s + 0.5 c = 1, 2, 3.
    assert counts([1.0, 3.0, 5.0], 6, "dgqa_ema", cache=cache, beta=0.5) == [1, 2, 3]
    # Nothing has changed: every importance is zero.
    assert counts([1.0, 1.0, 1.0], 6, "dgqa_diff", cache=cache) == [2, 2, 2]


def test_is_the_algorithm_written_with_loops_in_every_row_of_a_batch():
    for groups in range(2, 9):
        norms = torch.rand(50, groups, dtype=torch.float64)
        for num_heads in (groups, 2 * groups, 3 * groups + 1):
            found = head_counts(allocate_query_heads(norms, num_heads), groups)
            assert found.tolist() == [by_loops(row, num_heads) for row in norms.tolist()]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("random_repair", [False, True])
def test_every_query_head_gets_a_key_head_whatever_the_norms(rule, random_repair):
    for groups in (1, 2, 3, 7, 16):
        for num_heads in (1, groups, 17):
            # Wide, narrow, and mostly zero.
            norms = torch.cat([torch.randn(40, groups).exp(), 1 + 1e-3 * torch.rand(40, groups)])
            norms = torch.cat([norms, norms * (torch.rand(80, groups) > 0.7)])
            options = {"cache": torch.rand(groups), "random_repair": random_repair}
            head_map = allocate_query_heads(norms, num_heads, rule, **options)
            assert head_map.shape == (160, num_heads)
            assert (head_map.diff(dim=-1) >= 0).all()
            assert int(head_map.min()) >= 0 and int(head_map.max()) < groups


def test_a_permutation_of_key_heads_permutes_their_shares():
    # Shares far from halves, and no repair that a tie could decide.
    norms, order = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2, 0, 3, 1])
    assert counts(norms[order].tolist(), 8) == torch.tensor(counts(norms.tolist(), 8))[order].tolist()


def test_the_uniform_map_is_that_of_grouped_query_attention():
    assert uniform_head_map(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(head_counts(uniform_head_map(7, 3), 3).tolist()) == [2, 2, 3]


def test_heads_without_a_share_are_skipped_in_a_map():
    assert head_map_of(torch.tensor([0, 2, 0, 4, 0]), 6).tolist() == [1, 1, 3, 3, 3, 3]
    counts_of = torch.tensor([[0, 6], [5, 1]])
    assert torch.equal(head_counts(head_map_of(counts_of, 6), 2), counts_of)


def test_norms_that_are_not_finite_give_the_uniform_map():
    for bad in (float("nan"), float("inf")):
        assert counts([1.0, bad, 2.0], 6) == [2, 2, 2]


def test_random_repairs_follow_the_generator_and_choose_every_head_that_can_give():
    norms, cache = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.zeros(4)
    draw = lambda seed: counts(  # noqa: E731
        norms.tolist(), 8, "dgqa_diff", cache=cache, random_repair=True,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    assert draw(3) == draw(3)
    # Shares 8/3 round to 3, 3, 3, 0: one of three must give a head, and never the one that has none.
    results = {tuple(draw(seed)) for seed in range(40)}
    assert results == {(2, 3, 3, 0), (3, 2, 3, 0), (3, 3, 2, 0)}


def test_compiles_into_one_graph():
    norms = torch.rand(5, 4)
    compiled = torch.compile(allocate_query_heads, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(norms, 8, "kd"), allocate_query_heads(norms, 8, "kd"))


@pytest.mark.gpu
def test_never_waits_for_the_device():
    norms = torch.rand(32, 8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rule in RULES:
            allocate_query_heads(norms, 16, rule, cache=norms)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="rule='largest' is not one of 'uniform', 'kd', 'dgqa_diff'"):
        allocate_query_heads(torch.ones(2), 4, "largest")
    with pytest.raises(ValueError, match='rule="dgqa_diff" needs cache'):
        allocate_query_heads(torch.ones(2), 4, "dgqa_diff")
    with pytest.raises(ValueError, match="num_heads=0 must be at least 1"):
        allocate_query_heads(torch.ones(2), 0)
