"""GNA: what windows gain over full attention, simulated and measured.

The simulator counts tiles and gives the bounds of the paper's use cases. On a GPU the fused kernels are timed on these,
beside full attention by the same kernel (a window of everything), cuDNN's and PyTorch's flash kernel, and FlexAttention
on the same windows. Our kernels read the grid where it lies, so that no token is permuted: times are of the whole call.
FlexAttention gets its tokens in the order of tiles, and its time counts their permutation, unless "in rows" is said.

Gains are held against two bounds: the simulator's for the boxes that the kernel visits, over our own full attention;
and the ideal, the pairs of full attention over those of the definition, over cuDNN.
"""

from __future__ import annotations

from collections.abc import Iterator

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._neighborhood import (
    Call,
    Problem,
    backwards,
    check_kernels,
    flex_in_rows,
    forwards,
    library_dense,
    own,
    own_dense,
)
from undivided.claims._timing import measured_ceilings
from undivided.claims._window_quality import strides
from undivided.cost.gna import end_to_end, simulate
from undivided.ops.neighborhood import Neighborhood

# Size, window, query tile and key tile; then strides with the gain of the paper (where it has one) and the bound.
CASES = {
    "HunyuanVideo": ((30, 48, 80), (18, 24, 24), (4, 8, 8), (2, 8, 8)),
    "HunyuanVideo, wide window": ((30, 48, 80), (30, 40, 40), (2, 16, 8), (2, 8, 8)),
    "FLUX, 4K": ((256, 256), (80, 80), (16, 16), (16, 8)),
    "Cosmos": ((16, 44, 80), (16, 24, 16), (8, 4, 8), (4, 4, 8)),
    "line": ((32768,), (2048,), (128,), (128,)),
}
BOUNDS = [
    ("HunyuanVideo", (1, 1, 1), 3.27), ("HunyuanVideo", (2, 1, 1), 3.60), ("HunyuanVideo", (1, 1, 8), 5.45),
    ("HunyuanVideo", (2, 1, 8), 6.00), ("HunyuanVideo", (1, 8, 8), 9.09), ("HunyuanVideo", (2, 8, 8), 10.0),
    ("HunyuanVideo", (16, 8, 8), 11.11), ("HunyuanVideo", (18, 24, 24), 6.67),
    ("HunyuanVideo, wide window", (1, 1, 1), 1.43), ("HunyuanVideo, wide window", (1, 1, 8), 2.00),
    ("HunyuanVideo, wide window", (1, 32, 8), 2.40), ("HunyuanVideo, wide window", (30, 40, 40), 2.00),
    ("FLUX, 4K", (1, 1), 6.10), ("FLUX, 4K", (16, 1), 8.53), ("FLUX, 4K", (16, 16), 10.24),
    ("Cosmos", (1, 1, 1), 5.24), ("Cosmos", (1, 8, 1), 6.11), ("Cosmos", (1, 1, 16), 7.86),
    ("Cosmos", (1, 8, 16), 9.17), ("line", (1,), 15.06), ("line", (64,), 15.06), ("line", (128,), 15.06),
    ("line", (192,), 13.47),
    ("line", (256,), 16.0),
]  # fmt: skip
# Attention's share of the time of a model and its gain end to end, as the paper has them.
MODELS = [
    ("HunyuanVideo", (1, 1, 1), 0.607, 1.73), ("HunyuanVideo", (1, 1, 8), 0.607, 1.99),
    ("HunyuanVideo", (2, 8, 8), 0.607, 2.20), ("HunyuanVideo", (16, 8, 8), 0.607, 2.23),
    ("FLUX, 4K", (1, 1), 0.518, 1.76), ("FLUX, 4K", (16, 1), 0.518, 1.84), ("Cosmos", (1, 1, 1), 0.587, 1.90),
    ("Cosmos", (1, 1, 16), 0.587, 2.05),
]  # fmt: skip

# The smallest share of its bound that a case must reach, and the smallest gain over cuDNN.
PERFECT, OVER_CUDNN, OF_IDEAL, OVER_FLEX = 0.85, 5.0, 0.32, 3.0


def gate(device: str) -> None:
    """Raises unless the kernels are as accurate as eager PyTorch."""
    check_kernels(device, ("triton",), ("blocks", "volume") if device == "cuda" else ("map",))


def _bounds(device: str, quick: bool) -> Iterator[Row]:
    """Yields the simulated bounds beside the table, and the gains of whole models that follow from them."""
    for name, stride, expected in BOUNDS:
        size, window, query_tile, key_tile = CASES[name]
        report = simulate(size, window, stride=stride, query_tile=query_tile, key_tile=key_tile)
        shape = f"{name}, {_by(size)} tokens, window {_by(window)}, stride {_by(stride)}"
        yield measured(
            "simulated bound of the gain", f"{shape}, tiles {_by(query_tile)} / {_by(key_tile)}",
            round(report.speedup, 2), "x", better="higher", baseline_name="the table of the use cases",
            baseline=expected, required=1.0,
        )  # fmt: skip
    for tiling, tiles in (("single", "runs of 64 tokens"), ("multi", "boxes of 8 x 8 tokens")):
        report = simulate((64, 64), (16, 16), query_tile=(8, 8), key_tile=(8, 8), tiling=tiling)
        yield measured(
            "simulated bound of the gain", f"map, 64 x 64 tokens, window 16 x 16, stride 1 x 1, {tiles}",
            round(report.speedup, 2), "x", better="higher",
        )  # fmt: skip
    for name, stride, share, expected in MODELS:
        size, window, query_tile, key_tile = CASES[name]
        report = simulate(size, window, stride=stride, query_tile=query_tile, key_tile=key_tile)
        yield measured(
            "bound of the gain of a whole model", f"{name}, stride {_by(stride)}, attention {share:.1%} of the time",
            end_to_end(share, report.speedup), "x", better="higher", baseline_name="the paper", baseline=expected,
            # Shares are given to three digits, gains to two decimals.
            required=1 - 0.02 / expected,
        )  # fmt: skip


def _by(numbers: tuple[int, ...]) -> str:
    return " x ".join(map(str, numbers))


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields what has a bar, the rival of the bar beside it: rows are kept as they come, should time run out."""
    yield from _windows()
    for name, stride in (("HunyuanVideo", (16, 8, 8)), ("HunyuanVideo", (1, 1, 1)), ("FLUX, 4K", (16, 16))):
        yield from _use_case(name, stride, ("cuDNN",))
    yield from _halves()


def _rivals(device: str, quick: bool) -> Iterator[Row]:
    """Yields the use cases beside all rivals, forward and backward."""
    for one in (1, 256):
        yield from _use_case("line", (one,), ("cuDNN",), heads=1)
    for name, stride in (
        ("line", (1,)), ("line", (256,)), ("line", (2048,)), ("FLUX, 4K", (16, 16)), ("FLUX, 4K", (1, 1)),
        ("HunyuanVideo", (16, 8, 8)), ("HunyuanVideo", (1, 1, 1)),
    )[: 3 if quick else None]:  # fmt: skip
        yield from _use_case(name, stride, ("cuDNN", "flash", "FlexAttention"), with_backward=True)
    problem = Problem("causal line", Neighborhood.of((16384,), 1024, is_causal=True), 16, 128)
    yield from _against_flex(problem, None)


def _use_case(
    name: str,
    stride: tuple[int, ...],
    libraries: tuple[str, ...],
    with_backward: bool = False,
    heads: int = 24,
) -> Iterator[Row]:
    """One row a rival and direction; bars where the case has one."""
    size, window, *_ = CASES[name]
    problem = Problem(name, Neighborhood.of(size, window, stride), heads, 128)
    report = problem.simulated()
    rivals: dict[str, Call] = {"ours": own(problem), "our full attention": own_dense}
    for library in libraries:
        rivals[library] = own(problem, "flex") if library == "FlexAttention" else library_dense(library)
    is_line = len(size) == 1
    times = forwards(problem, rivals)
    yield from _rows("forward", problem, times, OVER_CUDNN if report.is_perfect and not is_line else None)
    kind, bound = (
        ("bound", report.speedup) if report.is_perfect else ("mean bound", report.dense / report.mean_visited)
    )
    yield measured(
        f"forward, {name}, share of the simulated {kind} of {bound:.2f}", problem.shape, times["ours"], "ms",
        better="lower", baseline_name=f"our full attention over the {kind}",
        baseline=times["our full attention"] / bound, required=PERFECT if report.is_perfect else None,
    )  # fmt: skip
    yield measured(
        f"forward, {name}, share of the ideal of {problem.ideal:.2f}", problem.shape, times["ours"], "ms",
        better="lower", baseline_name="cuDNN over the ideal", baseline=times["cuDNN"] / problem.ideal,
        required=OF_IDEAL if len(size) == 3 and not report.is_perfect else None,
    )  # fmt: skip
    if with_backward:
        times = backwards(problem, {name: rivals[name] for name in ("ours", "our full attention", "cuDNN")})
        yield from _rows("backward", problem, times, None)


def _rows(what: str, problem: Problem, times: dict[str, float], over_cudnn: float | None) -> Iterator[Row]:
    flops = problem.flops * (2.5 if what == "backward" else 1.0)
    for name in times:
        if name != "ours":
            yield measured(
                f"{what}, {problem.name}, against {name}", problem.shape, times["ours"], "ms", better="lower",
                baseline_name=name, baseline=times[name], required=over_cudnn if name == "cuDNN" else None,
                fraction_of_ceiling=measured_ceilings("cuda").fraction(times["ours"], flops=flops),
            )  # fmt: skip


def _windows() -> Iterator[Row]:
    """Yields a map of 128 x 128 with a window of 25 x 25 beside FlexAttention in rows."""
    yield from _against_flex(Problem("map", Neighborhood.of((128, 128), 25), 16, 128), OVER_FLEX)


def _against_flex(problem: Problem, required: float | None) -> Iterator[Row]:
    rivals = {
        "ours": own(problem), "FlexAttention in rows": flex_in_rows(problem), "cuDNN": library_dense("cuDNN"),
        "flash": library_dense("flash"),
    }  # fmt: skip
    for what, run in (("forward", forwards), ("backward", backwards)):
        times = run(problem, rivals)
        for name in times:
            if name != "ours":
                has_bar = name == "FlexAttention in rows"
                yield measured(
                    f"{what}, {problem.name}, against {name}", problem.shape, times["ours"], "ms", better="lower",
                    baseline_name=name, baseline=times[name], required=required if has_bar else None,
                )  # fmt: skip


def _halves() -> Iterator[Row]:
    """Yields windows of half an axis at 4,096 tokens: never slower than the fastest full attention."""
    for grid in (
        Neighborhood.of((64, 64), 32), Neighborhood.of((4096,), 2048), Neighborhood.of((16, 16, 16), 8),
    ):  # fmt: skip
        problem = Problem(f"half of each of {len(grid.size)} axes", grid, 16, 128)
        rivals = {"ours": own(problem), "cuDNN": library_dense("cuDNN"), "flash": library_dense("flash")}
        for what, times in (("forward", forwards(problem, rivals)), ("backward", backwards(problem, rivals))):
            fastest = min(("cuDNN", "flash"), key=times.__getitem__)
            yield measured(
                f"{what}, {problem.name}", problem.shape, times["ours"], "ms", better="lower",
                baseline_name=f"{fastest}, the fastest full attention", baseline=times[fastest], required=1.0,
            )  # fmt: skip


def _on_gpu(measure: Measure) -> Measure:
    """Nothing is timed without a GPU."""

    def run(device: str, quick: bool) -> Iterator[Row]:
        if device == "cuda":
            yield from measure(device, quick)  # type: ignore[misc]

    return run


_PARTS: dict[str, Measure] = {
    "bounds": _bounds, "speed": _on_gpu(_speed), "rivals": _on_gpu(_rivals), "quality": strides,
}  # fmt: skip
CLAIM = Claim(
    slug="gna",
    source="arXiv 2504.16922, experiments; kernel times in the documentation of NATTEN's profiler",
    paper=(
        "HunyuanVideo, 30 x 48 x 80 tokens, window 18 x 24 x 24 (91 % sparse): stride 16 x 8 x 8 reaches 2.23x end to "
        "end, the bound of the operations; stride 1 1.73x, windows without overlap 2.00x.",
        "End to end with dense first steps: Cosmos-7B 1.26x, HunyuanVideo 1.63x, FLUX 1.45x.",
        "NATTEN on an H100, fp16, 24 heads of 128, against cuDNN: HunyuanVideo's shape 283.3 ms, stride 1 79.0 (84.4 "
        "with permutation), stride 16 x 8 x 8 23.4 (29.1).",
        "The same, FLUX at 4K, 256 x 256, window 80 x 80: cuDNN 97.4 ms, stride 1 16.2 (18.6), stride 16 x 16 7.9 "
        "(10.6).",
        "The same, one head, 32,768 tokens, window 2,048: cuDNN 787.4 us, stride 1 94.8, 256 62.7, 2,048 59.3.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
)
