"""TiC: attention with the support of a convolution is linear in pixels and takes images of any size.

No figure of the paper is known here. What is measured: the fused operator against the authors' algorithm (columns of
the map, here in bf16; theirs needs float32) and against global flash attention, forward and backward; and how small
models fare at sizes that they were not trained at. The network is a reconstruction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import time_rivals
from undivided.layers.tic import MSAConv
from undivided.ops import msa_conv_attention
from undivided.testing import compare_op

UNFOLD, FLASH, FUSED = "unfold (the authors' algorithm)", "global flash attention", "fused"
REQUIRED_SPEED, REQUIRED_MEMORY, REQUIRED_FLASH = 5.0, 20.0, 1.0


def unfolded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """The authors' algorithm: columns `[head_dim * kernel_size^2, height * width]` of keys and of values."""
    batch, heads, height, width, dim = query.shape

    def columns(x: torch.Tensor) -> torch.Tensor:
        x = x.movedim(-1, 2).reshape(batch * heads, dim, height, width)
        return F.unfold(x, kernel_size, padding=kernel_size // 2).view(batch * heads, dim, -1, height * width)

    q = query.movedim(-1, 2).reshape(batch * heads, dim, 1, height * width)
    weights = (dim**-0.5 * (q * columns(key)).sum(1, keepdim=True)).softmax(2)
    return (weights * columns(value)).sum(2).view(batch, heads, dim, height, width).movedim(2, -1)


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of all pairs of a map."""
    out = F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (query, key, value)))
    return out.unflatten(2, query.shape[2:4])


def gate(device: str) -> None:
    """Raises unless the fused operator is as accurate as the reference, with its gradients, and the rival right."""
    on_cuda = device == "cuda"
    size, dim, dtype = ((20, 23), 32, torch.bfloat16) if on_cuda else ((5, 6), 16, torch.float32)
    for kernel_size, dilation, border, width in ((7, 1, "zero", dim), (5, 1, "zero", 1), (3, 2, "mask", dim)):
        x = {
            name: torch.randn(1, 2, *size, width, dtype=torch.float64, device=device)
            for name in ("query", "key", "value")
        }

        def run(backend: str, k=kernel_size, d=dilation, b=border) -> Callable[..., Any]:
            return lambda **t: msa_conv_attention(**t, kernel_size=k, dilation=d, border=b, backend=backend)

        slow = run("reference")
        compare_op(run("triton" if on_cuda else "auto"), slow, slow, x, dtype)
    torch.testing.assert_close(
        unfolded(x["query"], x["key"], x["value"], 3),
        msa_conv_attention(**x, kernel_size=3, backend="reference"),
    )


def _tensors(batch: int, heads: int, side: int, dim: int, device: str) -> list[torch.Tensor]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # The heads of a token side by side, as a projection leaves them.
    return [
        torch.randn(batch, side, side, heads, dim, device=device, dtype=dtype).movedim(3, 1).requires_grad_()
        for _ in range(4)
    ]


def _extra_mib(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of forward and backward, the shapes with bars first; memory beside inputs and their gradients."""
    on_cuda = device == "cuda"
    problems = [
        (8, 8, 64, 32, 7),
        (8, 8, 112, 32, 7),
        (8, 8, 32, 32, 7),
        (1, 16, 64, 80, 7),
        (8, 256, 64, 1, 7),
        (8, 8, 56, 32, 3),
    ]
    if device == "cpu":
        problems = [(1, 2, 16, 32, 7)]
    for batch, heads, side, dim, kernel_size in problems[: 1 if quick else None]:
        *x, gradient = _tensors(batch, heads, side, dim, device)

        def both(attend: Callable[..., Any], x=x, gradient=gradient) -> Callable[[], object]:
            return lambda: torch.autograd.grad(attend(*x), x, gradient.detach())

        rivals = {
            FUSED: both(partial(msa_conv_attention, kernel_size=kernel_size)),
            UNFOLD: both(partial(unfolded, kernel_size=kernel_size)),
        }
        if dim > 1:
            # Of scalars there is no flash attention.
            rivals[FLASH] = both(flash)
        # As a training step in a graph runs them: the launches of small maps take the host longer than the device.
        timings = time_rivals(rivals, device, method="graph" if on_cuda else "auto", seconds=0.05)
        times = {name: timing.median for name, timing in timings.items()}
        shape = (
            f"batch {batch}, {side} x {side}, {heads} heads of {dim}, kernel {kernel_size} x {kernel_size}, "
        )
        shape += "bf16" if on_cuda else "float32, reference backend"
        has_bars = on_cuda and kernel_size == 7
        bars = {UNFOLD: REQUIRED_SPEED, FLASH: REQUIRED_FLASH if side >= 64 else None}
        for rival in list(rivals)[1:]:
            required = bars[rival]
            yield measured(
                f"MSA-Conv, forward and backward, against {rival}", shape, times[FUSED], "ms", better="lower",
                baseline_name=rival, baseline=times[rival], required=required if has_bars else None,
            )  # fmt: skip
        if on_cuda:
            memory = {name: _extra_mib(run) for name, run in rivals.items()}
            # Gradients of the inputs are three tensors in every arm, and no algorithm can do without them.
            yield measured(
                "memory beside the inputs, gradients included", shape, memory[FUSED], "MiB", better="lower",
                baseline_name=UNFOLD, baseline=memory[UNFOLD], required=REQUIRED_MEMORY if has_bars else None,
            )  # fmt: skip


def _models(device: str, quick: bool) -> Iterator[Row]:
    """Yields images a second of whole networks at growing sizes, in inference."""
    import timm

    import undivided.models.vision  # noqa: F401

    if device != "cuda":
        return
    tic = timm.create_model("undivided_tic_tiny").eval().to(device, torch.bfloat16)
    for side in (224,) if quick else (224, 512, 1024):
        vit = timm.create_model("vit_small_patch16_224", img_size=side).eval().to(device, torch.bfloat16)
        x = torch.randn(8, 3, side, side, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            calls = {"tic": partial(tic, x), "vit": partial(vit, x)}
            times = time_rivals(calls, device, method="graph", seconds=0.05)
        yield measured(
            "inference of tic_tiny (a reconstruction)", f"batch 8, {side} x {side} pixels, bf16",
            8e3 / times["tic"].median, "images/s", better="higher", baseline_name="timm vit_small_patch16",
            baseline=8e3 / times["vit"].median,
        )  # fmt: skip


_STEPS, _SEEDS, _SCALES = 250, (0, 1, 2), (5 / 7, 1.0, 10 / 7, 2.0)
_ARMS: dict[str, dict[str, Any]] = {
    "MSA-Conv": {"has_shifts": False, "inter_pool": "none"},
    "MSA-Conv + shifts": {"has_shifts": True, "inter_pool": "none"},
    "MSA-Conv + inter-pooling": {"has_shifts": False, "inter_pool": "stage"},
    "TiC (both)": {"has_shifts": True, "inter_pool": "stage"},
}


_IMAGES = ("train_images", "test_images")
_BODIES = {"convolutions in its place": False, "depthwise convolutions in its place": True}


def small_tic(options: dict[str, Any], num_classes: int = 10) -> nn.Module:
    """Returns an untrained narrow network of two stages for images of one channel."""
    from undivided.models.vision.tic import TiC

    return TiC(in_chans=1, num_classes=num_classes, embed_dim=32, depths=(2, 3), kernel_size=5, **options)


class ConvolutionOfTokens(nn.Module):
    """A convolution of the size of an MSA-Conv, of tokens."""

    def __init__(self, attention: MSAConv, is_depthwise: bool) -> None:
        super().__init__()
        padding = [kernel // 2 for kernel in attention.kernel_size]
        groups = attention.dim if is_depthwise else 1
        self.conv = nn.Conv2d(
            attention.dim, attention.dim, attention.kernel_size, padding=padding, groups=groups
        )

    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return self.conv(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)


def _convolutional(num_classes: int, is_depthwise: bool) -> nn.Module:
    model = small_tic(_ARMS["MSA-Conv"], num_classes)
    for module in list(model.modules()):
        if isinstance(getattr(module, "attn", None), MSAConv):
            module.attn = ConvolutionOfTokens(module.attn, is_depthwise)
    return model


def reached(model: nn.Module, x: torch.Tensor) -> float:
    """Returns the share of pixels, in percent, with 1 % of the largest gradient of the output's middle."""
    x = x.clone().requires_grad_()
    out = model.eval().forward_features(x)
    middle = out[:, :, out.shape[2] // 2, out.shape[3] // 2]
    gradient = torch.autograd.grad(middle.sum(), x)[0].abs().mean((0, 1))
    return 100 * float((gradient > 0.01 * gradient.max()).float().mean())


def _growth(device: str, quick: bool) -> Iterator[Row]:
    """Yields how the time of a layer's attention grows with the side of the map: 2 is linear in pixels, 4 global."""
    on_cuda = device == "cuda"
    heads, dim, kernel_size = (8, 32, 7) if on_cuda else (1, 16, 7)
    sides = (128, 256) if on_cuda else (32, 64)
    times: dict[str, list[float]] = {FUSED: [], FLASH: []}
    for side in sides:
        x = [tensor.detach() for tensor in _tensors(1, heads, side, dim, device)[:3]]
        calls = {FUSED: partial(msa_conv_attention, *x, kernel_size=kernel_size), FLASH: partial(flash, *x)}
        with torch.no_grad():
            timings = time_rivals(calls, device, method="graph" if on_cuda else "auto", seconds=0.05)
        for name, timing in timings.items():
            times[name].append(timing.median)
    exponents = {
        name: math.log(values[-1] / values[0]) / math.log(sides[-1] / sides[0])
        for name, values in times.items()
    }
    dtype = "bf16" if on_cuda else "float32, reference backend"
    yield measured(
        "exponent of the side in the time of attention",
        f"{sides[0]} to {sides[-1]}, {heads} heads of {dim}, kernel {kernel_size}, {dtype}",
        exponents[FUSED], "", better="lower", baseline_name=FLASH, baseline=exponents[FLASH],
    )  # fmt: skip


def _quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields test accuracies at the size of training and at others, without retraining; TiC against a ViT."""
    from undivided.claims._loss_trainer import small_images
    from undivided.claims._tiny_lm import mean_and_deviation
    from undivided.claims._tiny_vit import Trainer, normalised

    images = small_images(device)
    if images.train_images.shape[-1] < 16:
        # A stem of stride 4 leaves too little of digits of 8 x 8.
        images = dataclasses.replace(
            images, **{name: F.interpolate(getattr(images, name), scale_factor=2) for name in _IMAGES}
        )
    side, seeds = images.train_images.shape[-1], _SEEDS[: 1 if quick or device == "cpu" else None]
    steps = _STEPS if device == "cuda" else 20

    def vit() -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            img_size=side, patch_size=4, in_chans=1, num_classes=images.num_classes, embed_dim=64, depth=5, num_heads=2,
            class_token=False, global_pool="avg", dynamic_img_size=True, dynamic_img_pad=True,
        )  # fmt: skip

    builders: dict[str, Callable[[], nn.Module]] = {
        name: partial(small_tic, options, images.num_classes) for name, options in _ARMS.items()
    }
    for name, is_depthwise in _BODIES.items():
        builders[name] = partial(_convolutional, images.num_classes, is_depthwise)
    builders["ViT, positions resampled"] = vit
    found: dict[str, list[list[float]]] = {}
    areas: dict[str, list[float]] = {name: [] for name in (*_ARMS, *_BODIES)}
    wide = F.interpolate(normalised(images.test_images[:64]), size=(3 * side, 3 * side), mode="bilinear")
    counts: dict[str, int] = {}
    for name, build in builders.items():
        model = build().to(device)
        counts[name] = sum(p.numel() for p in model.parameters())
        trainer = Trainer(model, images, batch_size=256)
        found[name] = []
        for seed in seeds:
            torch.manual_seed(seed)
            trainer.reset(build().state_dict())
            trainer.run(steps=steps, learning_rate=2e-3, seed=seed)
            found[name].append([_accuracy(model, images, round(side * scale)) for scale in _SCALES])
            if name in areas:
                areas[name].append(reached(model, wide))
    for index, scale in enumerate(_SCALES):
        baseline = mean_and_deviation([row[index] for row in found["ViT, positions resampled"]])[0]
        size = round(side * scale)
        shape = (
            f"{images.name}, trained at {side} x {side}, tested at {size} x {size}, {steps} steps of 256, "
        )
        shape += f"{len(seeds)} seeds"
        for name in (*_ARMS, *_BODIES):
            mean, deviation = mean_and_deviation([row[index] for row in found[name]])
            yield measured(
                f"test accuracy, {name}, {counts[name]:,} parameters", shape, mean, "%", better="higher",
                deviation=deviation, baseline_name=f"ViT, {counts['ViT, positions resampled']:,} parameters",
                baseline=baseline, required=1.0 if name == "TiC (both)" and scale != 1 else None,
            )  # fmt: skip

    plain = mean_and_deviation(areas["MSA-Conv"])[0]
    for name, values in areas.items():
        mean, deviation = mean_and_deviation(values)
        yield measured(
            f"image area with 1 % of the largest gradient of the middle, {name}",
            f"{images.name}, trained at {side} x {side}, seen at {3 * side} x {3 * side}, {len(seeds)} seeds",
            mean, "%", better="higher", deviation=deviation, baseline_name=None if name == "MSA-Conv" else "MSA-Conv",
            baseline=None if name == "MSA-Conv" else plain, required=1.0 if name in list(_ARMS)[1:] else None,
        )  # fmt: skip


@torch.no_grad()
def _accuracy(model: nn.Module, images: Any, size: int) -> float:
    from undivided.claims._tiny_vit import computing, normalised

    model.eval()
    right = 0
    for x, y in zip(images.test_images.split(1000), images.test_labels.split(1000), strict=True):
        x = F.interpolate(normalised(x), size=(size, size), mode="bilinear", antialias=True)
        with computing(x.device):
            right += int((model(x).argmax(-1) == y).sum())
    return 100 * right / len(images.test_labels)


_PARTS: dict[str, Measure] = {
    "speed": _speed,
    "models": _models,
    "growth": _growth,
    "quality": _quality,
}
CLAIM = Claim(
    slug="tic",
    source="arXiv 2310.04134, abstract",
    paper=(
        "Handles images of any size without retraining or rescaling, at less cost than global attention as they grow.",
        "MSA-Conv, shifts and inter-pooling each improve accuracy (no number is known here).",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
    devices=("cuda", "cpu"),
)
