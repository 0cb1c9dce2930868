"""KDGQA: what unequal groups cost, and whether they are better than equal ones.

The cost: the attention layer of ViT-L with 16 query heads on 8, against the uniform grouped-query attention of torch.
The authors split the query heads by sizes read back to the host and loop over groups; a head map needs neither.
The quality: a vision transformer is trained on small images, its heads are pooled, and every scheme continues from the
same weights. The paper's networks were pretrained on ImageNet and its images are larger, so that its "up to 8 %" is a
figure to compare with, not one that these can confirm or refute.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.claims._harness import Claim, Row, all_of, measured
from undivided.claims._timing import Timing, measured_ceilings, time_rivals
from undivided.claims._tiny_lm import mean_and_deviation
from undivided.claims._tiny_vit import Trainer, accuracy, normalised, on_device, tiny_vit
from undivided.convert.kdgqa import calibrate_head_maps, mha_to_gqa
from undivided.data.images import ImageSet, digits, fashion_mnist
from undivided.layers.kdgqa import KeyDrivenGQA
from undivided.layers.vision_gqa import VisionGQA
from undivided.ops import dense_attention
from undivided.testing import compare_op

WIDTH, HEADS, GROUPS, TOKENS, BATCH = 1024, 16, 8, 197, 32
WITHIN = 0.95
FROZEN, LIVE = "frozen head map", "a head map an image, live"
_SHAPE = f"batch {BATCH}, {TOKENS} tokens, width {WIDTH}, {HEADS} heads on {GROUPS}, bf16"
UNIFORM, LOOP = "uniform grouped-query attention", "loop over groups"
UNEVEN = (0, 0, 0, 0, 0, 2, 2, 3, 4, 4, 4, 4, 6, 6, 7, 7)


def gate(device: str) -> None:
    """Raises unless head maps are as accurate as eager PyTorch, and the loop over groups computes the same."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = {
        name: torch.randn(2, heads, 50, 64, device=device)
        for name, heads in (("query", HEADS), ("key", GROUPS), ("value", GROUPS))
    }
    shared = torch.tensor(UNEVEN, device=device)
    own = torch.stack([shared, shared.flip(0)])
    for head_map in (shared, own):

        def attention(backend: str, head_map: torch.Tensor = head_map) -> Callable[..., Any]:
            return lambda **x: dense_attention(**x, key_head_map=head_map, backend=backend)

        compare_op(attention("auto"), attention("reference"), attention("reference"), x, dtype)
        with torch.no_grad():
            compare_op(
                attention("auto"), attention("reference"), attention("reference"), x, dtype, grad_inputs=()
            )
    layer = KeyDrivenGQA(64, 8, 4, variant="released", device=device).double()
    loop = GroupLoop(64, 8, 4, device=device).double()
    loop.load_state_dict(layer.state_dict(), strict=False)
    images = torch.randn(3, 17, 64, device=device, dtype=torch.float64)
    torch.testing.assert_close(layer(images), loop(images), rtol=1e-10, atol=1e-10)


def speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of the attention layer, on CUDA alone."""
    if device == "cuda":
        yield from _speed(quick)


def quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields accuracies: on Fashion-MNIST on CUDA, on 8 x 8 digits on a CPU."""
    yield from _quality(_study(device, quick))


class GroupLoop(VisionGQA):
    """The composition of the authors' code: sizes of groups on the host, one attention a group, the outputs joined."""

    def attend(self, query, key, value, mask):
        norms = torch.norm(key, dim=(2, 3)).sum(dim=0)
        scaled = (norms - norms.min()) / (norms.max() - norms.min())
        counts = (scaled / scaled.sum() * self.num_heads).round().int()
        while counts.sum() > self.num_heads:
            counts[counts.argmax()] -= 1
        while counts.sum() < self.num_heads:
            counts[counts.argmin()] += 1
        queries = (query * self.scale).split(counts.tolist(), dim=1)
        outs = [
            F.softmax(group @ key[:, [index]].transpose(-2, -1), dim=-1) @ value[:, [index]]
            for index, group in enumerate(queries)
        ]
        return torch.cat(outs, dim=1)


# --- speed ---


def timed_layers() -> dict[str, nn.Module]:
    """The layers that are timed, with equal weights: ours frozen and live, uniform, and the loop over groups."""
    torch.manual_seed(0)
    uniform = VisionGQA(WIDTH, HEADS, GROUPS, qkv_bias=True)
    layers = {
        FROZEN: KeyDrivenGQA(WIDTH, HEADS, GROUPS, qkv_bias=True, frozen=True),
        LIVE: KeyDrivenGQA(WIDTH, HEADS, GROUPS, qkv_bias=True),
        UNIFORM: uniform,
        LOOP: GroupLoop(WIDTH, HEADS, GROUPS, qkv_bias=True),
    }
    for layer in layers.values():
        layer.load_state_dict(uniform.state_dict(), strict=False)
        layer.to("cuda", torch.bfloat16).eval()
    layers[FROZEN].head_map.copy_(torch.tensor(UNEVEN))
    return layers


@torch.no_grad()
def _speed(quick: bool) -> Iterator[Row]:
    layers = timed_layers()
    x = torch.randn(BATCH, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
    calls = {name: partial(layer, x) for name, layer in layers.items()}
    replayed = time_rivals(
        {name: calls[name] for name in (FROZEN, UNIFORM)}, "cuda", method="graph", seconds=0.3
    )
    yield _time("replayed", replayed, FROZEN, UNIFORM, WITHIN)
    called = time_rivals({name: calls[name] for name in (FROZEN, LIVE, LOOP)}, "cuda", seconds=0.3)
    for name in (FROZEN, LIVE):
        yield _time("called", called, name, LOOP)
    for name in (LOOP, LIVE):
        yield measured(
            f"waits of the host for the device in a forward: {name}",
            _SHAPE,
            waits(calls[name]),
            "waits",
            better="lower",
        )
    if quick:
        return
    # Compiled, or the allocation would be a score of small kernels.
    name = f"{LIVE}, compiled"
    rivals = {name: partial(torch.compile(layers[LIVE], fullgraph=True), x), UNIFORM: calls[UNIFORM]}
    yield _time("replayed", time_rivals(rivals, "cuda", method="graph", seconds=0.3), name, UNIFORM)


def _time(how: str, times: dict[str, Timing], name: str, rival: str, required: float | None = None) -> Row:
    flops = 4 * BATCH * TOKENS * WIDTH**2 * (1 + GROUPS / HEADS) + 4 * BATCH * TOKENS**2 * WIDTH
    return measured(
        f"attention layer forward, {how}: {name}, against {rival}", _SHAPE, times[name].median, "ms",
        better="lower", baseline_name=rival, baseline=times[rival].median, required=required,
        fraction_of_ceiling=measured_ceilings("cuda").fraction(times[name].median, flops=flops),
    )  # fmt: skip


def waits(function: Callable[[], object]) -> int:
    """How often a call makes the host wait for the device."""
    function()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(warning.message) for warning in caught)


# --- quality ---


@dataclass(frozen=True, kw_only=True)
class Study:
    """Sizes of the quality table."""

    images: ImageSet
    sizes: dict[str, Any]
    patch_size: int
    groups: tuple[int, ...]
    seeds: tuple[int, ...]
    batch_size: int
    steps: int
    learning_rate: float
    more_steps: int
    more_learning_rate: float
    window: int
    shift: int = 0
    flip: bool = False


@dataclass
class Arm:
    """What one scheme reached, a value a seed: accuracy in percent, and heads that an allocation re-assigns."""

    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)


FROM_START, RANDOM = "KDGQA frozen at step 0", "a random static map"
# The most telling first: a table may be cut short.
ARMS: dict[str, dict[str, Any]] = {
    "GQA": {"rule": "uniform"},
    "KDGQA": {"rule": "kd"},
    "DGQA-ema": {"rule": "dgqa_ema"},
    "DGQA-diff": {"rule": "dgqa_diff"},
    RANDOM: {"rule": "kd", "frozen": True},
    FROM_START: {"rule": "kd", "frozen": True},
    "PGQA": {"target": "output"},
    "DGQA-diff as released": {"rule": "dgqa_diff", "variant": "released"},
    "DGQA-ema as released": {"rule": "dgqa_ema", "variant": "released"},
    "KDGQA as released": {"rule": "kd", "variant": "released"},
}


def _study(device: str, quick: bool) -> Study:
    if device == "cuda":
        # Heads on key heads as in the paper's smallest network, 6 on 3.
        return Study(
            images=on_device(fashion_mnist(), device), sizes={"embed_dim": 192, "depth": 6, "num_heads": 6},
            patch_size=4, groups=(3,) if quick else (3, 2), seeds=(0, 1, 2), batch_size=512, steps=800,
            learning_rate=2e-3, more_steps=100, more_learning_rate=3e-4, window=10, shift=1, flip=True,
        )  # fmt: skip
    return Study(
        images=digits(), sizes={"embed_dim": 48, "depth": 2, "num_heads": 8}, patch_size=2,
        groups=(4,) if quick else (4, 2), seeds=(0,) if quick else (0, 1, 2), batch_size=64,
        steps=200 if quick else 300, learning_rate=8e-3, more_steps=20 if quick else 40, more_learning_rate=1e-3,
        window=5,
    )  # fmt: skip


def _quality(study: Study) -> Iterator[Row]:
    heads = study.sizes["num_heads"]
    base = (
        f"{study.images.name}, width {study.sizes['embed_dim']}, depth {study.sizes['depth']}, {heads} heads, "
        f"{study.steps} steps of {study.batch_size} images, {len(study.seeds)} seeds"
    )
    trained = train_sources(study)
    mean, deviation = mean_and_deviation(trained.accuracies)
    yield measured(
        "test accuracy of multi-head attention",
        base,
        mean,
        "%",
        better="higher",
        deviation=deviation,
    )
    for groups in study.groups:
        pooled = f"{base}, pooled to {groups} key heads"
        uniform: Arm | None = None
        for name in ARMS:
            arm = run_arm(study, trained, groups, name)
            uniform = arm if uniform is None else uniform
            # Several schemes start from the uniform map, where there is nothing to compare.
            if arm is uniform or arm.before != uniform.before:
                yield _accuracy(name, f"{pooled}, 0 steps more", arm.before, uniform.before)
            yield _accuracy(name, f"{pooled}, {study.more_steps} steps more", arm.after, uniform.after)
            if arm.moved:
                yield measured(
                    f"query heads that change their key head from one allocation to the next: {name}",
                    f"{pooled}, {study.more_steps} steps more", mean_and_deviation(arm.moved)[0], f"of {heads}",
                    better="lower",
                )  # fmt: skip


def _accuracy(name: str, shape: str, reached: list[float], uniform: list[float]) -> Row:
    (mean, deviation), (baseline, _) = mean_and_deviation(reached), mean_and_deviation(uniform)
    compared = reached is not uniform
    return measured(
        f"test accuracy of {name}", shape, mean, "%", better="higher", deviation=deviation,
        baseline_name="GQA" if compared else None, baseline=baseline if compared else None,
    )  # fmt: skip


@dataclass
class Sources:
    """The trained networks, one a seed: accuracies in percent, and the weights of each pooled to G heads."""

    accuracies: list[float]
    pooled: dict[int, list[dict[str, torch.Tensor]]]
    model: nn.Module


def train_sources(study: Study) -> Sources:
    """Trains one network with multi-head attention a seed."""
    images = study.images
    model = tiny_vit(images, patch_size=study.patch_size, **study.sizes).to(images.train_images.device)
    trainer = Trainer(model, images, batch_size=study.batch_size, shift=study.shift, flip=study.flip)
    sources = Sources([], {groups: [] for groups in study.groups}, model)
    for seed in study.seeds:
        trainer.reset(tiny_vit(images, seed, patch_size=study.patch_size, **study.sizes).state_dict())
        trainer.run(steps=study.steps, learning_rate=study.learning_rate, seed=seed)
        sources.accuracies.append(accuracy(model, images))
        for groups, states in sources.pooled.items():
            state = mha_to_gqa(model, groups)[0].state_dict()
            states.append({name: tensor.clone() for name, tensor in state.items()})
    return sources


def run_arm(study: Study, sources: Sources, groups: int, name: str) -> Arm:
    """Trains on with one scheme from the pooled weights of each seed."""
    window = {"window": study.window} if "rule" in ARMS[name] else {}
    model = copy.deepcopy(mha_to_gqa(sources.model, groups, **ARMS[name], **window)[0])
    trainer = Trainer(model, study.images, batch_size=study.batch_size, shift=study.shift, flip=study.flip)
    return _continued(study, trainer, name, sources.pooled[groups])


def _continued(study: Study, trainer: Trainer, name: str, states: list[dict[str, torch.Tensor]]) -> Arm:
    """Trains on with one scheme from the pooled weights of each seed, and notes what it reaches."""
    arm, model, images = Arm(), trainer.model, study.images
    layers = [layer for layer in model.modules() if isinstance(layer, KeyDrivenGQA)]
    known = set(model.state_dict())
    for seed, state in zip(study.seeds, states, strict=True):
        torch.manual_seed(seed)
        trainer.reset({key: tensor for key, tensor in state.items() if key in known})
        if name == FROM_START:
            for layer in layers:
                layer.frozen = False
            calibrate_head_maps(model, normalised(images.train_images[:1024]), batch_size=512)
        if name == RANDOM:
            for layer in layers:
                drawn = torch.randint(layer.num_key_value_heads, (layer.num_heads,))
                layer.head_map.copy_(drawn.sort().values)
        arm.before.append(accuracy(model, images))
        maps: list[torch.Tensor] = []

        def note(step: int, maps: list[torch.Tensor] = maps) -> None:
            # The step just done was the first of a window.
            if step % study.window == 1 % study.window:
                maps.append(torch.stack([layer.head_map for layer in layers]))

        is_dynamic = bool(layers) and layers[0].rule.startswith("dgqa")
        trainer.run(
            steps=study.more_steps, learning_rate=study.more_learning_rate, seed=seed + 100,
            after_step=note if is_dynamic else None,
        )  # fmt: skip
        arm.after.append(accuracy(model, images))
        if len(maps) > 1:
            moved = torch.stack(maps).diff(dim=0) != 0
            arm.moved.append(float(moved.float().sum(-1).mean()))
    return arm


PARTS = {"speed": speed, "quality": quality}
CLAIM = Claim(
    slug="kdgqa",
    source="arXiv 2408.08454, abstract, and the authors' code",
    paper=(
        "ViT-L gains up to 8 % accuracy with DGQA over GQA and the other variants, uptrained on CIFAR-10, CIFAR-100, "
        "Food101 and Tiny ImageNet (abstract).",
        "KDGQA allocates in each forward pass, DGQA as norms evolve in training, PGQA subtracts noise (abstract).",
    ),
    gate=gate,
    measure=all_of(PARTS),
    parts=PARTS,
)
