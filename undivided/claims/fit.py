"""FIT: a training step on an image of 6400 x 6400 pixels in 16 GB, and cost that grows as L^(4/3).

The paper's widths for that run are not known. Here: patches of 16, 400 groups of 400 tokens, 16 latents a group,
"(2)4(2)4(2)", tokens of 256 (8 heads), latents of 768 (12 heads), bf16 autocast, AdamW, nothing recomputed. The rival
is a vision transformer of the same depth (14 layers) and the width of the tokens, with flash attention in heads of 64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.layers.fit import TransformerLayer, group_image
from undivided.models.fit import FITAutoregressive, FITEncoder, attention_multiply_adds
from undivided.testing import assert_as_accurate

PATCH, LATENTS, LAYERS, DEPTH = 16, 16, "(2)4(2)4(2)", 14
WIDTHS: dict[str, int] = {"dim": 256, "latent_dim": 768, "num_heads": 8, "latent_heads": 12}
REQUIRED_SPEED, MEMORY = 10.0, 16.0
FLASH, CUDNN = "flash attention", "cuDNN's attention"
_KERNELS = {FLASH: [SDPBackend.FLASH_ATTENTION], CUDNN: [SDPBackend.CUDNN_ATTENTION]}


class FlashViT(nn.Module):
    """Transformer layers on all tokens at once; attention by `scaled_dot_product_attention`, as FIT's."""

    def __init__(self, num_tokens: int, dim: int, num_heads: int, depth: int, in_dim: int) -> None:
        super().__init__()
        self.stem = nn.Linear(in_dim, dim)
        self.position = nn.Parameter(torch.zeros(num_tokens, dim))
        self.layers = nn.ModuleList(TransformerLayer(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.stem(x.flatten(1, 2)) + self.position
        for layer in self.layers:
            x = layer(x)
        return (self.norm(x),)


def gate(device: str) -> None:
    """Raises unless the encoder in float32 is as accurate as the same layers run group by group, gradient too."""
    torch.manual_seed(0)
    model = FITEncoder("(1)2(1)1", 64, 4, 2, 16, 32, 2, 4, 5).to(device)
    x = torch.randn(2, 4, 16, 5, device=device)
    exact = _with_gradient(_group_by_group, model.double(), x.double())
    model = model.float()
    assert_as_accurate(
        _with_gradient(lambda m, y: m(y)[0], model, x),
        _with_gradient(_group_by_group, model, x),
        exact,
        name="FIT",
    )


def _group_by_group(model: FITEncoder, x: torch.Tensor) -> torch.Tensor:
    x = model.stem_norm(model.stem(x)) + model.position
    z = model.latents(len(x))
    for block in model.blocks:
        parts, read = [], []
        for group in range(model.num_groups):
            part = x[:, group]
            for layer in block.local:
                part = layer(part)
            parts.append(part)
            if block.read is not None:
                read.append(block.read(z[:, group], part))
        if block.read is not None:
            flat = torch.cat(read, 1)
            for layer in block.global_layers:
                flat = layer(flat)
            z = flat.view(z.shape)
        x = torch.stack(
            [p if block.write is None else block.write(p, z[:, g]) for g, p in enumerate(parts)], 1
        )
    return model.norm(x)


def _with_gradient(
    run: Callable[..., torch.Tensor], model: nn.Module, x: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    out = run(model, x)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


def training_step(model: nn.Module, data: torch.Tensor, kernel: str = FLASH) -> Callable[[], None]:
    """Returns forward, backward and AdamW on the mean square of all outputs; on CUDA attention is by this kernel."""
    on_cuda = data.is_cuda
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=on_cuda)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with ExitStack() as stack:
            if on_cuda:
                # One kernel, because a choice of cuDNN's plans a second for every new shape. What is recomputed in the
                # backward must be computed by the same one.
                stack.enter_context(sdpa_kernel(_KERNELS[kernel]))
            with torch.autocast(data.device.type, torch.bfloat16, enabled=on_cuda):
                loss = sum(part.float().square().mean() for part in model(data))
            loss.backward()
        optimiser.step()

    return step


def seconds_and_gib(
    build: Callable[[], nn.Module], data: torch.Tensor, repeats: int, warm_up: int = 1, kernel: str = FLASH
) -> tuple[float, float]:
    """Returns the median time of a step in seconds, and the most memory in use in GiB (0 on a CPU)."""
    import time

    on_cuda = data.is_cuda
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = training_step(build().to(data.device), data, kernel)
    times = []
    for index in range(warm_up + repeats):
        start = time.perf_counter()
        step()
        if on_cuda:
            torch.cuda.synchronize()
        if index >= warm_up:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2], torch.cuda.max_memory_allocated() / 2**30 if on_cuda else 0.0


def _encoder(
    tokens: int,
    groups: int,
    layers: str = LAYERS,
    latents: int = LATENTS,
    recomputed: bool = False,
    **options: Any,
) -> FITEncoder:
    model = FITEncoder(layers, tokens, groups, latents, in_dim=3 * PATCH**2, **{**WIDTHS, **options})
    model.set_grad_checkpointing(recomputed)
    return model


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields memory and time of a training step; at full size the rival with flash attention runs once.

    FIT runs with flash attention; the rival also with cuDNN's, which is the faster one of all pairs.
    """
    sides = ((1600, 25),) if quick or device == "cpu" else ((1600, 25), (6400, 400), (3200, 100))
    known: dict[int, tuple[float, float]] = {}
    for side, groups in sides:
        tokens = (side // PATCH) ** 2
        shape = f"{side} x {side} pixels, {tokens} tokens in {groups} groups, {LAYERS}, batch 1, bf16 autocast, AdamW"
        image = torch.randn(1, 3, side, side, device=device)
        data = group_image(image, PATCH, groups)
        ours, memory = seconds_and_gib(partial(_encoder, tokens, groups), data, 3)
        is_full = side == 6400
        if is_full:
            yield measured(
                "memory of a training step", shape, memory, "GiB", better="lower", baseline_name="16 GiB",
                baseline=MEMORY, required=1.0,
            )  # fmt: skip
        build = partial(FlashViT, tokens, WIDTHS["dim"], WIDTHS["dim"] // 64, DEPTH, 3 * PATCH**2)
        for kernel in (FLASH, CUDNN) if device == "cuda" else (FLASH,):
            warm_up = 0 if is_full and kernel == FLASH else 1
            rival, rival_memory = seconds_and_gib(build, data, 1, warm_up, kernel)
            name = f"ViT of {DEPTH} layers, {kernel}"
            known[tokens] = ours, rival
            yield measured(
                "training step", shape, 1e3 * ours, "ms", better="lower", baseline_name=name, baseline=1e3 * rival,
                required=REQUIRED_SPEED if is_full else None,
            )  # fmt: skip
            if kernel == FLASH and memory:
                yield measured(
                    "memory of a training step, against all pairs", shape, memory, "GiB", better="lower",
                    baseline_name=name, baseline=rival_memory,
                )  # fmt: skip
            if kernel == FLASH and is_full:
                yield from _wider(shape, tokens, groups, data)
    if len(known) > 1:
        # The rival by its fastest kernel. Below 40000 tokens the host is slower than the card.
        (_, fewest), (most, last) = sorted((count, times) for count, times in known.items() if count > 10000)
        ours, rival = (math.log(b / a) / math.log(4) for a, b in zip(fewest, last, strict=True))
        yield measured(
            "exponent of L in the time of a training step", f"{most // 4} to {most} tokens, groups of 400", ours, "",
            better="lower", baseline_name=name, baseline=rival,
        )  # fmt: skip


def _wider(shape: str, tokens: int, groups: int, data: torch.Tensor) -> Iterator[Row]:
    """Yields what other widths and other arrangements take; none of them has a bar."""
    others: dict[str, dict[str, Any]] = {
        "tokens of 512": {"dim": 512},
        "tokens of 512, blocks recomputed": {"dim": 512, "recomputed": True},
        "32 latents a group": {"latents": 32},
        "8 latents a group": {"latents": 8},
        "local layers alone": {"layers": "(6)"},
        "latents alone, as a Perceiver": {"layers": "(0)4(0)4(0)"},
    }
    for name, options in others.items():
        seconds, gib = seconds_and_gib(partial(_encoder, tokens, groups, **options), data, 1)
        yield measured(f"training step, {name}", shape, 1e3 * seconds, "ms", better="lower")
        if data.is_cuda:
            yield measured(
                f"memory of a training step, {name}", shape, gib, "GiB", better="lower", baseline_name="16 GiB",
                baseline=MEMORY,
            )  # fmt: skip


def _slope(device: str, quick: bool) -> Iterator[Row]:
    """Yields how a step's time, and the multiply-adds of attention, grow with L; groups have L^(1/3) tokens."""
    powers = (9, 12, 15) if device == "cpu" else (12, 15, 18) if quick else (12, 15, 18, 21)
    widths: dict[str, Any] = {"dim": 64, "latent_dim": 128, "num_heads": 2, "latent_heads": 2, "in_dim": 16}
    times, work = [], []
    for power in powers:
        tokens, size = 2**power, 2 ** (power // 3)
        model = FITEncoder("(2)4(2)", tokens, tokens // size, 4, **widths)
        # The longest does not fit otherwise.
        model.set_grad_checkpointing(power > 18)
        data = torch.randn(1, tokens // size, size, 16, device=device)
        times.append(seconds_and_gib(partial(nn.Module.train, model), data, 1 if power > 12 else 3)[0])
        work.append(sum(count for _, count in attention_multiply_adds(model)))
        yield measured("training step", f"{tokens} tokens in groups of {size}, 4 latents each", 1e3 * times[-1], "ms",
                       better="lower")  # fmt: skip
    for what, values, first in (("multiply-adds of attention", work, 0), ("time of a step", times, 1)):
        exponent = math.log2(values[-1] / values[first]) / (powers[-1] - powers[first])
        yield measured(
            f"exponent of L in the {what}", f"{2 ** powers[first]} to {2 ** powers[-1]} tokens, groups of L^(1/3)",
            exponent, "", better="lower", baseline_name="4/3", baseline=4 / 3, required=0.95,
        )  # fmt: skip


_LEVELS = 16


def levels(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Returns normalised images `[B, 1, H, W]` as ids `[B, T, n]` of 16 grey levels; large ones at half the size."""
    if x.shape[-1] > 8:
        x = F.avg_pool2d(x, 2)
    ids = ((x + 1) * (_LEVELS / 2)).long().clamp(0, _LEVELS - 1)
    return ids.flatten(1).unflatten(1, (num_groups, -1))


def _quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields bits per pixel of autoregressive models of the rows of small images; a group is a row."""
    from undivided.claims._loss_trainer import LossTrainer, small_images
    from undivided.claims._tiny_lm import mean_and_deviation
    from undivided.claims._tiny_vit import normalised

    images = small_images(device)
    side = 14 if images.train_images.shape[-1] > 8 else 8
    tokens, steps = side**2, (100 if quick else 400) if device == "cuda" else 60
    seeds = (0,) if quick or device == "cpu" else (0, 1, 2)
    # Four layers that see pixels or latents, in each arm.
    arms: dict[str, tuple[str, int, int]] = {
        "all pixels (one group)": ("(4)", 1, 1),
        "local layers alone": ("(4)", side, 1),
        "FIT (1)2(1), 1 latent": ("(1)2(1)", side, 1),
        "FIT (1)2(1), 4 latents": ("(1)2(1)", side, 4),
        "FIT (1)2(1), 8 latents": ("(1)2(1)", side, 8),
    }
    shape = f"{images.name}, {side} x {side} pixels of {_LEVELS} levels, 4 layers of 64, "
    shape += f"{steps} steps of 128, {len(seeds)} seeds"
    found: dict[str, list[float]] = {name: [] for name in arms}
    for name, (layers, groups, latents) in arms.items():

        def fresh(seed: int, layers=layers, groups=groups, latents=latents) -> FITAutoregressive:
            torch.manual_seed(seed)
            return FITAutoregressive(_LEVELS, layers, tokens, groups, latents, 64, 64, 2, 2)

        def loss(model, x, y, groups=groups):
            return model.loss(levels(x, groups))

        model = fresh(0).to(device)
        trainer = LossTrainer(model, images, loss, batch_size=128)
        for seed in seeds:
            trainer.reset(fresh(seed).state_dict())
            trainer.run(steps=steps, learning_rate=2e-3, seed=seed)
            with torch.no_grad():
                test = normalised(images.test_images[:1000])
                found[name].append(float(model.eval().loss(levels(test, groups))) / math.log(2))
    alone = mean_and_deviation(found["local layers alone"])[0]
    whole = "all pixels (one group)"
    work = {
        name: sum(
            n
            for _, n in attention_multiply_adds(
                FITAutoregressive(_LEVELS, layers, tokens, groups, latents, 64, 64, 2, 2)
            )
        )
        for name, (layers, groups, latents) in arms.items()
    }
    for name in arms:
        mean, deviation = mean_and_deviation(found[name])
        is_fit = name.startswith("FIT")
        yield measured(
            f"bits per pixel, {name}", shape, mean, "bits", better="lower", deviation=deviation,
            baseline_name=None if name == "local layers alone" else "local layers alone",
            baseline=None if name == "local layers alone" else alone, required=1.0 if is_fit else None,
        )  # fmt: skip
        if is_fit:
            yield measured(
                f"bits per pixel, {name}, against all pixels", shape, mean, "bits", better="lower",
                deviation=deviation, baseline_name=whole, baseline=mean_and_deviation(found[whole])[0],
            )  # fmt: skip
            yield measured(
                f"multiply-adds of attention, {name}", shape, work[name] / 1e6, "M", better="lower",
                baseline_name=whole, baseline=work[whole] / 1e6,
            )  # fmt: skip


_PAIRS = {"num_groups": 4, "group_size": 4, "dim": 8}


def pairs(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns tokens `[count, T, n, C]` with two marks, each of two kinds, in different groups; whether both are alike.

    What a pooled sum of what each group knows by itself cannot tell.
    """
    groups, size, dim = _PAIRS.values()
    device = generator.device
    x = 0.1 * torch.randn(count, groups, size, dim, generator=generator, device=device)
    group = torch.rand(count, groups, generator=generator, device=device).argsort(1)
    place = torch.randint(size, (count, 2), generator=generator, device=device)
    kind = torch.randint(2, (count, 2), generator=generator, device=device)
    row = torch.arange(count, device=device)
    for mark in range(2):
        x[row, group[:, mark], place[:, mark], kind[:, mark]] += 3
    return x, (kind[:, 0] == kind[:, 1]).long()


class PairClassifier(nn.Module):
    """An encoder whose tokens are averaged and classified."""

    def __init__(self, layers: str) -> None:
        super().__init__()
        groups, size, dim = _PAIRS.values()
        self.encoder = FITEncoder(layers, groups * size, groups, 2, 32, 32, 2, 2, dim)
        self.head = nn.Linear(32, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x)[0].mean((1, 2)))


def _pairs(device: str, quick: bool) -> Iterator[Row]:
    """Yields how often the relation of two marks in different groups is told, by FIT and by local layers alone."""
    from undivided.claims._tiny_lm import mean_and_deviation

    seeds, steps = (0,) if quick or device == "cpu" else (0, 1, 2), 300
    found: dict[str, list[float]] = {"(4)": [], "(1)2(1)": []}
    for layers, scores in found.items():
        for seed in seeds:
            torch.manual_seed(seed)
            model = PairClassifier(layers).to(device)
            optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
            generator = torch.Generator(device).manual_seed(seed)
            for _ in range(steps):
                x, y = pairs(64, generator)
                optimiser.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimiser.step()
            with torch.no_grad():
                x, y = pairs(2000, generator)
                scores.append(100 * float((model(x).argmax(1) == y).float().mean()))
    mean, deviation = mean_and_deviation(found["(1)2(1)"])
    yield measured(
        "two marks in different groups alike or not, FIT (1)2(1), 2 latents",
        f"4 groups of 4 tokens, {steps} steps of 64, {len(seeds)} seeds", mean, "%", better="higher",
        deviation=deviation, baseline_name="four local layers alone", baseline=mean_and_deviation(found["(4)"])[0],
        required=1.8,
    )  # fmt: skip


_PARTS: dict[str, Measure] = {"speed": _speed, "slope": _slope, "quality": _quality, "pairs": _pairs}
CLAIM = Claim(
    slug="fit",
    source="arXiv 2305.12689, abstract",
    paper=(
        "End-to-end training on 6400 x 6400 images (160 K tokens) within 16 GB of memory, without special "
        "optimisations or model parallelism.",
        "The cost of global attention falls from O(L^2) to O(L^(4/3)).",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
    devices=("cuda", "cpu"),
)
