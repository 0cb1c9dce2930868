"""Decode attention of one rank over a latent cache: MLA against FlashMLA, and the ranks of TPLA against MLA's.

Every result is checked against float64 at its own shape before it is timed. All rivals of a shape take turns in
one process. Caches are bfloat16 in shuffled pages of 64 rows, as FlashMLA wants them, unless a row says otherwise.
FlashInfer is timed too where it is installed. Where the memory decides, a rank of width 320 can be at most
576 / 320 = 1.80 times as fast as one of 576 whose kernel is as near to the memory's rate: a bar of 1.8 asks for
a kernel that is nearer to it than FlashMLA's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from undivided.claims._harness import Row, measured
from undivided.claims._latent_problem import (
    Problem,
    flash_infer,
    flash_infer_is_missing,
    flash_mla,
    flash_mla_is_missing,
    gate,
    ours,
)
from undivided.claims._timing import measured_ceilings, time_rivals

KEYS = 32768


@dataclass(frozen=True)
class Pair:
    """The rank of a model whose latent is cut, beside the rank that MLA would have there.

    Args:
        name: of the model and the number of ranks.
        cut: the rank's heads and its part of the latent.
        mla: MLA's rank: its part of the heads, the whole latent.
        required: least speed-up over FlashMLA at 32768 keys and a batch of 32 or more; None for no bar.
    """

    name: str
    cut: Problem
    mla: Problem
    required: float | None = None


MODELS = (
    Pair("TPLA, DeepSeek-V3 on 2 ranks", Problem(128, 256), Problem(64, 512), 1.6),
    Pair("TPLA, Kimi-K2 on 2 ranks", Problem(64, 256), Problem(32, 512), 1.8),
)
OTHERS = (
    Pair("GLA-2, 128 heads on 2 ranks", Problem(64, 256), Problem(64, 512)),
    Pair("TPLA, Kimi-K2 on 4 ranks", Problem(32, 256), Problem(16, 512)),
    Pair("TPLA, Kimi-K2 on 8 ranks", Problem(16, 256), Problem(8, 512)),
)
# Four tokens of each sequence at once, as speculative decoding verifies them.
EXTRA = (Problem(16, 512, 32, KEYS, 4), Problem(64, 512, 32, KEYS, 4))
FP8 = tuple(
    Problem(heads, dim, 32, KEYS) for heads, dim in ((64, 512), (64, 256), (128, 256), (16, 512), (16, 256))
)
# Batch sizes and cached keys; the quick run takes the first.
PAIR_POINTS = ((32, KEYS), (64, KEYS), (32, 1024), (32, 4096), (32, 16384), (32, 65536))
MLA_HEADS, MLA_BATCHES = (16, 32, 64, 128), (1, 8, 32, 64)


def mla_bar(heads: int, batch: int) -> float:
    """The least ratio to FlashMLA: ahead of it where it leaves the card idle, level where the memory decides."""
    if batch <= 8:
        return 1.0
    return 0.85 if heads >= 128 else 0.95


def decode_rows(device: str, quick: bool, dtype: torch.dtype = torch.bfloat16) -> Iterator[Row]:
    """Yields MLA's decoding at all head counts and batches, and that of several queries.

    Args:
        device: `"cpu"` or `"cuda"`.
        quick: the first shapes of each kind; so below.
        dtype: of queries and caches.
    """
    for batch in MLA_BATCHES[-1:] if quick else MLA_BATCHES:
        for heads in MLA_HEADS[2:3] if quick else MLA_HEADS:
            yield from mla_rows(Problem(heads, 512, batch, KEYS), device, dtype, mla_bar(heads, batch))
    for problem in () if quick else EXTRA:
        yield from mla_rows(problem, device, dtype, None)


def rank_rows(device: str, quick: bool, dtype: torch.dtype = torch.bfloat16) -> Iterator[Row]:
    """Yields the ranks whose latent is cut beside MLA's."""
    for pair in MODELS:
        for batch, keys in PAIR_POINTS[:1] if quick else PAIR_POINTS:
            yield from pair_rows(pair, batch, keys, device, dtype)
    for pair in () if quick else OTHERS:
        yield from pair_rows(pair, 32, KEYS, device, dtype)


def narrow_rows(device: str, quick: bool, dtype: torch.dtype = torch.bfloat16) -> Iterator[Row]:
    """Yields decoding over an fp8 cache beside that over a whole one."""
    for problem in FP8[:1] if quick else FP8:
        yield from fp8_rows(problem, device, dtype)


def mla_rows(problem: Problem, device: str, dtype: torch.dtype, required: float | None) -> Iterator[Row]:
    """Yields the chosen kernel and the Triton one beside FlashMLA, and the rate of the chosen one."""
    inputs = problem.inputs(device, dtype)
    rivals = {"chosen": ours(inputs)}
    if device == "cuda":
        rivals["Triton"] = ours(inputs, "triton")
    if device == "cuda" and flash_infer_is_missing() is None:
        rivals["FlashInfer"] = flash_infer(inputs)
    times = _times(rivals, inputs, problem, device)
    what = "decode attention, MLA"
    yield _row(what, problem, dtype, times["chosen"], times, required)
    if "FlashInfer" in times:
        yield _row(what, problem, dtype, times["chosen"], times, None, against="FlashInfer")
    if "Triton" in times:
        yield _row(f"{what}, Triton kernel", problem, dtype, times["Triton"], times, None)
    yield _rate(what, problem, dtype, times["chosen"], device)


def pair_rows(pair: Pair, batch: int, keys: int, device: str, dtype: torch.dtype) -> Iterator[Row]:
    """Yields the rank of a cut latent beside MLA's rank by FlashMLA and by our kernel."""
    cut, mla = pair.cut.at(batch, keys), pair.mla.at(batch, keys)
    cut_inputs = cut.inputs(device, dtype)
    attend = ours(cut_inputs)
    gate(cut_inputs, attend, f"{pair.name}, {_shape(cut, dtype)}")
    mla_inputs = mla.inputs(device, dtype)
    times = _times({"MLA, our kernel": ours(mla_inputs)}, mla_inputs, mla, device, {"cut": attend})
    what = f"decode attention, {pair.name}, against MLA's {mla}"
    decisive = batch >= 32 and keys == KEYS
    yield _row(what, cut, dtype, times["cut"], times, pair.required if decisive else None)
    yield _row(what, cut, dtype, times["cut"], times, None, against="MLA, our kernel")
    yield _rate(f"decode attention, {pair.name}", cut, dtype, times["cut"], device)


def fp8_rows(problem: Problem, device: str, dtype: torch.dtype) -> Iterator[Row]:
    """Yields the same rank over a cache of half the bytes, beside the kernel over the whole ones."""
    inputs = problem.inputs(device, dtype, fp8=True)
    narrow = {"fp8": ours(inputs)}
    if device == "cuda":
        narrow["fp8, Triton"] = ours(inputs, "triton")
    for each, attend in narrow.items():
        gate(inputs, attend, f"{each}, {_shape(problem, dtype)}")
    wide = problem.inputs(device, dtype)
    name = f"our kernel, {_name(dtype)} cache"
    times = _times({name: ours(wide)}, wide, problem, device, narrow, with_flash=False)
    what = "decode attention, fp8 cache with a scale a row"
    yield _row(what, problem, dtype, times["fp8"], times, None, against=name)
    if "fp8, Triton" in times:
        yield _row(f"{what}, Triton kernel", problem, dtype, times["fp8, Triton"], times, None, against=name)
    yield _rate(what, problem, dtype, times["fp8"], device, itemsize=1)


def _times(
    rivals: Mapping[str, Callable[[], torch.Tensor]],
    inputs: dict,
    problem: Problem,
    device: str,
    checked: Mapping[str, Callable[[], torch.Tensor]] | None = None,
    with_flash: bool = True,
) -> dict[str, float]:
    """Checks what runs on `inputs`, adds FlashMLA where it is there, and times all of it and what is checked."""
    rivals = dict(rivals)
    if with_flash and device == "cuda" and problem.latent_dim == 512 and flash_mla_is_missing() is None:
        rivals["FlashMLA"] = flash_mla(inputs)
    for name, attend in rivals.items():
        gate(inputs, attend, f"{name}, {problem}, batch {problem.batch}, {problem.keys} keys")
    method = "graph" if device == "cuda" else "auto"
    found = time_rivals({**(checked or {}), **rivals}, device, method=method, seconds=0.1)
    return {name: timing.median for name, timing in found.items()}


def _row(
    what: str,
    problem: Problem,
    dtype: torch.dtype,
    time: float,
    times: Mapping[str, float],
    required: float | None,
    against: str = "FlashMLA",
) -> Row:
    there = against in times
    # Without its rival a row still says how long ours takes, and why it stands alone.
    missing = flash_mla_is_missing() or "FlashMLA takes latents of 512 alone"
    name = f"{what}, against {against}" if there else f"{what}, alone: {missing}"
    return measured(
        name,
        _shape(problem, dtype),
        time,
        "ms",
        better="lower",
        baseline_name=against if there else None,
        baseline=times[against] if there else None,
        required=required if there else None,
    )


def _rate(
    what: str, problem: Problem, dtype: torch.dtype, time: float, device: str, itemsize: int | None = None
) -> Row:
    """The rate of whichever of memory and products takes longer by the measured ceilings."""
    ceilings = measured_ceilings(device)
    flops, moved = problem.flops(), problem.bytes_moved(itemsize or dtype.itemsize)
    by_memory = ceilings.floor(bytes_moved=moved) >= ceilings.floor(flops=flops)
    return measured(
        f"rate of {what}",
        _shape(problem, dtype),
        (moved if by_memory else flops) / time / 1e9,
        "TB/s" if by_memory else "TFLOPS",
        better="higher",
        fraction_of_ceiling=ceilings.fraction(time, flops=flops, bytes_moved=moved),
    )


def _shape(problem: Problem, dtype: torch.dtype) -> str:
    return f"{problem}, batch {problem.batch}, {problem.keys} keys, {_name(dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
