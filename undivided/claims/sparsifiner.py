"""Sparsifiner: half to two thirds of the multiply-adds of attention saved at a loss of 0.4 points.

The paper counts the two products of attention alone, without projections, and claims no time. Multiply-adds (`flops`)
and times (`speed`) are kept apart here; they say from which share of keys on lists are faster. Accuracy is that of
small vision transformers of small images, converted in the two phases; the choice of keys is compared with the largest
true weights (an oracle), the nearest keys, and random ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._sparsifiner_quality import quality
from undivided.claims._timing import time_rivals
from undivided.layers.sparsifiner import SparsifinerAttention, attention_cost

HEADS, HEAD_DIM = 6, 64
_SHARES = (0.25, 0.1, 0.05, 0.02, 0.01, 0.0025)
_DENSE, _CORE = "all pairs, scaled_dot_product_attention", "gather with keys known already"


def gate(device: str) -> None:
    """Raises unless lists give what masks give, and all keys what dense attention gives, in float32."""
    torch.manual_seed(0)
    x = torch.randn(2, 50, 64, device=device)
    for keep in (0.1, 1.0):
        masked = SparsifinerAttention(64, 2, 50, keep=keep).to(device)
        gathered = SparsifinerAttention(64, 2, 50, keep=keep, impl="gather").to(device)
        gathered.load_state_dict(masked.state_dict())
        with torch.no_grad():
            want = masked(x)
            torch.testing.assert_close(gathered(x), want, rtol=1e-4, atol=1e-5)
            masked.phase = "dense"
            if keep == 1.0:
                torch.testing.assert_close(masked(x), want, rtol=1e-4, atol=1e-5)


def _flops(device: str, quick: bool) -> Iterator[Row]:
    """Yields multiply-adds of DeiT-S's layer by formula; a quarter of the basis is taken to be not 0."""
    for tokens in (197, 577, 1025):
        for keep in (0.25, 0.1, 0.05):
            kept = math.ceil(keep * tokens)
            cost = attention_cost(tokens, HEADS, HEAD_DIM, kept, density=0.25)
            shape = f"{tokens} tokens, {HEADS} heads of {HEAD_DIM}, {kept} keys a query, basis density 0.25"
            yield measured(
                "multiply-adds of the products of attention, predictor included", shape,
                (cost.predictor + cost.core) / 1e6, "M", better="lower", baseline_name="all pairs",
                baseline=cost.dense / 1e6,
            )  # fmt: skip
    dense = attention_cost(197, HEADS, HEAD_DIM, 50, density=0.25)
    layer = 12 * 197 * (HEADS * HEAD_DIM) ** 2
    yield measured(
        "multiply-adds of a whole block, projections and MLP included", "197 tokens, DeiT-S, 50 keys a query",
        (layer + dense.predictor + dense.core) / 1e6, "M", better="lower", baseline_name="all pairs",
        baseline=(layer + dense.dense) / 1e6,
    )  # fmt: skip


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of the attention between the projections, predictor included; on a CPU with one thread."""
    on_cuda = device == "cuda"
    threads = torch.get_num_threads()
    if not on_cuda:
        torch.set_num_threads(1)
    try:
        yield from _speed_rows(device, on_cuda, quick)
    finally:
        torch.set_num_threads(threads)


def _speed_rows(device: str, on_cuda: bool, quick: bool) -> Iterator[Row]:
    dtype = torch.bfloat16 if on_cuda else torch.float32
    problems = ((64, 197), (8, 1025), (2, 4097)) if on_cuda else ((1, 197), (1, 577), (1, 1025))
    for batch, tokens in problems[: 1 if quick else None]:
        q, k, v = torch.randn(3, batch, HEADS, tokens, HEAD_DIM, device=device, dtype=dtype).unbind(0)
        calls: dict[str, Callable[[], object]] = {
            _DENSE: partial(nn.functional.scaled_dot_product_attention, q, k, v)
        }
        for keep in _SHARES:
            for impl in ("gather", "masked") if keep == _SHARES[0] else ("gather",):
                layer = _layer(tokens, keep, impl).to(device, dtype)
                calls[f"{impl}, keep {keep}"] = partial(_sparse, layer, q, k, v)
                if impl == "gather":
                    chosen = layer.predictor(q, k)
                    calls[f"{_CORE}, keep {keep}"] = partial(layer.attend, q, k, v, chosen)
        with torch.no_grad():
            # In a graph, because the host is slower than some of these; a CPU has no graphs.
            method, seconds = ("graph", 0.02) if on_cuda else ("auto", 0.2)
            times = time_rivals(calls, device, method=method, seconds=seconds)
        found = {name: timing.median for name, timing in times.items()}
        shape = f"batch {batch}, {tokens} tokens, {HEADS} heads of {HEAD_DIM}, {str(dtype).removeprefix('torch.')}"
        shape += "" if on_cuda else ", 1 thread"
        for name in list(found)[1:]:
            yield measured(
                f"attention by predicted keys, {name}", shape, found[name], "ms", better="lower",
                baseline_name=_DENSE, baseline=found[_DENSE],
            )  # fmt: skip
        for what in ("gather", _CORE):
            won = [keep for keep in _SHARES if found[f"{what}, keep {keep}"] < found[_DENSE]]
            yield measured(
                f"largest share of keys at which it is faster than all pairs (0: at none measured), {what}",
                f"{shape}, shares of {', '.join(map(str, _SHARES))}", max(won, default=0.0), "", better="higher",
            )  # fmt: skip


def _layer(tokens: int, keep: float, impl: str) -> SparsifinerAttention:
    return SparsifinerAttention(HEADS * HEAD_DIM, HEADS, tokens, keep=keep, impl=impl).eval()


def _tiles(device: str, quick: bool) -> Iterator[Row]:
    """Yields the time with tiles of pairs left out that no list names, by FlexAttention; not in the paper."""
    if device != "cuda":
        return
    batch, tokens = 8, 1025
    q, k, v = torch.randn(3, batch, HEADS, tokens, HEAD_DIM, device=device, dtype=torch.bfloat16).unbind(0)
    for keep in (0.05,) if quick else (0.05, 0.005):
        layer = _layer(tokens, keep, "block").to(device, torch.bfloat16)
        calls: dict[str, Callable[[], object]] = {
            "tiles": partial(layer.attend, q, k, v, layer.predictor(q, k)),
            _DENSE: partial(nn.functional.scaled_dot_product_attention, q, k, v),
        }
        with torch.no_grad():
            times = time_rivals(calls, device, seconds=0.05)
        yield measured(
            f"attention to keys known already, tiles of FlexAttention, keep {keep}",
            f"batch {batch}, {tokens} tokens, {HEADS} heads of {HEAD_DIM}, bfloat16, the map of tiles included",
            times["tiles"].median, "ms", better="lower", baseline_name=_DENSE, baseline=times[_DENSE].median,
        )  # fmt: skip


def _sparse(layer: SparsifinerAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return layer.attend(q, k, v, layer.predictor(q, k))


_PARTS: dict[str, Measure] = {"flops": _flops, "speed": _speed, "tiles": _tiles, "quality": quality}
CLAIM = Claim(
    slug="sparsifiner",
    source="arXiv 2303.13755, abstract",
    paper=(
        "48 % to 69 % fewer multiply-adds of attention on ImageNet at a loss of at most 0.4 points (DeiT-S).",
        "With token pruning too, more than 60 % fewer of the whole vision transformer.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
    devices=("cuda", "cpu"),
)
