"""MoH: what skipping heads saves where a kernel really skips them, and that a model learns with fewer.

The paper times a sparse product; here a kernel attends only with the queries that selected a head, against the dense
kernels everyone has, which compute all heads. What computing all heads and masking costs is shown beside it, since the
published code does that. A small share of active heads pays, a large one does not: the break-even is a row of its own.
On small byte-level models the quality with fewer heads, how evenly the heads are used, and what shared heads and
two-stage weights do; differences of a few hundredths of a bit are those between seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import measured_ceilings, time_rivals
from undivided.claims._tiny_lm import TinyRun, as_bytes, mean_and_deviation, train_tiny_lm
from undivided.ops import routed_attention
from undivided.testing import compare_op

BATCH, HEADS = 8, 32
FASTER, FROM = 1.5, 2048
FLASH, CUDNN, MASKED = (
    "flash (SDPA), all heads",
    "cuDNN (SDPA), all heads",
    "flash (SDPA), all heads, then masked",
)
_MOST, _SOME, _HALF = (1.0, 0.9, 0.75, 0.5), (1.0, 0.75, 0.5), (0.5,)


@dataclass(frozen=True)
class Problem:
    """One table of times.

    Args:
        head_dim: width of a head.
        length: tokens.
        is_causal: whether the mask is causal.
        shares: shares of active heads, from the greatest down.
        trains: forward and backward, or the forward alone.
    """

    head_dim: int
    length: int
    is_causal: bool
    shares: tuple[float, ...]
    trains: bool = False

    def __str__(self) -> str:
        mask = "causal" if self.is_causal else "not causal"
        return f"batch {BATCH}, {HEADS} heads of {self.head_dim}, {self.length} tokens, {mask}, bf16"

    @property
    def what(self) -> str:
        """What is timed, in words."""
        return "attention forward and backward" if self.trains else "attention forward"

    def flops(self, share: float) -> float:
        """Operations of the pairs that are selected: forward, and backward 2.5 times as many, for five products."""
        pairs = self.length * (self.length + 1) / 2 if self.is_causal else self.length**2
        return (3.5 if self.trains else 1.0) * 4 * self.head_dim * BATCH * HEADS * pairs * share


# The most important ones first.
_PROBLEMS = (
    Problem(64, 2048, True, _MOST),
    Problem(128, 2048, True, _SOME),
    Problem(64, 2048, True, _SOME, trains=True),
    Problem(128, 2048, True, _SOME, trains=True),
    Problem(64, 512, False, _MOST),
    Problem(64, 256, False, _MOST),
    Problem(64, 8192, True, _HALF),
    Problem(128, 8192, True, _HALF),
    Problem(128, 8192, True, _HALF, trains=True),
    Problem(64, 8192, True, _HALF, trains=True),
    Problem(64, 2048, False, _SOME),
)


def gate(device: str) -> None:
    """Raises unless the routed kernels, forward and backward, and masking are as accurate as eager PyTorch."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    backends = ("triton", "sdpa") if device == "cuda" else ("sdpa",)
    # Multiples of 16, as in what is timed, and a prompt behind a cache whose lengths are odd.
    for head_dim, key_heads, queries, keys in ((64, 4, 336, 336), (128, 4, 336, 336), (128, 2, 151, 400)):
        sizes = {"query": (4, queries), "key": (key_heads, keys), "value": (key_heads, keys)}
        inputs = {name: torch.randn(2, *size, head_dim, device=device) for name, size in sizes.items()}
        inputs["gates"] = torch.rand(2, 4, queries, device=device) + 0.5
        selected = balanced_choice(2, 4, queries, 0.5, device)
        selected[:, -1] = False
        for backend in backends:
            fast, exact = (_attention(name, selected, True) for name in (backend, "reference"))
            compare_op(fast, exact, exact, inputs, dtype)
            with torch.no_grad():
                compare_op(fast, exact, exact, inputs, dtype, grad_inputs=())
                fast, exact = (_attention(name, selected, False) for name in (backend, "reference"))
                compare_op(fast, exact, exact, inputs, dtype, grad_inputs=())


def _attention(backend: str, selected: torch.Tensor, is_causal: bool) -> Callable[..., torch.Tensor]:
    return lambda **x: routed_attention(**x, selected=selected, is_causal=is_causal, backend=backend)


def balanced_choice(batch: int, heads: int, length: int, share: float, device: str) -> torch.Tensor:
    """Returns a random balanced choice of heads, boolean `[batch, heads, length]`, in the layout of a router.

    Every token uses `share` of the heads: half of them the first ones, the same for all, the others at random.
    """
    active = round(share * heads)
    scores = torch.rand(batch, length, heads, device=device)
    scores[..., : active // 2] = 2.0
    best = scores.topk(active, dim=-1).indices
    return torch.zeros(scores.shape, device=device).scatter(-1, best, 1.0).bool().transpose(1, 2)


def _kernels(name: str) -> AbstractContextManager:
    """Restricts scaled_dot_product_attention to one family of kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel({"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}[name])


def _dense(name: str, x: dict[str, torch.Tensor], is_causal: bool) -> torch.Tensor:
    with _kernels(name):
        return F.scaled_dot_product_attention(x["query"], x["key"], x["value"], is_causal=is_causal)


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of attention on CUDA."""
    if device == "cpu":
        return
    for problem in _PROBLEMS[: 1 if quick else None]:
        shape = (BATCH, HEADS, problem.length, problem.head_dim)
        names = ("query", "key", "value")
        x = {name: torch.randn(shape, device="cuda", dtype=torch.bfloat16) for name in names}
        x["gates"] = torch.rand(shape[:3], device="cuda") + 0.5
        choices = {
            share: balanced_choice(BATCH, HEADS, problem.length, share, "cuda") for share in problem.shares
        }
        rivals = _with_backward(problem, x, choices) if problem.trains else _forward(problem, x, choices)
        with torch.set_grad_enabled(problem.trains):
            times = time_rivals(rivals, "cuda", method="events" if problem.trains else "graph", samples=30)
        yield from _rows(problem, {name: timing.median for name, timing in times.items()})


def _forward(
    problem: Problem, x: dict[str, torch.Tensor], choices: dict[float, torch.Tensor]
) -> dict[str, Callable[[], object]]:
    is_causal = problem.is_causal
    # Gates are zero where a head is not selected.
    gates = x["gates"] * choices[problem.shares[-1]]
    rivals: dict[str, Callable[[], object]] = {
        FLASH: lambda: _dense("flash", x, is_causal),
        CUDNN: lambda: _dense("cuDNN", x, is_causal),
    }
    if problem.length == FROM:
        rivals[MASKED] = lambda: (_dense("flash", x, is_causal) * gates[..., None]).to(torch.bfloat16)
    ours = {share: _attention("triton", selected, is_causal) for share, selected in choices.items()}
    return {str(share): partial(function, **x) for share, function in ours.items()} | rivals


def _with_backward(
    problem: Problem, x: dict[str, torch.Tensor], choices: dict[float, torch.Tensor]
) -> dict[str, Callable[[], object]]:
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    heads = [leaves[name] for name in ("query", "key", "value")]
    dout = torch.randn_like(x["query"])

    def routed(selected: torch.Tensor) -> Callable[[], object]:
        attend = _attention("triton", selected, problem.is_causal)
        return lambda: torch.autograd.grad(attend(**leaves), list(leaves.values()), dout)

    def dense(name: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(_dense(name, leaves, problem.is_causal), heads, dout)

    ours = {str(share): routed(selected) for share, selected in choices.items()}
    return ours | {FLASH: dense("flash"), CUDNN: dense("cuDNN")}


def _rows(problem: Problem, times: dict[str, float]) -> Iterator[Row]:
    """Every share of active heads against flash, the smallest against the other rivals, and the break-even."""
    for share in problem.shares[::-1]:
        smallest = share == problem.shares[-1]
        for name in (FLASH, CUDNN, MASKED) if smallest else (FLASH,):
            if name not in times:
                continue
            ours = times[str(share)]
            yield measured(
                f"{problem.what}, {share:.0%} of the heads, against {name}", str(problem), ours, "ms", better="lower",
                baseline_name=name, baseline=times[name],
                required=FASTER if name == FLASH and smallest and problem.length >= FROM else None,
                fraction_of_ceiling=measured_ceilings("cuda").fraction(ours, flops=problem.flops(share)),
            )  # fmt: skip
    points = [(share, times[str(share)]) for share in problem.shares]
    level = break_even(points, times[FLASH]) if len(points) > 1 else None
    if level is not None:
        yield measured(
            f"{problem.what}, share of active heads at which flash takes as long (1: even all take no longer)",
            str(problem), level, "of heads", better="higher",
        )  # fmt: skip


def break_even(points: Sequence[tuple[float, float]], time: float) -> float | None:
    """Returns the greatest share whose time, between the measured ones on a line, is `time`.

    Args:
        points: share of active heads and time, from the greatest share down.
        time: what the rival takes for all heads.

    Returns:
        1.0 if even all heads take less; None if no measured share does.
    """
    if points[0][1] <= time:
        return points[0][0]
    for (above, slower), (below, faster) in pairwise(points):
        if faster <= time:
            return below + (above - below) * (time - faster) / (slower - faster)
    return None


_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "head_dim": 32,
    "num_hidden_layers": 4,
}
_PARAMETERS, _STEPS, _QUICK_STEPS, _BATCH, _LENGTH, _SEEDS = 3_200_000, 300, 50, 32, 256, (0, 1, 2)
_PLAIN = "all 8 heads (MHA)"
_ARMS: dict[str, dict[str, Any] | None] = {
    _PLAIN: None,
    "75 % (2 shared, 4 of 6)": {"shared_heads": 2, "top_k": 4},
    "50 % (2 shared, 2 of 6)": {"shared_heads": 2, "top_k": 2},
    "75 % (no shared heads, 6 of 8)": {"shared_heads": 0, "top_k": 6},
    "75 % (2 shared, 4 of 6), without two-stage weights": {"shared_heads": 2, "top_k": 4, "two_stage": False},
}
# What the paper's claim allows: half a percent more, and heads whose loads differ by a factor of 3 at most.
_ALLOWED, _LARGEST_LOAD_RATIO = 1.005, 3.0


def _quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields the quality of small models, and the loads of their heads, on CUDA."""
    if device == "cpu":
        return
    from undivided.data import demo_texts

    texts = demo_texts()
    text, heldout = texts.calibration, texts.heldout["2024-Biden-1"]
    steps = _QUICK_STEPS if quick else _STEPS
    shape = (
        f"{_SIZES['num_hidden_layers']} layers, width {_SIZES['hidden_size']}, {steps} steps of {_BATCH * _LENGTH} "
        f"bytes, {len(_SEEDS)} seeds"
    )
    baseline: float | None = None
    for arm, options in _ARMS.items():
        runs = train_tiny_lm(
            None if options is None else {"mechanism": "moh", "backend": "mask", **options}, text, heldout,
            seeds=_SEEDS, steps=steps, batch_size=_BATCH, length=_LENGTH, parameters=_PARAMETERS, device="cuda",
            **_SIZES,
        )  # fmt: skip
        mean, deviation = mean_and_deviation([run.bits_per_byte for run in runs])
        # The claim is about 75 % with shared heads and two-stage weights; the other arms have no bar.
        bar = 1 / _ALLOWED if options == {"shared_heads": 2, "top_k": 4} else None
        yield measured(
            f"bits a byte of a small model, {arm}", f"{shape}, {runs[0].parameters} parameters", mean, "bits/byte",
            better="lower", deviation=deviation, baseline_name=None if baseline is None else _PLAIN,
            baseline=baseline, required=bar,
        )  # fmt: skip
        if options is None:
            baseline = mean
        else:
            yield _load_row(arm, shape, runs, heldout, bar is not None)


def _load_row(arm: str, shape: str, runs: Sequence[TinyRun], heldout: str, has_bar: bool) -> Row:
    ratio, _ = mean_and_deviation([max(load_ratios(run.model, heldout, _LENGTH)) for run in runs])
    return measured(
        f"load of the busiest routed head over that of the idlest, worst layer, {arm}", shape, ratio, "times",
        better="lower", baseline_name="the largest ratio allowed", baseline=_LARGEST_LOAD_RATIO,
        required=1.0 if has_bar else None,
    )  # fmt: skip


@torch.no_grad()
def load_ratios(model: nn.Module, text: str, length: int, most_bytes: int = 65536) -> list[float]:
    """Returns for each layer with routed heads how often its busiest one is selected over its idlest (one at least)."""
    counts: dict[nn.Module, torch.Tensor] = {}

    def count(router: nn.Module, inputs: Any, routing: Any) -> None:
        selected = routing.selected[:, router.shared_heads :].sum(dim=(0, 2))
        counts[router] = counts.get(router, 0) + selected

    routers = [layer.router for layer in model.attention_layers() if hasattr(layer, "router")]
    handles = [router.register_forward_hook(count) for router in routers]
    device = next(model.parameters()).device
    data = as_bytes(text)[:most_bytes]
    try:
        for ids in data[: len(data) // length * length].view(-1, length).to(device).split(64):
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [(load.max() / load.min().clamp(min=1)).item() for load in counts.values()]


def _tuning(device: str, quick: bool) -> Iterator[Row]:
    """Yields what continued training gives back of a model that was trained with all heads."""
    from undivided.claims._moh_tuning import tuning_rows

    yield from tuning_rows(device, quick)


def _smollm(device: str, quick: bool) -> Iterator[Row]:
    """Yields what distillation gives back of SmolLM2-135M with a router of its heads, on a GPU."""
    from undivided.claims._moh_tuning import smollm_rows

    yield from smollm_rows(device, quick)


_PARTS: dict[str, Measure] = {"speed": _speed, "quality": _quality, "tuning": _tuning, "smollm": _smollm}
CLAIM = Claim(
    slug="moh",
    source="arXiv 2410.11842, table 7 for times, abstract for quality",
    paper=(
        "32 heads of 64, sparse products: at 512 tokens 1.376 ms with all heads, 1.351, 1.180 and 0.863 ms with 90, 75 "
        "and 50 % of them; at 256 tokens 0.360 ms, and 0.352, 0.321 and 0.225 ms.",
        "MoH outperforms multi-head attention by using only 50 % to 90 % of the attention heads.",
        "Ablation on MoH-ViT-S, 100 epochs: 75.6 without shared heads, 78.3 with them, 78.6 with two-stage routing.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
)
