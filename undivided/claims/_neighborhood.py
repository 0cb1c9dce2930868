"""What the two claims on neighborhood attention share: problems, rivals and how they are timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from undivided.cost.gna import TileReport, simulate
from undivided.ops.neighborhood import Neighborhood, neighborhood_attention
from undivided.testing import compare_op

Call = Callable[..., torch.Tensor]

# Odd and even windows, strides, dilation with classes of two lengths, causal axes, whole axes; and grouped heads.
GATES = {
    "line": Neighborhood.of((333,), 63),
    "blocks": Neighborhood.of((64, 48), (16, 24), (16, 8)),
    "map": Neighborhood.of((37, 44), (9, 12), (3, 1), (2, 1), (False, True)),
    "volume": Neighborhood.of((6, 20, 17), (3, 7, 17), (1, 2, 1), (1, 2, 1), (True, False, False)),
}


@dataclass(frozen=True)
class Problem:
    """A grid with windows, and the tensors of a layer on it."""

    name: str
    neighborhood: Neighborhood
    heads: int
    head_dim: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> str:
        """The problem in words."""
        grid = self.neighborhood
        by = lambda entries: " x ".join(map(str, entries))  # noqa: E731
        words = [f"{by(grid.size)} tokens", f"window {by(grid.kernel_size)}", f"stride {by(grid.stride)}"]
        if max(grid.dilation) > 1:
            words.append(f"dilation {by(grid.dilation)}")
        if any(grid.is_causal):
            words.append(f"causal on {[axis for axis, is_causal in enumerate(grid.is_causal) if is_causal]}")
        words.append(f"{self.heads} heads of {self.head_dim}, batch {self.batch}")
        return ", ".join([*words, str(self.dtype).removeprefix("torch.")])

    @property
    def ideal(self) -> float:
        """Pairs of full attention over the pairs that the definition keeps."""
        return math.prod(axis.length / mean_window(axis) for axis in self.neighborhood.axes)

    @property
    def flops(self) -> float:
        """Operations of the forward that the definition keeps."""
        tokens = self.neighborhood.num_tokens
        return 4 * self.batch * self.heads * tokens * tokens / self.ideal * self.head_dim

    def simulated(self) -> TileReport:
        """Returns what the simulator says of the boxes of our forward, which start at the first key that is seen."""
        from undivided.ops.neighborhood.triton import forward_cut

        grid = self.neighborhood
        missing = 3 - len(grid.size)
        meta = torch.empty(1, 1, *grid.size, self.head_dim, dtype=self.dtype, device="meta")
        _, boxes = forward_cut(meta, meta, grid, 227 * 1024)
        return simulate(
            grid.size, grid.kernel_size, stride=grid.stride, dilation=grid.dilation, is_causal=grid.is_causal,
            query_tile=boxes.rows[missing:], key_tile=boxes.columns[missing:], key_tiling="dynamic",
        )  # fmt: skip

    def tensors(self, count: int = 3, requires_grad: bool = False) -> list[torch.Tensor]:
        """Returns query, key, value and so on, drawn afresh."""
        shape = (self.batch, self.heads, *self.neighborhood.size, self.head_dim)
        return [
            torch.randn(shape, device="cuda", dtype=self.dtype).requires_grad_(requires_grad)
            for _ in range(count)
        ]


def mean_window(axis: Any) -> float:
    """Returns the keys that a query of an axis sees on average: fewer than the window where it is causal."""
    start, end = axis.windows(axis.length, torch.device("cpu"))
    return float((end - start).double().mean())


def own(problem: Problem, backend: str = "triton", **options: Any) -> Call:
    """Returns neighborhood attention of `[batch, heads, *size, head_dim]` by a backend."""
    grid = problem.neighborhood
    return partial(
        neighborhood_attention, kernel_size=grid.kernel_size, stride=grid.stride, dilation=grid.dilation,
        is_causal=grid.is_causal, backend=backend, **options,
    )  # fmt: skip


def own_dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Full attention by the fused kernel itself, tokens in a line: a window of everything."""
    query, key, value = (x.flatten(2, -2) for x in (query, key, value))
    out = neighborhood_attention(query, key, value, query.shape[2], backend="triton")
    return out if isinstance(out, torch.Tensor) else out[0]


def library_dense(kernels: str) -> Call:
    """Returns full attention by a family of PyTorch's kernels, "cuDNN" or "flash"."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}[kernels]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.flatten(2, -2) for x in (query, key, value)))

    return attend


def flex_in_rows(problem: Problem) -> Call:
    """Returns FlexAttention of the tokens as they lie, row by row, with the blocks that its own builder finds."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = problem.neighborhood.num_tokens
    seen = seen_in_rows(problem.neighborhood)
    blocks = create_block_mask(seen, None, None, tokens, tokens, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value: compiled(
        *(x.flatten(2, -2) for x in (query, key, value)), block_mask=blocks
    )


def seen_in_rows(grid: Neighborhood) -> Callable[..., torch.Tensor]:
    """Returns FlexAttention's mask of undilated windows, for tokens in row-major order; it reads no table."""

    def seen(b, h, q, k):
        allowed = k >= 0
        for axis in reversed(grid.axes):
            query, key, last = q % axis.length, k % axis.length, axis.length - 1
            q, k = q // axis.length, k // axis.length
            group = query // axis.stride * axis.stride
            if axis.is_causal:
                leader = (group + axis.stride - 1).clamp(max=last)
                allowed = allowed & (key <= query) & (key > leader - axis.kernel_size)
            else:
                leader = (group + axis.stride // 2).clamp(max=last)
                start = (leader - axis.kernel_size // 2).clamp(0, axis.length - axis.kernel_size)
                allowed = allowed & (key >= start) & (key < start + axis.kernel_size)
        return allowed

    return seen


def forwards(problem: Problem, rivals: dict[str, Call]) -> dict[str, float]:
    """Returns the milliseconds of the forward of each rival on the same tensors."""
    tensors = problem.tensors()
    with torch.no_grad():
        return medians({name: partial(call, *tensors) for name, call in rivals.items()})


def backwards(problem: Problem, rivals: dict[str, Call]) -> dict[str, float]:
    """Returns the milliseconds of the backward alone of each rival on the same tensors."""
    leaves = problem.tensors(requires_grad=True)
    calls: dict[str, Callable[[], object]] = {}
    for name, call in rivals.items():
        out = call(*leaves)
        calls[name] = partial(torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True)
    return medians(calls)


def medians(calls: dict[str, Callable[[], object]], seconds: float = 0.05) -> dict[str, float]:
    """Returns the median milliseconds of calls in turns, between events: of 3 samples, or as many as fit, up to 20.

    The device is busy with other work while the host queues a call, as it is in a model, and finds a cold L2. A sample
    of long calls is several of them after as many that do not count, so that each rival runs at the clocks that it lets
    the device have and not at those of the rival before.
    """
    busy = torch.empty(2**30, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    samples, repeats = {}, {}
    for name, call in calls.items():
        call()
        once = _milliseconds(call, busy, 1)
        samples[name] = max(3, min(20, int(1e3 * seconds / once)))
        repeats[name] = 1 if once < 2 else math.ceil(80 / once)
    for turn in range(max(samples.values())):
        for name, call in calls.items():
            if turn < samples[name]:
                times[name].append(_milliseconds(call, busy, repeats[name]))
    return {name: median(own_times) for name, own_times in times.items()}


def _milliseconds(call: Callable[[], object], busy: torch.Tensor, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if repeats > 1:
        for _ in range(repeats):
            call()
    for _ in range(4):
        busy.zero_()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def check_kernels(device: str, backends: Sequence[str], names: Sequence[str] = tuple(GATES)) -> None:
    """Raises unless the kernels are as accurate as eager PyTorch, in output, log-sums and gradients."""
    if device == "cpu":
        # Kernels need a GPU; what runs on a CPU are the tiles in plain PyTorch.
        backends = ("composed",)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for name in names:
        grid = GATES[name]
        x = {
            "query": torch.randn(1, 4, *grid.size, 64, device=device),
            "key": torch.randn(1, 2, *grid.size, 64, device=device),
            "value": torch.randn(1, 2, *grid.size, 64, device=device),
        }
        problem = Problem(name, grid, 4, 64)
        slow = own(problem, "reference", return_lse=True)
        for backend in backends:
            compare_op(own(problem, backend, return_lse=True), slow, slow, x, dtype)
