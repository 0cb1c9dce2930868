from __future__ import annotations

import itertools
import math

import pytest
import torch

from undivided.ops import dense_attention, grouped_attention, merge_attention, neighborhood_attention
from undivided.ops.grouped import Windows
from undivided.ops.neighborhood import Axis, Neighborhood, composed, flex, permute_tokens, unpermute_tokens
from undivided.testing import compare_op, poison_surroundings

EXACT = {"rtol": 1e-11, "atol": 1e-11}
CPU = torch.device("cpu")
# Odd and even windows, strides that divide nothing, dilations with classes of two lengths, mixed causal axes.
PROBLEMS = {
    "line": Neighborhood.of((13,), 5),
    "even window": Neighborhood.of((13,), 4),
    "line with stride": Neighborhood.of((23,), 6, 4),
    "causal line with dilation": Neighborhood.of((17,), 3, 2, 3, True),
    "map": Neighborhood.of((7, 9), (3, 5)),
    "map with all": Neighborhood.of((11, 9), (4, 3), (3, 1), (2, 3), (False, True)),
    "blocks": Neighborhood.of((6, 8), (3, 4), (3, 4)),
    "whole map": Neighborhood.of((4, 5), (4, 5)),
    "window of one": Neighborhood.of((5, 4), (1, 3)),
    "volume": Neighborhood.of((3, 5, 4), (2, 3, 3), (1, 2, 1), (1, 1, 1), (True, False, False)),
    "volume with dilation": Neighborhood.of((4, 5, 3), (2, 2, 3), 1, (2, 2, 1)),
}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def inputs(problem, batch=2, heads=4, key_heads=2, dim=8, value_dim=6, dtype=torch.float64):
    draw = lambda heads, dim: torch.randn(batch, heads, *problem.size, dim, dtype=dtype)  # noqa: E731
    return {"query": draw(heads, dim), "key": draw(key_heads, dim), "value": draw(key_heads, value_dim)}


def call(problem, backend, **options):
    return lambda **x: neighborhood_attention(
        **x, kernel_size=problem.kernel_size, stride=problem.stride, dilation=problem.dilation,
        is_causal=problem.is_causal, backend=backend, **options,
    )  # fmt: skip


def window(position, length, kernel, stride, dilation, is_causal):
    """The keys that a query sees along one axis, in words of the paper and with whole numbers alone."""
    line = list(range(position % dilation, length, dilation))
    place = line.index(position)
    group = [i for i in range(len(line)) if i // stride == place // stride]
    if is_causal:
        leader = min(group[0] + stride - 1, len(line) - 1)
        return set(line[max(leader - kernel + 1, 0) : place + 1])
    leader = min(group[0] + stride // 2, len(line) - 1)
    start = leader - kernel // 2
    while start < 0:
        start += 1
    while start + kernel > len(line):
        start -= 1
    return set(line[start : start + kernel])


def brute_force(problem):
    """The mask, one pair of tokens at a time."""
    numbers = list(
        zip(
            problem.size, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal,
            strict=True,
        )
    )  # fmt: skip
    sees = [[window(i, *axis) for i in range(axis[0])] for axis in numbers]
    tokens = list(itertools.product(*map(range, problem.size)))
    return torch.tensor([[all(k[a] in sees[a][q[a]] for a in range(len(q))) for k in tokens] for q in tokens])


# -- the meaning


@every_problem
def test_the_mask_is_that_of_the_definition(problem):
    assert torch.equal(problem.mask(CPU), brute_force(problem))


def axes(longest):
    for length in range(1, longest + 1):
        for kernel in range(1, length + 1):
            for stride, dilation in itertools.product(range(1, kernel + 1), range(1, length // kernel + 1)):
                for is_causal in (False, True):
                    yield Axis(length, kernel, stride, dilation, is_causal)


def test_every_query_sees_itself_and_as_many_keys_as_the_window_has():
    for axis in axes(11):
        mask = axis.mask(CPU)
        assert mask.diagonal().all(), axis
        if not axis.is_causal:
            assert (mask.sum(1) == axis.kernel_size).all(), axis
        else:
            assert not mask.triu(1).any() and mask.sum(1).max() <= axis.kernel_size, axis


def test_bounds_never_decrease_and_the_inverse_tables_are_the_transposed_mask():
    for axis in axes(10):
        start, end, inverse_start, inverse_end = axis.tables(CPU)
        mask = axis.mask(CPU)
        for residue in range(axis.dilation):
            one = slice(residue, None, axis.dilation)
            for bound in (start[one], end[one], inverse_start[one], inverse_end[one]):
                assert (bound.diff() >= 0).all(), axis
            index = torch.arange(start[one].numel())
            inside = (index >= inverse_start[one][:, None]) & (index < inverse_end[one][:, None])
            assert torch.equal(inside, mask[one, one].T), axis


def test_the_windows_of_a_tile_lie_within_its_reach():
    for axis in axes(10):
        for tile in range(axis.stride, axis.longest + axis.stride, axis.stride):
            mask = axis.mask(CPU)
            for residue in range(axis.dilation):
                one = mask[residue :: axis.dilation, residue :: axis.dilation]
                for first in range(0, len(one), tile):
                    seen = one[first : first + tile].any(0).nonzero()
                    assert seen.max() - seen.min() < axis.reach(tile), (axis, tile)


# -- the operator


@every_problem
def test_the_reference_is_a_softmax_over_the_window(problem):
    x = inputs(problem)
    out, lse = call(problem, "reference", return_lse=True)(**x)
    query, key, value = (t.flatten(2, -2) for t in x.values())
    mask = brute_force(problem)
    want, want_lse = (
        torch.empty(2, 4, mask.shape[0], 6, dtype=torch.float64),
        torch.empty(2, 4, mask.shape[0]),
    )
    for head, token in itertools.product(range(4), range(mask.shape[0])):
        keys = mask[token]
        logits = torch.einsum("bd,bkd->bk", query[:, head, token], key[:, head // 2, keys]) * 8**-0.5
        want[:, head, token] = torch.einsum("bk,bkd->bd", logits.softmax(-1), value[:, head // 2, keys])
        want_lse[:, head, token] = logits.logsumexp(-1)
    torch.testing.assert_close(out, want.unflatten(2, problem.size), **EXACT)
    torch.testing.assert_close(lse.float(), want_lse.unflatten(2, problem.size))


@every_problem
@pytest.mark.parametrize("return_lse", [False, True])
def test_tiles_give_the_reference_and_its_gradients(problem, return_lse):
    x = inputs(problem)
    results = []
    for backend in ("composed", "reference"):
        leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
        found = call(problem, backend, return_lse=return_lse)(**leaves)
        found = list(found) if return_lse else [found]
        cotangents = [torch.cos(torch.arange(t.numel(), dtype=t.dtype)).view(t.shape) for t in found]
        results.append(found + list(torch.autograd.grad(found, list(leaves.values()), cotangents)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["line with stride", "map", "blocks", "volume"])
def test_tiles_are_as_accurate_as_the_reference(name, dtype):
    problem = PROBLEMS[name]
    for options in ({}, {"return_lse": True}):
        fast, slow = (call(problem, backend, **options) for backend in ("composed", "reference"))
        compare_op(fast, slow, slow, inputs(problem), dtype)


@every_problem
def test_tiles_in_several_chunks_are_the_same(problem, monkeypatch):
    x = inputs(problem)
    want = call(problem, "composed", return_lse=True)(**x)
    monkeypatch.setattr(composed, "_CHUNK", 1)
    torch.testing.assert_close(call(problem, "composed", return_lse=True)(**x), want, **EXACT)


def test_blocks_need_no_mask_and_copy_no_key_twice():
    for kernel, stride in ((7, 7), (2, 2), (8, 7)):
        axis = Axis(56, kernel, stride, 1, False)
        side = composed._Side(axis, composed.tile_edge(axis, 2), -(-56 // stride) * stride, CPU)
        assert side.mask is None and side.reach == kernel
        assert kernel != stride or torch.equal(side.keys.flatten(), torch.arange(56))


@pytest.mark.parametrize("backend", ["composed", "reference"])
def test_gradients_are_those_of_finite_differences(backend):
    problem = Neighborhood.of((3, 5), (2, 3), (1, 2), 1, (True, False))
    x = inputs(problem, batch=1, heads=2, key_heads=1, dim=2, value_dim=2)
    run = call(problem, backend, return_lse=True)
    function = lambda *tensors: run(**dict(zip(x, tensors, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in x.values()])


# -- what it must coincide with


@pytest.mark.parametrize("backend", ["composed", "reference"])
def test_a_window_of_everything_is_dense_attention(backend):
    problem = PROBLEMS["whole map"]
    x = inputs(problem)
    want = dense_attention(*(t.flatten(2, -2) for t in x.values()), backend="reference")
    torch.testing.assert_close(call(problem, backend)(**x).flatten(2, -2), want, **EXACT)


@pytest.mark.parametrize("backend", ["composed", "reference"])
def test_a_stride_of_the_window_is_attention_in_blocks(backend):
    problem = PROBLEMS["blocks"]
    x = inputs(problem, heads=3, key_heads=3)
    want = grouped_attention(
        *(t.flatten(2, -2) for t in x.values()),
        Windows(problem.size, problem.kernel_size),
        backend="reference",
    )
    torch.testing.assert_close(call(problem, backend)(**x).flatten(2, -2), want, **EXACT)


@pytest.mark.parametrize("backend", ["composed", "reference"])
def test_a_causal_line_is_a_sliding_window(backend):
    problem = Neighborhood.of((19,), 5, is_causal=True)
    x = inputs(problem)
    want = dense_attention(**x, is_causal=True, window=5, backend="reference")
    torch.testing.assert_close(call(problem, backend)(**x), want, **EXACT)


@pytest.mark.parametrize("backend", ["composed", "reference"])
def test_dilation_is_a_neighborhood_of_each_class_alone(backend):
    problem = PROBLEMS["map with all"]
    x = inputs(problem)
    out = call(problem, backend)(**x)
    for row, column in itertools.product(range(2), range(3)):
        alone = {name: t[:, :, row::2, column::3] for name, t in x.items()}
        want = neighborhood_attention(**alone, kernel_size=(4, 3), stride=(3, 1), is_causal=(False, True))
        torch.testing.assert_close(out[:, :, row::2, column::3], want, **EXACT)


def test_equals_the_unfolded_window_away_from_the_border():
    x = inputs(Neighborhood.of((9, 8), 3), heads=2)
    out = neighborhood_attention(**x, kernel_size=3)
    key, value = (x[name].unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2) for name in ("key", "value"))
    logits = torch.einsum("bhyxd,bhyxdn->bhyxn", x["query"][:, :, 1:-1, 1:-1], key) * 8**-0.5
    want = torch.einsum("bhyxn,bhyxdn->bhyxd", logits.softmax(-1), value)
    torch.testing.assert_close(out[:, :, 1:-1, 1:-1], want, **EXACT)


def test_keys_that_all_queries_see_merge_by_log_sum_exp():
    problem = PROBLEMS["map"]
    x = inputs(problem, heads=2)
    text = {name: torch.randn(2, 2, 3, t.shape[-1], dtype=torch.float64) for name, t in x.items()}
    query = x["query"].flatten(2, -2)
    out, lse = (t.flatten(2, 3) for t in call(problem, "auto", return_lse=True)(**x))
    others = dense_attention(query, text["key"], text["value"], return_lse=True)
    merged = merge_attention([out, others[0]], [lse, others[1]])[0]
    mask = torch.cat([problem.mask(CPU), torch.ones(63, 3, dtype=torch.bool)], 1)
    both = [torch.cat([x[name].flatten(2, -2), text[name]], 2) for name in ("key", "value")]
    torch.testing.assert_close(merged, dense_attention(query, *both, attn_mask=mask), **EXACT)
    direct = call(problem, "auto", additional_key=text["key"], additional_value=text["value"])(**x)
    torch.testing.assert_close(direct.flatten(2, 3), merged, **EXACT)


def test_gradients_with_additional_keys_are_those_of_one_softmax():
    problem = PROBLEMS["line"]
    x = [t.requires_grad_() for t in inputs(problem, batch=1, heads=2).values()]
    text = [torch.randn(1, 2, 3, width, dtype=torch.float64, requires_grad=True) for width in (8, 6)]
    out, lse = call(problem, "composed", additional_key=text[0], additional_value=text[1], return_lse=True)(
        **dict(zip(("query", "key", "value"), x, strict=True))
    )
    mask = torch.cat([problem.mask(CPU), torch.ones(13, 3, dtype=torch.bool)], 1)
    both = [torch.cat([x[1], text[0]], 2), torch.cat([x[2], text[1]], 2)]
    want, want_lse = dense_attention(x[0], *both, attn_mask=mask, return_lse=True)
    torch.testing.assert_close((out, lse), (want, want_lse), **EXACT)
    cotangents = torch.randn_like(out), torch.randn_like(lse)
    ours, theirs = (
        torch.autograd.grad(found, [*x, *text], cotangents) for found in ((out, lse), (want, want_lse))
    )
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, **EXACT)


def test_a_relative_bias_is_added_by_the_distance_of_key_and_query():
    problem = PROBLEMS["map with all"]
    x = inputs(problem, heads=2, key_heads=2)
    bias = torch.randn(2, *(2 * w - 1 for w in problem.kernel_size), dtype=torch.float64)
    out, lse = call(problem, "reference", relative_bias=bias, return_lse=True)(**x)
    tokens = list(itertools.product(*map(range, problem.size)))
    mask = problem.mask(CPU)
    for token in (0, 40, 98):
        seen = mask[token].nonzero()[:, 0].tolist()
        places = [
            [
                k // d - q // d + w - 1
                for k, q, d, w in zip(
                    tokens[j], tokens[token], problem.dilation, problem.kernel_size, strict=True
                )
            ]
            for j in seen
        ]
        added = torch.stack([bias[(slice(None), *place)] for place in places], -1)
        query, key = x["query"].flatten(2, 3)[:, :, token], x["key"].flatten(2, 3)[:, :, seen]
        logits = torch.einsum("bhd,bhkd->bhk", query, key) * 8**-0.5 + added
        torch.testing.assert_close(lse.flatten(2)[:, :, token], logits.logsumexp(-1), **EXACT)
        want = torch.einsum("bhk,bhkd->bhd", logits.softmax(-1), x["value"].flatten(2, 3)[:, :, seen])
        torch.testing.assert_close(out.flatten(2, 3)[:, :, token], want, **EXACT)


# -- FlexAttention: its blocks, and its mask without the kernel


@every_problem
def test_the_blocks_of_flex_attention_are_those_that_the_mask_touches(problem):
    tile = tuple(min(2, axis.longest) for axis in problem.axes)
    mask = flex.block_mask(problem, tile, 1, CPU)
    classes = math.prod(problem.dilation)
    tokens, block = mask.seq_lengths[0], math.prod(tile)
    seen = torch.stack(
        [
            mask.mask_mod(
                torch.tensor(b), torch.tensor(0), torch.arange(tokens)[:, None], torch.arange(tokens)
            )
            for b in range(classes)
        ]
    )
    # Padded queries have the window of a neighbor; the truth about the others is the permuted mask.
    ends = torch.arange(problem.num_tokens, dtype=torch.float64).view(1, 1, *problem.size, 1) + 1
    place = permute_tokens(ends, tile, problem.dilation)[:, 0, :, 0].long() - 1
    exists = place >= 0
    truth = problem.mask(CPU)
    for one in range(classes):
        real = place[one][exists[one]]
        assert torch.equal(seen[one][exists[one]][:, exists[one]], truth[real][:, real])
        assert not seen[one][:, ~exists[one]].any()
    blocks = seen.unflatten(2, (-1, block)).unflatten(1, (-1, block)).transpose(2, 3)
    touched, whole = blocks.flatten(3).any(-1), blocks.flatten(3).all(-1)

    def listed(numbers, columns):
        n = columns.shape[-1]
        found = torch.zeros(classes, n, n, dtype=torch.bool)
        for one, row in itertools.product(range(classes), range(n)):
            found[one, row, columns[one, 0, row, : numbers[one, 0, row]].long()] = True
        return found

    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    assert not (full & partial).any()
    assert torch.equal(full | partial, touched)
    assert torch.equal(full, whole)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("name", ["line with stride", "map with all", "volume"])
def test_flex_attention_with_this_mask_is_the_reference(name, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    problem = PROBLEMS[name]
    with torch.no_grad():
        slow = call(problem, "reference")
        compare_op(call(problem, "flex"), slow, slow, inputs(problem), torch.float32, grad_inputs=())


@pytest.mark.parametrize(
    ("size", "tile"),
    [
        ((4096,), (128,)),
        ((128, 128), (8, 16)),
        ((16, 32, 32), (4, 4, 8)),
        ((4, 256), (4, 32)),
        ((3,), (128,)),
    ],
)
def test_tiles_of_flex_attention_hold_128_tokens_and_are_as_even_as_the_axes_allow(size, tile):
    assert flex.tile_shape(Neighborhood.of(size, 2)) == tile


# -- permutation


@pytest.mark.parametrize(
    ("size", "tile", "dilation"),
    [
        ((7,), 4, 1),
        ((11,), 3, 2),
        ((5, 7), (2, 3), (1, 2)),
        ((4, 6), 2, 1),
        ((3, 5, 7), (2, 2, 3), (1, 2, 3)),
    ],
)
def test_permutation_is_undone_and_puts_each_tile_in_a_run(size, tile, dilation):
    axes = len(size)
    tiles, dilations = ((n,) * axes if isinstance(n, int) else n for n in (tile, dilation))
    x = torch.randn(2, 3, *size, 4)
    permuted = permute_tokens(x, tile, dilation)
    assert torch.equal(unpermute_tokens(permuted, size, tile, dilation), x)
    counts = [-(-n // (t * d)) for n, t, d in zip(size, tiles, dilations, strict=True)]
    classes, run = math.prod(dilations), math.prod(tiles)
    assert permuted.shape == (2 * classes, 3, math.prod(counts) * run, 4)
    for index, group in enumerate(itertools.product(*map(range, dilations))):
        for number, corner in enumerate(itertools.product(*map(range, counts))):
            for offset, place in enumerate(itertools.product(*map(range, tiles))):
                at = [
                    (c * t + p) * d + g
                    for c, t, p, d, g in zip(corner, tiles, place, dilations, group, strict=True)
                ]
                inside = all(c < n for c, n in zip(at, size, strict=True))
                want = x[(1, slice(None), *at)] if inside else torch.zeros(3, 4)
                assert torch.equal(permuted[classes + index, :, number * run + offset], want)


def test_a_line_without_dilation_is_not_copied():
    x = torch.randn(2, 3, 8, 4)
    assert permute_tokens(x, 4).data_ptr() == x.data_ptr()


# -- manners


@pytest.mark.parametrize("backend", ["composed", "reference"])
def test_reads_views_and_nothing_beside_them(backend):
    problem = PROBLEMS["map with all"]
    x = inputs(problem, dtype=torch.float32)
    views = {name: poison_surroundings(t) for name, t in x.items()}
    torch.testing.assert_close(call(problem, backend)(**views), call(problem, backend)(**x))


def test_a_sample_does_not_depend_on_its_batch_mates():
    problem = PROBLEMS["map"]
    x = inputs(problem, batch=3)
    together = call(problem, "composed")(**x)
    for index in range(3):
        alone = {name: t[index : index + 1] for name, t in x.items()}
        torch.testing.assert_close(call(problem, "composed")(**alone)[0], together[index], **EXACT)


def test_one_graph_under_torch_compile():
    problem = PROBLEMS["map with all"]
    x = inputs(problem, dtype=torch.float32)
    compiled = torch.compile(call(problem, "auto"), backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(**x), call(problem, "auto")(**x))


@pytest.mark.gpu
@every_problem
def test_flex_attention_on_the_gpu_is_as_accurate_as_the_reference(problem):
    x = {name: t.cuda() for name, t in inputs(problem, dim=32, value_dim=32).items()}
    slow = call(problem, "reference", return_lse=True)
    compare_op(call(problem, "flex", return_lse=True), slow, slow, x, torch.float16)


# -- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kernel_size": (3, 9)}, r"kernel_size\[1\] is 9, but axis 1 has 8 positions; use at most 8\."),
        ({"kernel_size": 0}, r"kernel_size\[0\] is 0; it must be at least 1\."),
        ({"kernel_size": 3, "stride": (1, 4)}, r"stride\[1\] is 4, but kernel_size\[1\] is 3; use at most 3"),
        ({"kernel_size": 3, "stride": 0}, r"stride\[0\] is 0; it must be at least 1"),
        (
            {"kernel_size": 3, "dilation": (2, 3)},
            r"kernel_size\[1\] \* dilation\[1\] is 3 \* 3 = 9, but axis 1 has 8 positions; use a dilation of at most 2",
        ),
        (
            {"kernel_size": (3, 3, 3)},
            r"kernel_size=\(3, 3, 3\) has 3 entries, but there are 2 axes; give 1 or 2",
        ),
        (
            {"kernel_size": 3, "is_causal": (True,)},
            r"is_causal=\(True,\) has 1 entries, but there are 2 axes",
        ),
        ({"kernel_size": 3.0}, "kernel_size=3.0 must be a whole number, or one an axis"),
        ({"kernel_size": True}, "kernel_size=True must be a whole number"),
        ({"kernel_size": 3, "is_causal": 1}, "is_causal=1 must be True or False, or one an axis"),
        (
            {"kernel_size": 3, "backend": "fast"},
            '"auto", "triton", "flex", "gemm", "composed", "reference", "naive"',
        ),
        (
            {"kernel_size": 3, "relative_bias": torch.zeros(2, 5, 4)},
            r"relative_bias has shape \[2, 5, 4\]; for 2 heads and kernel_size=\(3, 3\) it must be \[2, 5, 5\]",
        ),
        (
            {"kernel_size": 3, "relative_bias": torch.zeros(2, 5, 5), "backend": "composed"},
            'backend "composed" cannot run this: relative_bias is given',
        ),
        (
            {"kernel_size": 3, "additional_key": torch.zeros(1, 2, 3, 4)},
            "additional_value is None, but the other is given; give both",
        ),
        (
            {"kernel_size": 3, "backend": "flex", "return_lse": True},
            'backend "flex" cannot run this: query is on cpu and return_lse is True .* Able: .*"composed"',
        ),
    ],
)
def test_numbers_that_do_not_fit_are_named(options, text):
    x = torch.randn(1, 2, 7, 8, 4)
    with pytest.raises((ValueError, TypeError), match=text):
        neighborhood_attention(x, x, x, **options)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"query": torch.randn(2, 5, 4)},
            r"query has shape \[2, 5, 4\]; it needs \[batch, heads, \*size, head_dim\]",
        ),
        ({"key": torch.randn(1, 2, 5, 4)}, r"key has shape \[1, 2, 5, 4\]; it needs 5 axes"),
        ({"key": torch.randn(1, 2, 6, 8, 4)}, r"key lies on a grid of \[6, 8\], but query on \[7, 8\]"),
        ({"value": torch.randn(1, 1, 7, 8, 4)}, r"must share \[batch, key_heads\]"),
        ({"key": torch.randn(1, 2, 7, 8, 3)}, "key has head_dim 3, but query has 4"),
        (
            {"query": torch.randn(1, 3, 7, 8, 4)},
            "key has 2 heads, which does not divide the 3 heads of query",
        ),
        (
            {"key": torch.randn(1, 2, 7, 8, 4).half()},
            "key has dtype torch.float16, but query has torch.float32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, text):
    x = torch.randn(1, 2, 7, 8, 4)
    with pytest.raises((ValueError, TypeError), match=text):
        neighborhood_attention(**({"query": x, "key": x, "value": x} | change), kernel_size=3)


def test_permutations_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"x has shape \[2, 3, 4\]; it needs \[batch, heads, \*size, dim\]"):
        permute_tokens(torch.randn(2, 3, 4), 2)
    with pytest.raises(ValueError, match="tile=0 must be at least 1 on every axis"):
        permute_tokens(torch.randn(2, 3, 4, 1), 0)
    with pytest.raises(ValueError, match=r"it must be \[batch \* 2, heads, 6, dim\]"):
        unpermute_tokens(torch.randn(2, 3, 8, 1), (11,), 3, 2)
