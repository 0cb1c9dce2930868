"""RALA: attention that is linear in the tokens against softmax at large maps, and what its rank costs and brings.

Plain linear attention is timed in two forms: three products of PyTorch in half precision, and this library's own kernel
without weights of tokens and rotations, which is the closer rival.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import measured_ceilings, time_rivals
from undivided.layers.rala import (
    ModulatedSoftmaxAttention,
    RankAugmentedLinearAttention,
    axial_rotary,
    rank_report,
)
from undivided.ops import linear_attention
from undivided.testing import compare_op

BATCH, HEAD_DIM = 4, 64
# Bars: ten times the speed of softmax attention, less than 1.3 of the time of plain linear attention.
SOFTMAX, PLAIN, EAGER = 10.0, 1 / 1.3, 3.0
SDPA = "scaled_dot_product_attention"
PRODUCTS, OWN = "plain linear attention, products of PyTorch", "plain linear attention, the same kernel"
COMPOSED = "the same in products of PyTorch"
_SECONDS = 0.06


def gate(device: str) -> None:
    """Raises unless linear attention on this device is as accurate as its definition, output and gradients."""
    on_cuda = device == "cuda"
    dtype = torch.bfloat16 if on_cuda else torch.float32
    size = (9, 15)
    cos, sin = axial_rotary(size, HEAD_DIM, device, torch.float64)
    for options in ({"key_weight": "context", "cos": cos, "sin": sin}, {}):
        names = ("query", "key", "value", "local", "modulation")
        x = {
            name: torch.randn(2, 135, 3, HEAD_DIM, device=device, dtype=torch.float64).transpose(1, 2)
            for name in names
        }
        fast = partial(linear_attention, backend="triton" if on_cuda else "composed", **options)
        slow = partial(linear_attention, backend="reference", **options)
        compare_op(fast, slow, slow, x, dtype)


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Linear attention with elu(x) + 1 as it is written where no kernel is at hand."""
    query, key = F.elu(query) + 1, F.elu(key) + 1
    norm = query @ key.sum(-2)[..., None]
    return (query @ (key.transpose(-2, -1) @ value)) / norm


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of attention on maps, forward, then with gradients."""
    if device != "cuda":
        return
    for side, heads in ((224, 1),) if quick else ((224, 1), (224, 8), (56, 1)):
        yield from _forward(side, heads)
    yield from _trained(112 if quick else 224, 1)
    if not quick:
        yield from _backbone()


def _attentions(side: int, heads: int, device: str = "cuda") -> dict[str, Callable[..., torch.Tensor]]:
    cos, sin = axial_rotary((side, side), HEAD_DIM, device)
    rala = partial(linear_attention, key_weight="context", cos=cos, sin=sin)
    return {
        "RALA": rala,
        PRODUCTS: plain,
        OWN: linear_attention,
        COMPOSED: partial(rala, backend="composed"),
        SDPA: F.scaled_dot_product_attention,
    }


def _tensors(side: int, heads: int) -> list[torch.Tensor]:
    shape = (BATCH, side * side, heads, HEAD_DIM)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]


def _forward(side: int, heads: int) -> Iterator[Row]:
    given = _tensors(side, heads)
    calls = {name: partial(call, *given) for name, call in _attentions(side, heads).items()}
    with torch.no_grad():
        times = time_rivals(calls, "cuda", method="graph", seconds=_SECONDS)
    ours = times["RALA"].median
    # Queries, keys and values read, outputs written.
    ceiling = measured_ceilings("cuda").fraction(ours, bytes_moved=4 * given[0].numel() * 2)
    bars = {SDPA: SOFTMAX, PRODUCTS: PLAIN, OWN: PLAIN, COMPOSED: EAGER} if side == 224 else {}
    for name in (SDPA, PRODUCTS, OWN, COMPOSED):
        yield measured(
            f"attention on a map, forward, against {name}", _shape(side, heads), ours, "ms", better="lower",
            baseline_name=name, baseline=times[name].median, required=bars.get(name),
            fraction_of_ceiling=ceiling if name == SDPA else None,
        )  # fmt: skip


def _trained(side: int, heads: int) -> Iterator[Row]:
    given = [tensor.requires_grad_() for tensor in _tensors(side, heads)]
    dout = torch.randn_like(given[0])
    attentions = _attentions(side, heads)
    calls = {
        name: partial(_gradients, attentions[name], given, dout)
        for name in ("RALA", SDPA, PRODUCTS, COMPOSED)
    }
    times = time_rivals(calls, "cuda", seconds=_SECONDS)
    for name in (SDPA, PRODUCTS, COMPOSED):
        yield measured(
            f"attention on a map, forward and backward, against {name}", _shape(side, heads), times["RALA"].median,
            "ms", better="lower", baseline_name=name, baseline=times[name].median,
        )  # fmt: skip


def _gradients(call: Callable[..., torch.Tensor], given: list[torch.Tensor], dout: torch.Tensor) -> Any:
    return torch.autograd.grad(call(*given), given, dout)


def _shape(side: int, heads: int) -> str:
    return f"batch {BATCH}, {heads} heads, {side} x {side} tokens, head_dim {HEAD_DIM}, bfloat16"


def _backbone() -> Iterator[Row]:
    """Yields images a second of RAVLT-S as published against softmax attention in all of its stages."""
    import timm

    import undivided.models.vision  # noqa: F401

    for size, batch in ((1024, 2), (512, 8)):
        with torch.device("cuda"):
            models = {
                "ours": timm.create_model("undivided_ravlt_small"),
                "softmax": timm.create_model("undivided_ravlt_small", attention=("softmax",) * 4),
            }
        x = torch.randn(batch, 3, size, size, device="cuda", dtype=torch.bfloat16)
        calls = {name: partial(model.eval().bfloat16(), x) for name, model in models.items()}
        with torch.no_grad():
            times = time_rivals(calls, "cuda", method="graph", seconds=_SECONDS)
        rates = {name: 1e3 * batch / timing.median for name, timing in times.items()}
        yield measured(
            "RAVLT-S, linear attention in its first two stages, against softmax attention in all four",
            f"batch {batch}, {size} x {size} pixels, bfloat16", rates["ours"], "images/s", better="higher",
            baseline_name="softmax attention in all stages", baseline=rates["softmax"],
        )  # fmt: skip


_SEEDS: tuple[int, ...] = (0, 1, 2, 3, 4)
_PLAIN, _WEIGHTS, _MODULATION, _RALA, _SOFTMAX = (
    "plain linear attention", "with token weights alone", "with modulation alone", "RALA", "softmax attention"
)  # fmt: skip


def arms() -> dict[str, type[nn.Module]]:
    """Returns the layers by name; all have rotations, and none the local term, which has a rank of its own."""
    options = {
        _PLAIN: {"token_weight": False, "modulation": False},
        _WEIGHTS: {"token_weight": True, "modulation": False},
        _MODULATION: {"token_weight": False, "modulation": True},
        _RALA: {"token_weight": True, "modulation": True},
    }
    found: dict[str, type[nn.Module]] = {
        name: RankAugmentedLinearAttention.with_options(lepe_kernel=None, **own)
        for name, own in options.items()
    }
    found[_SOFTMAX] = ModulatedSoftmaxAttention.with_options(lepe_kernel=None, modulation=False)
    return found


def _quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields accuracies of small trained models, and ranks of their buffers and outputs, averaged over layers."""
    from undivided.claims._tiny_lm import mean_and_deviation
    from undivided.claims._tiny_vit import Trainer, accuracy, on_device, tiny_vit
    from undivided.data.images import digits, fashion_mnist

    on_cuda = device == "cuda"
    images = on_device(fashion_mnist() if on_cuda else digits(), device)
    # Two heads of 32 channels, more tokens than channels.
    sizes: dict[str, Any] = {
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 2 if on_cuda else 1,
        "mlp_ratio": 2.0,
    }
    seeds = _SEEDS if on_cuda else _SEEDS[:3]
    steps, batch_size = (300, 256) if on_cuda else (100, 64)
    if quick:
        steps, seeds = steps // 10, seeds[:1]
    found: dict[str, list[tuple[float, float, float]]] = {}
    for arm, layer in arms().items():
        build = partial(tiny_vit, images, **sizes, attn_layer=layer)
        model = build().to(device)
        trainer = Trainer(model, images, batch_size=batch_size)
        for seed in seeds:
            trainer.reset(build(seed=seed).state_dict())
            trainer.run(steps=steps, learning_rate=2e-3, seed=seed)
            buffer, output = ranks(model, images.test_images[:16])
            found.setdefault(arm, []).append((accuracy(model, images, batch_size=500), buffer, output))
    side = images.train_images.shape[-1] // sizes["patch_size"]
    shape = (
        f"{images.name}, {side} x {side} tokens of {sizes['embed_dim']}, {sizes['num_heads']} heads, {sizes['depth']} "
        f"blocks, {steps} steps of {batch_size}, {len(seeds)} seeds"
    )
    titles = (
        ("test accuracy", "%"),
        ("effective rank of the buffer", "of 32"),
        ("effective rank of the output", "of 64"),
    )
    for column, (title, unit) in enumerate(titles):
        means = {arm: mean_and_deviation([values[column] for values in own]) for arm, own in found.items()}
        baseline = means[_PLAIN][0]
        for arm, (mean, deviation) in means.items():
            if arm == _SOFTMAX and column == 1:
                continue
            is_baseline = arm == _PLAIN
            yield measured(
                f"{title}, {arm}", shape, mean, unit, better="higher", deviation=deviation,
                baseline_name=None if is_baseline else _PLAIN, baseline=None if is_baseline else baseline,
                required=1.0 if arm == _RALA else None,
            )  # fmt: skip


@torch.no_grad()
def ranks(model: nn.Module, images: torch.Tensor) -> tuple[float, float]:
    """Returns the effective ranks of buffers (0 where there is none) and of outputs, means over layers and images."""
    from undivided.claims._tiny_vit import normalised

    reports = []

    def keep(module: nn.Module, inputs: Any) -> None:
        reports.append(rank_report(module, inputs[0].float()))

    handles = [block.attn.register_forward_pre_hook(keep) for block in model.blocks]
    try:
        model.eval()(normalised(images))
    finally:
        for handle in handles:
            handle.remove()
    buffer = sum(report.buffer_effective or 0.0 for report in reports) / len(reports)
    return buffer, sum(report.output_effective for report in reports) / len(reports)


_PARTS: dict[str, Measure] = {"speed": _speed, "quality": _quality}
CLAIM = Claim(
    slug="rala",
    source="arXiv 2411.07635, abstract, sections 3 and 4",
    paper=(
        "RAVLT-S: 84.4 % top-1 on ImageNet-1K with 26 M parameters and 4.6 GFLOPs.",
        "The buffer and the output of plain linear attention are far from full rank, those of RALA near it.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
    devices=("cuda", "cpu"),
)
