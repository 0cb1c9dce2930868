from __future__ import annotations

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl

from tests.ops.test_neighborhood import PROBLEMS, axes, call, every_problem, inputs
from undivided.cost.gna import simulate
from undivided.ops import dense_attention, neighborhood_attention
from undivided.ops._flash import Tiling
from undivided.ops.neighborhood import Neighborhood, backward, unfused
from undivided.ops.neighborhood import triton as kernels
from undivided.ops.neighborhood.boxes import _visits, choose_boxes
from undivided.testing import compare_op, poison_surroundings

# Triton's interpreter multiplies bfloat16 wrongly.
ON_CPU = not torch.cuda.is_available()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tilings(monkeypatch):
    """Sixteen rows and columns, so that small problems take several boxes."""
    if ON_CPU:
        one = ((Tiling(16, 16, 4, 1), 1),)
        for module, name in (
            (kernels, "_FORWARD"), (kernels, "_FORWARD_FLOAT32"), (backward, "_QUERY"), (backward, "_KEY"),
            (backward, "_QUERY_FLOAT32"), (backward, "_KEY_FLOAT32"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, one)


def options(problem, scale=0.3):
    return problem.kernel_size, problem.stride, problem.dilation, problem.is_causal, scale


# -- the boxes


@triton.jit
def _window_kernel(
    index, last, kernel_size, stride, start, end, BLOCK: tl.constexpr, IS_CAUSAL: tl.constexpr, INVERSE: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    low, high = kernels.window(
        tl.load(index + at),
        tl.load(last + at),
        tl.load(kernel_size + at),
        tl.load(stride + at),
        IS_CAUSAL,
        INVERSE,
    )
    tl.store(start + at, low)
    tl.store(end + at, high)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_kernels_compute_the_windows_and_the_inverse_windows_of_the_tables(is_causal, inverse, device):
    numbers, expected = [], []
    for axis in axes(11):
        if axis.dilation > 1 or axis.is_causal != is_causal:
            continue
        tables = axis.tables(CPU)[2 * inverse : 2 * inverse + 2]
        for index in range(axis.length):
            numbers.append((index, axis.length - 1, axis.kernel_size, axis.stride))
        expected.append(torch.stack(tables, 1))
    want = torch.cat(expected)
    block = triton.next_power_of_2(len(numbers))
    padded = torch.tensor(numbers + [(0, 0, 1, 1)] * (block - len(numbers)), dtype=torch.int32, device=device)
    start, end = torch.empty(2, block, dtype=torch.int32, device=device)
    _window_kernel[(1,)](
        *padded.T.contiguous(), start, end, BLOCK=block, IS_CAUSAL=is_causal, INVERSE=inverse
    )
    assert torch.equal(torch.stack([start, end], 1)[: len(numbers)].cpu(), want)


def visited_boxes(axis, rows, columns, inverse):
    """The boxes of columns that each box of rows visits, from the tables: first column, and what its rows see."""
    for residue in range(axis.dilation):
        start, end = (
            t[residue :: axis.dilation].tolist() for t in axis.tables(CPU)[2 * inverse : 2 * inverse + 2]
        )
        length = len(start)
        for first in range(0, length, rows):
            own = range(first, min(first + rows, length))
            low, high = start[own[0]], end[own[-1]]
            count = -(-(high - low) // columns)
            low = max(min(low, length - count * columns), 0)
            yield (
                length,
                [range(low + i * columns, low + (i + 1) * columns) for i in range(count)],
                [range(start[i], end[i]) for i in own],
            )


def test_boxes_hold_all_that_is_seen_and_are_counted_as_they_are():
    for axis in axes(8):
        for rows, columns, inverse in itertools.product((1, 4), (1, 2), (False, True)):
            visited = list(visited_boxes(axis, rows, columns, inverse))
            found = _visits(axis, rows, columns, inverse)
            counts = [len(boxes) for _, boxes, _ in visited]
            whole = [
                sum(
                    all(window.start <= box.start and box.stop <= window.stop for window in seen)
                    for box in boxes
                )
                for _, boxes, seen in visited
            ]
            for _, boxes, seen in visited:
                reached = {column for box in boxes for column in box}
                assert all(set(window) <= reached for window in seen), axis
            assert found.visited == pytest.approx(sum(counts) / len(counts)), axis
            assert found.full == pytest.approx(sum(whole) / len(whole)), axis
            assert found.is_masked == (whole != counts), axis
            assert found.overruns == any(box.stop > n for n, boxes, _ in visited for box in boxes), axis


def test_queries_visit_what_the_simulator_says():
    for problem in PROBLEMS.values():
        boxes = choose_boxes(problem, 16, 16)
        count = len(problem.size)
        report = simulate(
            problem.size, problem.kernel_size, stride=problem.stride, dilation=problem.dilation,
            is_causal=problem.is_causal, query_tile=boxes.rows[3 - count :], key_tile=boxes.columns[3 - count :],
            key_tiling="dynamic",
        )  # fmt: skip
        assert boxes.visited == pytest.approx(report.mean_visited)


@pytest.mark.parametrize(
    ("problem", "gain"),
    [
        (Neighborhood.of((30, 48, 80), (18, 24, 24), (16, 8, 8)), 11.11),
        (Neighborhood.of((256, 256), 80, 16), 10.24),
        (Neighborhood.of((32768,), 2048, 256), 16.0),
        (Neighborhood.of((32768,), 32768), 1.0),
    ],
)
def test_cases_without_waste_get_boxes_that_need_no_mask(problem, gain):
    boxes = choose_boxes(problem, 128, 64)
    assert boxes.is_masked == (False, False, False)
    assert not boxes.overruns
    assert problem.num_tokens / (64 * boxes.visited) == pytest.approx(gain, abs=0.005)


def test_boxes_are_no_longer_than_an_axis_that_has_longer_ones_beside_it():
    for problem in (Neighborhood.of((3, 5, 500), (3, 5, 9)), Neighborhood.of((700, 3), 3)):
        boxes = choose_boxes(problem, 128, 64)
        longest = [1] * (3 - len(problem.size)) + [axis.longest for axis in problem.axes]
        for box in (boxes.rows, boxes.columns):
            assert all(edge < 2 * length for edge, length in zip(box, longest, strict=True))
    assert math.prod(choose_boxes(Neighborhood.of((2, 2), 2), 128, 64).rows) == 128


# -- the kernels


@every_problem
def test_kernels_are_as_accurate_as_the_reference(problem, device):
    # Two heads on one of keys where the interpreter is quick; on all problems it would take minutes.
    heads = 2 if len(problem.size) == 1 or not ON_CPU else 1
    x = inputs(problem, batch=1, heads=heads, key_heads=1, dim=12, value_dim=6)
    x = {name: t.to(device) for name, t in x.items()}
    slow = call(problem, "reference", return_lse=True)
    compare_op(call(problem, "triton", return_lse=True), slow, slow, x, torch.float16)


@pytest.mark.parametrize("name", ["causal line with dilation", "blocks"])
def test_kernels_in_float32_are_as_accurate_as_the_reference(name, device):
    problem = PROBLEMS[name]
    x = {name: t.to(device) for name, t in inputs(problem, batch=1, heads=2, key_heads=2, dim=16).items()}
    slow = call(problem, "reference")
    compare_op(call(problem, "triton"), slow, slow, x, torch.float32)


@pytest.mark.gpu
@every_problem
def test_kernels_in_bfloat16_are_as_accurate_as_the_reference(problem):
    x = {name: t.cuda() for name, t in inputs(problem, dim=64, value_dim=64).items()}
    slow = call(problem, "reference", return_lse=True)
    compare_op(call(problem, "triton", return_lse=True), slow, slow, x, torch.bfloat16)


def test_log_sums_alone_have_a_gradient(device):
    problem = PROBLEMS["line with stride"]
    x = {
        name: t.float().to(device).requires_grad_()
        for name, t in inputs(problem, batch=1, heads=2, key_heads=1).items()
    }
    found = [
        torch.autograd.grad(
            call(problem, backend, return_lse=True)(**x)[1].square().sum(), [x["query"], x["key"]]
        )
        for backend in ("triton", "reference")
    ]
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow)


def test_a_window_of_everything_is_dense_attention(device):
    x = {
        name: t.float().to(device)
        for name, t in inputs(Neighborhood.of((3, 13), (3, 13)), batch=1, heads=2).items()
    }
    want = dense_attention(*(t.flatten(2, -2) for t in x.values()), backend="reference")
    out = neighborhood_attention(**x, kernel_size=(3, 13), backend="triton")
    torch.testing.assert_close(out.flatten(2, -2), want)


def test_a_causal_line_is_a_sliding_window(device):
    problem = Neighborhood.of((37,), 9, is_causal=True)
    x = {name: t.float().to(device) for name, t in inputs(problem, batch=1).items()}
    want = dense_attention(**x, is_causal=True, window=9, backend="reference")
    torch.testing.assert_close(call(problem, "triton")(**x), want)


def test_reads_views_and_nothing_beside_them(device):
    problem = Neighborhood.of((5, 7), (2, 3), 1, (2, 1))
    x = {name: t.float().to(device) for name, t in inputs(problem, batch=1, heads=2).items()}
    views = {name: poison_surroundings(t) for name, t in x.items()}
    # The layout of a layer: heads side by side in a token.
    views["key"] = x["key"].movedim(1, -2).contiguous().movedim(-2, 1)
    torch.testing.assert_close(call(problem, "triton")(**views), call(problem, "triton")(**x))


def test_gradients_have_the_same_bits_in_every_run(device):
    problem = PROBLEMS["line with stride"]
    x = [
        t.float().to(device)
        for t in inputs(problem, batch=1, heads=2, key_heads=1, dim=8, value_dim=8).values()
    ]
    out, lse = kernels.forward(*x, *options(problem))
    dout = torch.randn_like(out)
    runs = [
        backward.backward(dout, None, out, lse, *x, *options(problem)) for _ in range(2 if ON_CPU else 10)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_an_empty_batch_stays_empty(device):
    x = torch.randn(0, 2, 5, 4, device=device, requires_grad=True)
    out, lse = neighborhood_attention(x, x, x, 3, return_lse=True, backend="triton")
    assert out.shape == (0, 2, 5, 4) and lse.shape == (0, 2, 5)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_operators_are_registered_as_torch_wants(device):
    problem = PROBLEMS["line"]
    x = [
        t.float().to(device)
        for t in inputs(problem, batch=1, heads=1, key_heads=1, dim=4, value_dim=6).values()
    ]
    given = (*(list(entries) for entries in options(problem)[:4]), 0.3)
    forward = torch.ops.undivided.neighborhood_forward
    torch.library.opcheck(forward, (*x, *given), test_utils=("test_schema", "test_faketensor"))
    out, lse = forward(*x, *given)
    torch.library.opcheck(
        torch.ops.undivided.neighborhood_backward, (torch.randn_like(out), lse, out, lse, *x, *given),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_one_graph_under_torch_compile_with_gradients(device):
    problem = PROBLEMS["line"]
    x = {
        name: t.float().to(device).requires_grad_()
        for name, t in inputs(problem, batch=1, heads=1, key_heads=1, dim=4, value_dim=6).items()
    }
    run = call(problem, "triton")
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=False)
    for fast, slow in zip(
        torch.autograd.grad(compiled(**x).sum(), list(x.values())),
        torch.autograd.grad(run(**x).sum(), list(x.values())),
        strict=True,
    ):
        torch.testing.assert_close(fast, slow)


@pytest.mark.gpu
def test_peak_memory_does_not_depend_on_the_window_and_grows_with_the_tokens():
    peaks = {}
    for rows, window in ((96, 5), (96, 61), (192, 61)):
        x = torch.randn(1, 4, rows, 96, 64, device="cuda", dtype=torch.float16)
        neighborhood_attention(x, x, x, window, backend="triton")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        neighborhood_attention(x, x, x, window, backend="triton")
        peaks[rows, window] = torch.cuda.max_memory_allocated() - before
    assert peaks[96, 5] == peaks[96, 61]
    assert peaks[192, 61] == pytest.approx(2 * peaks[96, 61], rel=0.01)


# -- the forms that keep the weights in memory

LOW_MEMORY = {
    "map": Neighborhood.of((5, 6), (3, 4), (1, 2), 1, (False, True)),
    "line": Neighborhood.of((11,), 3, 1, 2),
    "short line": Neighborhood.of((5,), 2, 1, 2, True),
}
every_form = pytest.mark.parametrize("backend", ["gemm", "naive"])


@pytest.mark.parametrize(("backend", "name"), [("gemm", "map"), ("gemm", "line"), ("naive", "short line")])
def test_weights_in_memory_give_the_reference_and_its_gradients(backend, name, device):
    problem = LOW_MEMORY[name]
    x = {
        name: t.float().to(device).requires_grad_()
        for name, t in inputs(problem, batch=1, heads=2, key_heads=1, dim=4, value_dim=3).items()
    }
    bias = torch.randn(2, *(2 * w - 1 for w in problem.kernel_size), device=device, requires_grad=True)
    results = []
    for one in (backend, "reference"):
        found = call(problem, one, return_lse=True, relative_bias=bias)(**x)
        cotangents = [
            torch.cos(torch.arange(t.numel(), device=device, dtype=t.dtype)).view(t.shape) for t in found
        ]
        results.append([*found, *torch.autograd.grad(found, [*x.values(), bias], cotangents)])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@every_form
def test_the_three_products_are_each_others_transpose(backend, device):
    problem, as_gemm = Neighborhood.of((5,), 3), backend == "gemm"
    out, value, query, key = (torch.randn(1, 1, 5, 4, device=device) for _ in range(4))
    weights = torch.randn(1, 1, 5, 3, device=device)
    mixed = (unfused.mix(weights, value, problem, 1.0, as_gemm) * out).sum()
    torch.testing.assert_close(mixed, (weights * unfused.scores(out, value, problem, 1.0, as_gemm)).sum())
    torch.testing.assert_close(mixed, (value * unfused.gather(weights, out, problem, 1.0, as_gemm, 1)).sum())
    scored = (unfused.scores(query, key, problem, 0.5, as_gemm) * weights).sum()
    torch.testing.assert_close(scored, (unfused.mix(weights, key, problem, 0.5, as_gemm) * query).sum())


def test_slots_of_a_window_are_its_keys_in_order(device):
    problem = LOW_MEMORY["line"]
    key = torch.randn(1, 1, 11, 4, device=device)
    scores = unfused.scores(torch.ones_like(key), key, problem, 1.0, True)[0, 0]
    for query in range(11):
        seen = problem.mask(torch.device("cpu"))[query].nonzero()[:, 0].to(device)
        torch.testing.assert_close(scores[query], key[0, 0, seen].sum(-1))


def test_the_log_sum_of_the_fused_kernel_is_that_of_the_scores(device):
    problem = PROBLEMS["line with stride"]
    x = {name: t.float().to(device) for name, t in inputs(problem, batch=1, heads=2).items()}
    scores = unfused.scores(x["query"], x["key"], problem, 8**-0.5, True)
    torch.testing.assert_close(call(problem, "triton", return_lse=True)(**x)[1], scores.logsumexp(-1))


# -- refusals


def test_what_the_kernels_cannot_do_is_named(device):
    x = torch.randn(1, 2, 7, 4, device=device)
    wide = torch.randn(1, 2, 7, 300, device=device)
    for tensors, given, text in (
        ((x.double(),) * 3, {}, "query is float64"),
        ((x, x, x), {"scale": -1.0}, "scale is -1.0 .the kernels need a positive one"),
        ((wide,) * 3, {}, "the last axis of query is 300 .at most 256.; the last axis of value is 300"),
        (
            (x, x, x),
            {"relative_bias": torch.zeros(2, 5, device=device)},
            "relative_bias is given .* Able: .*gemm",
        ),
    ):
        with pytest.raises(ValueError, match=f'backend "triton" cannot run this: {text}'):
            neighborhood_attention(*tensors, 3, backend="triton", **given)


@pytest.mark.skipif(not ON_CPU, reason="a GPU multiplies it rightly")
def test_bfloat16_is_refused_where_the_interpreter_would_run_it():
    x = torch.randn(1, 2, 7, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="query is bfloat16 .Triton's interpreter multiplies it wrongly."):
        neighborhood_attention(x, x, x, 3, backend="triton")


# -- compilation for Hopper, without a GPU


def test_kernels_compile_for_hopper_and_keep_what_they_need_on_the_chip(run_python):
    done = run_python(
        """
import re
import torch
from tests.ops.ahead_of_time import compile_only, ptxas

def report(name, kernel, options):
    spills = [int(n) for n in re.findall(r"(\\d+) bytes spill stores", ptxas(kernel))]
    return name, kernel.metadata.shared, max(spills)

compile_only(report)
from undivided.ops.neighborhood import Neighborhood, backward, triton as kernels, unfused

def options(p):
    return p.kernel_size, p.stride, p.dilation, p.is_causal, 0.1

volume = Neighborhood.of((6, 20, 24), (3, 9, 9), (1, 2, 1), (1, 2, 1), (True, False, False))
blocks = Neighborhood.of((256, 256), 80, 16)
for problem, width in ((volume, 128), (blocks, 64)):
    x = torch.empty(1, 2, *problem.size, width, dtype=torch.bfloat16)
    lse = torch.empty(x.shape[:-1])
    kernels.forward(x, x[:, :1], x[:, :1], *options(problem))
    backward.backward(x, lse, x, lse, x, x[:, :1], x[:, :1], *options(problem))
x = torch.empty(1, 2, *volume.size, 32, dtype=torch.float16)
weights = unfused.scores(x, x[:, :1], volume, 0.1, True)
unfused.mix(weights, x[:, :1], volume, 1.0, True)
unfused.gather(weights, x, volume, 1.0, True, 1)
"""
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2 * 3 + 3
    for name, shared, spill in lines:
        assert int(shared) <= 227 * 1024, name
        assert int(spill) <= 256, (name, spill)
