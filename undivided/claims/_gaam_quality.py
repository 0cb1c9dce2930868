"""Heads of classification with Gaussian attention over the layers of frozen encoders, beside dot-product attention.

Three sets of features. Digits: a vision transformer of eight layers has learnt which way scikit-learn's digits are
turned, and the heads learn which digit it is. Text: all layers of SmolLM2-135M-Instruct, and the heads learn which of
four speeches a passage is from. Drift: layers of prototypes and noise whose gain and offset change from sample to
sample, or do not. Arms without attention, with a gate that is not trained and with a linear map alone say how much of
a gain is the gate's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from undivided.claims._harness import Row, measured
from undivided.claims._tiny_lm import mean_and_deviation
from undivided.data import ImageSet, digits
from undivided.layers.gaam import GaussianAdaptiveAttention, GaussianAdaptiveBlock
from undivided.models.gat import LayerwiseGAT

_SEEDS = (0, 1, 2, 3, 4)
# Name, attention, whether it has one density head or the most of the setting, and whether it is trained.
_ARMS = (
    ("MHA", "mha", False, True),
    ("MHA and batch normalisation", "mha_bn", False, True),
    ("DAAM", "daam", False, True),
    ("DAAM, 1 head", "daam", True, True),
    ("DAAM, not trained", "daam", False, False),
    ("GQDAAM", "gqdaam", False, True),
    ("published layer", "gaam", False, True),
    ("published layer, 3 blocks", "gaam3", False, True),
    ("no attention", "none", True, True),
    ("linear map of the features", "linear", True, True),
)
# DAAM may have so many times fewer weights than MHA.
_FEWER = 10.0
Features = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _Study:
    """Features `[samples, layers, width]` and labels of training and test, by seed, and how heads are trained."""

    features: Callable[[int], Features]
    heads: int
    channels: int
    steps: int
    where: str
    bar: float | None = None


def quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields test accuracies of the heads on digits, with the weights that their attention has."""
    # On a GPU a step takes its launches, whatever it computes.
    images, steps = digits(), 60 if quick else 400 if device == "cpu" else 200
    study = _Study(
        lambda seed: _frozen_features(images, seed, steps, device), 2, 32, steps,
        "digits, frozen transformer of 8 layers of 64 that tells rotations", 1.0,
    )  # fmt: skip
    yield from _compare(study, device, _SEEDS[:1] if quick else _SEEDS)


def text(device: str, quick: bool) -> Iterator[Row]:
    """Yields the same for passages of speeches through SmolLM2."""
    passages, labels = _passages(device)
    study = _Study(
        lambda seed: _split(passages, labels, seed), 6, 32, 60 if quick else 200,
        "passages of 48 tokens of four speeches, frozen SmolLM2-135M-Instruct, 30 layers of 576",
    )  # fmt: skip
    yield from _compare(study, device, _SEEDS[:1] if quick else _SEEDS[:3])


def drift(device: str, quick: bool) -> Iterator[Row]:
    """Yields the same for synthetic layers that drift and that do not."""
    for drifts in (True, False):
        words = "gain 0.2 to 5 and an offset for each sample" if drifts else "no drift"
        study = _Study(
            partial(_synthetic, drifts=drifts, device=device), 2, 32, 60 if quick else 300,
            f"64 classes, 8 layers of 64, {words}", 1.0 if drifts else None,
        )  # fmt: skip
        yield from _compare(study, device, _SEEDS[:1] if quick else _SEEDS[:3])


def _compare(study: _Study, device: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    found: dict[str, list[float]] = {name: [] for name, *_ in _ARMS}
    weights: dict[str, int] = {}
    for seed in seeds:
        features = study.features(seed)
        for name, attention, is_single, trained in _ARMS:
            torch.manual_seed(100 + seed)
            head = _head(study, features, attention, 1 if is_single else study.heads).to(device)
            weights[name] = _attention_weights(head)
            if not trained:
                head.mix.requires_grad_(False)
            found[name].append(_accuracy(head, features, study.steps, seed))
    where = f"{study.where}, {study.steps} steps, {len(seeds)} seeds"
    base = mean_and_deviation(found["MHA"])[0]
    for name, values in found.items():
        value, deviation = mean_and_deviation(values)
        is_base = name == "MHA"
        yield measured(
            f"test accuracy, {name}, {weights[name]} weights", where, value, "%", better="higher",
            deviation=deviation, baseline_name=None if is_base else "MHA", baseline=None if is_base else base,
            required=study.bar if name == "DAAM" else None,
        )  # fmt: skip
    yield measured(
        "weights of the attention, DAAM", where, weights["DAAM"], "weights", better="lower",
        baseline_name="MHA", baseline=weights["MHA"], required=_FEWER,
    )  # fmt: skip


def _head(study: _Study, features: Features, attention: str, heads: int) -> nn.Module:
    layers, width = features[0].shape[1:]
    classes = int(features[1].max()) + 1
    if attention == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(layers * width, classes))
    kind = "gaam" if attention == "gaam3" else attention
    head = LayerwiseGAT(layers, width, classes, attention=kind, num_heads=heads, channels=study.channels)
    if attention == "gaam3":
        head.mix = GaussianAdaptiveBlock(-1, heads, 5, 3)
    return head


def _attention_weights(head: nn.Module) -> int:
    parts = [getattr(head, part) for part in ("mix", "grouped", "norm", "reduce") if hasattr(head, part)]
    return sum(p.numel() for part in parts for p in part.parameters())


def _frozen_features(images: ImageSet, seed: int, steps: int, device: str) -> Features:
    """Hidden layers `[images, layers, width]` of training and test images, each behind its labels."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=4, embed_dim=64, depth=8, num_heads=4,
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
    train, test = _normalised(*layers)
    return train, images.train_labels.to(device), test, images.test_labels.to(device)


def _normalised(train: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Large encoders hand over normalised layers; a residual stream is brought to their size."""
    mean, size = train.mean(0), train.std(0).clamp(min=1e-6)
    return (train - mean) / size, (test - mean) / size


@torch.no_grad()
def _passages(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden layers `[passages, layers, width]` of passages, and the speech that each is from."""
    from undivided.data import demo_texts
    from undivided.models.checkpoint import open_checkpoint
    from undivided.models.gat import pooled_layers

    opened = open_checkpoint("smollm2-135m", device=device)
    layers, labels = [], []
    for label, speech in enumerate(demo_texts().heldout.values()):
        ids = torch.tensor(opened.tokenizer(speech, add_special_tokens=False, verbose=False).input_ids)
        for part in ids[: len(ids) // 48 * 48].view(-1, 48).split(64):
            hidden = opened.model(
                input_ids=part.to(device), use_cache=False, output_hidden_states=True
            ).hidden_states
            layers.append(pooled_layers(hidden).float())
            labels.append(torch.full((len(part),), label))
    return torch.cat(layers), torch.cat(labels).to(device)


def _split(features: torch.Tensor, labels: torch.Tensor, seed: int) -> Features:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    train, test = order[len(order) // 3 :], order[: len(order) // 3]
    seen, unseen = _normalised(features[train], features[test])
    return seen, labels[train], unseen, labels[test]


def _synthetic(seed: int, drifts: bool, device: str) -> Features:
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(64, 8, 64, generator=generator)
    labels = torch.arange(64).repeat(48)
    x = prototypes[labels] + 1.5 * torch.randn(len(labels), 8, 64, generator=generator)
    if drifts:
        # Gains are evenly spread in the logarithm.
        gain = 0.2 * 25 ** torch.rand(len(labels), 1, 1, generator=generator)
        x = gain * x + 2.0 * torch.randn(len(labels), 1, 1, generator=generator)
    x, labels, train = x.to(device), labels.to(device), 64 * 32
    return x[:train], labels[:train], x[train:], labels[train:]


def _accuracy(head: nn.Module, features: Features, steps: int, seed: int) -> float:
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


def importance(device: str, quick: bool) -> Iterator[Row]:
    """Yields how well the Importance Factor of a gate ranks the features that alone carry the label."""
    from undivided.inspect import importance_factor

    features, known, steps = 64, 8, 60 if quick else 300
    scores: dict[str, list[float]] = {"Importance Factor": [], "input times gradient": []}
    for seed in _SEEDS:
        torch.manual_seed(seed)
        informative = torch.zeros(features, dtype=torch.bool)
        informative[torch.randperm(features)[:known]] = True
        labels = torch.randint(2, (1024,))
        x = torch.randn(1024, features)
        x[:, informative] += labels[:, None] - 0.5
        x, labels = x.to(device), labels.to(device)
        gate = GaussianAdaptiveAttention(1, 1, 2).to(device)
        head = nn.Linear(features, 2).to(device)
        optimizer = torch.optim.Adam([*gate.parameters(), *head.parameters()], lr=3e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(head(features * gate(x)), labels).backward()
            optimizer.step()
        factor = importance_factor([gate(x, need_weights=True)[1]])
        x.requires_grad_()
        F.cross_entropy(head(features * gate(x)), labels).backward()
        saliency = (x * x.grad).abs().mean(0)
        for name, score in (("Importance Factor", factor), ("input times gradient", saliency)):
            scores[name].append(_area(score.cpu().detach(), informative))
    where = f"{known} of {features} features carry the label, mixture gate of 2 densities, {steps} steps"
    value, deviation = mean_and_deviation(scores["Importance Factor"])
    yield measured(
        "area under the curve of the ranking by the Importance Factor, either way round",
        f"{where}, {len(_SEEDS)} seeds", value, "AUROC", better="higher", deviation=deviation,
        baseline_name="input times gradient", baseline=mean_and_deviation(scores["input times gradient"])[0],
    )  # fmt: skip


def _area(score: torch.Tensor, positive: torch.Tensor) -> float:
    """Area under the receiver's curve; a factor may mark what matters by its lowest values too."""
    pairs = score[positive][:, None] - score[~positive]
    area = ((pairs > 0).float() + 0.5 * (pairs == 0).float()).mean().item()
    return max(area, 1 - area)
