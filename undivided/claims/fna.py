"""Faster neighborhood attention: the naive form, products of matrices with scattered weights, and the fused kernel.

All three are kernels of this library, on the same windows. The naive form multiplies a vector a query, reads keys where
they lie (no gathered copy), and like the GEMM form keeps the weights of all windows in memory; a training step of both
takes the softmax of PyTorch between. Beside them full attention by cuDNN and PyTorch's flash kernel, and FlexAttention
on the larger maps. Products in float32 are not rounded to TF32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import fmean, geometric_mean

import torch

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._nat_shape import NATShaped, attend_by
from undivided.claims._neighborhood import (
    Call,
    Problem,
    backwards,
    check_kernels,
    forwards,
    library_dense,
    own,
)
from undivided.claims._timing import time_rivals
from undivided.claims._window_quality import forms
from undivided.cost.gna import arithmetic_intensity, weight_bytes
from undivided.ops.neighborhood import Neighborhood

HALF = torch.float16
FORMS = {"naive": "naive", "GEMM": "gemm", "fused": "triton"}
# Mean gain over the naive form: those of the abstract, and for the forward in three dimensions that of the tables.
PAPER = {
    ("GEMM", 1, HALF): 1 + 4.96, ("GEMM", 2, HALF): 1 + 1.13, ("fused", 1, HALF): 1 + 16.07,
    ("fused", 2, HALF): 1 + 5.81, ("fused", 3, HALF): 1 + 11.35, ("GEMM", 1, torch.float32): 1 + 8.95,
    ("GEMM", 2, torch.float32): 1 + 2.72,
}  # fmt: skip
# What the fused forward must gain on average over the naive form.
BARS = {1: 10.0, 2: 5.0}


def gate(device: str) -> None:
    """Raises unless all forms are right in output, log-sums and gradients."""
    check_kernels(device, ("triton",), ("map",))
    if device == "cuda":
        _check_unfused(device)


def _check_unfused(device: str) -> None:
    """The weights in memory are rounded to float16, as they are in eager attention without a fused softmax."""
    from undivided.testing import compare_op

    problem = Problem("map", Neighborhood.of((14, 17), (5, 7), 1, (2, 1)), 2, 32)
    x = {
        name: torch.randn(1, 2, *problem.neighborhood.size, 32, device=device)
        for name in ("query", "key", "value")
    }
    mask = problem.neighborhood.mask(torch.device(device))

    def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (t.flatten(2, -2) for t in (query, key, value))
        logits = (query @ key.transpose(-2, -1) * 32**-0.5).masked_fill(~mask, float("-inf"))
        return (logits.softmax(-1) @ value).unflatten(2, problem.neighborhood.size)

    for backend in ("gemm", "naive"):
        compare_op(own(problem, backend), eager, eager, x, HALF)


def _table(problems: list[Problem], with_flex: bool = False) -> Iterator[Row]:
    """One row a form, rival and direction; then the means over the problems."""
    gains: dict[tuple[str, str], list[float]] = {}
    wins: dict[tuple[str, str], list[bool]] = {}
    for problem in problems:
        rivals: dict[str, Call] = {name: own(problem, backend) for name, backend in FORMS.items()}
        many = problem.neighborhood.num_tokens >= 4096 and problem.dtype != torch.float32
        dense: dict[str, Call] = {name: library_dense(name) for name in ("cuDNN", "flash")} if many else {}
        flex: dict[str, Call] = {"FlexAttention": own(problem, "flex")} if many and with_flex else {}
        forward = forwards(problem, rivals | dense | flex)
        backward = backwards(problem, rivals | dense)
        both = {name: forward[name] + backward[name] for name in backward}
        for what, times in (("forward", forward), ("forward and backward", both)):
            for name in times:
                wins.setdefault((what, name), []).append(times["fused"] <= times[name])
            for form in ("GEMM", "fused"):
                gains.setdefault((what, form), []).append(times["naive"] / times[form])
                yield measured(
                    f"{what}, {form} against naive", problem.shape, times[form], "ms", better="lower",
                    baseline_name="naive", baseline=times["naive"],
                )  # fmt: skip
            for name in (*dense, *flex):
                if name in times:
                    yield measured(
                        f"{what}, fused against {name}", problem.shape, times["fused"], "ms", better="lower",
                        baseline_name=name, baseline=times[name],
                        required=1.0 if name in dense and _within_half(problem) else None,
                    )  # fmt: skip
    yield from _means(problems[0], len(problems), gains)
    for (what, name), own_wins in wins.items():
        if name != "fused":
            yield measured(
                f"{what}, share of problems where fused is at least as fast as {name}",
                f"{len(own_wins)} problems of {len(problems[0].neighborhood.size)} axes, {_words(problems[0].dtype)}",
                100 * fmean(own_wins), "%", better="higher",
            )  # fmt: skip


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _within_half(problem: Problem) -> bool:
    grid = problem.neighborhood
    return all(2 * window <= length for window, length in zip(grid.kernel_size, grid.size, strict=True))


def _means(problem: Problem, count: int, gains: dict[tuple[str, str], list[float]]) -> Iterator[Row]:
    axes, dtype = len(problem.neighborhood.size), problem.dtype
    shape = f"{count} problems of {axes} axes, {_words(dtype)}"
    for (what, form), own_gains in gains.items():
        expected = PAPER.get((form, axes, dtype)) if what == "forward" else None
        yield measured(
            f"{what}, mean gain of {form} over naive", shape, fmean(own_gains), "x", better="higher",
            baseline_name=None if expected is None else "the paper, A100", baseline=expected,
        )  # fmt: skip
        yield measured(
            f"{what}, geometric mean gain of {form} over naive",
            shape,
            geometric_mean(own_gains),
            "x",
            better="higher",
        )
        if form == "fused" and what == "forward" and dtype == HALF and axes in BARS:
            yield measured(
                "forward, mean gain of fused over naive, against the bar", shape, fmean(own_gains), "x",
                better="higher", baseline_name="the bar", baseline=BARS[axes], required=1.0,
            )  # fmt: skip
    if dtype == HALF:
        for what in ("forward", "forward and backward"):
            yield measured(
                f"{what}, mean gain of fused against that of GEMM", shape, fmean(gains[what, "fused"]), "x",
                better="higher", baseline_name="GEMM", baseline=fmean(gains[what, "GEMM"]), required=1.0,
            )  # fmt: skip


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields one or two problems of each number of axes, in half precision."""
    for problems in (
        [
            _problem((128, 128), 13, heads=8, head_dim=64),
            _problem((56, 56), 7, heads=2, batch=128, head_dim=32),
        ],
        [_problem((length,), 127, heads=4, batch=8, head_dim=64) for length in (4096, 16384)],
        [_problem((16, 32, 32), (3, 7, 7), heads=8, head_dim=64)],
    ):
        yield from _table(problems)


def _line(device: str, quick: bool) -> Iterator[Row]:
    """Yields the table of lines."""
    one = partial(_problem, heads=4, batch=8)
    problems = [
        one((length,), window, head_dim=64)
        for length in (1024, 4096, 16384)
        for window in (31, 127, 511, 1023)
    ]
    problems += [one((4096,), 31, 4, head_dim=64), one((16384,), 127, 4, head_dim=64)]
    if not quick:
        problems += [one((4096,), 127, head_dim=width) for width in (32, 128)]
    yield from _table(problems)


def _stages(device: str, quick: bool) -> Iterator[Row]:
    """Yields the table of the stages of NAT and DiNAT at batch 128."""
    sizes = ((56, 2, (1, 8)), (28, 4, (1, 4)), (14, 8, (1, 2)), (7, 16, (1,)))
    problems = [
        _problem((size, size), 7, dilation, heads=heads, batch=128, head_dim=32)
        for size, heads, dilations in sizes
        for dilation in dilations
    ]
    yield from _table(problems[:2] if quick else problems)


def _maps(device: str, quick: bool) -> Iterator[Row]:
    """Yields the table of large maps."""
    problems = [_problem((128, 128), window, heads=8, head_dim=64) for window in (13, 31, 63)]
    if not quick:
        problems += [_problem((256, 256), window, heads=8, head_dim=64) for window in (13, 31)]
    yield from _table(problems, with_flex=True)


def _volume(device: str, quick: bool) -> Iterator[Row]:
    """Yields the table of volumes."""
    one = partial(_problem, heads=8, head_dim=64)
    causal = (True, False, False)
    problems = [one((8, 28, 28), (3, 7, 7)), one((16, 32, 32), (8, 7, 7), is_causal=causal)]
    if not quick:
        problems += [one((16, 32, 32), (3, 7, 7)), one((16, 32, 32), (8, 7, 7)), one((8, 28, 28), (8, 7, 7))]
    yield from _table(problems)


def _float32(device: str, quick: bool) -> Iterator[Row]:
    """Yields the tables of lines and maps in float32."""
    line = partial(_problem, heads=4, batch=8, head_dim=64, dtype=torch.float32)
    yield from _table([line((4096,), window) for window in (31, 127, 511)])
    if not quick:
        plane = partial(_problem, dtype=torch.float32)
        yield from _table(
            [
                plane((56, 56), 7, heads=2, batch=128, head_dim=32),
                plane((128, 128), 13, heads=8, head_dim=64),
                plane((128, 128), 31, heads=8, head_dim=64),
            ]
        )


def _problem(
    size: tuple[int, ...],
    window: int | tuple[int, ...],
    dilation: int = 1,
    *,
    heads: int,
    head_dim: int,
    batch: int = 1,
    dtype: torch.dtype = HALF,
    is_causal: bool | tuple[bool, ...] = False,
) -> Problem:
    grid = Neighborhood.of(size, window, 1, dilation, is_causal)
    return Problem(f"{len(size)} axes", grid, heads, head_dim, batch, dtype)


@torch.no_grad()
def _models(device: str, quick: bool) -> Iterator[Row]:
    """Yields images a second of models of the shapes of NAT-Tiny and DiNAT-Tiny, by the form of their attention."""
    images = torch.randn(128, 3, 224, 224, device=device, dtype=HALF)
    for name, is_dilated in (("NAT-Tiny", False), ("DiNAT-Tiny", True)):
        model = NATShaped(is_dilated).to(device, HALF).eval()

        def run(backend: str, model: NATShaped = model) -> torch.Tensor:
            attend_by(model, backend)
            return model(images)

        calls = {form: partial(run, backend) for form, backend in FORMS.items()}
        times = time_rivals(calls, device, method="graph", samples=30)
        rates = {form: 128e3 / timing.median for form, timing in times.items()}
        for form in ("GEMM", "fused"):
            yield measured(
                f"images a second of {name}'s shape, {form}", "random weights, batch 128, 224 x 224, float16",
                rates[form], "images/s", better="higher", baseline_name="naive", baseline=rates["naive"],
            )  # fmt: skip


def _memory(device: str, quick: bool) -> Iterator[Row]:
    """Yields what a forward keeps beside inputs and output: by the formula, and on a GPU as measured."""
    tokens, heads, head_dim = 128 * 128, 8, 64
    for window in (13, 63):
        shape = f"128 x 128 tokens, window {window} x {window}, 8 heads of 64, batch 1, float16"
        kept = {
            fused: weight_bytes(tokens, window * window, heads, 2, fused) / 2**20 for fused in (True, False)
        }
        yield measured(
            "bytes beside inputs and output, by the formula", shape, kept[True], "MiB", better="lower",
            baseline_name="weights in memory", baseline=kept[False],
        )  # fmt: skip
        intensity = {
            fused: arithmetic_intensity(window * window, head_dim, 2, fused) for fused in (True, False)
        }
        yield measured(
            "operations a byte, by the formula", shape, intensity[True], "FLOP/byte", better="higher",
            baseline_name="weights in memory", baseline=intensity[False],
        )  # fmt: skip
        if device == "cuda":
            problem = _problem((128, 128), window, heads=heads, head_dim=head_dim)
            peaks = {name: _peak(problem, backend) / 2**20 for name, backend in FORMS.items()}
            for name in ("naive", "GEMM"):
                yield measured(
                    f"peak memory of a forward beside inputs, fused against {name}", shape, peaks["fused"], "MiB",
                    better="lower", baseline_name=name, baseline=peaks[name],
                )  # fmt: skip


@torch.no_grad()
def _peak(problem: Problem, backend: str) -> int:
    tensors = problem.tensors()
    call = own(problem, backend)
    call(*tensors)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(*tensors)
    return torch.cuda.max_memory_allocated() - before


def _on_gpu(measure: Measure) -> Measure:
    """Nothing is timed without a GPU."""

    def run(device: str, quick: bool) -> Iterator[Row]:
        if device == "cuda":
            yield from measure(device, quick)  # type: ignore[misc]

    return run


_PARTS: dict[str, Measure] = {
    "speed": _on_gpu(_speed), "line": _on_gpu(_line), "stages": _on_gpu(_stages), "maps": _on_gpu(_maps),
    "volume": _on_gpu(_volume), "float32": _on_gpu(_float32), "models": _on_gpu(_models),
    "training": forms, "memory": _memory,
}  # fmt: skip
CLAIM = Claim(
    slug="fna",
    source="arXiv 2403.04690, abstract and tables of the operators",
    paper=(
        "Mean gain over the naive kernels, A100: GEMM 895 % in 1-D and 272 % in 2-D in full precision; in half "
        "precision GEMM 496 % and 113 %, fused 1,607 % and 581 %.",
        "Forward, fp16: fused over naive 1,759 % (1-D), 958 % (2-D), 1,135 % (3-D); forward and backward 844 %, 385 %, "
        "447 %.",
        "fp16: fused matches or beats dense attention in 100, 98.6 and 97.3 % of the problems in 1-D, 2-D and 3-D, and "
        "FlashAttention-2 in 98.2, 92.4 and 87.0 %.",
        "Images a second, A100, fp16, batch 128, naive to fused: NAT-Tiny 2,167 to 2,772, DiNAT-Tiny 1,910 to 2,909.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
)
