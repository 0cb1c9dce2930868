"""Timing of rivals on equal terms, and the ceilings of the device that they are measured against.

On CUDA each sample is one call, or one replay of its CUDA graph, between two events, after a write that
evicts the L2 cache. On a CPU a sample is as many calls as take a few milliseconds. On both, the rivals take
turns in one process, so that clocks, heat and neighbours weigh on all of them alike.

Two events around a kernel of one element are about 4 us apart on an H100; nothing is subtracted for that.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MIN_SAMPLES = {"cpu": 7, "cuda": 30}
_WARM_UP_SECONDS = 0.3
_CPU_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Timing:
    """Times of one rival, in milliseconds a call.

    Args:
        median: Median of the samples.
        low: 20 % of the samples are below it.
        high: 80 % of the samples are below it.
        samples: How many samples.
        method: How they were taken, in words.
    """

    median: float
    low: float
    high: float
    samples: int
    method: str

    def __str__(self) -> str:
        return f"{self.median:.4g} ms (20 %: {self.low:.4g}, 80 %: {self.high:.4g}; {self.samples} samples)"


def time_rivals(
    rivals: Mapping[str, Callable[[], object]],
    device: str,
    *,
    method: str = "auto",
    samples: int | None = None,
    seconds: float = 0.5,
) -> dict[str, Timing]:
    """Times functions that do the same work, in turns.

    Args:
        rivals: Name to function without arguments; with `"graph"`, one that never waits for the device.
        device: `"cpu"` or `"cuda"`.
        method: `"events"` times single calls and so counts what the host costs where it is the slower side;
            `"graph"` replays a CUDA graph of one call, for work that the host would dominate, such as decode;
            `"wall"` is the CPU's; `"auto"` is `"events"` on CUDA and `"wall"` on a CPU.
        samples: Samples of each rival; by default as many as fit in `seconds`, within the minimum and 200.
        seconds: Aim for the measured time of each rival, warm-up not counted.

    Returns:
        Name to timing, in the order given.

    Raises:
        ValueError: If there is no rival, the method does not fit the device, or `samples` is under the
            minimum (30 on CUDA, 7 on a CPU).
    """
    kind = torch.device(device).type
    if not rivals:
        raise ValueError("rivals is empty; give at least one function.")
    if kind not in MIN_SAMPLES:
        raise ValueError(f'device="{device}" must be "cpu" or "cuda".')
    allowed = ("auto", "wall") if kind == "cpu" else ("auto", "events", "graph")
    if method not in allowed:
        raise ValueError(f'method="{method}" must be one of {", ".join(allowed)} on {kind}.')
    least = MIN_SAMPLES[kind]
    if samples is not None and samples < least:
        raise ValueError(f"samples={samples} is too few for a median on {kind}; use at least {least}.")
    if kind == "cpu":
        return _time_on_cpu(rivals, samples, seconds)
    return _time_on_cuda(rivals, method, samples, seconds)


def _sample_count(kind: str, slowest: float, samples: int | None, seconds: float) -> int:
    return samples or int(min(max(seconds / max(slowest, 1e-9), MIN_SAMPLES[kind]), 200))


def _time_on_cpu(
    rivals: Mapping[str, Callable[[], object]], samples: int | None, seconds: float
) -> dict[str, Timing]:
    calls = {name: _calls_per_sample(function) for name, function in rivals.items()}
    slowest = max(_wall(function, calls[name]) * calls[name] for name, function in rivals.items())
    count = _sample_count("cpu", slowest, samples, seconds)
    times: dict[str, list[float]] = {name: [] for name in rivals}
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(count):
            for name in _rotated(list(rivals), turn):
                times[name].append(1e3 * _wall(rivals[name], calls[name]))
    finally:
        if was_collecting:
            gc.enable()
    return {name: _summary(own, f"wall clock, {calls[name]} calls a sample") for name, own in times.items()}


def _wall(function: Callable[[], object], calls: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _calls_per_sample(function: Callable[[], object]) -> int:
    # The first call compiles and allocates; it says nothing about the rest.
    function()
    calls = 1
    while True:
        duration = _wall(function, calls) * calls
        if duration >= _CPU_SAMPLE_SECONDS:
            return calls
        calls *= 2


def _time_on_cuda(
    rivals: Mapping[str, Callable[[], object]], method: str, samples: int | None, seconds: float
) -> dict[str, Timing]:
    for function in rivals.values():
        _warm_up(function)
    graphed = method == "graph"
    calls = {name: _captured(function) if graphed else function for name, function in rivals.items()}
    flush = _l2_flush()
    slowest = max(_event_times([call] * 5, flush)[-1] for call in calls.values()) / 1e3
    count = _sample_count("cuda", slowest, samples, seconds)
    times: dict[str, list[float]] = {name: [] for name in rivals}
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(count):
            order = _rotated(list(rivals), turn)
            durations = _event_times([calls[name] for name in order], flush)
            for name, duration in zip(order, durations, strict=True):
                times[name].append(duration)
    finally:
        if was_collecting:
            gc.enable()
    words = "replays of a CUDA graph between events, L2 flushed" if graphed else "CUDA events, L2 flushed"
    return {name: _summary(own, words) for name, own in times.items()}


def _warm_up(function: Callable[[], object]) -> None:
    # The first call compiles and tunes; the time after it brings the clocks to where the samples find them.
    function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    while time.perf_counter() - start < _WARM_UP_SECONDS:
        function()
        torch.cuda.synchronize()


def _captured(function: Callable[[], object]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _l2_flush() -> Callable[[], object]:
    # Four times the cache and at least 256 MB: the write also hides the host's launch of what follows it.
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    buffer = torch.empty(max(4 * cache, 256 * 2**20), dtype=torch.int8, device="cuda")
    return buffer.zero_


def _event_times(calls: list[Callable[[], object]], flush: Callable[[], object]) -> list[float]:
    """Milliseconds of each call, one after another, each from a cold L2."""
    events = []
    for call in calls:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        flush()
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _rotated(names: list[str], turn: int) -> list[str]:
    # Whoever follows a heavy rival finds a hotter chip; rotation shares that out.
    shift = turn % len(names)
    return names[shift:] + names[:shift]


def _summary(times: list[float], method: str) -> Timing:
    levels = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    median, low, high = torch.quantile(torch.tensor(times, dtype=torch.float64), levels).tolist()
    return Timing(median, low, high, len(times), method)


@dataclass(frozen=True)
class Ceilings:
    """The measured limits of a device: the roofline that `fraction_of_ceiling` refers to.

    Args:
        copy_bytes_per_second: Rate of a large copy on the device, bytes read plus bytes written.
        matmul_flops_per_second: Rate of a large matrix product.
        matmul: Which product, in words.
    """

    copy_bytes_per_second: float
    matmul_flops_per_second: float
    matmul: str

    def floor(self, *, flops: float = 0.0, bytes_moved: float = 0.0) -> float:
        """Least time in milliseconds: `1e3 * max(flops / matmul rate, bytes / copy rate)`."""
        return 1e3 * max(flops / self.matmul_flops_per_second, bytes_moved / self.copy_bytes_per_second)

    def fraction(self, milliseconds: float, *, flops: float = 0.0, bytes_moved: float = 0.0) -> float:
        """Share of the ceiling that a measured time reaches: `floor / milliseconds`.

        Args:
            milliseconds: Measured time.
            flops: Useful floating-point operations: only the pairs that the definition keeps.
            bytes_moved: Bytes that must be moved: each input read once, each output written once.
        """
        return self.floor(flops=flops, bytes_moved=bytes_moved) / milliseconds


def measured_ceilings(device: str) -> Ceilings:
    """Measures the ceilings of a device, once a process.

    On CUDA: a copy between two buffers of 1 GiB (less where memory is short) and a bf16 product of
    8192 x 8192 matrices. On a CPU: a copy of 256 MiB and a float32 product of 1024 x 1024 matrices.

    Args:
        device: `"cpu"` or `"cuda"`.
    """
    where = torch.device(device)
    if where.type not in MIN_SAMPLES:
        raise ValueError(f'device="{device}" must be "cpu" or "cuda".')
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    return _measure_ceilings(where)


@functools.cache
def _measure_ceilings(device: torch.device) -> Ceilings:
    on_cuda = device.type == "cuda"
    size, dtype, copied = (8192, torch.bfloat16, 2**30) if on_cuda else (1024, torch.float32, 2**28)
    if on_cuda:
        copied = min(copied, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Random entries: products of zeros draw less power and so run faster than real ones.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    with torch.no_grad():
        copy = time_rivals({"copy": lambda: target.copy_(source)}, device.type)["copy"]
        matmul = time_rivals({"matmul": lambda: torch.mm(left, right, out=product)}, device.type)["matmul"]
    return Ceilings(
        copy_bytes_per_second=2 * copied / (copy.median / 1e3),
        matmul_flops_per_second=2 * size**3 / (matmul.median / 1e3),
        matmul=f"{size} x {size} x {size}, {str(dtype).removeprefix('torch.')}",
    )
