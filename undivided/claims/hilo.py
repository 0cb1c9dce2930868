"""HiLo: faster on a CPU than attention to reduced keys and than attention in local windows, at 14 x 14 tokens.

The paper's figure is of eager products; fused attention may take from each layer another share of its time, so each is
timed in both forms. Rivals have the same width, heads and biases, and no positions. Small trained models show what the
share of low-frequency heads does, and whether high-frequency heads carry higher frequencies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import time_rivals
from undivided.layers._vision import Size, to_map, to_tokens
from undivided.layers.hilo import HiLoAttention
from undivided.ops.grouped import Windows
from undivided.testing import assert_as_accurate

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

DIM, HEADS, SIDE, ALPHA = 768, 12, 14, 0.9
HILO, REDUCED, LOCAL, PLAIN = "HiLo", "spatial reduction (SRA)", "local windows of 7 x 7", "all pairs (MSA)"
REQUIRED = {REDUCED: 1.2, LOCAL: 1.4}
EAGER, FUSED = "eager products", "scaled_dot_product_attention"


def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention as the authors of vision models write it."""
    return ((query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5).softmax(-1) @ value


class EagerHiLo(HiLoAttention):
    """HiLo attention with eager products in place of this library's operators."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, windows: Windows | None = None
    ) -> torch.Tensor:
        if windows is None:
            return eager(query, key, value)
        parts = (windows.gather(x, group_axis=2) for x in (query, key, value))
        return windows.scatter(eager(*parts), group_axis=2)


class SpatialReductionAttention(nn.Module):
    """Attention to keys of a convolution of kernel and stride 2 and a LayerNorm (PVT, arXiv 2102.12122)."""

    def __init__(self, dim: int, num_heads: int, attend: Attend) -> None:
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.q = nn.Linear(dim, dim)
        self.reduction = nn.Conv2d(dim, dim, 2, stride=2)
        self.norm = nn.LayerNorm(dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        reduced = self.norm(to_tokens(self.reduction(to_map(x, size)))[0])
        (query,), (key, value) = (
            _heads(self.q(x), 1, self.num_heads),
            _heads(self.kv(reduced), 2, self.num_heads),
        )
        return self.proj(self.attend(query, key, value).transpose(1, 2).flatten(2))


class LocalWindowAttention(nn.Module):
    """Attention inside windows that do not move, without positions (Swin, arXiv 2103.14030).

    Tokens are brought into the order of windows before the projections and back after them, one copy each way.
    """

    def __init__(self, dim: int, num_heads: int, attend: Attend, window_size: int = 7) -> None:
        super().__init__()
        self.num_heads, self.attend, self.window_size = num_heads, attend, (window_size, window_size)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        windows = Windows(size, self.window_size)
        x = windows.gather(x[:, None]).flatten(0, 2)
        out = self.proj(self.attend(*_heads(self.qkv(x), 3, self.num_heads)).transpose(1, 2).flatten(2))
        return windows.scatter(out.unflatten(0, (-1, windows.num_groups, 1)))[:, 0]


def _heads(x: torch.Tensor, count: int, num_heads: int) -> tuple[torch.Tensor, ...]:
    return x.unflatten(-1, (count, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def layers(dim: int = DIM, heads: int = HEADS) -> dict[tuple[str, str], nn.Module]:
    """Returns the layers by name and form; the two forms of one have the same weights."""
    found: dict[tuple[str, str], nn.Module] = {}
    for form, hilo, attend in (
        (EAGER, EagerHiLo, eager),
        (FUSED, HiLoAttention, F.scaled_dot_product_attention),
    ):
        found[HILO, form] = hilo(dim, heads, 2, alpha=ALPHA, qkv_bias=True)
        found[REDUCED, form] = SpatialReductionAttention(dim, heads, attend)
        found[LOCAL, form] = LocalWindowAttention(dim, heads, attend)
        found[PLAIN, form] = hilo(dim, heads, 1, qkv_bias=True)
    for name in (HILO, REDUCED, LOCAL, PLAIN):
        found[name, FUSED].load_state_dict(found[name, EAGER].state_dict())
    return found


def gate(device: str) -> None:
    """Raises unless every layer is as accurate as its eager form, output and gradient, also where maps are padded."""
    for size in ((14, 14), (7, 21)):
        pairs = layers(48, 4)
        x = torch.randn(2, size[0] * size[1], 48, device=device)
        for name in (HILO, PLAIN) if size == (7, 21) else (HILO, PLAIN, REDUCED, LOCAL):
            fast, plain = (pairs[name, form].to(device) for form in (FUSED, EAGER))
            found, want = _with_gradient(fast, x, size), _with_gradient(plain, x, size)
            exact = _with_gradient(plain.double(), x.double(), size)
            # The rivals are torch's own kernels, whose rounding is not judged here.
            factor = 2.0 if name == HILO else 16.0
            assert_as_accurate(found, want, exact, factor=factor, name=name)


def _with_gradient(layer: nn.Module, x: torch.Tensor, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x, size)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields images a second of single layers; on a CPU with one thread and with all.

    Threads wait for each other after every product, and OpenMP's spin while they wait: where another program has one of
    the cores, two threads took up to four times as long as one, most in the layer of the most products. Such a machine
    needs `OMP_WAIT_POLICY=PASSIVE`.
    """
    if device == "cuda":
        problems = ((64, torch.float32), (64, torch.bfloat16), (256, torch.bfloat16))
        for batch, dtype in problems[: 1 if quick else None]:
            yield from _layer_rows(layers(), batch, device, dtype)
        return
    for count in dict.fromkeys((1,) if quick else (1, torch.get_num_threads())):
        with _threads(count):
            yield from _layer_rows(layers(), 8, device)


def _speed_64(device: str, quick: bool) -> Iterator[Row]:
    """Yields the same at the paper's batch on a CPU, with all threads; without all pairs, which have no bar."""
    if device == "cpu" and not quick:
        chosen = {key: layer for key, layer in layers().items() if key[0] != PLAIN}
        yield from _layer_rows(chosen, 64, device)


def _layer_rows(
    chosen: dict[tuple[str, str], nn.Module], batch: int, device: str, dtype: torch.dtype = torch.float32
) -> Iterator[Row]:
    x = torch.randn(batch, SIDE**2, DIM, device=device, dtype=dtype)
    times = _times(chosen, x, (SIDE, SIDE), device)
    shape = (
        f"batch {batch}, {SIDE} x {SIDE} tokens of {DIM}, {HEADS} heads, {str(dtype).removeprefix('torch.')}"
    )
    if device == "cpu":
        count = torch.get_num_threads()
        shape += f", {count} thread{'s' if count > 1 else ''}"
    yield from speed_rows(times, batch, shape, device)


def _times(
    chosen: dict[tuple[str, str], nn.Module], x: torch.Tensor, size: Size, device: str
) -> dict[tuple[str, str], float]:
    rivals = {key: partial(layer.eval().to(x), x, size) for key, layer in chosen.items()}
    names = {" ".join(key): key for key in rivals}
    with torch.no_grad():
        found = time_rivals(
            {name: rivals[key] for name, key in names.items()},
            device,
            method="graph" if device == "cuda" else "auto",
        )
    return {names[name]: timing.median for name, timing in found.items()}


def speed_rows(times: dict[tuple[str, str], float], batch: int, shape: str, device: str) -> Iterator[Row]:
    """HiLo against each rival in each form, with the bars on a CPU; then each layer against its eager form."""
    rates = {key: 1e3 * batch / time for key, time in times.items()}
    for form in (EAGER, FUSED):
        for rival in (REDUCED, LOCAL, PLAIN):
            if (rival, form) not in rates:
                continue
            yield measured(
                f"one layer with {form}, against {rival}", shape, rates[HILO, form], "images/s", better="higher",
                baseline_name=rival, baseline=rates[rival, form],
                required=REQUIRED.get(rival) if device == "cpu" else None,
            )  # fmt: skip
    for name, form in rates:
        if form == FUSED:
            yield measured(
                f"{name}: {FUSED} against {EAGER}", shape, rates[name, FUSED], "images/s", better="higher",
                baseline_name=EAGER, baseline=rates[name, EAGER],
            )  # fmt: skip


def _larger_maps(device: str, quick: bool) -> Iterator[Row]:
    """Yields HiLo of windows of 2 and 4 against local windows where maps grow: pooled keys are quadratic in tokens."""
    dim, heads, batch = 256, 8, 1
    for side in (28,) if quick else (28, 56):
        chosen: dict[tuple[str, str], nn.Module] = {
            (f"HiLo, windows of {window} x {window}", FUSED): HiLoAttention(
                dim, heads, window, alpha=ALPHA, qkv_bias=True
            )
            for window in (2, 4)
        }
        chosen[LOCAL, FUSED] = LocalWindowAttention(dim, heads, F.scaled_dot_product_attention)
        x = torch.randn(batch, side**2, dim, device=device)
        with _threads(1):
            times = _times(chosen, x, (side, side), device)
        rates = {key[0]: 1e3 * batch / time for key, time in times.items()}
        shape = f"batch {batch}, {side} x {side} tokens of {dim}, {heads} heads, float32"
        shape += ", 1 thread" if device == "cpu" else ""
        for name in list(rates)[:2]:
            yield measured(
                f"{name}, {FUSED}, against {LOCAL}", shape, rates[name], "images/s", better="higher",
                baseline_name=LOCAL, baseline=rates[LOCAL],
            )  # fmt: skip


# Published sizes beside models of about as many operations; the first pair has the paper's bar.
RIVALS = {
    "small": ("swin_tiny_patch4_window7_224", "convnext_tiny", "pvt_v2_b2"),
    "medium": ("swin_small_patch4_window7_224", "convnext_small"),
    "base": ("swin_base_patch4_window7_224", "convnext_base"),
}


def _models(device: str, quick: bool) -> Iterator[Row]:
    """Yields images a second of the published models, untrained, on a GPU, beside models of timm."""
    if device != "cuda":
        return
    yield from _throughput("small", 224, 64, RIVALS["small"][: 1 if quick else None])
    if quick:
        return
    yield from _throughput("small", 512, 32, RIVALS["small"][:2])
    for name in ("medium", "base"):
        yield from _throughput(name, 224, 64, RIVALS[name])


def _throughput(ours: str, size: int, batch: int, rivals: tuple[str, ...]) -> Iterator[Row]:
    import timm

    import undivided.models.vision  # noqa: F401

    with torch.device("cuda"):
        models = {
            name: timm.create_model(name, **({"img_size": size} if name.startswith("swin") else {}))
            for name in (f"undivided_litv2_{ours}", *rivals)
        }
    x = torch.randn(batch, 3, size, size, device="cuda", dtype=torch.bfloat16)
    calls = {name: partial(model.eval().bfloat16(), x) for name, model in models.items()}
    with torch.no_grad():
        times = time_rivals(calls, "cuda", method="graph", seconds=0.1)
    rate, *others = (1e3 * batch / timing.median for timing in times.values())
    for name, other in zip(rivals, others, strict=True):
        yield measured(
            f"LITv2-{ours[0].upper()}, against {name} of timm", f"batch {batch}, {size} x {size} pixels, bfloat16",
            rate, "images/s", better="higher", baseline_name=name, baseline=other,
            required=1.0 if size == 224 and name == RIVALS["small"][0] else None,
        )  # fmt: skip


_ALPHAS, _SEEDS = (0.0, 0.5, 0.9, 1.0), (0, 1, 2, 3, 4)
_MODEL: dict[str, Any] = {"depths": (2,), "num_heads": (10,), "window_size": (2,), "mlp_ratio": 2.0}


def _alpha(device: str, quick: bool) -> Iterator[Row]:
    """Yields test accuracies of small models of several shares of low-frequency heads, and frequencies of the heads."""
    from undivided.claims._tiny_lm import mean_and_deviation
    from undivided.claims._tiny_vit import Trainer, accuracy, on_device
    from undivided.data.images import digits, fashion_mnist
    from undivided.models.vision.litv2 import LITv2

    on_cuda = device == "cuda"
    images = on_device(fashion_mnist() if on_cuda else digits(), device)
    sizes: dict[str, Any] = {"embed_dim": 80 if on_cuda else 40, "patch_size": 2}
    steps, batch_size, rate = (800, 256, 2e-3) if on_cuda else (200, 64, 4e-3)
    if quick:
        steps //= 4
    seeds = _SEEDS[: 1 if quick else None]
    side = images.train_images.shape[-1] // sizes["patch_size"]
    shape = (
        f"{images.name}, {side} x {side} tokens of {sizes['embed_dim']}, 2 blocks, {steps} steps of {batch_size}, "
        f"{len(seeds)} seeds"
    )
    found: dict[float, list[float]] = {alpha: [] for alpha in _ALPHAS}
    shares: list[tuple[float, float]] = []
    for alpha in _ALPHAS:
        model = LITv2(in_chans=1, num_classes=images.num_classes, alpha=alpha, **_MODEL, **sizes).to(device)
        trainer = Trainer(model, images, batch_size=batch_size)
        for seed in seeds:
            torch.manual_seed(seed)
            fresh = LITv2(in_chans=1, num_classes=images.num_classes, alpha=alpha, **_MODEL, **sizes)
            trainer.reset(fresh.state_dict())
            trainer.run(steps=steps, learning_rate=rate, seed=seed)
            found[alpha].append(accuracy(model, images))
            if alpha == 0.5:
                shares.append(high_frequencies(model, images.test_images[:256]))
    baseline = mean_and_deviation(found[1.0])[0]
    for alpha in _ALPHAS:
        mean, deviation = mean_and_deviation(found[alpha])
        yield measured(
            f"test accuracy, alpha {alpha}, standard deviation {deviation:.2f}", shape, mean, "%", better="higher",
            baseline_name=None if alpha == 1.0 else "alpha 1.0", baseline=None if alpha == 1.0 else baseline,
        )  # fmt: skip
    high, low = (mean_and_deviation(list(column))[0] for column in zip(*shares, strict=True))
    yield measured(
        "share of a map's energy above half of the Nyquist frequency, high-frequency heads, alpha 0.5", shape, high,
        "of 1", better="higher", baseline_name="low-frequency heads", baseline=low, required=1.0,
    )  # fmt: skip


@torch.no_grad()
def high_frequencies(model: nn.Module, images: torch.Tensor) -> tuple[float, float]:
    """Returns the share of energy above half of Nyquist in the outputs of high- and of low-frequency heads.

    Maps are those after the parts' projections; shares are means over layers.
    """
    from undivided.claims._tiny_vit import normalised

    found: dict[str, list[float]] = {"hifi_proj": [], "lofi_proj": []}

    def keep(name: str, module: nn.Module, inputs: Any, out: torch.Tensor) -> None:
        side = int(out.shape[1] ** 0.5)
        found[name].append(energy_share(to_map(out.float(), (side, side))))

    handles = [
        module.register_forward_hook(partial(keep, name.rpartition(".")[2]))
        for name, module in model.named_modules()
        if name.endswith(tuple(found))
    ]
    try:
        model.eval()(normalised(images))
    finally:
        for handle in handles:
            handle.remove()
    high, low = (sum(values) / len(values) for values in found.values())
    return high, low


def energy_share(maps: torch.Tensor) -> float:
    """Returns the share of the energy of maps `[B, C, H, W]` above half of Nyquist along either axis."""
    energy = torch.fft.fft2(maps).abs().square().sum((0, 1))
    rows, columns = (torch.fft.fftfreq(length, device=maps.device).abs() for length in maps.shape[2:])
    above = torch.maximum(rows[:, None], columns[None]) > 0.25
    return float(energy[above].sum() / energy.sum())


_PARTS: dict[str, Measure] = {
    "speed": _speed,
    "speed_64": _speed_64,
    "maps": _larger_maps,
    "models": _models,
    "alpha": _alpha,
}
CLAIM = Claim(
    slug="hilo",
    source="arXiv 2205.13213, abstract and section 5.3; the layer table is of the authors' benchmark",
    paper=(
        "1.4x faster than spatial reduction attention and 1.6x faster than local window attention on CPUs.",
        "Batch 64, 14 x 14 tokens of 768, 12 heads, Core i9-10900X, images/s (millions of multiply-adds): all pairs "
        "505 (521.4), local windows of 7 x 7 631 (477.2), SRA 710 (419.6), HiLo 1029 (298.3).",
        "Batch 64, images/s on an A100: LITv2-S 1874, Swin-Ti 1564, ConvNeXt-Ti 1654, PVTv2-B2 1175.",
        "LITv2-S on ImageNet-1K by alpha: 81.16 at 0, 81.88 at 0.5, 82.03 at 0.9, 81.89 at 1.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
    devices=("cpu", "cuda"),
)
