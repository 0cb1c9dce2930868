"""TiC: attention with the support of a convolution is linear in pixels and takes images of any size.

No figure of the paper is known here. What is measured: the fused operator against the authors' algorithm (columns of
the map, here in bf16; theirs needs float32) and against global flash attention, forward and backward; and how small
models fare at sizes that they were not trained at. The network is a reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import time_rivals
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
    for kernel_size, dilation, border in ((7, 1, "zero"), (3, 2, "mask")):
        x = {
            name: torch.randn(1, 2, *size, dim, dtype=torch.float64, device=device)
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
    problems = [
        (8, 8, 64, 32, 7),
        (8, 8, 112, 32, 7),
        (8, 8, 32, 32, 7),
        (1, 16, 64, 80, 7),
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
            FLASH: both(flash),
        }
        times = {name: timing.median for name, timing in time_rivals(rivals, device, seconds=0.05).items()}
        shape = (
            f"batch {batch}, {side} x {side}, {heads} heads of {dim}, kernel {kernel_size} x {kernel_size}, "
        )
        shape += "bf16" if device == "cuda" else "float32, reference backend"
        has_bars = device == "cuda" and kernel_size == 7
        for rival, required in ((UNFOLD, REQUIRED_SPEED), (FLASH, REQUIRED_FLASH if side >= 64 else None)):
            yield measured(
                "MSA-Conv, forward and backward", shape, times[FUSED], "ms", better="lower", baseline_name=rival,
                baseline=times[rival], required=required if has_bars else None,
            )  # fmt: skip
        if device == "cuda":
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
            times = time_rivals({"tic": partial(tic, x), "vit": partial(vit, x)}, device, seconds=0.05)
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


def _quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields test accuracies at the size of training and at others, without retraining; TiC against a ViT."""
    from undivided.claims._loss_trainer import small_images
    from undivided.claims._tiny_lm import mean_and_deviation
    from undivided.claims._tiny_vit import Trainer
    from undivided.models.vision.tic import TiC

    images = small_images(device)
    side, seeds = images.train_images.shape[-1], _SEEDS[: 1 if quick or device == "cpu" else None]
    steps = _STEPS if device == "cuda" else 20

    def vit() -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            img_size=side, patch_size=4, in_chans=1, num_classes=images.num_classes, embed_dim=64, depth=5, num_heads=2,
            class_token=False, global_pool="avg", dynamic_img_size=True, dynamic_img_pad=True,
        )  # fmt: skip

    def tic(options: dict[str, Any]) -> nn.Module:
        sizes: dict[str, Any] = {"embed_dim": 32, "depths": (2, 3), "kernel_size": 5}
        return TiC(in_chans=1, num_classes=images.num_classes, **sizes, **options)

    builders: dict[str, Callable[[], nn.Module]] = {
        name: partial(tic, options) for name, options in _ARMS.items()
    }
    builders["ViT, positions resampled"] = vit
    found: dict[str, list[list[float]]] = {}
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
    for index, scale in enumerate(_SCALES):
        baseline = mean_and_deviation([row[index] for row in found["ViT, positions resampled"]])[0]
        size = round(side * scale)
        shape = (
            f"{images.name}, trained at {side} x {side}, tested at {size} x {size}, {steps} steps of 256, "
        )
        shape += f"{len(seeds)} seeds"
        for name in _ARMS:
            mean, deviation = mean_and_deviation([row[index] for row in found[name]])
            yield measured(
                f"test accuracy, {name}, {counts[name]:,} parameters", shape, mean, "%", better="higher",
                deviation=deviation, baseline_name=f"ViT, {counts['ViT, positions resampled']:,} parameters",
                baseline=baseline, required=1.0 if name == "TiC (both)" and scale != 1 else None,
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


_PARTS: dict[str, Measure] = {"speed": _speed, "models": _models, "quality": _quality}
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
