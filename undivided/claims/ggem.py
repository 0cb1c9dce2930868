"""GGeM: a pooling that costs one read of the tokens, and what it gives a small vision transformer.

Times are of the pooling alone, at the shapes of ViT-B and ViT-L, against one read of the tokens at the measured rate of
a copy, and as a share of a ViT-B's forward pass. Accuracies are of small models that differ in their pooling alone,
paired by seed; differences of a few tenths of a point, as the paper reports them, are within what ten seeds can tell
apart or below it, and the interval says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import measured_ceilings, time_rivals
from undivided.data.images import ImageSet
from undivided.layers.ggem import GGeMPool, replace_pool
from undivided.ops import generalised_mean
from undivided.testing import compare_op

BANDWIDTH, SHARE = 0.7, 0.01
READ, COMPOSED, MEAN = "one read at the rate of a copy", "PyTorch's operators", "the mean"
_SHAPES = (
    ((256, 197, 768), torch.bfloat16), ((128, 197, 1024), torch.bfloat16), ((64, 1025, 1024), torch.bfloat16),
    ((256, 197, 768), torch.float32),
)  # fmt: skip


def gate(device: str) -> None:
    """Raises unless every backend is as accurate as the formula, forward and backward, and finite at large powers."""
    on_cuda = device == "cuda"
    backends = ("triton", "composed") if on_cuda else ("composed",)
    for shape in ((4, 196, 768), (2, 33, 40)) if on_cuda else ((2, 13, 12),):
        x = {
            "x": torch.rand(shape, device=device) + 0.1,
            "power": 4 * torch.rand(shape[2], device=device) + 0.5,
        }
        for backend in backends:
            fast, exact = (partial(generalised_mean, backend=name) for name in (backend, "reference"))
            compare_op(fast, exact, exact, x, torch.bfloat16 if on_cuda else torch.float32)
    large = 40 * torch.randn(2, 196, 64, device=device).abs().bfloat16()
    for backend in backends:
        found = generalised_mean(large, torch.full((64,), 50.0, device=device), backend=backend)
        if not bool(found.isfinite().all()):
            raise ArithmeticError(f'backend "{backend}" is not finite at an exponent of 50 in bfloat16.')


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of the pooling, forward and backward."""
    ceilings = measured_ceilings(device)
    for shape, dtype in _SHAPES[: 1 if quick else None]:
        x = torch.randn(shape, device=device, dtype=dtype)
        tokens = x[:, 1:]
        power = torch.full((shape[2],), 3.0, device=device)
        rivals: dict[str, Callable[[], object]] = {
            "ours": partial(generalised_mean, tokens, power, backend="triton"),
            COMPOSED: partial(generalised_mean, tokens, power, backend="composed"),
            MEAN: partial(tokens.mean, 1),
        }
        with torch.no_grad():
            times = time_rivals(rivals, device, method="graph", samples=30, seconds=0.05)
        ours = times["ours"].median
        least = ceilings.floor(bytes_moved=tokens.numel() * tokens.element_size())
        words = f"{list(shape)}, {shape[2] // 64} groups, {str(dtype).removeprefix('torch.')}"
        yield measured(
            f"GGeM forward, against {READ}", words, ours, "ms", better="lower", baseline_name=READ, baseline=least,
            required=BANDWIDTH, fraction_of_ceiling=least / ours,
        )  # fmt: skip
        for name in (COMPOSED, MEAN):
            yield measured(
                f"GGeM forward, against {name}", words, ours, "ms", better="lower", baseline_name=name,
                baseline=times[name].median,
            )  # fmt: skip
        leaf, dout = (
            tokens.detach().requires_grad_(),
            torch.randn(shape[0], shape[2], device=device, dtype=dtype),
        )
        power = power.requires_grad_()
        steps = {name: _step(leaf, power, dout, name) for name in ("triton", "composed")}
        both = time_rivals(steps, device, samples=30, seconds=0.05)
        yield measured(
            f"GGeM forward and backward, against {COMPOSED}", words, both["triton"].median, "ms", better="lower",
            baseline_name=COMPOSED, baseline=both["composed"].median,
        )  # fmt: skip
    if not quick:
        yield from _share(device)


def _step(
    leaf: torch.Tensor, power: torch.Tensor, dout: torch.Tensor, backend: str
) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: torch.autograd.grad(generalised_mean(leaf, power, backend=backend), (leaf, power), dout)


def _share(device: str) -> Iterator[Row]:
    """Yields the pooling's time against a hundredth of a ViT-B's forward pass."""
    import timm

    batch = 128
    found = timm.create_model("vit_base_patch16_224").to(device, torch.bfloat16).eval()
    images = torch.randn(batch, 3, 224, 224, device=device, dtype=torch.bfloat16)
    tokens = torch.randn(batch, 197, 768, device=device, dtype=torch.bfloat16)
    pool = GGeMPool(768, 12, num_prefix_tokens=1, device=device)
    with torch.no_grad():
        whole = time_rivals({"ViT-B": partial(found, images)}, device, samples=30, seconds=0.05)[
            "ViT-B"
        ].median
        ours = time_rivals({"ours": lambda: pool(tokens)}, device, method="graph", samples=30)["ours"].median
    yield measured(
        "GGeM forward, against a hundredth of a ViT-B/16's forward pass", f"batch {batch}, 224 x 224, bf16", ours, "ms",
        better="lower", baseline_name="1 % of ViT-B/16", baseline=SHARE * whole, required=1.0,
    )  # fmt: skip


_SIZES: dict[str, Any] = {"embed_dim": 96, "depth": 4, "num_heads": 12, "patch_size": 4}
_STEPS, _BATCH, _RATE, _SEEDS = 200, 256, 2e-3, tuple(range(10))
# Two-sided, 95 %, nine degrees of freedom.
_STUDENT = 2.262
_OURS, _GEM = "GGeM, a group a head", "GeM"
_ARMS: dict[str, int | None] = {
    "the class token": None,
    MEAN: 0,
    _GEM: 1,
    _OURS: 12,
    "an exponent a channel": 96,
}


def small_model(arm: str, images: ImageSet, seed: int) -> nn.Module:
    """Returns an untrained small vision transformer with the pooling of an arm; all start from the same weights."""
    from timm.models.vision_transformer import VisionTransformer

    from undivided.claims._tiny_vit import tiny_vit

    groups = _ARMS[arm]
    if groups is None:
        torch.manual_seed(seed)
        shape = images.train_images.shape
        return VisionTransformer(
            img_size=shape[-1], in_chans=shape[1], num_classes=images.num_classes, **_SIZES
        )
    found = tiny_vit(images, seed, **_SIZES)
    if groups:
        replace_pool(found, groups)
    return found


def paired(ours: list[float], others: list[float]) -> tuple[float, float, float]:
    """Returns mean and standard deviation of the differences of ten pairs, and the lower end of the 95 % interval."""
    from undivided.claims._tiny_lm import mean_and_deviation

    mean, deviation = mean_and_deviation([a - b for a, b in zip(ours, others, strict=True)])
    return mean, deviation, mean - _STUDENT * deviation / math.sqrt(len(ours))


def _quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields test accuracies of small models by pooling, and the paired differences."""
    from undivided.claims._tiny_lm import mean_and_deviation
    from undivided.claims._tiny_vit import Trainer, accuracy, on_device
    from undivided.data.images import fashion_mnist

    images = on_device(fashion_mnist(), device)
    steps = 20 if quick else _STEPS
    shape = (
        f"{images.name}, {_SIZES['depth']} blocks, width {_SIZES['embed_dim']}, {steps} steps of {_BATCH}, "
        f"{len(_SEEDS)} seeds"
    )
    scores: dict[str, list[float]] = {}
    for arm in _ARMS:
        found = small_model(arm, images, 0).to(device)
        trainer = Trainer(found, images, batch_size=_BATCH, shift=2)
        scores[arm] = []
        for seed in _SEEDS:
            trainer.reset(small_model(arm, images, seed).state_dict())
            trainer.run(steps=steps, learning_rate=_RATE, seed=seed)
            scores[arm].append(accuracy(found, images))
        mean, deviation = mean_and_deviation(scores[arm])
        has_rival = arm not in ("the class token", MEAN)
        yield measured(
            f"test accuracy, pooled by {arm}", shape, mean, "%", better="higher", deviation=deviation,
            baseline_name=MEAN if has_rival else None,
            baseline=mean_and_deviation(scores[MEAN])[0] if has_rival else None,
        )  # fmt: skip
    for rival in (MEAN, _GEM):
        mean, deviation, lower = paired(scores[_OURS], scores[rival])
        yield measured(
            f"paired difference in test accuracy, {_OURS}, less {rival}", shape, mean, "points", better="higher",
            deviation=deviation,
        )  # fmt: skip
        yield measured(
            f"lower end of its 95 % interval, {_OURS}, less {rival}", shape, lower, "points", better="higher"
        )


_PARTS: dict[str, Measure] = {"speed": _speed, "quality": _quality}
CLAIM = Claim(
    slug="ggem",
    source="arXiv 2212.04114, abstract",
    paper=(
        "0.1 to 0.7 points above the baselines' own pooling on ImageNet-1K, with one exponent a group of channels.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
    devices=("cuda",),
)
