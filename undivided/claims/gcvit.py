"""GC ViT: a block of global queries against one of shifted windows, and how far each reaches.

Both blocks have the same tokens, window, heads and MLP. The rival is timm's Swin block with its shift, its roll and its
mask. Small models on pairs of real images, which stand in opposite corners of a map, show the reach: the class of one
is asked where the other stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import time_rivals
from undivided.data.images import ImageSet
from undivided.layers._vision import to_tokens
from undivided.layers.gcvit import GlobalQueryGenerator, GlobalWindowAttention
from undivided.ops import grouped_attention
from undivided.ops.grouped import Windows
from undivided.testing import compare_op

WINDOW = 7
_SECONDS = 0.08
SHIFTED, UNSHIFTED = "shifted windows (timm's Swin block)", "windows that do not move (timm's Swin block)"
COPIED = "queries copied for every window"


def gate(device: str) -> None:
    """Raises unless windows with shared queries are as accurate as their definition, output and gradients."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    windows = Windows((14, 21), (7, 7))
    for tokens, shared in ((49, True), (294, False)):
        x = {
            "query": torch.randn(2, 2, tokens, 32, device=device, dtype=torch.float64),
            "key": torch.randn(2, 2, 294, 32, device=device, dtype=torch.float64),
            "value": torch.randn(2, 2, 294, 32, device=device, dtype=torch.float64),
            "bias": torch.randn(2, 49, 49, device=device, dtype=torch.float64),
        }
        fast, slow = (
            partial(grouped_attention, groups=windows, shared_query=shared, backend=backend)
            for backend in ("sdpa", "reference")
        )
        compare_op(fast, slow, slow, x, dtype)


class CopiedQueries(GlobalWindowAttention):
    """The same layer with its queries repeated for every window."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, size: tuple[int, int], global_query: torch.Tensor
    ) -> torch.Tensor:
        windows = Windows(size, self.window_size)
        query = global_query.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        copies = query[:, None].repeat(1, windows.num_groups, 1, 1, 1).flatten(0, 1)
        key, value = (windows.gather(part).flatten(0, 1) for part in self.heads(x))
        bias = self.position_bias()[None].to(query.dtype)
        out = F.scaled_dot_product_attention(copies, key, value, attn_mask=bias, scale=self.scale)
        out = windows.scatter(out.unflatten(0, (x.shape[0], windows.num_groups)))
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


def blocks(side: int, dim: int, heads: int, mlp_ratio: float = 3.0) -> dict[str, nn.Module]:
    """Returns a global and a local block of ours and Swin's blocks of timm, with and without a shift."""
    from timm.models.swin_transformer import SwinTransformerBlock

    from undivided.models.vision.gcvit import GCViTBlock

    common: dict[str, Any] = {"mlp_ratio": mlp_ratio, "qkv_bias": True}
    ours = {
        name: GCViTBlock(
            dim, heads, (WINDOW, WINDOW), is_global=is_global, layer_scale=None, proj_drop=0.0, drop_path=0.0, **common
        )
        for name, is_global in (("global", True), ("local", False))
    }  # fmt: skip
    theirs = {
        name: SwinTransformerBlock(dim, (side, side), heads, window_size=WINDOW, shift_size=shift, **common)
        for name, shift in ((SHIFTED, WINDOW // 2), (UNSHIFTED, 0))
    }
    return {**ours, **theirs}


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of single blocks and layers, and of whole models."""
    shapes = ((56, 64, 2), (14, 256, 8))
    if device == "cpu":
        yield from _block_rows(28, 64, 2, 2 if quick else 8, device, torch.float32)
        return
    for side, dim, heads in shapes[: 1 if quick else None]:
        yield from _block_rows(side, dim, heads, 64, device, torch.bfloat16)
    yield from _copies(device)
    if not quick:
        yield from _models(device)


def _block_rows(
    side: int, dim: int, heads: int, batch: int, device: str, dtype: torch.dtype
) -> Iterator[Row]:
    options = {"device": device, "dtype": dtype}
    found = {name: block.to(**options).eval() for name, block in blocks(side, dim, heads).items()}
    x = torch.randn(batch, side, side, dim, **options)
    tokens, query = x.flatten(1, 2), torch.randn(batch, WINDOW**2, dim, **options)
    size = (side, side)
    calls: dict[str, Callable[[], Any]] = {
        "global": partial(found["global"], tokens, size, query),
        **{name: partial(found[name], x) for name in (SHIFTED, UNSHIFTED)},
    }
    layers: dict[str, Callable[[], Any]] = {
        "global": partial(found["global"].attn, tokens, size, query),
        **{name: partial(found[name]._attn, x) for name in (SHIFTED, UNSHIFTED)},
    }
    shape = f"batch {batch}, {side} x {side} tokens of {dim}, {heads} heads, windows of {WINDOW} x {WINDOW}, "
    shape += str(dtype).removeprefix("torch.")
    method = "graph" if device == "cuda" else "auto"
    for what, rivals in (("block", calls), ("attention layer alone", layers)):
        with torch.no_grad():
            times = time_rivals(rivals, device, method=method, seconds=_SECONDS)
        for name in (SHIFTED, UNSHIFTED):
            yield measured(
                f"{what} of global queries against {name}", shape, times["global"].median, "ms", better="lower",
                baseline_name=name, baseline=times[name].median,
                required=1.0 if name == SHIFTED and device == "cuda" else None,
            )  # fmt: skip


def _copies(device: str) -> Iterator[Row]:
    """Yields time and memory of shared queries against copies of them."""
    batch, side, dim, heads = 64, 56, 64, 2
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    shared = GlobalWindowAttention(dim, heads, WINDOW).to(**options)
    copied = CopiedQueries(dim, heads, WINDOW).to(**options)
    copied.load_state_dict(shared.state_dict())
    x, query = (torch.randn(batch, n, dim, **options) for n in (side**2, WINDOW**2))
    calls = {
        name: partial(layer, x, (side, side), query) for name, layer in (("ours", shared), (COPIED, copied))
    }
    with torch.no_grad():
        times = time_rivals(calls, device, seconds=_SECONDS)
        peaks = {name: _peak(call) for name, call in calls.items()}
    shape = f"batch {batch}, {side} x {side} tokens of {dim}, {heads} heads, bfloat16"
    yield measured(
        f"layer of global queries, against {COPIED}", shape, times["ours"].median, "ms", better="lower",
        baseline_name=COPIED, baseline=times[COPIED].median,
    )  # fmt: skip
    yield measured(
        f"memory of a layer of global queries, against {COPIED}", shape, peaks["ours"], "MB", better="lower",
        baseline_name=COPIED, baseline=peaks[COPIED], required=1.0,
    )  # fmt: skip


def _peak(call: Callable[[], Any]) -> float:
    """Returns the most memory that a call allocates beside what is there, in MB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    del out
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _models(device: str) -> Iterator[Row]:
    """Yields images a second of GC ViT-T against models of its size."""
    import timm

    rivals = ("swin_tiny_patch4_window7_224", "convnext_tiny", "gcvit_tiny")
    batch = 64
    with torch.device(device):
        models = {name: timm.create_model(name) for name in ("undivided_gcvit_tiny", *rivals)}
    x = torch.randn(batch, 3, 224, 224, device=device, dtype=torch.bfloat16)
    calls = {name: partial(model.eval().bfloat16(), x) for name, model in models.items()}
    with torch.no_grad():
        times = time_rivals(calls, device, method="graph", seconds=_SECONDS)
    rates = {name: 1e3 * batch / timing.median for name, timing in times.items()}
    for name in rivals:
        yield measured(
            f"GC ViT-T, against {name} of timm", f"batch {batch}, 224 x 224 pixels, bfloat16",
            rates["undivided_gcvit_tiny"], "images/s", better="higher", baseline_name=name, baseline=rates[name],
        )  # fmt: skip


class TwoBlocks(nn.Module):
    """A classifier of grey images of 56 x 56 pixels: patches of 2 x 2, two blocks, the mean of the first window.

    Args:
        kind: "global" (a local block, then a global one), "shifted" (Swin's pair) or "local" (two local blocks).
        dim: width of the tokens.
        num_classes: classes.
    """

    def __init__(self, kind: str, dim: int = 64, num_classes: int = 2) -> None:
        super().__init__()
        self.kind = kind
        self.patches = nn.Conv2d(1, dim, 2, stride=2)
        # As behind the stem of GC ViT, whose global queries have no norm of their own.
        self.patch_norm = nn.LayerNorm(dim)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 28**2, dim))
        found = blocks(28, dim, 2, mlp_ratio=2.0)
        first, second = found["local"], blocks(28, dim, 2, mlp_ratio=2.0)["local"]
        if kind == "shifted":
            first, second = found[UNSHIFTED], found[SHIFTED]
        elif kind == "global":
            second = found["global"]
            self.query_generator = GlobalQueryGenerator(dim, WINDOW, 2)
        self.blocks = nn.ModuleList([first, second])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.tokens(self.embedded(x))).unflatten(1, (28, 28))
        return self.head(tokens[:, :WINDOW, :WINDOW].mean((1, 2)))

    def embedded(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the tokens that the blocks read, `[B, 784, dim]`."""
        return self.patch_norm(to_tokens(self.patches(x))[0]) + self.positions

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what the blocks make of tokens."""
        size = (28, 28)
        if self.kind == "shifted":
            x = x.unflatten(1, size)
            for block in self.blocks:
                x = block(x)
            return x.flatten(1, 2)
        query = self.query_generator(x, size) if self.kind == "global" else None
        for block in self.blocks:
            x = block(x, size, query)
        return x


ARMS = {"global": "global queries", "shifted": "shifted windows", "local": "windows that do not move"}


def reach(model: TwoBlocks) -> float:
    """Returns the share of tokens that the gradient of the middle token's output reaches.

    Gradients below 1e-9 of the largest do not count: a mask of -100, as Swin's, lets e ** -100 through.
    """
    weight = model.patches.weight
    x = torch.randn(1, 28**2, model.positions.shape[2], device=weight.device, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.tokens(x)[0, 13 * 28 + 13].sum(), x)
    size = gradient.abs().amax(-1)
    return (size > 1e-9 * size.max()).float().mean().item()


def pairs(images: ImageSet, count: int, seed: int = 0) -> ImageSet:
    """Returns maps of 56 x 56 pixels with images of two classes in opposite corners; the class is that of the last.

    Args:
        images: of at most 28 x 28 pixels; those of classes 0 and 1 alone are shown.
        count: training maps; a quarter as many are for the test.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for shown, labels, number in (
        (images.train_images, images.train_labels, count),
        (images.test_images, images.test_labels, count // 4),
    ):
        chosen = (labels < 2).nonzero().flatten()
        shown, labels = shown[chosen].cpu(), labels[chosen].cpu()
        first, second = torch.randint(len(labels), (2, number), generator=generator)
        maps = torch.zeros(number, 1, 56, 56, dtype=torch.uint8)
        side = shown.shape[-1]
        maps[:, :, :side, :side] = shown[first]
        maps[:, :, -side:, -side:] = shown[second]
        parts += [maps, labels[second]]
    return ImageSet(f"pairs of {images.name} images", *parts)


_SEEDS: tuple[int, ...] = (0, 1, 2, 3, 4)


def _quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields what two blocks reach, and test accuracies where the opposite corner is asked for."""
    from undivided.claims._tiny_lm import mean_and_deviation
    from undivided.claims._tiny_vit import Trainer, accuracy, on_device
    from undivided.data.images import digits, fashion_mnist

    on_cuda = device == "cuda"
    images = on_device(pairs(fashion_mnist() if on_cuda else digits(), 8000 if on_cuda else 2000), device)
    seeds = _SEEDS if on_cuda else _SEEDS[:3]
    steps, batch_size = (300, 128) if on_cuda else (100, 32)
    if quick:
        steps, seeds = steps // 10, seeds[:1]
    reached: dict[str, float] = {}
    found: dict[str, list[float]] = {}
    for kind in ARMS:
        model = TwoBlocks(kind).to(device)
        reached[kind] = reach(model)
        trainer = Trainer(model, images, batch_size=batch_size)
        for seed in seeds:
            torch.manual_seed(seed)
            trainer.reset(TwoBlocks(kind).state_dict())
            trainer.run(steps=steps, learning_rate=2e-3, seed=seed)
            found.setdefault(kind, []).append(accuracy(model, images, batch_size=250))
    tokens = "28 x 28 tokens of 64, windows of 7 x 7, two blocks"
    for kind in ("shifted", "local"):
        yield measured(
            f"tokens that the middle token reaches, global queries against {ARMS[kind]}", tokens,
            100 * reached["global"], "%", better="higher", baseline_name=ARMS[kind], baseline=100 * reached[kind],
        )  # fmt: skip
    shape = f"{images.name}, {tokens}, {steps} steps of {batch_size}, {len(seeds)} seeds"
    (ours, deviation), *others = (mean_and_deviation(found[kind]) for kind in ARMS)
    for kind, (theirs, spread) in zip(list(ARMS)[1:], others, strict=True):
        yield measured(
            f"accuracy on the image in the opposite corner, global queries against {ARMS[kind]} "
            f"(their standard deviation {spread:.2f})", shape, ours,
            "%", better="higher", baseline_name=ARMS[kind], baseline=theirs, deviation=deviation, required=1.0,
        )  # fmt: skip


_PARTS: dict[str, Measure] = {"speed": _speed, "quality": _quality}
CLAIM = Claim(
    slug="gcvit",
    source="arXiv 2206.09959, abstract and section 3",
    paper=(
        "ImageNet-1K top-1 of 84.3, 84.9 and 85.6 % at 51, 90 and 201 M parameters.",
        "Global queries take the place of shifted windows and masks; a global block has no projection of queries.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
    devices=("cuda", "cpu"),
)
