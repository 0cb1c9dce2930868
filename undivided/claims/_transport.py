"""Column and plan anchors at 8k tokens, with and without a matrix of all pairs: time and peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from undivided.claims._harness import Row, measured
from undivided.claims._timing import measured_ceilings, time_rivals
from undivided.ops import column_attention, sinkhorn_attention
from undivided.testing import compare_op

HEADS, HEAD_DIM, LENGTH, SWEEPS = 8, 64, 8192, 5
FASTER, LEANER = 5.0, 20.0
# Rounding adds up over 2 * SWEEPS + 1 half-steps, in the kernels as in eager, but in another order.
_FACTOR = 4.0
_DEVICE = "cuda"
Attention = Callable[..., torch.Tensor]


def gate(dtype: torch.dtype = torch.bfloat16, length: int = LENGTH) -> None:
    """Raises unless both anchors, forward and backward, are as accurate as eager PyTorch at the length timed."""
    for name in ("column", "sinkhorn"):
        fast, eager = (anchored(name, backend) for backend in ("triton", "reference"))
        compare_op(fast, eager, eager, _inputs(1, length, torch.float32), dtype, factor=_FACTOR)


def anchored(name: str, backend: str) -> Attention:
    """Column or Sinkhorn attention of query, key and value on a backend."""
    if name == "column":
        return partial(column_attention, backend=backend)
    return partial(sinkhorn_attention, num_iterations=SWEEPS, backend=backend)


def eager_column(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Products in the dtype of the inputs and softmax in float32, as the eager attention of transformers.

    Scores stand key by query: softmax over neighbours in memory is several times faster than over rows.
    """
    scores = key @ (query.shape[-1] ** -0.5 * query).transpose(-2, -1)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype).transpose(-2, -1) @ value


def eager_sinkhorn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Products in the dtype of the inputs, sweeps in float32; as many keys as queries, so all sums are one."""
    scores = ((query.shape[-1] ** -0.5 * query) @ key.transpose(-2, -1)).float()
    column_field = torch.zeros_like(scores[..., :1, :])
    for _ in range(SWEEPS):
        row_field = -torch.logsumexp(scores + column_field, -1, keepdim=True)
        column_field = -torch.logsumexp(scores + row_field, -2, keepdim=True)
    return (scores + column_field).softmax(-1).to(value.dtype) @ value


_EAGER = {"column": eager_column, "sinkhorn": eager_sinkhorn}
_NAMES = {"column": "column anchor", "sinkhorn": f"plan anchor, {SWEEPS} sweeps"}


def measure(quick: bool) -> Iterator[Row]:
    """Rows of both anchors, forward and forward with backward, a short length, and one that eager cannot hold."""
    for name in ("column", "sinkhorn"):
        for training in (False, True):
            yield from anchor_rows(name, training, LENGTH, compiled=not training and not quick)
    if not quick:
        for name in ("column", "sinkhorn"):
            yield from anchor_rows(name, False, 1024, bars=False)
            yield _alone(name, 4 * LENGTH)


def anchor_rows(
    name: str, training: bool, length: int, *, bars: bool = True, compiled: bool = False
) -> Iterator[Row]:
    """Rows of time and peak memory of one anchor against eager PyTorch, and compiled by torch."""
    rivals: dict[str, Attention] = {"ours": anchored(name, "triton"), "eager": _EAGER[name]}
    if compiled:
        rivals["eager, compiled"] = torch.compile(_EAGER[name], dynamic=False)
    x = _inputs(HEADS, length, torch.bfloat16)
    calls = {
        rival: (_with_backward if training else _forward)(function, x) for rival, function in rivals.items()
    }
    times = {rival: timing.median for rival, timing in time_rivals(calls, _DEVICE).items()}
    memory = {rival: peak_bytes(call) for rival, call in calls.items()}
    shape = f"{HEADS} heads, head_dim {HEAD_DIM}, {length} tokens, bf16"
    what = f"{_NAMES[name]}, {'forward and backward' if training else 'forward'}"
    share = measured_ceilings(_DEVICE).fraction(times["ours"], flops=flops(name, training, length))
    for rival in list(rivals)[1:]:
        bar = bars and rival == "eager"
        yield measured(
            f"{what}: time, against {rival}", shape, times["ours"], "ms", better="lower", baseline_name=rival,
            baseline=times[rival], required=FASTER if bar else None, fraction_of_ceiling=share,
        )  # fmt: skip
        yield measured(
            f"{what}: peak memory, against {rival}", shape, memory["ours"] / 2**20, "MiB", better="lower",
            baseline_name=rival, baseline=memory[rival] / 2**20, required=LEANER if bar else None,
        )  # fmt: skip


def _alone(name: str, length: int) -> Row:
    call = _forward(anchored(name, "triton"), _inputs(HEADS, length, torch.bfloat16))
    time = time_rivals({"ours": call}, _DEVICE)["ours"].median
    return measured(
        f"{_NAMES[name]}, forward: time where one matrix of scores takes {4 * HEADS * length**2 / 2**30:.0f} GiB",
        f"{HEADS} heads, head_dim {HEAD_DIM}, {length} tokens, bf16", time, "ms", better="lower",
        fraction_of_ceiling=measured_ceilings(_DEVICE).fraction(time, flops=flops(name, False, length)),
    )  # fmt: skip


def flops(name: str, training: bool, length: int) -> float:
    """Operations of the matrix products of a streaming computation, which has no matrix of scores to read again.

    A half-step is one product (query by key), and one more forward: the values. The backward has four
    half-steps a sweep but one, and eight products for the gradients of value (2), query (3) and key (3).
    """
    sweeps = SWEEPS if name == "sinkhorn" else 0
    forward = 2 * sweeps + 2 if sweeps else 3
    backward = 8 + (2 * sweeps - 1 if sweeps else 0)
    return 2.0 * HEADS * HEAD_DIM * length**2 * (forward + (backward if training else 0))


def peak_bytes(call: Callable[[], object]) -> int:
    """Bytes that one call has allocated at its worst moment, beyond what was there before it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _inputs(heads: int, length: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    # Twice the usual spread: the fields of the plan are then far from zero.
    return {
        name: (spread * torch.randn(1, heads, length, HEAD_DIM, device=_DEVICE)).to(dtype)
        for name, spread in (("query", 2.0), ("key", 1.0), ("value", 1.0))
    }


def _forward(function: Attention, x: dict[str, torch.Tensor]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return function(**x)

    return run


def _with_backward(function: Attention, x: dict[str, torch.Tensor]) -> Callable[[], object]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    cotangent = torch.randn_like(x["query"])
    return lambda: torch.autograd.grad(function(**leaves), list(leaves.values()), cotangent)
