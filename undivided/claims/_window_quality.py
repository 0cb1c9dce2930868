"""Windows of one size in small vision transformers: with strides, as blocks, and by two forms of the attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.claims._harness import Row, measured
from undivided.claims._nat_shape import attend_by
from undivided.claims._tiny_lm import mean_and_deviation
from undivided.claims._tiny_vit import Trainer, accuracy, computing, normalised, on_device, tiny_vit
from undivided.data.images import ImageSet, digits, fashion_mnist
from undivided.layers.gna import NeighborhoodAttention

# Tokens of one pixel: 28 x 28 on a GPU, 8 x 8 on a CPU; the last stride is that of blocks.
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"window": 7, "strides": (1, 3, 7), "steps": 250, "batch_size": 128, "depth": 3},
    "cpu": {"window": 4, "strides": (1, 2, 4), "steps": 40, "batch_size": 64, "depth": 2},
}
SEEDS = (0, 1, 2)
Trained = dict[str, list[tuple[float, float]]]


def strides(device: str, quick: bool) -> Iterator[Row]:
    """Yields test losses and accuracies with windows of one size, by their stride."""
    window, own = SIZES[device]["window"], SIZES[device]["strides"]
    names = {stride: f"stride {stride}" for stride in own} | {own[-1]: "blocks"}
    arms = {name: (stride, "auto") for stride, name in names.items()}
    trained, shape = _trained(arms, device, quick)
    for column, (title, unit, better) in enumerate((("loss", "nats", "lower"), ("accuracy", "%", "higher"))):
        means = {name: mean_and_deviation([one[column] for one in runs]) for name, runs in trained.items()}
        for name, (mean, deviation) in means.items():
            is_baseline = name == "blocks"
            yield measured(
                f"test {title}, windows of {window} x {window}, {name}", shape, mean, unit, better=better,
                deviation=deviation, baseline_name=None if is_baseline else "blocks",
                baseline=None if is_baseline else means["blocks"][0],
            )  # fmt: skip


def forms(device: str, quick: bool) -> Iterator[Row]:
    """Yields the difference of trained losses between the forms, beside that between seeds."""
    if device != "cuda":
        return
    trained, shape = _trained({"fused": (1, "triton"), "naive": (1, "naive")}, device, quick)
    losses = {name: [loss for loss, _ in runs] for name, runs in trained.items()}
    differences = [abs(a - b) for a, b in zip(losses["fused"], losses["naive"], strict=True)]
    fused, deviation = mean_and_deviation(losses["fused"])
    yield measured(
        "test loss after training by the fused kernels", shape, fused, "nats", better="lower", deviation=deviation,
        baseline_name="by the naive ones", baseline=mean_and_deviation(losses["naive"])[0],
    )  # fmt: skip
    yield measured(
        "difference of test losses between fused and naive, same seeds", shape,
        sum(differences) / len(differences), "nats", better="lower", baseline_name="largest difference between seeds",
        baseline=max(losses["fused"]) - min(losses["fused"]), required=None if quick else 1.0,
    )  # fmt: skip


def _trained(arms: dict[str, tuple[int, str]], device: str, quick: bool) -> tuple[Trained, str]:
    """Test loss and accuracy of each arm (stride and backend) and seed, and the sizes in words."""
    sizes = SIZES[device]
    images = on_device(fashion_mnist() if device == "cuda" else digits(), device)
    steps, seeds = (sizes["steps"] // 10, SEEDS[:2]) if quick else (sizes["steps"], SEEDS)
    found: Trained = {}
    for name, (stride, backend) in arms.items():
        layer = NeighborhoodAttention.with_options(kernel_size=sizes["window"], stride=stride)
        build: Callable[..., nn.Module] = partial(
            tiny_vit, images, patch_size=1, embed_dim=64, depth=sizes["depth"], num_heads=2, mlp_ratio=2.0,
            attn_layer=layer,
        )  # fmt: skip
        model = build().to(device)
        attend_by(model, backend)
        trainer = Trainer(model, images, batch_size=sizes["batch_size"])
        for seed in seeds:
            trainer.reset(build(seed=seed).state_dict())
            trainer.run(steps=steps, learning_rate=2e-3, seed=seed)
            found.setdefault(name, []).append(
                (loss_of(model, images), accuracy(model, images, batch_size=500))
            )
    side = images.train_images.shape[-1]
    shape = (
        f"{images.name}, {side} x {side} tokens of 64, 2 heads, {sizes['depth']} blocks, {steps} steps of "
        f"{sizes['batch_size']}, {len(seeds)} seeds"
    )
    return found, shape


@torch.no_grad()
def loss_of(model: nn.Module, images: ImageSet, batch_size: int = 500) -> float:
    """Returns the mean cross-entropy of the test images, in nats.

    Args:
        model: a classifier.
        images: the set.
        batch_size: images at a time.
    """
    was_training = model.training
    model.eval()
    losses = []
    for x, y in zip(images.test_images.split(batch_size), images.test_labels.split(batch_size), strict=True):
        with computing(x.device):
            losses.append(F.cross_entropy(model(normalised(x)).float(), y, reduction="sum"))
    model.train(was_training)
    return float(torch.stack(losses).sum()) / len(images.test_labels)
