"""ELA: gates of rows and columns at the speed of memory, and whether they find an object and bear small batches.

The authors compare with Coordinate Attention, which squeezes channels and has a batch norm. Times are of the module
alone at ResNet-50's shapes, against the least that must be moved (the map read twice and written once, at the measured
rate of a copy) and against timm's modules, and of a whole ResNet-50 with and without it.

Small networks on scenes made here, one of four shapes on noise, show the rest: how often the shape is recognised, how
far the strongest gate is from it, and what batches of two do to a batch norm inside the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import measured_ceilings, time_rivals
from undivided.data.images import ImageSet
from undivided.layers.ela import ELA, add_ela
from undivided.ops import strip_attention
from undivided.testing import compare_op

WITHIN, SLOWDOWN = 1.3, 0.9
BOUND, COMPOSED = "two reads and one write at the rate of a copy", "PyTorch's operators"
COORDINATE = "Coordinate Attention (timm)"
_SHAPES = ((256, 256, 56, 56), (256, 512, 28, 28), (256, 1024, 14, 14), (256, 2048, 7, 7))


def gate(device: str) -> None:
    """Raises unless every backend, forward and backward, is as accurate as PyTorch in the type of the map."""
    on_cuda = device == "cuda"
    shapes = ((2, 64, 56, 56), (2, 128, 7, 7), (2, 32, 20, 33)) if on_cuda else ((2, 16, 5, 7),)
    for channels_last in (False, True):
        for shape in shapes:
            channels = shape[1]
            inputs = {
                "x": torch.randn(shape, device=device),
                "conv": 0.3 * torch.randn(channels, 1, 7, device=device),
                "norm": torch.rand(channels, device=device) + 0.5,
                "bias": torch.randn(channels, device=device),
            }
            for backend in ("triton", "composed") if on_cuda else ("composed",):
                fast, exact = (partial(_attend, name, channels_last) for name in (backend, "reference"))
                compare_op(fast, exact, exact, inputs, torch.bfloat16 if on_cuda else torch.float32)


def _attend(
    backend: str,
    channels_last: bool,
    x: torch.Tensor,
    conv: torch.Tensor,
    norm: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weights = (conv, norm, bias)
    return strip_attention(
        x.contiguous(memory_format=layout), weights, conv_groups=x.shape[1], norm_groups=16, backend=backend
    )


def _module(name: str, channels: int) -> nn.Module:
    from timm.layers import SEModule
    from timm.layers.cbam import CbamModule
    from timm.layers.coord_attn import CoordAttn, EfficientLocalAttn

    others: dict[str, Callable[[int], nn.Module]] = {
        COORDINATE: CoordAttn,
        "EfficientLocalAttn (timm)": EfficientLocalAttn,
        "squeeze and excitation (timm)": SEModule,
        "CBAM (timm)": CbamModule,
    }
    if name in others:
        return others[name](channels)
    return ELA(channels, "B", backend="composed" if name == COMPOSED else "triton")


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of the module alone at the shapes of a ResNet-50, then of the whole network."""
    ceilings = measured_ceilings(device)
    for place, shape in enumerate(_SHAPES[: 1 if quick else None]):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=layout)
            rivals = [COORDINATE]
            if place == 0 and layout is torch.contiguous_format:
                rivals += [
                    COMPOSED,
                    "EfficientLocalAttn (timm)",
                    "squeeze and excitation (timm)",
                    "CBAM (timm)",
                ]
            modules = {
                name: _module(name, shape[1]).to(device, torch.bfloat16).eval() for name in ("ELA-B", *rivals)
            }
            with torch.no_grad():
                calls = {name: partial(module, x) for name, module in modules.items()}
                times = time_rivals(calls, device, method="graph", samples=30, seconds=0.05)
            found = {name: timing.median for name, timing in times.items()}
            least = ceilings.floor(bytes_moved=3 * x.numel() * x.element_size())
            words = f"{list(shape)}, bf16, {'channels last' if layout is torch.channels_last else 'NCHW'}"
            yield measured(
                f"ELA-B forward, against {BOUND}", words, found["ELA-B"], "ms", better="lower", baseline_name=BOUND,
                baseline=least, required=1 / WITHIN, fraction_of_ceiling=least / found["ELA-B"],
            )  # fmt: skip
            for name in rivals:
                yield measured(
                    f"ELA-B forward, against {name}", words, found["ELA-B"], "ms", better="lower",
                    baseline_name=name, baseline=found[name], required=1.0 if name == COORDINATE else None,
                )  # fmt: skip
            if place == 0:
                yield from _with_backward(modules, x, words, device)
    if not quick:
        yield from _network(device)


def _with_backward(modules: dict[str, nn.Module], x: torch.Tensor, words: str, device: str) -> Iterator[Row]:
    leaf, dout = x.detach().requires_grad_(), torch.randn_like(x)
    chosen = {
        name: module.train() for name, module in modules.items() if name in ("ELA-B", COORDINATE, COMPOSED)
    }

    def step(module: nn.Module) -> object:
        return torch.autograd.grad(module(leaf), [leaf, *module.parameters()], dout)

    times = time_rivals(
        {name: partial(step, m) for name, m in chosen.items()}, device, samples=30, seconds=0.05
    )
    for name in list(chosen)[1:]:
        yield measured(
            f"ELA-B forward and backward, against {name}", words, times["ELA-B"].median, "ms", better="lower",
            baseline_name=name, baseline=times[name].median, required=1.0 if name == COORDINATE else None,
        )  # fmt: skip


def _network(device: str) -> Iterator[Row]:
    """Yields images a second of a ResNet-50 with the module before each of its residual sums."""
    import timm

    batch = 128
    images = torch.randn(batch, 3, 224, 224, device=device, dtype=torch.bfloat16)
    images = images.contiguous(memory_format=torch.channels_last)
    plain, gated = timm.create_model("resnet50"), timm.create_model("resnet50")
    add_ela(gated, "block", "B")
    calls = {
        name: partial(found.to(device, torch.bfloat16, memory_format=torch.channels_last).eval(), images)
        for name, found in (("ResNet-50", plain), ("with ELA-B", gated))
    }
    with torch.no_grad():
        times = time_rivals(calls, device, samples=30, seconds=0.05)
    rates = {name: 1e3 * batch / timing.median for name, timing in times.items()}
    yield measured(
        "ResNet-50 with ELA-B before each residual sum, inference",
        f"batch {batch}, 224 x 224, bf16, channels last, eager",
        rates["with ELA-B"], "images/s", better="higher", baseline_name="ResNet-50", baseline=rates["ResNet-50"],
        required=SLOWDOWN,
    )  # fmt: skip


_SIDE, _OBJECT = 64, 9
_RIVAL, _BLOCKS, _BEST = "Coordinate Attention", (1, 2, 3, 4), "the best of its blocks"
_TRAINED, _TESTED, _STEPS, _BATCH, _RATE, _SEEDS = 8192, 2000, 200, 128, 2e-3, (0, 1, 2, 3, 4)


def scenes(count: int, seed: int, contrast: float = 120.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns images of one shape each on noise, their classes, and the centres of the shapes.

    Args:
        count: how many.
        seed: of everything.
        contrast: of a shape, where the noise has a standard deviation of 40.

    Returns:
        images `[count, 1, 64, 64]`, uint8; classes `[count]` of a square, a disc, a cross and a frame; centres
        `[count, 2]`, (y, x) in pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*2 * [torch.arange(_OBJECT) - _OBJECT // 2], indexing="ij")
    size = torch.maximum(y.abs(), x.abs())
    shapes = torch.stack([size <= 3, y**2 + x**2 <= 16, (y.abs() <= 1) | (x.abs() <= 1), size >= 3]).float()
    labels = torch.randint(len(shapes), (count,), generator=generator)
    corner = torch.randint(_SIDE - _OBJECT + 1, (count, 2), generator=generator)
    images = 128 + 40 * torch.randn(count, _SIDE, _SIDE, generator=generator)
    rows, columns = (corner[:, axis, None] + torch.arange(_OBJECT) for axis in (0, 1))
    place = torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    images[place] += contrast * shapes[labels]
    return images.clamp(0, 255).byte()[:, None], labels, corner + _OBJECT // 2


def network(attention: Callable[[int], nn.Module] | None, seed: int, norm: str = "batchnorm2d") -> nn.Module:
    """Returns an untrained narrow ResNet, with an attention module in each of its four blocks."""
    from timm.models.resnet import BasicBlock, ResNet

    torch.manual_seed(seed)
    return ResNet(
        BasicBlock, (1, 1, 1, 1), num_classes=4, in_chans=1, channels=(16, 32, 64, 64), stem_width=16, output_stride=8,
        norm_layer=norm, block_args={"attn_layer": attention},
    )  # fmt: skip


@torch.no_grad()
def distance_of_strongest_gate(
    found: nn.Module, images: torch.Tensor, centres: torch.Tensor, block: int = 4
) -> float:
    """Returns how far, in pixels, the strongest gate of a block is from the shapes' centres, in the mean.

    A gate is what the module gives over what it gets, whatever the module, as a mean over channels.
    """
    from undivided.claims._tiny_vit import normalised

    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, out: torch.Tensor) -> None:
        x = inputs[0].float()
        ratio = out.float() / torch.where(x.abs() < 1e-6, 1.0, x)
        seen.append(torch.where(x.abs() < 1e-6, 0.0, ratio).mean(1))

    handle = found.get_submodule(f"layer{block}")[-1].se.register_forward_hook(keep)
    try:
        found.eval()(normalised(images))
    finally:
        handle.remove()
    maps = torch.cat(seen)
    strongest = maps.flatten(1).argmax(1)
    cells = torch.stack((strongest // maps.shape[2], strongest % maps.shape[2]), dim=1)
    pixels = (cells + 0.5) * (_SIDE / maps.shape[2]) - 0.5
    return float((pixels - centres.to(pixels)).norm(dim=1).mean())


def _arms() -> dict[str, Callable[[int], nn.Module] | None]:
    from timm.layers import SEModule
    from timm.layers.cbam import CbamModule
    from timm.layers.coord_attn import CoordAttn

    ela: dict[str, Callable[[int], nn.Module] | None] = {
        f"ELA-{version}": partial(ELA, version=version) for version in "TBSL"
    }
    return {
        "no attention": None,
        "squeeze and excitation": SEModule,
        "CBAM": CbamModule,
        "Coordinate Attention": CoordAttn,
        **ela,
    }


def _scene_set(device: str) -> tuple[ImageSet, torch.Tensor]:
    from undivided.claims._tiny_vit import on_device

    train, test = scenes(_TRAINED, 0), scenes(_TESTED, 1)
    return on_device(ImageSet("shapes on noise", *train[:2], *test[:2]), device), test[2]


def _localisation(device: str, quick: bool) -> Iterator[Row]:
    """Yields how often shapes are recognised, and how far the strongest gate is from them."""
    from undivided.claims._tiny_lm import mean_and_deviation
    from undivided.claims._tiny_vit import Trainer, accuracy

    images, centres = _scene_set(device)
    seeds = _SEEDS[: 1 if quick else None]
    shape = f"{images.name}, {_SIDE} x {_SIDE}, {_STEPS} steps of {_BATCH}, {len(seeds)} seeds"
    rival: dict[str, float] = {}
    for arm, attention in _arms().items():
        found = network(attention, 0).to(device)
        trainer = Trainer(found, images, batch_size=_BATCH)
        scores: list[float] = []
        distances: list[list[float]] = [[] for _ in _BLOCKS]
        gates = arm.startswith(("ELA", "Coordinate"))
        for seed in seeds:
            trainer.reset(network(attention, seed).state_dict())
            trainer.run(steps=_STEPS, learning_rate=_RATE, seed=seed)
            scores.append(accuracy(found, images))
            for own, block in zip(distances, _BLOCKS if gates else (), strict=False):
                own.append(distance_of_strongest_gate(found, images.test_images, centres, block))
        count = sum(parameter.numel() for parameter in found.parameters())
        mean, deviation = mean_and_deviation(scores)
        is_ours = arm.startswith("ELA")
        yield measured(
            f"test accuracy, {arm}, {count} parameters", shape, mean, "%", better="higher", deviation=deviation,
            baseline_name=_RIVAL if is_ours else None, baseline=rival["accuracy"] if is_ours else None,
            required=1.0 if is_ours else None,
        )  # fmt: skip
        if not gates:
            continue
        far = {
            f"block {block} of 4": mean_and_deviation(own)
            for block, own in zip(_BLOCKS, distances, strict=True)
        }
        # Early gates point at the shape, and late ones, of what has been found already, anywhere. Every module is
        # judged by the block of it that points best.
        far[_BEST] = min(far.values())
        for where, (mean_distance, spread) in far.items():
            yield measured(
                f"distance of the strongest gate from the shape, {arm}, {where}", shape, mean_distance, "pixels",
                better="lower", deviation=spread, baseline_name=_RIVAL if is_ours else None,
                baseline=rival[where] if is_ours else None,
                required=1.0 if is_ours and where == _BEST else None,
            )  # fmt: skip
        if not is_ours:
            rival = {"accuracy": mean, **{where: value for where, (value, _) in far.items()}}


_BATCHES, _SAMPLES, _BATCH_SEEDS = (32, 8, 2), 3200, (0, 1, 2)


def _batches(device: str, quick: bool) -> Iterator[Row]:
    """Yields what is lost with small batches, where the module alone has a batch norm or not."""
    from timm.layers.coord_attn import CoordAttn

    from undivided.claims._tiny_lm import mean_and_deviation
    from undivided.claims._tiny_vit import Trainer, accuracy

    images, _ = _scene_set(device)
    seeds = _BATCH_SEEDS[: 1 if quick else None]
    arms: dict[str, Callable[[int], nn.Module]] = {
        "Coordinate Attention": CoordAttn,
        "Coordinate Attention with a group norm": partial(CoordAttn, norm_layer=partial(nn.GroupNorm, 1)),
        "ELA-B": partial(ELA, version="B"),
    }
    rival: dict[int, float] = {}
    for arm, attention in arms.items():
        for batch in _BATCHES[: 2 if quick else None]:
            # The network itself has no batch norm, so that the module's is the only one.
            found = network(attention, 0, "groupnorm1").to(device)
            trainer = Trainer(found, images, batch_size=batch)
            scores = []
            for seed in seeds:
                trainer.reset(network(attention, seed, "groupnorm1").state_dict())
                trainer.run(steps=_SAMPLES // batch, learning_rate=_RATE * (batch / 32) ** 0.5, seed=seed)
                scores.append(accuracy(found, images))
            mean, deviation = mean_and_deviation(scores)
            known = rival.get(batch)
            if arm == "Coordinate Attention":
                rival[batch] = mean
            yield measured(
                f"test accuracy, batches of {batch}, {arm}",
                f"{images.name}, {_SAMPLES} images seen, {len(seeds)} seeds",
                mean, "%", better="higher", deviation=deviation,
                baseline_name=None if known is None else "Coordinate Attention", baseline=known,
                required=1.0 if arm == "ELA-B" and batch == min(_BATCHES) else None,
            )  # fmt: skip


_BODIES = {
    "resnet18": "a ResNet-18 of a quarter of the width",
    "mobilenetv2_035": "MobileNetV2 of width 0.35",
}
_IMAGE_STEPS, _IMAGE_BATCH = 250, 256


def body(name: str, attention: Callable[[int], nn.Module] | None, seed: int) -> nn.Module:
    """Returns an untrained narrow network of timm for grey images of 10 classes, with a module in each block."""
    import timm

    torch.manual_seed(seed)
    options: dict[str, Any] = {"in_chans": 1, "num_classes": 10}
    if name == "resnet18":
        options |= {"channels": (16, 32, 64, 128), "stem_width": 16}
    found = timm.create_model(name, **options)
    if attention is not None:
        # The places that `add_ela` fills, by the same names, with other modules too.
        for place, layer in add_ela(found, image_size=28).items():
            parent, _, attribute = place.rpartition(".")
            setattr(found.get_submodule(parent), attribute, attention(layer.channels))
    return found


def _images(device: str, quick: bool) -> Iterator[Row]:
    """Yields test accuracies of narrow ResNets and MobileNets of Fashion-MNIST by the module in their blocks."""
    from undivided.claims._tiny_lm import mean_and_deviation
    from undivided.claims._tiny_vit import Trainer, accuracy, on_device
    from undivided.data.images import fashion_mnist

    images = on_device(fashion_mnist(), device)
    seeds = _BATCH_SEEDS[: 1 if quick else None]
    arms = {name: arm for name, arm in _arms().items() if name not in ("CBAM", "ELA-T", "ELA-L")}
    for name, words in _BODIES.items():
        means: dict[str, float] = {}
        for arm, attention in arms.items():
            found = body(name, attention, 0).to(device)
            count = sum(parameter.numel() for parameter in found.parameters())
            trainer = Trainer(found, images, batch_size=_IMAGE_BATCH, shift=2, flip=True)
            scores = []
            for seed in seeds:
                trainer.reset(body(name, attention, seed).state_dict())
                trainer.run(steps=_IMAGE_STEPS, learning_rate=_RATE, seed=seed)
                scores.append(accuracy(found, images))
            means[arm], deviation = mean_and_deviation(scores)
            rivals = ("no attention", "Coordinate Attention") if arm.startswith("ELA") else (None,)
            for rival in rivals:
                yield measured(
                    f"test accuracy of {words}, {arm}, {count} parameters",
                    f"{images.name}, {_IMAGE_STEPS} steps of {_IMAGE_BATCH}, {len(seeds)} seeds", means[arm], "%",
                    better="higher", deviation=deviation, baseline_name=rival,
                    baseline=None if rival is None else means[rival],
                )  # fmt: skip


_PARTS: dict[str, Measure] = {
    "speed": _speed,
    "localisation": _localisation,
    "batches": _batches,
    "images": _images,
}
CLAIM = Claim(
    slug="ela",
    source="arXiv 2403.01123, abstract",
    paper=(
        "Outperforms the attention modules of its time on ImageNet, COCO and Pascal VOC, with hardly any parameters.",
        "Group norm in place of batch norm and no squeeze of the channels generalise better than Coordinate Attention.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
    devices=("cuda",),
)
