from __future__ import annotations

import itertools
import math

import pytest
import torch

from undivided.cost.gna import arithmetic_intensity, end_to_end, search, simulate, table, weight_bytes
from undivided.ops.neighborhood import Neighborhood

HUNYUAN = dict(size=(30, 48, 80), kernel_size=(18, 24, 24), query_tile=(4, 8, 8), key_tile=(2, 8, 8))
WIDE = dict(size=(30, 48, 80), kernel_size=(30, 40, 40), query_tile=(2, 16, 8), key_tile=(2, 8, 8))
FLUX = dict(size=(256, 256), kernel_size=(80, 80), query_tile=(16, 16), key_tile=(16, 8))
COSMOS = dict(size=(16, 44, 80), kernel_size=(16, 24, 16), query_tile=(8, 4, 8), key_tile=(4, 4, 8))
LINE = dict(size=32768, kernel_size=2048, query_tile=128, key_tile=128)

# Bounds of the speed-up in the paper's use cases, to two decimals; its end-to-end gains follow from them. The tiles of
# WIDE and COSMOS are not in the text: they are those that give its figures.
BOUNDS = [
    (HUNYUAN, (1, 1, 1), 3.27), (HUNYUAN, (2, 1, 1), 3.60), (HUNYUAN, (1, 1, 8), 5.45), (HUNYUAN, (2, 1, 8), 6.00),
    (HUNYUAN, (1, 8, 8), 9.09), (HUNYUAN, (2, 8, 8), 10.0), (HUNYUAN, (16, 8, 8), 11.11), (HUNYUAN, (18, 24, 24), 6.67),
    (WIDE, (1, 1, 1), 1.43), (WIDE, (1, 1, 8), 2.00), (WIDE, (1, 32, 8), 2.40), (WIDE, (30, 40, 40), 2.00),
    (FLUX, (1, 1), 6.10), (FLUX, (16, 1), 8.53), (FLUX, (16, 16), 10.24),
    (COSMOS, (1, 1, 1), 5.24), (COSMOS, (1, 8, 1), 6.11), (COSMOS, (1, 1, 16), 7.86), (COSMOS, (1, 8, 16), 9.17),
    (LINE, 1, 15.06), (LINE, 64, 15.06), (LINE, 128, 15.06), (LINE, 192, 13.47), (LINE, 256, 16.0),
]  # fmt: skip


@pytest.mark.parametrize(("case", "stride", "bound"), BOUNDS)
def test_the_bounds_of_the_use_cases_of_the_paper(case, stride, bound):
    assert round(simulate(**case, stride=stride).speedup, 2) == bound


def test_the_strides_that_reach_the_bound_of_the_operations_need_no_mask():
    perfect = [(HUNYUAN, (16, 8, 8)), (WIDE, (1, 32, 8)), (FLUX, (16, 16)), (COSMOS, (1, 8, 16)), (LINE, 256)]
    for case, stride in perfect:
        report = simulate(**case, stride=stride)
        assert report.is_perfect
        assert report.speedup == report.flop_bound
    for case, stride, _ in BOUNDS:
        if (case, stride) not in perfect:
            assert not simulate(**case, stride=stride).is_perfect


def test_counts_of_hunyuan_video():
    report = simulate(**HUNYUAN)
    assert (report.visited, report.dense) == (275, 900)
    assert report.mean_visited < report.visited


@pytest.mark.parametrize(
    ("share", "speedup", "model"),
    [
        (0.607, 3.27, 1.73), (0.607, 5.45, 1.99), (0.607, 10.0, 2.20), (0.607, 11.11, 2.23), (0.518, 6.10, 1.76),
        (0.518, 8.53, 1.84), (0.587, 5.24, 1.90), (0.587, 7.86, 2.05),
    ],
)  # fmt: skip
def test_end_to_end_gains_are_those_of_the_paper(share, speedup, model):
    assert end_to_end(share, speedup) == pytest.approx(model, abs=0.02)


def test_tiles_that_are_runs_of_a_map_visit_more():
    case = dict(size=(64, 64), kernel_size=(16, 16), query_tile=(8, 8), key_tile=(8, 8))
    assert simulate(**case, tiling="single").speedup == 4.0
    assert round(simulate(**case).speedup, 1) == 7.1
    assert simulate(**case).flop_bound == 16.0


def small_problems():
    sizes = [((9,), (4,)), ((10,), (3,)), ((12,), (6,)), ((12,), (4,)), ((5, 6), (3, 2)), ((4, 8), (4, 4))]
    for size, kernel in sizes:
        for stride in itertools.product(*(range(1, w + 1) for w in kernel)):
            for dilation in (1, 2):
                if any(w * dilation > n for n, w in zip(size, kernel, strict=True)):
                    continue
                for is_causal in (False, True):
                    for query_tile, key_tile in ((1, 2), (2, 2), (3, 2), (4, 3)):
                        yield size, kernel, stride, dilation, is_causal, query_tile, key_tile


def blocks_of(mask, order, query_tile, key_tile):
    """Visited tiles of keys and whether all their keys are seen, for each tile of queries, from the mask itself."""
    for queries in order(query_tile):
        tiles = [keys for keys in order(key_tile) if mask[queries][:, keys].any()]
        yield len(tiles), all(mask[queries][:, keys].all() for keys in tiles)


def box_order(size, dilation):
    """Tokens of each tile: boxes of the positions of one class."""
    coordinates = torch.cartesian_prod(*map(torch.arange, size)).view(-1, len(size))

    def order(edge):
        keys = [tuple(c % dilation + (c // dilation // edge) * 1000) for c in coordinates.numpy()]
        return [torch.tensor([t for t, k in enumerate(keys) if k == one]) for one in sorted(set(keys))]

    return order


def run_order(size):
    """Tokens of each tile: as many tokens as a box has, one after the other."""
    return lambda edge: torch.arange(math.prod(size)).split(edge ** len(size))


def test_counts_are_those_of_the_mask():
    for size, kernel, stride, dilation, is_causal, query_tile, key_tile in small_problems():
        report = simulate(
            size, kernel, stride=stride, dilation=dilation, is_causal=is_causal, query_tile=query_tile,
            key_tile=key_tile,
        )  # fmt: skip
        mask = Neighborhood.of(size, kernel, stride, dilation, is_causal).mask(torch.device("cpu"))
        found = list(blocks_of(mask, box_order(size, dilation), query_tile, key_tile))
        counts = [count for count, _ in found]
        assert report.visited == max(counts), report
        assert report.mean_visited == pytest.approx(sum(counts) / len(counts)), report
        assert report.is_perfect == all(whole for _, whole in found), report


def test_counts_of_runs_are_those_of_the_mask():
    for size, kernel, stride, dilation, is_causal, query_tile, key_tile in small_problems():
        if dilation > 1 or is_causal:
            continue
        report = simulate(
            size, kernel, stride=stride, query_tile=query_tile, key_tile=key_tile, tiling="single"
        )
        mask = Neighborhood.of(size, kernel, stride).mask(torch.device("cpu"))
        found = list(blocks_of(mask, run_order(size), query_tile, key_tile))
        assert report.visited == max(count for count, _ in found), report
        assert report.is_perfect == all(whole for _, whole in found), report


def test_tiles_that_start_at_the_first_key_waste_no_alignment():
    case = dict(size=64, kernel_size=16, stride=8, query_tile=8, key_tile=8)
    assert not simulate(**case).is_perfect
    dynamic = simulate(**case, key_tiling="dynamic")
    assert dynamic.is_perfect
    assert dynamic.visited == 2


def test_the_search_keeps_what_no_smaller_stride_reaches():
    found = search((12, 10), (6, 4), query_tile=(2, 2), key_tile=(2, 2))
    everything = {
        stride: simulate((12, 10), (6, 4), stride=stride, query_tile=2, key_tile=2).visited
        for stride in itertools.product(range(1, 7), range(1, 5))
    }
    pays = {
        stride
        for stride, visited in everything.items()
        if all(
            visited < other
            for smaller, other in everything.items()
            if smaller != stride and all(a <= b for a, b in zip(smaller, stride, strict=True))
        )
    }
    assert {report.stride for report in found} == pays
    assert [report.visited for report in found] == sorted(report.visited for report in found)


def test_the_search_finds_the_strides_of_the_paper():
    assert search(**HUNYUAN)[0].stride == (16, 8, 8)
    assert search(**FLUX)[0].stride == (16, 16)


def test_the_table_has_a_line_for_each_report():
    lines = table([simulate(**HUNYUAN, stride=(16, 8, 8)), simulate(**HUNYUAN)]).splitlines()
    assert lines[0].split("  ")[-1] == "perfect"
    assert lines[1].split() == ["16", "x", "8", "x", "8", "81", "/", "900", "11.11", "11.11", "yes"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"kernel_size": (3, 9)},
            r"kernel_size\[1\] \* dilation\[1\] is 9 \* 1 = 9, but axis 1 has 8 positions",
        ),
        ({"stride": 4}, r"stride\[0\] is 4, but kernel_size\[0\] is 3; use at most 3"),
        ({"query_tile": (2, 0)}, r"query_tile=\(2, 0\) must be at least 1 on every axis"),
        ({"key_tile": (2,)}, r"key_tile=\(2,\) has 1 entries, but size=\(8, 8\) has 2 axes"),
        ({"size": (8, 8, 8, 8)}, "it needs 1 to 3"),
        ({"tiling": "boxes"}, 'tiling="boxes" is not one of "multi", "single"'),
        ({"key_tiling": "free"}, 'key_tiling="free" is not one of "static", "dynamic"'),
        ({"tiling": "single", "dilation": 2}, 'tiling="single" needs key_tiling="static" and dilation=1'),
    ],
)
def test_numbers_that_do_not_fit_are_named(change, text):
    case = dict(size=(8, 8), kernel_size=(3, 3), query_tile=2, key_tile=2)
    with pytest.raises(ValueError, match=text):
        simulate(**(case | change))


def test_shares_and_gains_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="share=1.5 must be from 0 to 1"):
        end_to_end(1.5, 2.0)
    with pytest.raises(ValueError, match="speedup=0 must be positive"):
        end_to_end(0.5, 0)


def test_needs_no_torch(run_python):
    done = run_python("import sys, undivided.cost.gna; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False"


def test_operations_a_byte_have_the_limits_of_the_paper():
    for head_dim, element_size in ((32, 2), (64, 2), (128, 4)):
        for window in (9, 49, 169):
            fused = arithmetic_intensity(window, head_dim, element_size, fused=True)
            assert fused == window / element_size
            assert arithmetic_intensity(window, head_dim, element_size, fused=False) < fused
        limit = 2 * head_dim / element_size
        assert arithmetic_intensity(10**9, head_dim, element_size, fused=False) == pytest.approx(limit)


def test_what_a_fused_forward_keeps_does_not_depend_on_the_window():
    fused = {weight_bytes(4096, window, 8, 2, fused=True) for window in (9, 961)}
    assert fused == {8 * 4096 * 4}
    assert weight_bytes(4096, 961, 8, 2, fused=False) == 2 * 8 * 4096 * 961 * 2
