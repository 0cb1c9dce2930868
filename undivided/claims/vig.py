"""ViG: the scan in both directions against two scans, ViG-T at high resolution against DeiT-T, and other resolutions.

Attention of DeiT is timed in two forms: eager, as in tables of 2024, whose memory grows with the square of the tokens,
and fused, which needs no such memory. The paper's ratios are of the first; a user has the second. Small models on real
images show what a resolution that was not trained does to each kind of attention.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import time_rivals
from undivided.layers.vig import BidirectionalGatedLinearAttention
from undivided.ops import gated_scan
from undivided.testing import compare_op

# Of ViG-T in an image of 1024 x 1024 pixels.
HEADS, TOKENS, KEY_DIM, VALUE_DIM = 3, 4096, 32, 64
# Bars: of two calls at most 0.7 of the time; at least 85 % less memory than eager attention, 4 times its speed.
MERGED, MEMORY, SPEED, SMALL_SPEED = 1 / 0.7, 1 / 0.15, 4.0, 2.0
EAGER, FUSED = "DeiT with eager attention", "DeiT with fused attention"
TWO_CALLS = "two calls of fla's chunk_gla, sequences flipped beforehand"
_SECONDS = 0.08
# fla tunes up to 48 configurations a kernel, minutes in all.
_CONFIGURATIONS = 6


def gate(device: str) -> None:
    """Raises unless the scan of this device is as accurate as eager products, output and gradients."""
    on_cuda = device == "cuda"
    scan = _scan("triton" if on_cuda else "chunked")
    slow = _scan("chunked" if on_cuda else "reference")
    dtype = torch.bfloat16 if on_cuda else torch.float32
    for length, strength in ((197, 0.04), (150, 0.5)):
        x = _inputs(2, device, torch.float64, length)
        for name in ("log_gate", "reverse_log_gate"):
            x[name] = -strength * torch.rand_like(x[name])
        compare_op(scan, slow, slow, x, dtype)


def _scan(backend: str) -> Callable[..., torch.Tensor]:
    return partial(gated_scan, backend=backend)


def _inputs(batch: int, device: str, dtype: torch.dtype, length: int = TOKENS) -> dict[str, torch.Tensor]:
    """Queries, keys, values and gates as the layer has them, `[batch, heads, tokens, width]` by token in memory."""

    def draw(width: int) -> torch.Tensor:
        return torch.randn(batch, length, HEADS, width, device=device, dtype=dtype).transpose(1, 2)

    wide = torch.promote_types(dtype, torch.float32)
    gates = (F.logsigmoid(draw(KEY_DIM).to(wide)) / 16 for _ in range(2))
    x = {"query": draw(KEY_DIM), "key": draw(KEY_DIM), "value": draw(VALUE_DIM)}
    return x | dict(zip(("log_gate", "reverse_log_gate"), gates, strict=True))


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields scans and whole models on a GPU, what has a bar first."""
    if device != "cuda":
        return
    rivals = fla_rivals()
    yield from _scan_rows(64, device, rivals)
    yield from _against_deit("tiny", 1024, 16, torch.bfloat16, (EAGER, FUSED), speed=SPEED, memory=MEMORY)
    if quick:
        return
    yield from _against_deit("small", 224, 64, torch.bfloat16, (FUSED,), rival="base", speed=SMALL_SPEED)
    yield from _against_deit("tiny", 1024, 8, torch.float32, (EAGER, FUSED), speed=SPEED, memory=MEMORY)
    yield from _against_deit("tiny", 1024, 1, torch.bfloat16, (EAGER, FUSED))
    yield from _scan_rows(1, device, rivals)
    for size, batch in ((224, 64), (512, 16), (2048, 2)):
        yield from _against_deit("tiny", size, batch, torch.bfloat16, (FUSED,))


def _scan_rows(batch: int, device: str, rivals: dict[str, Callable[..., Any]]) -> Iterator[Row]:
    x = {name: t.requires_grad_() for name, t in _inputs(batch, device, torch.bfloat16).items()}
    by_token = {name: t.detach().transpose(1, 2).contiguous().requires_grad_() for name, t in x.items()}
    flipped = {name: t.detach().flip(1).contiguous().requires_grad_() for name, t in by_token.items()}
    calls: dict[str, Callable[[], Any]] = {"merged": partial(_scan("triton"), **x)}
    leaves = {"merged": list(x.values())}
    for name, rival in rivals.items():
        calls[name] = partial(rival, by_token, flipped)
        used = [*by_token.values(), *(flipped.values() if name == TWO_CALLS else ())]
        unused = {id(by_token["reverse_log_gate"]), id(flipped["log_gate"])} if name == TWO_CALLS else set()
        leaves[name] = [t for t in used if id(t) not in unused]
    shape = (
        f"batch {batch}, {HEADS} heads, {TOKENS} tokens, head_dim {KEY_DIM}, value_dim {VALUE_DIM}, bfloat16"
    )
    names = [TWO_CALLS, *(name for name in rivals if name != TWO_CALLS)] if rivals else []
    with torch.no_grad():
        times = time_rivals(calls, device, seconds=_SECONDS)
        peaks = {name: _peak(call) for name, call in calls.items()}
    yield from _against(
        "scan in both directions, forward", shape, {n: t.median for n, t in times.items()}, "ms", names, batch
    )
    trained = {name: partial(_gradients, call, leaves[name]) for name, call in calls.items()}
    times = time_rivals(trained, device, seconds=_SECONDS)
    yield from _against(
        "scan in both directions, forward and backward", shape, {n: t.median for n, t in times.items()}, "ms", names,
        batch,
    )  # fmt: skip
    yield from _against("memory of a scan in both directions, forward", shape, peaks, "MB", names, 0)


def _against(
    what: str, shape: str, found: dict[str, float], unit: str, names: list[str], batch: int
) -> Iterator[Row]:
    """Yields the merged scan against each rival; the bar is of the two calls, at the batch of training."""
    if not names:
        yield measured(what, shape, found["merged"], unit, better="lower")
    for name in names:
        yield measured(
            f"{what}, against {name}", shape, found["merged"], unit, better="lower", baseline_name=name,
            baseline=found[name], required=MERGED if name == TWO_CALLS and batch == 64 else None,
        )  # fmt: skip


def _gradients(call: Callable[[], Any], leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    out = call()
    outputs = out if isinstance(out, tuple) else (out,)
    return torch.autograd.grad(outputs, leaves, [torch.ones_like(part) for part in outputs])


def _peak(call: Callable[[], Any]) -> float:
    """Returns the most memory that a call allocates beside what is there, in MB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    del out
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def fla_rivals() -> dict[str, Callable[..., Any]]:
    """Returns scans in both directions made of flash-linear-attention's causal kernel; none where it is missing.

    Each of its kernels is tuned over at most six of its configurations, evenly chosen.
    """
    if importlib.util.find_spec("fla") is None:
        return {}
    from fla.ops.gla import chunk_gla

    _tune_less()

    def scan(x: dict[str, torch.Tensor], gate: str) -> torch.Tensor:
        return chunk_gla(x["query"], x["key"], x["value"], x[gate])[0]

    def two_calls(x: dict[str, torch.Tensor], flipped: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return scan(x, "log_gate"), scan(flipped, "reverse_log_gate")

    def with_flips(x: dict[str, torch.Tensor], flipped: dict[str, torch.Tensor]) -> torch.Tensor:
        turned = {name: tensor.flip(1) for name, tensor in x.items() if name != "log_gate"}
        return (scan(x, "log_gate") + scan(turned, "reverse_log_gate").flip(1)) / 2

    def stacked(x: dict[str, torch.Tensor], flipped: dict[str, torch.Tensor]) -> torch.Tensor:
        both = {name: torch.cat((x[name], x[name].flip(1))) for name in ("query", "key", "value")}
        both["gate"] = torch.cat((x["log_gate"], x["reverse_log_gate"].flip(1)))
        start, end = scan(both, "gate").chunk(2)
        return (start + end.flip(1)) / 2

    return {
        TWO_CALLS: two_calls,
        "two calls with the flips": with_flips,
        "one call of both directions stacked on the batch": stacked,
    }


def _tune_less() -> None:
    import sys

    from triton.runtime.autotuner import Autotuner

    for name in [name for name in sys.modules if name.startswith("fla.")]:
        for kernel in list(vars(sys.modules[name]).values()):
            while kernel is not None and not isinstance(kernel, Autotuner):
                # Heuristics around a tuner.
                kernel = getattr(kernel, "fn", None) if hasattr(kernel, "run") else None
            if kernel is not None:
                # One warp, and other depths of pipelines, are never best at these sizes.
                usual = [c for c in kernel.configs if c.num_warps > 1 and c.num_stages == 3] or kernel.configs
                kernel.configs = usual[:: -(-len(usual) // _CONFIGURATIONS)]


def deit(name: str, size: int, *, fused: bool, **options: Any) -> nn.Module:
    """Returns a DeiT of timm for square images, with fused or eager attention."""
    import timm

    model = timm.create_model(name, img_size=size, **options)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


def _compiled(device: str, quick: bool) -> Iterator[Row]:
    """Yields the same at 1024 x 1024 pixels with both models through torch.compile, which fuses what is between."""
    if device == "cuda":
        yield from _against_deit(
            "tiny", 1024, 16, torch.bfloat16, (EAGER, FUSED), speed=SPEED, memory=MEMORY, compiled=True
        )


def _against_deit(
    ours: str,
    size: int,
    batch: int,
    dtype: torch.dtype,
    forms: tuple[str, ...],
    *,
    rival: str | None = None,
    speed: float | None = None,
    memory: float | None = None,
    compiled: bool = False,
) -> Iterator[Row]:
    import timm

    import undivided.models.vision  # noqa: F401

    rival = rival or ours
    options = {"device": "cuda", "dtype": dtype}
    with torch.device("cuda"):
        models = {"ViG": timm.create_model(f"undivided_vig_{ours}", img_size=size)}
        for form in forms:
            models[form] = deit(f"deit_{rival}_patch16_224", size, fused=form == FUSED)
    x = torch.randn(batch, 3, size, size, **options)
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        model = model.eval().to(dtype)
        calls[name] = partial(torch.compile(model) if compiled else model, x)
    shape = f"batch {batch}, {size} x {size} pixels, {str(dtype).removeprefix('torch.')}"
    shape += ", compiled" if compiled else ""
    title = f"ViG-{ours[0].upper()}"
    with torch.no_grad():
        for call in calls.values():
            call()
        peaks = {name: _peak(call) for name, call in calls.items()}
        times = time_rivals(calls, "cuda", method="graph", seconds=_SECONDS)
    names = {form: f"{form.replace('DeiT', f'DeiT-{rival[0].upper()}')}" for form in forms}
    for form in forms:
        yield measured(
            f"{title} against {names[form]}, speed", shape, 1e3 * batch / times["ViG"].median, "images/s",
            better="higher", baseline_name=names[form], baseline=1e3 * batch / times[form].median,
            required=speed if form == forms[0] else None,
        )  # fmt: skip
    for form in forms:
        yield measured(
            f"{title} against {names[form]}, memory beside weights and images", shape, peaks["ViG"], "MB",
            better="lower", baseline_name=names[form], baseline=peaks[form],
            required=memory if form == forms[0] else None,
        )  # fmt: skip


def _scaling(device: str, quick: bool) -> Iterator[Row]:
    """Yields what more tokens cost one layer of ViG-T's width on a CPU, beside softmax attention."""
    from timm.layers import Attention

    if device != "cpu":
        return
    dim, heads = 192, 3
    ours = BidirectionalGatedLinearAttention(dim, heads).eval()
    softmax = Attention(dim, heads).eval()
    times: dict[str, list[float]] = {"ViG": [], "softmax attention": []}
    sides = (14, 28) if quick else (14, 28, 56)
    for side in sides:
        x = torch.randn(1, side**2, dim)
        calls = {"ViG": partial(ours, x, (side, side)), "softmax attention": partial(softmax, x)}
        with torch.no_grad():
            found = time_rivals(calls, device, seconds=0.3)
        for name, timing in found.items():
            times[name].append(timing.median)
        yield measured(
            "one layer, against softmax attention", f"batch 1, {side} x {side} tokens of {dim}, {heads} heads, float32",
            found["ViG"].median, "ms", better="lower", baseline_name="softmax attention",
            baseline=found["softmax attention"].median,
        )  # fmt: skip
    growth = {name: math.log(own[-1] / own[-2]) / math.log(4) for name, own in times.items()}
    yield measured(
        "power of the number of tokens with which the time of one layer grows",
        f"from {sides[-2]} x {sides[-2]} to {sides[-1]} x {sides[-1]} tokens of {dim}, {heads} heads, float32",
        growth["ViG"], "power", better="lower", baseline_name="softmax attention",
        baseline=growth["softmax attention"], required=1.0,
    )  # fmt: skip


_SEEDS: tuple[int, ...] = (0, 1, 2, 3, 4)
_ARMS: dict[str, dict[str, Any]] = {
    "ViG": {"attn_layer": BidirectionalGatedLinearAttention.with_options(conv_act=True, out_act=True)},
    "softmax attention": {},
}


def _quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields test accuracies at the resolution of training and at twice of it, of models of equal size."""
    from undivided.claims._tiny_lm import mean_and_deviation
    from undivided.claims._tiny_vit import Trainer, accuracy, on_device, tiny_vit
    from undivided.data.images import digits, fashion_mnist

    on_cuda = device == "cuda"
    images = on_device(fashion_mnist() if on_cuda else digits(), device)
    sizes: dict[str, Any] = {"embed_dim": 96, "depth": 3, "num_heads": 3, "patch_size": 2, "mlp_ratio": 2.0}
    seeds = _SEEDS if on_cuda else _SEEDS[:3]
    steps, batch_size = (1000, 256) if on_cuda else (150, 64)
    if quick:
        steps, seeds = steps // 10, seeds[:1]
    side = images.train_images.shape[-1] // 2
    found: dict[tuple[str, int], list[float]] = {}
    for arm, options in _ARMS.items():
        build = partial(tiny_vit, images, **sizes, **options, dynamic_img_size=True)
        model = build().to(device)
        trainer = Trainer(model, images, batch_size=batch_size)
        for seed in seeds:
            trainer.reset(build(seed=seed).state_dict())
            trainer.run(steps=steps, learning_rate=2e-3, seed=seed)
            for factor in (1, 2):
                tested = enlarged(images, factor)
                found.setdefault((arm, factor), []).append(accuracy(model, tested, batch_size=500))
    shape = (
        f"{images.name}, {side} x {side} tokens of {sizes['embed_dim']}, {sizes['depth']} blocks, {steps} steps of "
        f"{batch_size}, {len(seeds)} seeds"
    )
    for factor, what in ((1, "at the resolution of training"), (2, "at twice the resolution of training")):
        (ours, deviation), (theirs, _) = (mean_and_deviation(found[arm, factor]) for arm in _ARMS)
        yield measured(
            f"test accuracy {what}, against softmax attention", shape, ours, "%", better="higher",
            baseline_name="softmax attention", baseline=theirs, deviation=deviation,
            required=1.0 if factor == 2 else None,
        )  # fmt: skip
    lost = {
        arm: mean_and_deviation([a - b for a, b in zip(found[arm, 1], found[arm, 2], strict=True)])
        for arm in _ARMS
    }
    for arm, (mean, deviation) in lost.items():
        yield measured(
            f"accuracy lost at twice the resolution, {arm}", shape, mean, "percentage points", better="lower",
            deviation=deviation,
        )  # fmt: skip


def enlarged(images: Any, factor: int) -> Any:
    """Returns the set with test images of `factor` times the side, by bilinear interpolation."""
    import dataclasses

    if factor == 1:
        return images
    larger = F.interpolate(images.test_images.float(), scale_factor=factor, mode="bilinear")
    return dataclasses.replace(images, test_images=larger.round().to(torch.uint8))


_PARTS: dict[str, Measure] = {
    "speed": _speed,
    "compiled": _compiled,
    "scaling": _scaling,
    "quality": _quality,
}
CLAIM = Claim(
    slug="vig",
    source="arXiv 2405.18425, abstract and table 2",
    paper=(
        "ViG-T in images of 1024 x 1024 pixels against DeiT-T: 5.2 times fewer FLOPs, 90 % less GPU memory, 4.8 times "
        "the speed, and 20.7 points more top-1 accuracy, both trained at 224 x 224.",
        "ViG-S matches DeiT-B with 20 % of its FLOPs, at twice its speed in images of 224 x 224 pixels.",
        "ImageNet-1K top-1 of ViG-T, S and B: 77.2, 81.7 and 82.6 %.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
    devices=("cuda", "cpu"),
)
