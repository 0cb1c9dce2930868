"""Sparsifiner's accuracy: small vision transformers of small images, converted in both phases, by share of keys.

Arms that choose other keys, or save as much in another way, start from the same teacher and are trained as long.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

from undivided.claims._harness import Row, measured
from undivided.data.images import ImageSet
from undivided.layers.sparsifiner import Connectivity, SparsifinerAttention, attention_cost
from undivided.ops import dense_attention

# Percentage points that the paper loses at most, and the savings it does so at.
DROP, SAVINGS = 0.4, (0.48, 0.70)
KEEP = (0.25, 0.1)
# The share at which other ways of saving as much are trained too.
_COMPARED = 0.25
_SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"patch": 2, "width": 96, "depth": 4, "heads": 3, "steps": (1000, 400, 200), "seeds": (0, 1, 2)},
    "cpu": {"patch": 1, "width": 48, "depth": 2, "heads": 3, "steps": (150, 60, 20), "seeds": (0,)},
}
# A further seed is begun only if it should end within so many seconds.
_SECONDS = 42
_PLACES = 0.3
_BATCH, _RATES = 128, (2e-3, 3e-3, 3e-4)
_CHOICES = ("oracle", "local", "random")


class Chooser(nn.Module):
    """Stands in for a predictor: chooses b keys a query by `score(query, key) [B, H, N - 1, N]`."""

    def __init__(self, budget: int, score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.budget, self.score = budget, score

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        phase: str = "sparse",
    ) -> Connectivity:
        score = self.score(query, key)
        return Connectivity(score.topk(self.budget, dim=-1).indices.sort(-1).values, score)


def true_logits(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The oracle's score."""
    return query[:, :, 1:].float() @ key.float().transpose(-2, -1)


def nearness(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Minus the distance on the map of patches; the class token is nearest of all."""
    side = math.isqrt(key.shape[2] - 1)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float().to(key.device)
    score = nn.functional.pad(-torch.cdist(place, place), (1, 0), value=1.0)
    return score.expand(*query.shape[:2], -1, -1)


def chance(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Random scores."""
    return torch.rand(*query.shape[:2], query.shape[2] - 1, key.shape[2], device=key.device)


class Linformer(nn.Module):
    """Attention to `rows` learned mixtures of all tokens, in the place of timm's attention whose weights it takes.

    `out = proj(softmax(q (E k)^T / sqrt(head_dim)) (F v))`; E and F start as means of neighbouring tokens.
    """

    def __init__(self, source: nn.Module, num_tokens: int, rows: int) -> None:
        super().__init__()
        self.num_heads = source.num_heads
        self.qkv, self.proj = source.qkv, source.proj
        cell = torch.arange(num_tokens) * rows // num_tokens
        means = nn.functional.one_hot(cell, rows).T.float()
        means = (means / means.sum(1, keepdim=True)).to(source.qkv.weight)
        self.key_rows, self.value_rows = nn.Parameter(means.clone()), nn.Parameter(means.clone())

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        key, value = self.key_rows.to(key) @ key, self.value_rows.to(value) @ value
        out = cast(torch.Tensor, dense_attention(query, key, value))
        return self.proj(out.transpose(1, 2).flatten(2))


def pruned_share(saving: float, depth: int) -> float:
    """Returns the share of patches left after the first block of `depth` that saves as much of attention's pairs."""
    return math.sqrt(max((depth * (1 - saving) - 1) / (depth - 1), 1e-4))


def quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields accuracies after both phases against the teacher's, and what other choices of as many keys have."""
    from undivided.claims._loss_trainer import small_images
    from undivided.claims._tiny_lm import mean_and_deviation

    sizes = _SIZES[device]
    # What a CPU trains in a minute has learnt too little.
    has_bars = device == "cuda"
    images = small_images(device)
    seeds = sizes["seeds"][: 1 if quick else None]
    keeps = KEEP[1:2] if quick else KEEP
    found: dict[tuple[float, str], list[float]] = {}
    start, done = time.perf_counter(), 0
    for seed in seeds:
        if done and (time.perf_counter() - start) * (done + 1) / done > _SECONDS:
            break
        for key, value in _one_seed(images, sizes, seed, keeps):
            found.setdefault(key, []).append(value)
        done += 1
    tokens = (images.train_images.shape[-1] // sizes["patch"]) ** 2 + 1
    steps = sizes["steps"]
    words = f"{images.name}, {tokens} tokens, {sizes['depth']} layers of {sizes['width']}, steps {steps[0]} (teacher), "
    words += f"{steps[1]} (phase 1), {steps[2]} (phase 2), {done} seeds"
    mean = {key: mean_and_deviation(values)[0] for key, values in found.items()}
    spread = {key: mean_and_deviation(values)[1] for key, values in found.items()}
    teacher, longer = (0.0, "teacher"), (0.0, "all pairs, trained as long")
    rivals = ((teacher, "all pairs, the teacher"), (longer, longer[1]))
    for key, rival in rivals:
        yield measured(
            f"test accuracy, {rival}", words, mean[key], "%", better="higher", deviation=spread[key]
        )
    for keep in keeps:
        saving = mean[keep, "saving"]
        shape = f"{words}, {math.ceil(keep * tokens)} keys a query, {100 * saving:.0f} % of attention saved"
        for better, worse in (("oracle", "ours"), ("ours", "local"), ("local", "random")):
            yield measured(
                f"share of the true weights on chosen keys, {better}", shape, mean[keep, f"mass, {better}"], "%",
                better="higher", deviation=spread[keep, f"mass, {better}"], baseline_name=worse,
                baseline=mean[keep, f"mass, {worse}"], required=1.0 if has_bars else None,
            )  # fmt: skip
        for name in (*_CHOICES, "ours"):
            yield measured(
                f"accuracy of 2000 test images before training, keys by {name}", shape,
                mean[keep, f"untrained, {name}"], "%", better="higher",
                deviation=spread[keep, f"untrained, {name}"], baseline_name="all pairs, all test images",
                baseline=mean[teacher],
            )  # fmt: skip
        within = has_bars and SAVINGS[0] <= saving <= SAVINGS[1]
        for key, rival in rivals:
            yield measured(
                f"test accuracy after both phases, against {rival}", shape, mean[keep, "ours"], "%", better="higher",
                deviation=spread[keep, "ours"], baseline_name=rival, baseline=mean[key],
                required=(mean[key] - DROP) / mean[key] if within else None,
            )  # fmt: skip
        for name in ("token pruning", "Linformer"):
            if (keep, name) in mean:
                rival = f"{name}, as many multiply-adds of attention"
                yield measured(
                    f"test accuracy after both phases of the first seed, against {rival}", shape,
                    found[keep, "ours"][0], "%", better="higher", baseline_name=rival, baseline=mean[keep, name],
                )  # fmt: skip


def local_vit(images: ImageSet, sizes: dict[str, Any], seed: int) -> nn.Module:
    """Returns an untrained vision transformer whose queries and keys start alike, beside sines of places.

    So the attention of large trained models looks (arXiv 2305.09828), partly local and by likeness; that of a small one
    trained for a minute from other weights stays spread over all tokens, and leaves nothing to choose.
    """
    from timm.layers import build_sincos2d_pos_embed
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    side, width = images.train_images.shape[-1], sizes["width"]
    model = VisionTransformer(
        img_size=side, patch_size=sizes["patch"], in_chans=1, num_classes=images.num_classes, embed_dim=width,
        depth=sizes["depth"], num_heads=sizes["heads"],
    )  # fmt: skip
    with torch.no_grad():
        places = build_sincos2d_pos_embed([side // sizes["patch"]] * 2, dim=width, temperature=100.0)
        model.pos_embed[:, 1:].copy_(_PLACES * places)
        for block in model.blocks:
            alike = torch.linalg.qr(torch.randn(width, width))[0]
            block.attn.qkv.weight[: 2 * width].copy_(torch.cat([alike, alike]))
    return model


def _one_seed(
    images: Any, sizes: dict[str, Any], seed: int, keeps: tuple[float, ...]
) -> Iterator[tuple[tuple[float, str], float]]:
    """Yields (share of keys, quantity) and value of one teacher and all that is made of it."""
    from undivided.claims._loss_trainer import LossTrainer
    from undivided.claims._tiny_vit import Trainer, accuracy, normalised
    from undivided.convert.sparsifiner import (
        SparsifinerLoss,
        reconstruction_loss,
        set_phase,
        sparse_layers,
        sparsify,
    )

    teacher = local_vit(images, sizes, seed).to(images.train_images.device)
    Trainer(teacher, images, batch_size=_BATCH).run(
        steps=sizes["steps"][0], learning_rate=_RATES[0], seed=seed
    )
    teacher.eval().requires_grad_(False)
    yield (0.0, "teacher"), accuracy(teacher, images)
    some = ImageSet(images.name, images.train_images, images.train_labels, images.test_images[:2000],
                    images.test_labels[:2000])  # fmt: skip
    tokens = teacher.pos_embed.shape[1]
    criterion = SparsifinerLoss(teacher)

    def tuned(model: nn.Module) -> float:
        trainer = LossTrainer(model, images, criterion, batch_size=_BATCH)
        trainer.run(steps=sizes["steps"][2], learning_rate=_RATES[2], seed=seed)
        return accuracy(model, images)

    # Phase 1 does not know how many keys will be kept.
    first, _ = sparsify(teacher, keep=0.5, seed=seed)
    set_phase(first, "reconstruct")

    def reconstruct(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        model(x)
        return reconstruction_loss(model)

    LossTrainer(first, images, reconstruct, batch_size=_BATCH).run(
        steps=sizes["steps"][1], learning_rate=_RATES[1], seed=seed
    )
    set_phase(first, "sparse")
    layers = sparse_layers(first)
    density = sum(float((layer.predictor.basis() != 0).float().mean()) for layer in layers) / len(layers)
    all_pairs, _ = sparsify(teacher, keep=1.0, seed=seed)
    set_phase(all_pairs, "sparse")
    for layer in sparse_layers(all_pairs):
        layer.phase = "dense"
    yield (0.0, "all pairs, trained as long"), tuned(all_pairs)

    for keep in keeps:
        budget = math.ceil(keep * tokens)
        head_dim = sizes["width"] // sizes["heads"]
        saving = attention_cost(tokens, sizes["heads"], head_dim, budget, density=density).saving
        yield (keep, "saving"), saving
        ours = copy.deepcopy(first)
        for layer in sparse_layers(ours):
            layer.predictor.keep = keep
        arms = {"ours": ours}
        for name, score in zip(_CHOICES, (true_logits, nearness, chance), strict=True):
            arms[name] = _with_chooser(first, budget, score)
        for name, model in arms.items():
            yield (keep, f"mass, {name}"), 100 * mass_on_chosen(model, normalised(some.test_images[:64]))
            yield (keep, f"untrained, {name}"), accuracy(model, some)
        yield (keep, "ours"), tuned(ours)
        if keep == _COMPARED and seed == 0:
            share = pruned_share(saving, sizes["depth"])
            pruned, _ = sparsify(teacher, keep=1.0, prune_after=(0,), token_keep=share, seed=seed)
            set_phase(pruned, "sparse")
            yield (keep, "token pruning"), tuned(pruned)
            # As many multiply-adds: the mixing of keys and values costs what attention to them does.
            low = copy.deepcopy(teacher).requires_grad_(True)
            for block in low.blocks:
                block.attn = Linformer(block.attn, tokens, max(round(tokens * (1 - saving) / 2), 1))
            yield (keep, "Linformer"), tuned(low.to(images.train_images.device))


def _with_chooser(model: nn.Module, budget: int, score: Callable[..., torch.Tensor]) -> nn.Module:
    from undivided.convert.sparsifiner import sparse_layers

    model = copy.deepcopy(model)
    for layer in sparse_layers(model):
        layer.predictor = Chooser(budget, score)
    return model


@torch.no_grad()
def mass_on_chosen(model: nn.Module, x: torch.Tensor) -> float:
    """Returns the share of the weights of dense attention that lies on chosen keys, over layers, images and heads."""
    shares = []

    def keep(layer: SparsifinerAttention, given: Any, out: torch.Tensor) -> None:
        query, key, _ = layer.heads(given[0])
        weights = (layer.scale * true_logits(query, key)).softmax(-1)
        chosen = layer.predictor(query, key).indices.long()
        shares.append(float(weights.gather(-1, chosen).sum(-1).mean()))

    handles = [
        layer.register_forward_hook(keep)
        for layer in model.modules()
        if isinstance(layer, SparsifinerAttention)
    ]
    try:
        model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
    return sum(shares) / len(shares)
