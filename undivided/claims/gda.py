"""GDA: what a smaller share of noise heads saves, what fusing saves, and that growth keeps the function.

The paper gives no times. Its premise is that a noise head that serves g signal heads makes the subtraction cheap:
with `6 D (Hs + Hn)` operations a pair, four signal heads a noise head need 1.6 times fewer than one. The authors'
production code makes four calls of flash attention, two for each map, and computes every score twice:
`8 D (Hs + Hn)`. On a GPU the attention and the whole layer are timed at the head counts of Motif-2-12.7B. The whole
layer gains less than its attention at short lengths, where its projections, which no ratio of heads makes cheap, are
most of the work. What small models can show of the quality is in `_gda_quality`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from undivided.claims._gda_quality import quality, recall
from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import measured_ceilings, time_rivals
from undivided.layers.gda import GDAttention
from undivided.ops import differential_attention
from undivided.testing import compare_op

HIDDEN, HEAD_DIM, KEY_HEADS, SIGNAL_HEADS = 4096, 128, 8, 32
FASTER, FUSED = 1.5, 1.3
_LENGTHS = (4096, 16384, 32768)


def gate(device: str) -> None:
    """Raises unless every fused kernel of this device, forward and backward, is as accurate as eager PyTorch."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    backends = ["triton", "sdpa"] if device == "cuda" else ["sdpa"]
    if device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        backends.append("gluon")
    for noise_heads, queries, keys in ((2, 333, 333), (8, 150, 400), (2, 1, 777)):
        x = _inputs(noise_heads, queries, device, keys=keys, heads=8, key_heads=2, dtype=torch.float32)
        # Far from one: there the first rows would cancel, and the norm would magnify the rounding of any dtype.
        x["lam"] = 0.2 + 0.4 * torch.rand(1, 8, queries, device=device)
        for backend in backends:
            compare_op(_attention(backend), _attention("reference"), _attention("reference"), x, dtype)
        with torch.no_grad():
            compare_op(
                _attention("auto"), _attention("reference"), _attention("reference"), x, dtype, grad_inputs=()
            )


def _attention_times(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of attention alone, forward, on a GPU."""
    if device == "cuda":
        for length in _LENGTHS[:1] if quick else _LENGTHS:
            yield from _forward(length)


def _layer_times(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of the whole layer, on a GPU."""
    if device == "cuda":
        for length in _LENGTHS[:1] if quick else _LENGTHS:
            yield from _layer(length)


def _training_times(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of attention forward and backward, on a GPU."""
    if device == "cuda":
        yield from _training(4096 if quick else 8192)


def _decode_times(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of a step of decoding, on a GPU."""
    if device == "cuda":
        yield from _decode(32768)


def _inputs(
    noise_heads: int,
    queries: int,
    device: str,
    *,
    keys: int | None = None,
    heads: int = SIGNAL_HEADS,
    key_heads: int = KEY_HEADS,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """Random heads as a cache holds them: both kinds of keys of a head in one row."""
    keys = queries if keys is None else keys
    draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
    rows = draw(1, key_heads, keys, 2 * HEAD_DIM)
    return {
        "query": draw(1, heads, queries, HEAD_DIM),
        "noise_query": draw(1, noise_heads, queries, HEAD_DIM),
        "key": rows[..., :HEAD_DIM],
        "noise_key": rows[..., HEAD_DIM:],
        "value": draw(1, key_heads, keys, 2 * HEAD_DIM),
        "lam": torch.tensor(0.4, device=device),
        "norm_weight": draw(2 * HEAD_DIM).abs(),
    }


def _attention(backend: str) -> Callable[..., torch.Tensor]:
    return lambda **x: differential_attention(**x, is_causal=True, out_scale=0.8, backend=backend)


def four_calls(
    query: torch.Tensor,
    noise_query: torch.Tensor,
    key: torch.Tensor,
    noise_key: torch.Tensor,
    value: torch.Tensor,
    lam: torch.Tensor,
    norm_weight: torch.Tensor,
    *,
    out_scale: float = 0.8,
    is_causal: bool = True,
) -> torch.Tensor:
    """Differential attention as the authors' production code composes it, all in the dtype of the inputs."""
    halves = value.split(query.shape[3], dim=-1)
    signal, noise = (
        torch.cat(
            [F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True) for v in halves],
            -1,
        )
        for q, k in ((query, key), (noise_query, noise_key))
    )
    noise = noise.repeat_interleave(signal.shape[1] // noise.shape[1], dim=1)
    mixed = signal - lam.to(signal.dtype) * noise
    return F.rms_norm(mixed, mixed.shape[-1:], norm_weight, 1e-5) * out_scale


def _kernels(name: str) -> AbstractContextManager:
    """Restricts scaled_dot_product_attention to one family of kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel({"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}[name])


def _within(
    context: Callable[[], AbstractContextManager], function: Callable[[], object]
) -> Callable[[], object]:
    def run() -> object:
        with context():
            return function()

    return run


def _composed(kernels: str, x: dict[str, torch.Tensor], is_causal: bool = True) -> Callable[[], object]:
    return _within(lambda: _kernels(kernels), lambda: four_calls(**x, is_causal=is_causal))


@torch.no_grad()
def _forward(length: int) -> Iterator[Row]:
    gda, symmetric = _inputs(8, length, "cuda"), _inputs(SIGNAL_HEADS, length, "cuda")
    wider = _inputs(4, length, "cuda", key_heads=4)
    query, key, value = (
        torch.randn(1, heads, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for heads in (64, 16, 16)
    )
    fused = _attention("auto")
    times = time_rivals(
        {
            "gda": lambda: fused(**gda),
            "wider": lambda: fused(**wider),
            "the same kernel, one signal head a noise head": lambda: fused(**symmetric),
            "four flash calls (SDPA)": _composed("flash", gda),
            "four cuDNN calls (SDPA)": _composed("cuDNN", gda),
            "one signal head a noise head, four flash calls": _composed("flash", symmetric),
            "64 plain heads on 16, flash (SDPA)": _within(
                lambda: _kernels("flash"),
                lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
            ),
        },
        "cuda",
    )
    ours, wide = times.pop("gda").median, times.pop("wider").median
    bars = {
        "the same kernel, one signal head a noise head": FASTER,
        "one signal head a noise head, four flash calls": FASTER,
        "four flash calls (SDPA)": FUSED,
    }
    shape = f"{SIGNAL_HEADS}:8 heads on {KEY_HEADS}, head_dim {HEAD_DIM}, {length} tokens, causal, bf16"
    flops = _flops(SIGNAL_HEADS + 8, length)
    for name, timing in times.items():
        yield measured(
            f"attention forward, against {name}", shape, ours, "ms", better="lower", baseline_name=name,
            baseline=timing.median, required=bars.get(name),
            fraction_of_ceiling=measured_ceilings("cuda").fraction(ours, flops=flops),
        )  # fmt: skip
    name = "the same kernel, one signal head a noise head"
    yield measured(
        f"attention forward, against {name}", shape.replace(":8 heads on 8", ":4 heads on 4"), wide, "ms",
        better="lower", baseline_name=f"{name} (on 8)", baseline=times[name].median,
        fraction_of_ceiling=measured_ceilings("cuda").fraction(wide, flops=_flops(SIGNAL_HEADS + 4, length)),
    )  # fmt: skip


def _flops(heads: int, length: int) -> float:
    """Operations of all maps with their wide values, over the pairs of a causal mask."""
    return 6 * HEAD_DIM * heads * length * (length + 1) / 2


class _FourCalls(GDAttention):
    """The layer with the authors' composition in place of the fused kernel."""

    def attend(self, query, noise_query, key, noise_key, value, mask):
        return four_calls(
            query,
            noise_query,
            key,
            noise_key,
            value,
            self.lam(),
            self.subln.weight,
            out_scale=1 - self.lam_init,
        )


@torch.no_grad()
def _layer(length: int) -> Iterator[Row]:
    def build(layer_class: type[GDAttention], noise_heads: int) -> GDAttention:
        heads = SIGNAL_HEADS + noise_heads
        layer = layer_class(HIDDEN, heads, 2 * KEY_HEADS, HEAD_DIM, num_noise_heads=noise_heads, layer_idx=1)
        return layer.to("cuda", torch.bfloat16)

    x = torch.randn(1, length, HIDDEN, device="cuda", dtype=torch.bfloat16)
    angles = torch.outer(
        torch.arange(length), 1e4 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    ).repeat(1, 2)
    tables = tuple(f(angles)[None].to("cuda", torch.bfloat16) for f in (torch.cos, torch.sin))
    layers = {
        "gda": build(GDAttention, 8),
        "one signal head a noise head, fused": build(GDAttention, SIGNAL_HEADS),
        "one signal head a noise head, four flash calls": build(_FourCalls, SIGNAL_HEADS),
        "four flash calls": build(_FourCalls, 8),
        "four cuDNN calls": build(_FourCalls, 8),
    }

    def run(name: str, layer: GDAttention) -> Callable[[], object]:
        kernels = next((kernels for kernels in ("flash", "cuDNN") if kernels in name), None)
        return _within(
            nullcontext if kernels is None else lambda: _kernels(kernels), lambda: layer(x, tables)
        )

    times = time_rivals({name: run(name, layer) for name, layer in layers.items()}, "cuda")
    ours = times.pop("gda").median
    weights = sum(weight.numel() for name, weight in layers["gda"].named_parameters() if "proj" in name)
    flops = 2 * length * weights + _flops(SIGNAL_HEADS + 8, length)
    bars = {"one signal head a noise head, four flash calls": FASTER, "four flash calls": FUSED}
    for name, timing in times.items():
        yield measured(
            f"whole layer forward, against {name}",
            f"hidden size {HIDDEN}, {SIGNAL_HEADS}:8 heads on {KEY_HEADS}, head_dim {HEAD_DIM}, {length} tokens, bf16",
            ours, "ms", better="lower", baseline_name=name, baseline=timing.median, required=bars.get(name),
            fraction_of_ceiling=measured_ceilings("cuda").fraction(ours, flops=flops),
        )  # fmt: skip


def _training(length: int) -> Iterator[Row]:
    def leaves(noise_heads: int) -> dict[str, torch.Tensor]:
        return {name: x.detach().requires_grad_() for name, x in _inputs(noise_heads, length, "cuda").items()}

    def with_backward(
        function: Callable[[], torch.Tensor], x: dict[str, torch.Tensor]
    ) -> Callable[[], object]:
        dout = torch.randn(1, SIGNAL_HEADS, length, 2 * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        return lambda: torch.autograd.grad(function(), list(x.values()), dout)

    gda, symmetric, fused = leaves(8), leaves(SIGNAL_HEADS), _attention("auto")
    times = time_rivals(
        {
            "gda": with_backward(lambda: fused(**gda), gda),
            "the same kernels, one signal head a noise head": with_backward(
                lambda: fused(**symmetric), symmetric
            ),
            "four flash calls (SDPA)": with_backward(_composed("flash", gda), gda),
            "four cuDNN calls (SDPA)": with_backward(_composed("cuDNN", gda), gda),
        },
        "cuda",
    )
    ours = times.pop("gda").median
    for name, timing in times.items():
        yield measured(
            f"attention forward and backward, against {name}",
            f"{SIGNAL_HEADS}:8 heads on {KEY_HEADS}, head_dim {HEAD_DIM}, {length} tokens, causal, bf16",
            ours, "ms", better="lower", baseline_name=name, baseline=timing.median,
            # Forward once, and backward at least 14 / 6 times as much: five products, two of them and the values wide.
            fraction_of_ceiling=measured_ceilings("cuda").fraction(
                ours, flops=(1 + 14 / 6) * _flops(SIGNAL_HEADS + 8, length)
            ),
        )  # fmt: skip


@torch.no_grad()
def _decode(keys: int) -> Iterator[Row]:
    gda, symmetric = (_inputs(noise_heads, 1, "cuda", keys=keys) for noise_heads in (8, SIGNAL_HEADS))
    fused = _attention("auto")
    times = time_rivals(
        {
            "gda": lambda: fused(**gda),
            "the same kernel, one signal head a noise head": lambda: fused(**symmetric),
            "four flash calls (SDPA)": _composed("flash", gda, is_causal=False),
            "four cuDNN calls (SDPA)": _composed("cuDNN", gda, is_causal=False),
        },
        "cuda",
        method="graph",
    )
    ours = times.pop("gda").median
    moved = sum(gda[name].numel() * gda[name].element_size() for name in ("key", "noise_key", "value"))
    for name, timing in times.items():
        yield measured(
            f"decode step, against {name}",
            f"{SIGNAL_HEADS}:8 heads on {KEY_HEADS}, head_dim {HEAD_DIM}, {keys} cached tokens, batch 1, bf16",
            1e3 * ours, "us", better="lower", baseline_name=name, baseline=1e3 * timing.median,
            required=FUSED if "flash" in name else None,
            fraction_of_ceiling=measured_ceilings("cuda").fraction(ours, bytes_moved=moved),
        )  # fmt: skip


_PARTS: dict[str, Measure] = {
    "attention": _attention_times,
    "layer": _layer_times,
    "training": _training_times,
    "decode": _decode_times,
    "quality": quality,
    "recall": recall,
}
CLAIM = Claim(
    slug="gda",
    source="arXiv 2510.06949, abstract; the authors' production code for the four calls",
    paper=(
        "Moderate imbalance ratios of signal to noise heads improve generalization and stability over symmetric "
        "baselines, with minimal computational overhead (abstract; no figure is quoted there).",
        "Counted from the definition: at 4:1 the maps of a layer take 1.6 times fewer operations than at 1:1.",
        "Growth replicates the signal-focused heads alone (abstract).",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
)
