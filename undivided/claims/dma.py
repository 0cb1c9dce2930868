"""DMA: what attention to few keys of a query's choice costs, and what the choice is worth.

The paper measures its kernels against scaled_dot_product_attention with the mask written out, `[heads, queries, keys]`,
which takes no flash kernel. That baseline is here under its name; the ones that decide are the fastest kernels for full
causal attention, flash and cuDNN, and FlexAttention with the same keys and biases. All times of ours include the choice
of keys. Biases are drawn at random: kept keys are then scattered over the whole prefix, the hardest case for a kernel
that skips tiles; how many tiles it could skip is counted. A constant bias, a sliding window, is shown beside it.

Decoding is shown with the whole cache, in which the best keys are looked up at every step, and with the cache of the
layer, which holds only those that can still be attended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from undivided.claims._dma_quality import Recall, language_rows, recall_rows
from undivided.claims._dma_tiles import live_blocks, share_of_tiles
from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import measured_ceilings, time_rivals
from undivided.ops import dynamic_mask_attention
from undivided.testing import compare_op

HEADS, KEY_HEADS, HEAD_DIM, KEEP = 32, 8, 128, 1024
FLASH, CUDNN, FLEX, MASKED = (
    "flash (SDPA), all keys",
    "cuDNN (SDPA), all keys",
    "FlexAttention, the same keys",
    "SDPA with the mask written out (the paper's baseline)",
)
# The lengths with a bar first: rows are kept as they come, should time run out.
LENGTHS = (32768, 8192, 16384, 65536, 4096, 2048)
FORWARD_BARS = {32768: 4.0, 8192: 1.0}
PAPER_FORWARD = 10.0


def gate(device: str) -> None:
    """Raises unless the kernels, forward, backward and decoding, and the mask written out are as accurate as eager."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    backend = "triton" if device == "cuda" else "reference"
    for length, keep, ties in ((700, 200, False), (700, 100, True), (300, 500, False)):
        bias = torch.randn(1, 2, length, device=device)
        x = {
            name: torch.randn(1, heads, length, HEAD_DIM, device=device)
            for name, heads in (("query", 8), ("key", 2), ("value", 2))
        } | {"key_bias": (2 * bias).round() if ties else bias}
        own, reference = (_attention(name, keep) for name in (backend, "reference"))
        compare_op(own, reference, reference, x, dtype)
        with torch.no_grad():
            last = x | {"query": x["query"][:, :, -1:]}
            compare_op(own, reference, reference, last, dtype, grad_inputs=())


def _attention(backend: str, keep: int) -> Callable[..., torch.Tensor]:
    return lambda **x: dynamic_mask_attention(**x, keep_window_size=keep, backend=backend)


def _kernels(name: str) -> AbstractContextManager:
    """Restricts scaled_dot_product_attention to one family of kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel({"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}[name])


def _dense(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    with _kernels(name):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _flex(key_bias: torch.Tensor, length: int, keep: int) -> Callable[..., torch.Tensor]:
    """FlexAttention with the same keys: a key is attended from its own query to the one that loses it."""
    from torch.nn.attention.flex_attention import flex_attention

    from undivided.ops.dynamic_mask import lists, triton

    # Without the gradient of the bias, which FlexAttention adds atomically.
    key_bias = key_bias.detach()
    death = lists.select(key_bias, length, keep, triton.tile_size(2))[1]
    group = HEADS // KEY_HEADS

    def score(
        s: torch.Tensor, b: torch.Tensor, h: torch.Tensor, n: torch.Tensor, m: torch.Tensor
    ) -> torch.Tensor:
        return s + key_bias[b, h // group, m]

    blocks = live_blocks(death, length, group)
    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, score_mod=score, block_mask=blocks, enable_gqa=True)


def _tiles(device: str, quick: bool) -> Iterator[Row]:
    """Yields the share of tiles that a kernel which skips empty tiles would have to compute, counted on the CPU."""
    length = 8192 if quick else 32768
    noise = torch.randn(length, generator=torch.Generator().manual_seed(0))
    # Neighbours with nearly the same bias: a random walk that forgets half of itself in about 350 tokens.
    clustered = [0.0]
    for step in noise.tolist():
        clustered.append(0.998 * clustered[-1] + step)
    for name, bias in (
        ("random biases", noise),
        ("clustered biases", torch.tensor(clustered[1:])),
        ("a constant bias", torch.zeros(length)),
    ):
        yield measured(
            f"share of causal tiles with a kept key, {name}", f"{length} tokens, {KEEP} kept keys, tiles of 128 x 128",
            share_of_tiles(bias, KEEP, 128), "share", better="lower", baseline_name="all causal tiles", baseline=1.0,
        )  # fmt: skip


def _inputs(length: int, queries: int | None = None) -> dict[str, torch.Tensor]:
    def draw(heads: int, count: int) -> torch.Tensor:
        return torch.randn(1, heads, count, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    return {
        "query": draw(HEADS, length if queries is None else queries),
        "key": draw(KEY_HEADS, length),
        "value": draw(KEY_HEADS, length),
        "key_bias": torch.randn(1, KEY_HEADS, length, device="cuda"),
    }


def _medians(calls: dict[str, Callable[[], object]], samples: int) -> dict[str, float]:
    """Returns the median milliseconds of a few calls in turns: calls of tens of milliseconds need no thirty."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(samples):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: median(own) for name, own in times.items()}


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of attention on a GPU: what has a bar first, what compiles long last."""
    if device != "cuda":
        return
    lengths = LENGTHS[:2] if quick else LENGTHS
    for length in lengths:
        yield from _times(length, backward=False)
    yield from _masked(32768)
    for length in lengths:
        if length < 65536:
            yield from _times(length, backward=True)
    yield from _decode(65536)
    if not quick:
        yield from _decode(262144)
        yield from _decode(524288)
        yield from _against_flex(32768)


def _times(length: int, backward: bool) -> Iterator[Row]:
    x = _inputs(length)
    heads = [x[name].requires_grad_(backward) for name in ("query", "key", "value")]
    x["key_bias"].requires_grad_(backward)
    constant = x | {"key_bias": torch.zeros_like(x["key_bias"]).requires_grad_(backward)}
    ours = _attention("triton", KEEP)
    outs: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: ours(**x),
        "ours, constant bias": lambda: ours(**constant),
        FLASH: partial(_dense, "flash", *heads),
        CUDNN: partial(_dense, "cuDNN", *heads),
    }
    calls: dict[str, Callable[[], object]] = dict(outs)
    if backward:
        dout = torch.randn_like(heads[0])
        leaves = {"ours": list(x.values()), "ours, constant bias": list(constant.values())}
        calls = {
            name: partial(
                torch.autograd.grad,
                out(),
                leaves.get(name, heads),
                dout,
                retain_graph=True,
            )
            for name, out in outs.items()
        }
    with torch.set_grad_enabled(backward):
        times = _medians(calls, 5 if length < 65536 else 3)
    yield from _rows(length, times, backward)


def _against_flex(length: int) -> Iterator[Row]:
    """FlexAttention with the same keys and biases, forward and backward."""
    x = _inputs(length)
    heads = [x[name] for name in ("query", "key", "value")]
    ours, flex = _attention("triton", KEEP), partial(_flex(x["key_bias"], length, KEEP), *heads)
    with torch.no_grad():
        torch.testing.assert_close(flex(), ours(**x), rtol=0.02, atol=0.02)
        times = {"forward": _medians({"ours": partial(ours, **x), FLEX: flex}, 3)}
    leaves = [tensor.requires_grad_() for tensor in x.values()]
    dout = torch.randn_like(heads[0])
    grad = partial(torch.autograd.grad, grad_outputs=dout, retain_graph=True)
    times["backward"] = _medians(
        {"ours": partial(grad, ours(**x), leaves), FLEX: partial(grad, flex(), heads)}, 3
    )
    for direction, found in times.items():
        yield measured(
            f"attention {direction}, against {FLEX}", _shape(length), found["ours"], "ms", better="lower",
            baseline_name=FLEX, baseline=found[FLEX],
        )  # fmt: skip


def _shape(length: int) -> str:
    return f"{HEADS} heads of {HEAD_DIM}, {KEY_HEADS} key heads, {length} tokens, {KEEP} kept keys, batch 1, bf16"


def _rows(length: int, times: dict[str, float], backward: bool) -> Iterator[Row]:
    what = "attention backward" if backward else "attention forward"
    pairs = sum(min(n + 1, KEEP) for n in range(length))
    flops = (2.5 if backward else 1.0) * 4 * HEAD_DIM * HEADS * pairs
    for name in (FLASH, CUDNN):
        required = None
        if name == FLASH:
            required = None if backward else FORWARD_BARS.get(length, 1.0 if length >= 8192 else None)
        yield measured(
            f"{what}, against {name}", _shape(length), times["ours"], "ms", better="lower", baseline_name=name,
            baseline=times[name], required=required,
            fraction_of_ceiling=measured_ceilings("cuda").fraction(times["ours"], flops=flops),
        )  # fmt: skip
    yield measured(
        f"{what}, constant bias (a sliding window), against {FLASH}", _shape(length), times["ours, constant bias"],
        "ms", better="lower", baseline_name=FLASH, baseline=times[FLASH],
    )  # fmt: skip


def _masked(length: int) -> Iterator[Row]:
    """The paper's baseline, one key head after another with one mask: all masks together do not fit in memory.

    What the mask holds does not change the time of these kernels, which compute every score; here it is causal.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    x = _inputs(length)
    group = HEADS // KEY_HEADS
    mask = torch.zeros(1, 1, length, length, device="cuda", dtype=torch.bfloat16)
    for first in range(0, length, 4096):
        causal = (
            torch.arange(length, device="cuda") > torch.arange(first, first + 4096, device="cuda")[:, None]
        )
        mask[0, 0, first : first + 4096].masked_fill_(causal, float("-inf"))

    def run(*heads: torch.Tensor) -> list[torch.Tensor]:
        query, key, value = heads
        # Heads expanded without copies, and no eager attention, which would form all scores.
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
            return [
                F.scaled_dot_product_attention(
                    query[:, h * group : (h + 1) * group],
                    key[:, h : h + 1].expand(-1, group, -1, -1),
                    value[:, h : h + 1].expand(-1, group, -1, -1),
                    attn_mask=mask.expand(-1, group, -1, -1),
                )
                for h in range(KEY_HEADS)
            ]

    heads = [x[name] for name in ("query", "key", "value")]
    ours = _attention("triton", KEEP)
    with torch.no_grad():
        times = _medians({"ours": lambda: ours(**x), MASKED: partial(run, *heads)}, 3)
    yield measured(
        f"attention forward, against {MASKED}", _shape(length), times["ours"], "ms", better="lower",
        baseline_name=MASKED, baseline=times[MASKED], required=PAPER_FORWARD,
    )  # fmt: skip
    leaves = [tensor.requires_grad_() for tensor in x.values()]
    dout = torch.randn_like(heads[0])
    out, parts = ours(**x), torch.cat(run(*heads), dim=1)
    grad = partial(torch.autograd.grad, retain_graph=True)
    times = _medians({"ours": partial(grad, out, leaves, dout), MASKED: partial(grad, parts, heads, dout)}, 3)
    yield measured(
        f"attention backward, against {MASKED}", _shape(length), times["ours"], "ms", better="lower",
        baseline_name=MASKED, baseline=times[MASKED],
    )  # fmt: skip


def _with_all_keys(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


@torch.no_grad()
def _decode(keys: int) -> Iterator[Row]:
    """One step of decoding, with both kinds of cache."""
    x = _inputs(keys, queries=1)
    kept = {name: x[name] if name == "query" else x[name][:, :, :KEEP].contiguous() for name in x}
    heads = [x[name] for name in ("query", "key", "value")]
    ours = _attention("triton", KEEP)
    dense = "SDPA, all keys"
    rivals: dict[str, Callable[[], object]] = {
        "whole": partial(ours, **x),
        "kept": partial(ours, **kept),
        dense: partial(_with_all_keys, *heads),
    }
    times = time_rivals(rivals, "cuda", method="graph", seconds=0.05)
    for name, words in (("whole", "the best keys looked up among all"), ("kept", "a cache of the kept keys")):
        moved = 4.0 * KEY_HEADS * KEEP * HEAD_DIM + (4 * KEY_HEADS * keys if name == "whole" else 0)
        yield measured(
            f"attention of a step of decoding, {words}", _shape(keys), 1e3 * times[name].median, "us", better="lower",
            baseline_name=dense, baseline=1e3 * times[dense].median,
            fraction_of_ceiling=measured_ceilings("cuda").fraction(times[name].median, bytes_moved=moved),
        )  # fmt: skip


def _recall(device: str, quick: bool) -> Iterator[Row]:
    """Yields shares of right answers in associative recall, on a GPU."""
    if device == "cuda":
        yield from recall_rows(Recall(steps=50) if quick else Recall(), device)


def _quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields losses of small language models with few kept keys."""
    yield from language_rows(device, 64 if device == "cuda" else 16, quick)


_PARTS: dict[str, Measure] = {"speed": _speed, "tiles": _tiles, "recall": _recall, "quality": _quality}
CLAIM = Claim(
    slug="dma",
    source="arXiv 2508.02124, experiments; the table of kernels in the authors' repository flash-dmattn",
    paper=(
        "Kernels on an A100, 32 heads, 8 key heads, head_dim 128, window 1024, bf16, against attention with the mask "
        "written out: forward 26.1x / 10.2x / 21.5x at 8K / 16K / 32K, backward 2.5x / 4.4x / 7.9x, decoding 49.6x to "
        "171x at 65K to 524K keys.",
        "The repository's table: 111.9 ms against 2.25 ms at 32K forward, 142 against 25.6 backward, 2.49 against 0.24 "
        "decoding at 524K.",
        "Associative recall with 512 pairs, 1024 to 8192 tokens, width 32 to 256, window 512: better than a sliding "
        "window and NSA.",
        "1.7B parameters, 40B tokens: zero-shot mean 46.5 (full attention 45.7, NSA 45.5), LAMBADA perplexity 14.42 "
        "(15.22, 14.91).",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
)  # fmt: skip
