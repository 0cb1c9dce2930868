"""GAAM: heads of classification on frozen features, and the gate's kernel beside plain PyTorch.

Quality is that of the paper's heads on all layers of a frozen encoder, at the smallest scale: a vision transformer of
eight layers has learnt which way scikit-learn's digits are turned, and the heads learn which digit it is, five seeds.
Arms without a gate, and with a gate that is not trained, say how much of the gain is the gate's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import measured_ceilings, time_rivals
from undivided.claims._tiny_lm import mean_and_deviation
from undivided.data import ImageSet, digits
from undivided.layers.gaam import GaussianAdaptiveAttention
from undivided.models.gat import LayerwiseGAT
from undivided.ops.gaussian import gaussian_gate
from undivided.testing import compare_op

_SEEDS = (0, 1, 2, 3, 4)
_LAYERS, _WIDTH = 8, 64
# Name, attention, heads of the density, and whether the attention is trained.
_ARMS = (
    ("MHA", "mha", 1, True),
    ("MHA and batch normalisation", "mha_bn", 1, True),
    ("DAAM, 2 heads", "daam", 2, True),
    ("DAAM, 1 head", "daam", 1, True),
    ("DAAM, 2 heads, not trained", "daam", 2, False),
    ("GQDAAM", "gqdaam", 2, True),
    ("published layer", "gaam", 4, True),
    ("no attention", "none", 1, True),
)
# DAAM may have so many times fewer weights than MHA.
_FEWER = 10.0


def gate(device: str) -> None:
    """Raises unless the gate's fast forms, forward and backward, are as accurate as the densities one by one."""
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    for shape in ((2, 3, 257, 40), (4, 1, 96, 1)):
        inputs = {
            "x": torch.randn(*shape, device=device, dtype=torch.float64),
            "offset": 0.3 * torch.randn(shape[1], 5, device=device, dtype=torch.float64),
            "width": 1 + torch.rand(shape[1], 5, device=device, dtype=torch.float64),
        }
        for dtype in dtypes:
            for backend in ("triton", "composed") if device == "cuda" else ("composed",):
                compare_op(_gated(backend), _gated("reference"), _gated("reference"), inputs, dtype)


def _gated(backend: str) -> Callable[..., torch.Tensor]:
    return lambda x, offset, width: gaussian_gate(x, offset, width, backend=backend)


def quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields test accuracies of the heads, with the weights that their attention has."""
    images = digits()
    seeds = _SEEDS[:1] if quick else _SEEDS
    steps = 60 if quick else 400
    found: dict[str, list[float]] = {name: [] for name, *_ in _ARMS}
    weights: dict[str, int] = {}
    for seed in seeds:
        features = _frozen_features(images, seed, steps, device)
        for name, attention, heads, trained in _ARMS:
            torch.manual_seed(100 + seed)
            head = LayerwiseGAT(_LAYERS, _WIDTH, 10, attention=attention, num_heads=heads, channels=32).to(
                device
            )
            parts = [
                head.mix,
                *(getattr(head, part) for part in ("grouped", "norm", "reduce") if hasattr(head, part)),
            ]
            weights[name] = sum(p.numel() for part in parts for p in part.parameters())
            head.mix.requires_grad_(trained)
            found[name].append(_accuracy(head, features, steps, seed))
    where = (
        f"digits, frozen transformer of {_LAYERS} layers of {_WIDTH} that tells rotations, {steps} steps, "
        f"{len(seeds)} seeds"
    )
    base = mean_and_deviation(found["MHA"])[0]
    for name, values in found.items():
        value, deviation = mean_and_deviation(values)
        is_base = name == "MHA"
        yield measured(
            f"test accuracy, {name}, {weights[name]} weights", where, value, "%", better="higher",
            deviation=deviation, baseline_name=None if is_base else "MHA", baseline=None if is_base else base,
            required=1.0 if name == "DAAM, 2 heads" else None,
        )  # fmt: skip
    yield measured(
        "weights of the attention, DAAM of 2 heads", where, weights["DAAM, 2 heads"], "weights", better="lower",
        baseline_name="MHA", baseline=weights["MHA"], required=_FEWER,
    )  # fmt: skip


def _frozen_features(images: ImageSet, seed: int, steps: int, device: str) -> tuple[torch.Tensor, ...]:
    """Hidden layers `[images, layers, width]` of training and test images, and the labels of both."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=4, embed_dim=_WIDTH, depth=_LAYERS, num_heads=4,
        class_token=False, global_pool="avg",
    ).to(device)  # fmt: skip
    pictures = [x.to(device).float() / 255 - 0.3 for x in (images.train_images, images.test_images)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2 * steps):
        chosen = pictures[0][torch.randint(len(pictures[0]), (64,), generator=generator).to(device)]
        turns = torch.randint(4, (64,), generator=generator)
        turned = torch.stack([torch.rot90(x, int(k), (1, 2)) for x, k in zip(chosen, turns, strict=True)])
        loss = F.cross_entropy(model(turned), turns.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    layers = []
    with torch.no_grad():
        for group in pictures:
            tokens = model.forward_intermediates(group, output_fmt="NLC", intermediates_only=True)
            layers.append(torch.stack([x.mean(1) for x in tokens], dim=1))
    # Large encoders hand over normalised layers; this one's residual stream is brought to their size.
    mean, size = layers[0].mean(0), layers[0].std(0)
    train, test = ((x - mean) / size for x in layers)
    return train, images.train_labels.to(device), test, images.test_labels.to(device)


def _accuracy(head: nn.Module, features: tuple[torch.Tensor, ...], steps: int, seed: int) -> float:
    train, labels, test, expected = features
    parameters = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    head.train()
    for _ in range(steps):
        chosen = torch.randint(len(train), (64,), generator=generator).to(train.device)
        loss = F.cross_entropy(head(train[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    with torch.no_grad():
        return 100 * (head(test).argmax(1) == expected).float().mean().item()


def speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of the gate beside the densities one by one and beside dot-product attention, on a GPU."""
    if device == "cpu":
        return
    for batch, length, width in ((32, 4096, 1024), (4, 32768, 1024))[: 1 if quick else 2]:
        x = torch.randn(batch, length, width, device=device, dtype=torch.bfloat16)
        layer = GaussianAdaptiveAttention(1, 1, 5).to(device)
        rows, own = x[:, None], (layer.offset, layer.width)
        heads = x.unflatten(-1, (8, -1)).transpose(1, 2)
        with torch.no_grad():
            calls = {
                "ours": partial(gaussian_gate, rows, *own, backend="triton"),
                "eager, density by density": partial(gaussian_gate, rows, *own, backend="reference"),
                "scaled_dot_product_attention, 8 heads": partial(
                    F.scaled_dot_product_attention, heads, heads, heads
                ),
            }
            times = time_rivals(calls, device, method="graph", seconds=0.05)
        ours = times.pop("ours").median
        fraction = measured_ceilings(device).fraction(ours, bytes_moved=2 * x.numel() * x.element_size())
        bars = {"eager, density by density": 5.0}
        if length == 32768:
            bars["scaled_dot_product_attention, 8 heads"] = 50.0
        for name, timing in times.items():
            yield measured(
                f"gate of 5 densities, against {name}", f"batch {batch}, {length} tokens of {width}, bf16", ours, "ms",
                better="lower", baseline_name=name, baseline=timing.median, required=bars.get(name),
                fraction_of_ceiling=fraction,
            )  # fmt: skip


_PARTS: dict[str, Measure] = {"quality": quality, "speed": speed}
CLAIM = Claim(
    slug="gaam",
    source="arXiv 2401.11143, abstract and experiments",
    paper=(
        "CIFAR-100 with frozen BEiT-Large features: MHA 61.7, with batch normalisation 66.1, GQDAAM 80.1, DAAM of 8 "
        "heads 80.3, of one head 80.6.",
        "IEMOCAP with WavLM-Large: MHA 62.3, DAAM of 8 heads 67.4. AG News with Llama-2-13B: 94.6 both.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
    devices=("cpu", "cuda"),
)
