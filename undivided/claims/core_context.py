"""CCA-Attention (core context): what summaries of the far past save of time and cache at 8K to 128K tokens.

The paper times the first token of a whole LLaMA-2-7B. Here its attention is timed at its shape, pooling included, and
against the faster of PyTorch's two kernels at each length, FlashAttention and cuDNN; then prompts through a whole model
of its size with random weights, where the products of weights bound what any attention can gain. Caches are filled and
their tensors counted. Quality is measured on SmolLM2-135M-Instruct, whose text is short and whose training takes
seconds: it shows the order of the arms, not what LLaMA-2-7B scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import measured_ceilings, time_rivals
from undivided.layers.core_context import CoreContextAttention
from undivided.ops import core_context_attention, pool_core_tokens
from undivided.ops.core_context import visible_cores
from undivided.testing import compare_op

GROUP, WINDOW, HEAD_DIM = 16, 1024, 128
MHA, GQA = (32, 32), (32, 8)
_CACHED = 131072
BARS = {32768: 3.5, 65536: 5.7}


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, group_size: int = GROUP, window: int = WINDOW,
    core_heads: str = "query", backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """Returns core context attention of whole texts, pooling included."""
    cores = visible_cores(key.shape[2], group_size, window)
    rows = slice(cores * group_size)
    last = query[:, :, group_size - 1 : rows.stop : group_size]
    if core_heads == "kv":
        last = last.unflatten(1, (key.shape[1], -1)).mean(dim=2)
    pooling = "reference" if backend == "sdpa" else backend
    pooled = pool_core_tokens(last, key[:, :, rows], value[:, :, rows], group_size, backend=pooling)
    return core_context_attention(
        query, key, value, *pooled, group_size=group_size, window=window, backend=backend
    )


def gate(device: str) -> None:
    """Raises unless kernels are as accurate as eager PyTorch, and decoding goes on where a prompt ended."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for heads, length, head_dim, group_size, window in (
        ((4, 4), 700, 128, 16, 256),
        ((4, 1), 531, 64, 16, 100),
        ((2, 2), 90, 16, 4, 30),
    ):
        # A CPU is given a short text, a GPU the long ones: every shape compiles six kernels.
        if (device == "cpu") == (length > 100):
            continue
        x = {
            name: torch.randn(1, count, length, head_dim, device=device)
            for name, count in (("query", heads[0]), ("key", heads[1]), ("value", heads[1]))
        }
        own, reference = (
            partial(attend, group_size=group_size, window=window, backend=backend)
            for backend in ("triton" if device == "cuda" else "sdpa", "reference")
        )
        compare_op(own, reference, reference, x, dtype)
    _check_decoding(device)


def _check_decoding(device: str) -> None:
    from transformers import DynamicCache

    layer = CoreContextAttention(64, 4, 2, 16, group_size=4, window=10).to(device).double()
    x, angles = (torch.randn(1, 60, width, device=device, dtype=torch.float64) for width in (64, 16))
    tables = (angles.cos(), angles.sin())
    cache, parts = DynamicCache(), []
    with torch.no_grad():
        for start, stop in ((0, 31), *((n, n + 1) for n in range(31, 60))):
            here = tuple(table[:, start:stop] for table in tables)
            parts.append(layer(x[:, start:stop], here, past_key_values=cache)[0])
        torch.testing.assert_close(torch.cat(parts, dim=1), layer(x, tables)[0], rtol=1e-9, atol=1e-9)


def _heads(heads: tuple[int, int], length: int, gradients: bool = False) -> list[torch.Tensor]:
    counts = (heads[0], heads[1], heads[1])
    return [
        torch.randn(1, count, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16).requires_grad_(gradients)
        for count in counts
    ]


def _full(kernels: str) -> Callable[..., torch.Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {"FlashAttention": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}[kernels]

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
            )

    return run


def pairs(length: int, group_size: int = GROUP, window: int = WINDOW) -> int:
    """Returns how many core tokens and single keys the queries of a text of `length` see in all."""
    seen = torch.arange(1, length + 1)
    cores = (seen - window).clamp(min=0) // group_size
    return int((cores + seen - cores * group_size).sum())


def _words(heads: tuple[int, int], length: int) -> str:
    return f"{heads[0]} heads on {heads[1]}, {HEAD_DIM} wide, {length} tokens, g {GROUP}, s {WINDOW}, causal, bf16"


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of the attention of one layer and bytes of its cache; on a CPU of a short one."""
    if device == "cpu":
        yield from _on_cpu(2048)
        yield from _memory(device)
        return
    # What has a bar first: rows are kept as they come, should time run out.
    yield from _forward(MHA, 32768)
    yield from _forward(MHA, 65536)
    yield from _memory(device)
    if not quick:
        yield from _forward(GQA, 32768)
        yield from _forward(MHA, 8192)
        yield from _forward(MHA, 131072)
        yield from _backward(MHA, 32768)


@torch.no_grad()
def _forward(heads: tuple[int, int], length: int) -> Iterator[Row]:
    x = _heads(heads, length)
    calls = {"ours": partial(attend, *x)}
    if heads[0] != heads[1]:
        calls['ours, core_heads="kv"'] = partial(attend, *x, core_heads="kv")
    calls |= {name: partial(_full(name), *x) for name in ("FlashAttention", "cuDNN")}
    times = _times(calls, length)
    best = min(("FlashAttention", "cuDNN"), key=lambda name: times[name])
    flops = 4 * pairs(length) * heads[0] * HEAD_DIM
    for own in (name for name in calls if name.startswith("ours")):
        for rival in ("FlashAttention", "cuDNN"):
            yield measured(
                f"attention forward, pooling included{own[4:]}, against {rival}", _words(heads, length), times[own],
                "ms", better="lower", baseline_name=rival, baseline=times[rival],
                required=BARS.get(length) if rival == best and heads == MHA else None,
                fraction_of_ceiling=measured_ceilings("cuda").fraction(times[own], flops=flops),
            )  # fmt: skip


def _backward(heads: tuple[int, int], length: int) -> Iterator[Row]:
    x = _heads(heads, length, gradients=True)
    gradient = torch.randn_like(x[0])

    def step(function: Callable[..., torch.Tensor]) -> object:
        return torch.autograd.grad(function(*x), x, gradient)

    times = _times({"ours": partial(step, attend), "cuDNN": partial(step, _full("cuDNN"))}, length)
    yield measured(
        "attention forward and backward, pooling included, against cuDNN", _words(heads, length), times["ours"], "ms",
        better="lower", baseline_name="cuDNN", baseline=times["cuDNN"],
    )  # fmt: skip


def _times(calls: Mapping[str, Callable[[], object]], length: int) -> dict[str, float]:
    """Median milliseconds: of thirty samples, and of a few where a call takes tens of milliseconds."""
    if length > 16384:
        return _medians(calls, 7 if length <= 65536 else 3)
    return {name: timing.median for name, timing in time_rivals(calls, "cuda", seconds=0.05).items()}


@torch.no_grad()
def _on_cpu(length: int) -> Iterator[Row]:
    query, key, value = (torch.randn(1, 8, length, 64) for _ in range(3))
    sizes: dict[str, Any] = {"group_size": GROUP, "window": length // 8}
    full = partial(F.scaled_dot_product_attention, query, key, value, is_causal=True)
    times = time_rivals(
        {"ours": partial(attend, query, key, value, **sizes), "SDPA": full}, "cpu", seconds=1.0
    )
    yield measured(
        "attention forward, pooling included",
        f"8 heads, 64 wide, {length} tokens, g {GROUP}, s {length // 8}, float32",
        times["ours"].median, "ms", better="lower", baseline_name="SDPA", baseline=times["SDPA"].median,
    )  # fmt: skip


@torch.no_grad()
def _memory(device: str) -> Iterator[Row]:
    """Yields the bytes of caches that were filled, of one layer, and on a GPU the time of a step behind them."""
    from transformers import DynamicCache

    from undivided.layers.gqa import GQAttention
    from undivided.models.evaluation import cache_bytes

    for heads, length, bar in ((MHA, _CACHED, 1 / 0.07), (GQA, _CACHED if device == "cuda" else 16384, None)):
        # A CPU fills the cache of one key head: heads have the same.
        scale = 1 if device == "cuda" else heads[1]
        sizes = (heads[0] * HEAD_DIM // scale, heads[0] // scale, heads[1] // scale, HEAD_DIM)
        with torch.device(device):
            layers: dict[str, Any] = {'core_heads="query"': CoreContextAttention(*sizes)}
            if heads[0] != heads[1]:
                layers['core_heads="kv"'] = CoreContextAttention(*sizes, core_heads="kv")
            layers["all keys"] = GQAttention(*sizes)
        caches = {name: DynamicCache() for name in layers}
        for name, layer in layers.items():
            layer.to(torch.bfloat16)
            _fill(layer, caches[name], length, sizes[0], device)
        kept = {name: cache_bytes(cache) / 2**20 for name, cache in caches.items()}
        shape = (
            f"{sizes[1]} heads on {sizes[2]}, {HEAD_DIM} wide, {length} tokens, g {GROUP}, s {WINDOW}, bf16"
        )
        for name in (name for name in layers if name != "all keys"):
            yield measured(
                f"cache of a layer, {name}", shape, kept[name], "MiB", better="lower", baseline_name="all keys",
                baseline=kept["all keys"], required=bar,
            )  # fmt: skip
        if device == "cuda":
            yield from _step(layers, caches, sizes[0], shape)


def _fill(layer: Any, cache: Any, length: int, width: int, device: str, piece: int = 16384) -> None:
    for start in range(0, length, piece):
        x, tables = (
            torch.randn(1, piece, width, device=device, dtype=torch.bfloat16),
            _tables(start, piece, device),
        )
        if isinstance(layer, CoreContextAttention):
            layer(x, tables, past_key_values=cache)
        else:
            # What all keys are does not depend on attention to them.
            cache.update(*layer.heads(x, tables)[1:], layer.layer_idx)


def _tables(start: int, length: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 1e4 ** -(torch.arange(0, HEAD_DIM, 2, device=device) / HEAD_DIM)
    angles = torch.outer(torch.arange(start, start + length, device=device), frequencies).repeat(1, 2)[None]
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def _step(layers: dict[str, Any], caches: dict[str, Any], width: int, shape: str) -> Iterator[Row]:
    x, tables = torch.randn(1, 1, width, device="cuda", dtype=torch.bfloat16), _tables(131072, 1, "cuda")
    # Every call makes the caches one token longer, of 131072.
    calls = {name: partial(layer, x, tables, past_key_values=caches[name]) for name, layer in layers.items()}
    times = time_rivals(calls, "cuda", seconds=0.05)
    for name in layers:
        if name != "all keys":
            yield measured(
                f"step of decoding through an attention layer, {name}", shape, 1e3 * times[name].median, "us",
                better="lower", baseline_name="all keys", baseline=1e3 * times["all keys"].median,
            )  # fmt: skip


@torch.no_grad()
def _model(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of prompts through a model of LLaMA-2-7B's size with random weights, on a GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import undivided

    if device == "cpu":
        return
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=4 if quick else 32,
        num_attention_heads=32, max_position_embeddings=131072,
    )  # fmt: skip
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            full = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    ours = undivided.attach(full, "core_context", group_size=GROUP, window=WINDOW)
    for length in (32768,) if quick else (32768, 65536):
        ids = torch.randint(32000, (1, length), device="cuda")
        calls = {
            name: partial(model, ids, use_cache=False, logits_to_keep=1)
            for name, model in (("ours", ours), ("SDPA", full))
        }
        times = _medians(calls, 3)
        yield measured(
            "prompt through a model of LLaMA-2-7B's size", f"{config.num_hidden_layers} layers, {_words(MHA, length)}",
            times["ours"], "ms", better="lower", baseline_name="SDPA", baseline=times["SDPA"],
        )  # fmt: skip


def _medians(calls: Mapping[str, Callable[[], object]], samples: int) -> dict[str, float]:
    """Returns the median milliseconds of a few calls in turns: calls of seconds need no thirty."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(samples + 1):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            # The first turn compiles.
            if turn:
                times[name].append(start.elapsed_time(end))
    return {name: sorted(own)[len(own) // 2] for name, own in times.items()}


def _quality(device: str, quick: bool) -> Iterator[Row]:
    from undivided.claims._core_quality import quality

    yield from quality(device, quick)


def _pooling(device: str, quick: bool) -> Iterator[Row]:
    from undivided.claims._core_quality import pooling

    yield from pooling(device, quick)


def _long(device: str, quick: bool) -> Iterator[Row]:
    from undivided.claims._core_quality import long

    yield from long(device, quick)


_PARTS: dict[str, Measure] = {
    "speed": _speed,
    "model": _model,
    "quality": _quality,
    "pooling": _pooling,
    "long": _long,
}
CLAIM = Claim(
    slug="core_context",
    source="arXiv 2412.12465, abstract, section 5 and its tables",
    paper=(
        "LLaMA-2-7B, 32K tokens: LongBench-E 22.11 with full attention, 14.95 StreamingLLM, 18.76 LM-Infinite, 21.14 "
        "MInference, 21.86 CCA; first token after 9.15 s and 2.59 s (3.5x), memory 35.58 and 19.12 GB.",
        "64K tokens: 22.24 and 22.42; 32.43 s and 6.42 s (5.7x). 128K tokens: 7.9x faster, 93 % less KV cache.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
)
