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
_STEPS, _BATCH, _RATE, _SEEDS = 300, 256, 2e-3, tuple(range(10))
# Two-sided, 95 %, nine degrees of freedom.
_STUDENT = 2.262
_OURS, _GEM, _TOKEN, _MAX = "GGeM, a group a head", "GeM", "the class token", "the maximum"
_ARMS: dict[str, int | None] = {
    _TOKEN: None,
    MEAN: 0,
    _MAX: 0,
    _GEM: 1,
    _OURS: 12,
    "an exponent a channel": 96,
}


def small_model(arm: str, images: ImageSet, seed: int, num_classes: int | None = None) -> nn.Module:
    """Returns an untrained small vision transformer with the pooling of an arm; all start from the same weights.

    With 0 classes it gives the pooled vector.
    """
    from timm.models.vision_transformer import VisionTransformer

    from undivided.claims._tiny_vit import tiny_vit

    groups = _ARMS[arm]
    if groups is None:
        torch.manual_seed(seed)
        shape = images.train_images.shape
        found = VisionTransformer(
            img_size=shape[-1], in_chans=shape[1], num_classes=images.num_classes, **_SIZES
        )
    else:
        found = tiny_vit(images, seed, **_SIZES)
    if arm == _MAX:
        found.global_pool = "max"
    if groups:
        replace_pool(found, groups)
    if num_classes is not None:
        found.head = nn.Linear(found.num_features, num_classes) if num_classes else nn.Identity()
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
    likeness: dict[str, list[float]] = {}
    powers: list[float] = []
    for arm in _ARMS:
        found = small_model(arm, images, 0).to(device)
        trainer = Trainer(found, images, batch_size=_BATCH, shift=2)
        scores[arm], likeness[arm] = [], []
        for seed in _SEEDS:
            trainer.reset(small_model(arm, images, seed).state_dict())
            trainer.run(steps=steps, learning_rate=_RATE, seed=seed)
            scores[arm].append(accuracy(found, images))
            likeness[arm].append(correlation_of_heads(pooled(found, images), _SIZES["num_heads"]))
            if arm == _OURS:
                pool = next(module for module in found.modules() if isinstance(module, GGeMPool))
                powers += pool.exponent.tolist()
        mean, deviation = mean_and_deviation(scores[arm])
        has_rival = arm not in (_TOKEN, MEAN)
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
        mean, deviation = mean_and_deviation(likeness[_OURS])
        yield measured(
            "correlation of channels of different heads in the pooled vector, mean of its size", shape, mean, "",
            better="lower", deviation=deviation, baseline_name=rival,
            baseline=mean_and_deviation(likeness[rival])[0],
        )  # fmt: skip
    mean, deviation = mean_and_deviation(powers)
    yield measured(
        f"learned exponents of {_SIZES['num_heads']} groups, from 3", shape, mean, "", better="higher",
        deviation=deviation,
    )  # fmt: skip
    yield measured("largest learned exponent", shape, max(powers), "", better="higher")
    yield measured("smallest learned exponent", shape, min(powers), "", better="lower")


@torch.no_grad()
def pooled(model: nn.Module, images: ImageSet, count: int = 2000) -> torch.Tensor:
    """Returns the vectors that are classified, `[count, C]`, of the first test images."""
    from undivided.claims._tiny_vit import computing, normalised

    found = []
    for x in images.test_images[:count].split(500):
        with computing(x.device):
            features = model.eval().forward_features(normalised(x))
            found.append(model.forward_head(features, pre_logits=True).float())
    return torch.cat(found)


def correlation_of_heads(vectors: torch.Tensor, num_heads: int) -> float:
    """Returns the mean absolute correlation, over images, of channels of different heads."""
    matrix = torch.corrcoef(vectors.T).nan_to_num().abs()
    head = torch.arange(len(matrix), device=matrix.device) * num_heads // len(matrix)
    return float(matrix[head[:, None] != head].mean())


def contrast(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """InfoNCE of unit vectors at a temperature of 0.1, every image of the same class a positive."""
    vectors = nn.functional.normalize(model(x).float(), dim=-1)
    logits = vectors @ vectors.T / 0.1
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    others = logits.masked_fill(itself, float("-inf")).log_softmax(-1).masked_fill(itself, 0.0)
    positive = (y[:, None] == y) & ~itself
    return -((others * positive).sum(1) / positive.sum(1).clamp(min=1)).mean()


def recall_and_precision(vectors: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Returns, in percent, how often the nearest other image is of the class, and the mean average precision."""
    vectors = nn.functional.normalize(vectors, dim=-1)
    likeness = (vectors @ vectors.T).fill_diagonal_(float("-inf"))
    order = likeness.argsort(dim=1, descending=True)[:, :-1]
    right = (labels[order] == labels[:, None]).float()
    rank = torch.arange(1, right.shape[1] + 1, device=right.device)
    precision = (right * right.cumsum(1) / rank).sum(1) / right.sum(1).clamp(min=1)
    return 100 * float(right[:, 0].mean()), 100 * float(precision.mean())


def _retrieval(device: str, quick: bool) -> Iterator[Row]:
    """Yields how well images of the same class are found by the pooled vector, leaving one out."""
    from undivided.claims._loss_trainer import LossTrainer
    from undivided.claims._tiny_lm import mean_and_deviation
    from undivided.claims._tiny_vit import on_device
    from undivided.data.images import fashion_mnist

    images = on_device(fashion_mnist(), device)
    seeds, steps = _SEEDS[: 1 if quick else 3], 20 if quick else _STEPS
    shape = (
        f"{images.name}, 2000 test images, {steps} steps of {_BATCH}, InfoNCE by class, {len(seeds)} seeds"
    )
    means: dict[str, tuple[float, float]] = {}
    for arm in (_TOKEN, MEAN, _MAX, _GEM, _OURS):
        model = small_model(arm, images, 0, num_classes=0).to(device)
        trainer = LossTrainer(model, images, contrast, batch_size=_BATCH)
        found = []
        for seed in seeds:
            trainer.reset(small_model(arm, images, seed, num_classes=0).state_dict())
            trainer.run(steps=steps, learning_rate=_RATE, seed=seed)
            found.append(recall_and_precision(pooled(model, images), images.test_labels[:2000]))
        both = [mean_and_deviation(values) for values in zip(*found, strict=True)]
        means[arm] = both[0][0], both[1][0]
        for place, what in enumerate(("nearest image of the same class", "mean average precision")):
            yield measured(
                f"{what}, pooled by {arm}", shape, both[place][0], "%", better="higher", deviation=both[place][1],
                baseline_name=MEAN if arm in (_MAX, _GEM, _OURS) else None,
                baseline=means[MEAN][place] if arm in (_MAX, _GEM, _OURS) else None,
            )  # fmt: skip


_PARTS: dict[str, Measure] = {"speed": _speed, "quality": _quality, "retrieval": _retrieval}
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
