"""SQA: what fewer query heads save where attention is most of the work, and what they cost in quality.

The paper's dense model is timed at the paper's lengths and batches, then one layer of the size of an 8B model. All arms
run the same flash kernel of PyTorch (a window excepted), so that the head counts alone differ. Heads of the paper's
model are 16 wide, which flash kernels pad; those of the layer are 128 wide. Whole models and whole decoder layers gain
less than attention, by the share of what no head count changes. Decoding is shown too: there SQA gains nothing, and the
symmetric variant loses to GQA, because its cache is larger.

Quality is measured on byte-level models trained for seconds: the order of arms far apart can be seen, differences of
a few thousandths of a bit are those between seeds. On a CPU the operations are counted instead of timed at length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import measured_ceilings, time_rivals
from undivided.claims._tiny_lm import mean_and_deviation, tiny_lm, train_tiny_lm
from undivided.cost.head_counts import sparse_head_counts
from undivided.layers.sqa import SQAttention
from undivided.ops import dense_attention
from undivided.testing import compare_op

HEADS, WINDOW = 16, 128
# Query heads and key/value heads of 16.
ARMS: dict[str, tuple[int, int]] = {
    "MHA": (16, 16),
    "GQA": (16, 4),
    "MQA": (16, 1),
    "lSQA": (12, 4),
    "SQA": (8, 4),
    "sSQA": (8, 8),
    "xSQA": (4, 4),
    "xSMQA": (4, 1),
}
BATCHES = {1024: 128, 4096: 32, 32768: 4, 131072: 1, 200000: 1}
LONG = 131072
BARS = {"xSQA": 3.0, "SQA": 1.9}
# The layer of the size of an 8B model: query heads and key/value heads of 32, each 128 wide.
LARGE = {"GQA": (32, 8), "SQA": (16, 8), "sSQA": (16, 16), "xSQA": (8, 8)}
LARGE_WIDTH, LARGE_MLP, LARGE_DIM = 4096, 14336, 128


def gate(device: str) -> None:
    """Raises unless presets are the paper's, layers their specification, and kernels as accurate as eager PyTorch."""
    for preset in ("sqa", "ssqa", "xsqa", "xsmqa", "lsqa"):
        name = preset[:-3] + "SQA" if preset.endswith("sqa") else "xSMQA"
        if sparse_head_counts(HEADS, preset=preset) != ARMS[name]:
            raise ValueError(f'preset="{preset}" is not {ARMS[name]} of {HEADS} heads.')
    for heads in ARMS.values():
        for window in (None, 50):
            _check_layer(heads, window, device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for query_heads, key_heads in ((16, 4), (8, 4), (4, 4)):
        for head_dim, queries, keys, window in (
            (16, 333, 333, None),
            (128, 300, 300, None),
            (128, 1, 777, None),
            (16, 333, 333, 128),
            (64, 1, 777, 128),
        ):
            x = {
                "query": torch.randn(2, query_heads, queries, head_dim, device=device),
                "key": torch.randn(2, key_heads, keys, head_dim, device=device),
                "value": torch.randn(2, key_heads, keys, head_dim, device=device),
            }
            own, reference = (_attention(backend, window) for backend in ("auto", "reference"))
            with _kernels("flash" if device == "cuda" and window is None else None):
                compare_op(own, reference, reference, x, dtype)


def _attention(backend: str, window: int | None = None) -> Callable[..., torch.Tensor]:
    return lambda **x: dense_attention(**x, is_causal=True, window=window, backend=backend)


def _check_layer(heads: tuple[int, int], window: int | None, device: str) -> None:
    from undivided.spec import interpret

    layer = SQAttention(64, HEADS, heads[1], 8, num_query_heads=heads[0], window=window).to(device).double()
    x, angles = (torch.randn(1, 100, width, device=device, dtype=torch.float64) for width in (64, 8))
    tables = (angles.cos(), angles.sin())
    with torch.no_grad():
        heads_out = interpret(layer.spec, layer.spec_inputs(x, tables)).out
        expected = layer.o_proj(heads_out.transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x, tables)[0], expected, rtol=1e-9, atol=1e-9)


def _kernels(name: str | None) -> AbstractContextManager:
    """Restricts scaled_dot_product_attention to one family of kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name is None:
        return nullcontext()
    return sdpa_kernel({"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}[name])


def _with(
    kernels: str | None, function: Callable[..., object], *args: Any, **kwargs: Any
) -> Callable[[], object]:
    """Returns a call of `function` with these arguments and one family of kernels."""

    def run() -> object:
        with _kernels(kernels):
            return function(*args, **kwargs)

    return run


def _medians(calls: dict[str, Callable[[], object]], samples: int) -> dict[str, float]:
    """Returns the median milliseconds of a few calls in turns: calls of tenths of a second need no thirty.

    The first, which has the most heads, warms up for all: they share its kernels, and need no more memory.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    next(iter(calls.values()))()
    for _ in range(samples):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: median(own) for name, own in times.items()}


def dense_model(query_heads: int, key_heads: int, window: int | None = None) -> nn.Module:
    """Returns the paper's dense model, untrained: 8 layers of width 256, 16 heads, SwiGLU of 768, 10,000 words."""
    entry: dict[str, Any] = {
        "mechanism": "sqa",
        "num_query_heads": query_heads,
        "num_key_value_heads": key_heads,
        "window": window,
    }
    return tiny_lm(
        entry, vocab_size=10_000, hidden_size=256, intermediate_size=768, num_hidden_layers=8,
        num_attention_heads=HEADS, head_dim=16, max_position_embeddings=max(BATCHES),
    )  # fmt: skip


def _models(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of the paper's dense models forward, on a GPU."""
    if device == "cuda":
        # The lengths with a bar first: rows are kept as they come, should time run out.
        yield from _forward((1024, 4096) if quick else (LONG, 200000, 1024, 32768, 4096), device)


def _training(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of the same models forward and backward, on a GPU."""
    if device == "cuda":
        yield from _forward_and_backward((1024,) if quick else (1024, LONG, 32768), device)


# Where a call takes seconds, the arms with a bar alone.
_FEW = ("GQA", "SQA", "xSQA")


def _forward(lengths: tuple[int, ...], device: str) -> Iterator[Row]:
    models = _dense_models(device)
    with torch.device(device):
        windowed = {
            f"GQA, window of {WINDOW}": dense_model(16, 4, WINDOW),
            f"SQA, window of {WINDOW}": dense_model(8, 4, WINDOW),
        }
    models |= {name: model.to(torch.bfloat16) for name, model in windowed.items()}
    kernels = {name: None if name in windowed else "flash" for name in models}
    for length in lengths:
        ids = torch.randint(10_000, (BATCHES[length], length), device=device)
        chosen = models if length <= LONG else (*_FEW, *windowed)
        calls = {name: _with(kernels[name], models[name], ids, use_cache=False) for name in chosen}
        with torch.no_grad():
            times = _medians(calls, 2 if length >= LONG else 5)
        yield from _against_gqa("whole model forward", _dense_shape(length), times, length >= LONG)


def _forward_and_backward(lengths: tuple[int, ...], device: str) -> Iterator[Row]:
    models = _dense_models(device)
    for length in lengths:
        ids = torch.randint(10_000, (BATCHES[length], length), device=device)
        chosen = models if length < LONG else _FEW
        calls = {name: _with("flash", _step, models[name], ids) for name in chosen}
        times = _medians(calls, {32768: 2, LONG: 1}.get(length, 3))
        yield from _against_gqa("whole model forward and backward", _dense_shape(length), times, False)


def _dense_models(device: str) -> dict[str, nn.Module]:
    with torch.device(device):
        return {name: dense_model(*heads).to(torch.bfloat16) for name, heads in ARMS.items()}


def _dense_shape(length: int) -> str:
    return f"8 layers, width 256, 16 heads of 16, batch {BATCHES[length]}, {length} tokens, causal, bf16"


def _step(model: nn.Module, ids: torch.Tensor) -> None:
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def _against_gqa(what: str, shape: str, times: dict[str, float], bars: bool) -> Iterator[Row]:
    """One row an arm, against GQA; `lSQA` and the others at 16 heads without a bar."""
    for name, own in times.items():
        if name != "GQA":
            heads = f" {ARMS[name]}" if name in ARMS else ""
            yield measured(
                f"{what}, {name}{heads}", shape, own, "ms", better="lower", baseline_name=f"GQA {ARMS['GQA']}",
                baseline=times["GQA"], required=BARS.get(name) if bars else None,
            )  # fmt: skip


def _layer(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of one layer of the size of an 8B model on a GPU; on a CPU counted operations and a smaller one."""
    if device == "cpu":
        yield from _counted()
        yield from _on_cpu(1024 if quick else 2048)
        return
    yield from _large((32768,) if quick else (32768, LONG))
    yield from _windows(32768 if quick else LONG)
    yield from _decode(32768)


def _large(lengths: tuple[int, ...]) -> Iterator[Row]:
    """The attention layer with flash and cuDNN, and the whole decoder layer."""
    with torch.device("cuda"):
        models = {name: large_model(*heads).to(torch.bfloat16) for name, heads in LARGE.items()}
    for length in lengths:
        x = torch.randn(1, length, LARGE_WIDTH, device="cuda", dtype=torch.bfloat16)
        tables = models["GQA"].get_decoder().rotary_emb(x, torch.arange(length, device="cuda")[None])
        shape = f"width {LARGE_WIDTH}, 32 heads of {LARGE_DIM}, batch 1, {length} tokens, causal, bf16"
        for kernels in ("flash", "cuDNN"):
            calls = {
                name: _with(kernels, model.attention_layers()[0], x, tables) for name, model in models.items()
            }
            with torch.no_grad():
                times = _medians(calls, 5 if length < LONG else 3)
            yield from _large_rows("attention layer forward", shape, times, kernels, length)
        calls = {
            name: _with("flash", model.decoder_layers[0], x, position_embeddings=tables)
            for name, model in models.items()
        }
        with torch.no_grad():
            times = _medians(calls, 2)
        yield from _large_rows(f"decoder layer forward with its MLP of {LARGE_MLP}", shape, times, "flash")


def _large_rows(
    what: str, shape: str, times: dict[str, float], kernels: str, length: int | None = None
) -> Iterator[Row]:
    """One row an arm; with `length`, of the attention layer alone, with its share of the ceiling and the bars."""
    for name, own in times.items():
        query_heads, key_heads = LARGE[name]
        has_baseline = name != "GQA"
        has_bar = length is not None and length >= LONG and kernels == "flash"
        fraction = None
        if length is not None:
            flops = 2 * length * (length + 1) * query_heads * LARGE_DIM
            flops += 4 * length * LARGE_WIDTH * LARGE_DIM * (query_heads + key_heads)
            fraction = measured_ceilings("cuda").fraction(own, flops=flops)
        yield measured(
            f"{what}, {name} {LARGE[name]}, {kernels}", shape, own, "ms", better="lower",
            baseline_name=f"GQA {LARGE['GQA']}, {kernels}" if has_baseline else None,
            baseline=times["GQA"] if has_baseline else None,
            required=BARS.get(name) if has_bar else None, fraction_of_ceiling=fraction,
        )  # fmt: skip


def large_model(query_heads: int, key_heads: int) -> nn.Module:
    """Returns one decoder layer of the size of an 8B model, untrained: width 4096, 32 heads of 128."""
    return tiny_lm(
        {"mechanism": "sqa", "num_query_heads": query_heads, "num_key_value_heads": key_heads},
        hidden_size=LARGE_WIDTH, intermediate_size=LARGE_MLP, num_hidden_layers=1, num_attention_heads=32,
        head_dim=LARGE_DIM, max_position_embeddings=LONG,
    )  # fmt: skip


def _heads(
    heads: tuple[int, int], queries: int, keys: int, head_dim: int, batch: int = 1
) -> list[torch.Tensor]:
    sizes = ((heads[0], queries), (heads[1], keys), (heads[1], keys))
    return [torch.randn(batch, *size, head_dim, device="cuda").bfloat16() for size in sizes]


@torch.no_grad()
def _windows(length: int) -> Iterator[Row]:
    """A window in blocks, beside FlexAttention with the same blocks and flash attention without a window."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = window_blocks(length, WINDOW, "cuda")
    for heads, head_dim in (((16, 4), 16), ((32, 8), 128)):
        x = _heads(heads, length, length, head_dim)
        times = time_rivals(
            {
                "ours": partial(dense_attention, *x, is_causal=True, window=WINDOW),
                "FlexAttention": partial(compiled, *x, block_mask=mask, enable_gqa=True),
            },
            "cuda",
        )
        yield measured(
            "attention forward in a window", f"{heads} heads of {head_dim}, {length} tokens, window {WINDOW}, bf16",
            times["ours"].median, "ms", better="lower", baseline_name="FlexAttention",
            baseline=times["FlexAttention"].median,
        )  # fmt: skip


def window_blocks(length: int, window: int, device: str) -> Any:
    """Returns FlexAttention's mask of a causal window, without the `length x length` mask that its own builder forms.

    Args:
        length: queries and keys, a multiple of 128.
        window: tokens a query sees, at most 129, so that two blocks of 128 keys hold them.
        device: where.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows = torch.arange(length // 128, device=device)
    indices = torch.stack([rows, (rows - 1).clamp(min=0)], dim=-1)
    padded = torch.zeros(1, 1, len(rows), len(rows), dtype=torch.int32, device=device)
    padded[0, 0, :, :2] = indices
    counts = (1 + (rows > 0)).int()[None, None]
    return BlockMask.from_kv_blocks(
        counts, padded, BLOCK_SIZE=128, mask_mod=lambda b, h, n, m: (m <= n) & (m > n - window),
        seq_lengths=(length, length),
    )  # fmt: skip


@torch.no_grad()
def _decode(keys: int, batch: int = 8) -> Iterator[Row]:
    inputs = {name: _heads(heads, 1, keys, LARGE_DIM, batch) for name, heads in LARGE.items()}
    calls = {name: _with("flash", dense_attention, *x, is_causal=True) for name, x in inputs.items()}
    times = time_rivals(calls, "cuda", method="graph")
    for name, timing in times.items():
        moved = sum(x.numel() * x.element_size() for x in inputs[name][1:])
        is_baseline = name == "GQA"
        yield measured(
            f"attention of a step of decoding, {name} {LARGE[name]}",
            f"heads of {LARGE_DIM}, {keys} cached tokens, batch {batch}, bf16",
            1e3 * timing.median, "us", better="lower",
            baseline_name=None if is_baseline else f"GQA {LARGE['GQA']}",
            baseline=None if is_baseline else 1e3 * times["GQA"].median,
            required=0.95 if name == "xSQA" else None,
            fraction_of_ceiling=measured_ceilings("cuda").fraction(timing.median, bytes_moved=moved),
        )  # fmt: skip


@torch.no_grad()
def _counted() -> Iterator[Row]:
    """Operations of scores and values as PyTorch counts them: the ratio of the definition, exactly."""
    counts = {name: counted_operations(*heads) for name, heads in ARMS.items()}
    for name in ("lSQA", "SQA", "sSQA", "xSQA", "xSMQA"):
        yield measured(
            f"operations of scores and values, {name} {ARMS[name]}", "16 heads of 16, 256 tokens, not causal",
            counts[name] / 1e6, "million", better="lower", baseline_name=f"GQA {ARMS['GQA']}",
            baseline=counts["GQA"] / 1e6, required=HEADS / ARMS[name][0],
        )  # fmt: skip


def counted_operations(query_heads: int, key_heads: int, length: int = 256, head_dim: int = 16) -> int:
    """Returns the floating-point operations of the attention of one layer, as `FlopCounterMode` counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    query = torch.randn(1, query_heads, length, head_dim)
    key, value = torch.randn(2, 1, key_heads, length, head_dim).unbind()
    with FlopCounterMode(display=False) as counter:
        # Not causal, and as products: the counter does not know the causal half, nor the fused kernel of a CPU.
        dense_attention(query, key, value, backend="reference")
    return counter.get_total_flops()


@torch.no_grad()
def _on_cpu(length: int) -> Iterator[Row]:
    calls = {}
    for name in ("GQA", "SQA", "xSQA"):
        layer = SQAttention(1024, HEADS, ARMS[name][1], num_query_heads=ARMS[name][0])
        x, angles = torch.randn(1, length, 1024), torch.randn(1, length, 64)
        calls[name] = _with(None, layer, x, (angles.cos(), angles.sin()))
    times = time_rivals(calls, "cpu", seconds=1.0)
    shape = f"width 1024, 16 heads of 64, batch 1, {length} tokens, causal, float32"
    yield from _against_gqa(
        "attention layer forward", shape, {name: timing.median for name, timing in times.items()}, False
    )


# On a GPU half of the paper's layers at its width and half its context; on a CPU what a few seconds allow.
_QUALITY: dict[str, dict[str, Any]] = {
    "cuda": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 16,
        "head_dim": 16, "steps": 250, "batch_size": 16, "length": 512, "learning_rate": 2e-3,
    },
    "cpu": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 8,
        "head_dim": 8, "steps": 60, "batch_size": 16, "length": 128, "learning_rate": 3e-3,
    },
}  # fmt: skip
_SEEDS = (0, 1, 2)


def _quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields losses of small models, and on a GPU the times of their training."""
    from undivided.data import demo_texts

    texts = demo_texts()
    options = dict(_QUALITY[device])
    # The baseline first: rows are kept as they come, should time run out.
    arms = ["GQA", "SQA", "xSQA"]
    if quick:
        options["steps"] = 20
    else:
        arms += ["MHA", "MQA", "sSQA", "xSMQA", "lSQA"]
    heads = options["num_attention_heads"]
    shape = (
        f"{options['num_hidden_layers']} layers, width {options['hidden_size']}, {heads} heads, {options['steps']} "
        f"steps of {options['batch_size']} x {options['length']} bytes, {len(_SEEDS)} seeds"
    )
    bits: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for name in arms:
        entry = {
            "mechanism": "sqa",
            "num_query_heads": ARMS[name][0] * heads // HEADS,
            "num_key_value_heads": max(ARMS[name][1] * heads // HEADS, 1),
        }
        runs = train_tiny_lm(
            entry, texts.calibration, texts.heldout["2024-Biden-1"], seeds=_SEEDS, device=device, **options
        )
        bits[name], deviation = mean_and_deviation([run.bits_per_byte for run in runs])
        seconds[name] = min(run.seconds for run in runs)
        yield measured(
            f"bits a byte of a tiny model, {name}", f"{shape}, {runs[0].parameters} parameters", bits[name],
            "bits/byte", better="lower", deviation=deviation, baseline_name="GQA" if len(bits) > 1 else None,
            baseline=bits["GQA"] if len(bits) > 1 else None,
        )  # fmt: skip
        # The arms are trained one after another, and a CPU has other work too: times would compare that.
        if device == "cuda" and len(bits) > 1:
            yield measured(
                f"seconds of training a tiny model, best of {len(_SEEDS)}, {name}", shape, seconds[name], "s",
                better="lower", baseline_name="GQA", baseline=seconds["GQA"],
            )  # fmt: skip


_PARTS: dict[str, Measure] = {
    "models": _models,
    "training": _training,
    "layer": _layer,
    "quality": _quality,
}
CLAIM = Claim(
    slug="sqa",
    source="arXiv 2510.01817, experiments; the same in the authors' repository RxNN, sparse_query_attention.md",
    paper=(
        "Dense model, forward, one A100 40GB, 131,072 tokens, batch 1: xSQA .3759 s, SQA .6308, sSQA .6630, window of "
        "128 .7531, MQA 1.2530, GQA 1.2558, MHA 1.2648: GQA / xSQA = 3.34, GQA / SQA = 1.99.",
        "The same, 200,000 tokens: xSQA .8194 s, window 1.1871, SQA 1.4116, sSQA 1.4824, GQA 2.8596, MHA 2.8734: "
        "GQA / xSQA = 3.49, GQA / SQA = 2.03.",
        "The same, 32,768 tokens, batch 4: xSQA .1348 s, SQA .1991, GQA .3637; 1,024 tokens, batch 128: xSQA .0570, "
        "SQA .0642, GQA .0785.",
        "Validation loss of the dense models: MHA 1.1976, GQA 1.2177, sSQA 1.2201, SQA 1.2272, xSQA 1.2428, MQA "
        "1.2497, xSMQA 1.2815; training minutes 269, 258, 243, 241, 235, 261, 235 (one L40S, context 1024).",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
)
