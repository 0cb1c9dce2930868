"""SLA: attention that is exact on a few blocks and linear on the others, timed whole and in its parts, and trained.

The shape is that of Wan2.1-1.3B on a video of 81 frames at 480p. Times are of the whole method: means, map, sums, both
branches and the projection. The authors' module stands beside it if their package `sparse_linear_attention` is
installed (branch SLA-1); FlexAttention computes the sparse branch alone, with the same blocks. Random queries and keys
share no blocks between rows, which is the worst case for the cache. The Method of Four Russians is measured at half of
the blocks, where it should pay; the product with the map takes its place in the library.

Quality is measured on small diffusion transformers of procedural images: that the arms train and the order of those far
apart can be seen, a video model's quality can not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.claims import _four_russians, _wan_shape
from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._sla_quality import quality
from undivided.claims._timing import time_rivals
from undivided.convert.sla import convert_sla
from undivided.ops import block_classes, selected_attention, sparse_linear_attention
from undivided.ops.block_map import invert, score_blocks
from undivided.ops.sparse_linear import class_counts, lists_of
from undivided.testing import assert_as_accurate, compare_op

HEADS, TOKENS, DIM = 12, 32760, 128
SHARES = (0.05, 0.10)
FLASH, CUDNN, FLEX, OFFICIAL = (
    "flash (SDPA), all pairs",
    "cuDNN (SDPA), all pairs",
    "FlexAttention, critical blocks alone",
    "the authors' module (branch SLA-1)",
)
# Rival to the ratio that holds: forward and backward. Those of dense rivals are for 5 % of the blocks.
BARS = {FLASH: (10.0, 5.0), CUDNN: (6.0, None), OFFICIAL: (2.0, 2.0)}
LINEAR_SHARE, STEP = 0.25, 1.8
Calls = Mapping[str, Callable[[], object]]


def gate(device: str) -> None:
    """Raises unless kernels are as accurate as eager PyTorch, and with all blocks critical SLA is dense attention."""
    length, width, block, dtype = (
        (600, DIM, 64, torch.bfloat16) if device == "cuda" else (50, 16, 16, torch.float32)
    )
    x = {name: torch.randn(1, 2, length, width, device=device) for name in ("query", "key", "value")}
    x["weight"], x["bias"] = (
        torch.randn(width, width, device=device) / width**0.5,
        torch.randn(width, device=device),
    )
    for scope in ("marginal", "noncritical"):
        classes = block_classes(
            x["query"], x["key"], topk=0.25, bottomk=0.2, query_block_size=block, block_size=block
        )
        own, reference = (
            partial(
                sparse_linear_attention, classes=classes, query_block_size=block, block_size=block, linear_scope=scope,
                backend=backend,
            )
            for backend in ("auto", "reference")
        )  # fmt: skip
        compare_op(own, reference, reference, x, dtype)
        # Without gradients another kernel runs, which projects the values first.
        rounded = {name: tensor.to(dtype) for name, tensor in x.items()}
        with torch.no_grad():
            exact = reference(**{name: tensor.double() for name, tensor in rounded.items()})
            assert_as_accurate(own(**rounded), reference(**rounded), exact)
    heads = [tensor.double() for tensor in heads_of(x)]
    whole, linear = sparse_linear_attention(
        heads[0], heads[1], heads[2], topk=1.0, bottomk=0.0, backend="reference"
    )
    torch.testing.assert_close(whole, F.scaled_dot_product_attention(*heads))
    if linear.any():
        raise ValueError("the linear part is not zero where all blocks are critical.")


def problem(batch: int = 1, heads: int = HEADS, length: int = TOKENS) -> dict[str, torch.Tensor]:
    """Returns random heads on a GPU, in bf16, an output gradient `dout`, and a projection in float32."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    found = {n: draw(batch, heads, length, DIM).bfloat16() for n in ("query", "key", "value", "dout")}
    return found | {"weight": draw(DIM, DIM) / DIM**0.5, "bias": draw(DIM)}


def heads_of(x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns queries, keys and values."""
    return x["query"], x["key"], x["value"]


def shape_of(x: dict[str, torch.Tensor], topk: float, rows: int = 64) -> str:
    """Returns the sizes of a problem in words."""
    batch, heads, length, width = x["query"].shape
    return f"batch {batch}, {heads} heads of {width}, {length} tokens, blocks {rows}/64, {topk:.0%} critical, bf16"


def _kernels(name: str) -> AbstractContextManager:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel({FLASH: SDPBackend.FLASH_ATTENTION, CUDNN: SDPBackend.CUDNN_ATTENTION}[name])


def _dense(name: str, *heads: torch.Tensor) -> torch.Tensor:
    with _kernels(name):
        return F.scaled_dot_product_attention(*heads)


def official(topk: float) -> nn.Module | None:
    """Returns the authors' module with a random projection, or None if their package is not installed."""
    try:
        from sparse_linear_attention import SparseLinearAttention
    except ImportError:
        return None
    module = SparseLinearAttention(DIM, topk).cuda()
    with torch.no_grad():
        module.proj_l.weight.normal_(0, DIM**-0.5)
    return module


def _forward(device: str, quick: bool) -> Iterator[Row]:
    """Forward of the whole method at 5 and 10 percent, beside dense attention and the authors' module."""
    if device != "cuda":
        return
    x = problem()
    heads = heads_of(x)
    dense: Calls = {name: partial(_dense, name, *heads) for name in (FLASH, CUDNN)}
    dense_times: dict[str, float] = {}
    for topk in SHARES:
        shape = shape_of(x, topk)
        ours = partial(sparse_linear_attention, *heads, x["weight"], x["bias"], topk=topk)
        with torch.no_grad():
            own = _graphed({"ours": ours})["ours"]
            dense_times = dense_times or _graphed(dense)
        for name, baseline in dense_times.items():
            yield measured(
                "forward, map and projection included", shape, own, "ms", better="lower", baseline_name=name,
                baseline=baseline, required=BARS[name][0] if topk == SHARES[0] else None,
            )  # fmt: skip
        module = official(topk)
        if module is None:
            continue
        # Theirs has no negligible blocks: it stands beside ours without them, both called from Python.
        rivals: Calls = {
            "ours": partial(ours, bottomk=0.0, linear_scope="noncritical"),
            OFFICIAL: partial(module, *heads),
        }
        with torch.no_grad():
            times = time_rivals(rivals, "cuda", method="events", samples=30)
        yield measured(
            "forward, none negligible, called from Python", shape, times["ours"].median, "ms", better="lower",
            baseline_name=OFFICIAL, baseline=times[OFFICIAL].median, required=BARS[OFFICIAL][0],
        )  # fmt: skip


def _graphed(rivals: Calls) -> dict[str, float]:
    """Median milliseconds of replays of CUDA graphs: in a model the host runs ahead, for all rivals alike."""
    return {
        name: timing.median
        for name, timing in time_rivals(rivals, "cuda", method="graph", samples=30).items()
    }


@torch.no_grad()
def _split(device: str, quick: bool) -> Iterator[Row]:
    """The steps of the forward at 5 percent, each alone, and what the linear branch adds to block-sparse attention."""
    if device != "cuda":
        return
    from undivided.ops.sparse_linear.classes import lists_and_shares
    from undivided.ops.sparse_linear.triton import means_of, sums_of

    x, topk = problem(), SHARES[0]
    heads = heads_of(x)
    folded = x["weight"].bfloat16()
    query_means, key_means, sums = sums_of(*heads, folded, 64, 64, "softmax", True)
    counts = class_counts(key_means.shape[2], topk, 0.10)
    scores = score_blocks(query_means, key_means)
    lists, shares = lists_and_shares(scores, *counts, "marginal", torch.bfloat16)

    def means_and_map() -> None:
        means = means_of(*heads[:2], 64, 64)
        lists_and_shares(score_blocks(*means), *counts, "marginal", torch.bfloat16)

    sparse = partial(_critical, heads, lists.index, lists.counts)

    def without_the_linear_branch() -> None:
        means_and_map()
        sparse()

    times = _graphed(
        {
            "means of queries and keys, scores and choice": means_and_map,
            "means, and sums over projected values of each block": lambda: sums_of(
                *heads, folded, 64, 64, "softmax", True
            ),
            "scores and choice": lambda: lists_and_shares(
                score_blocks(query_means, key_means), *counts, "marginal", torch.bfloat16
            ),
            "sums over the marginal blocks of each row": lambda: torch.matmul(shares, sums),
            "attention of critical blocks alone": sparse,
            "map and critical blocks, without the linear branch": without_the_linear_branch,
            "whole": partial(sparse_linear_attention, *heads, x["weight"], x["bias"], topk=topk),
        }
    )
    shape, whole = shape_of(x, topk), times.pop("whole")
    for name, own in times.items():
        yield measured(f"part of the forward: {name}", shape, own, "ms", better="lower")
    linear = max(whole - times["map and critical blocks, without the linear branch"], 1e-3) / whole
    yield measured(
        "share of the linear branch in the forward", shape, linear, "share", better="lower",
        baseline_name="a quarter", baseline=LINEAR_SHARE, required=1.0,
    )  # fmt: skip


def _backward(device: str, quick: bool) -> Iterator[Row]:
    """Backward of the whole method, beside dense attention and the authors' module."""
    if device != "cuda":
        return
    x = problem()
    dense: dict[str, float] = {}
    for topk in SHARES:
        shape = shape_of(x, topk)
        leaves = [head.detach().requires_grad_() for head in heads_of(x)]
        parameters = [x[name].detach().requires_grad_() for name in ("weight", "bias")]
        ours = partial(sparse_linear_attention, *leaves, *parameters, topk=topk)
        calls = {
            "ours": _gradients(ours(), [*leaves, *parameters], x["dout"]),
            "released": _gradients(
                ours(bottomk=0.0, linear_scope="noncritical"), [*leaves, *parameters], x["dout"]
            ),
        }
        module = official(topk)
        if module is not None:
            calls[OFFICIAL] = _gradients(module(*leaves), [*leaves, *module.parameters()], x["dout"])
        if not dense:
            calls |= {name: _gradients(_dense(name, *leaves), leaves, x["dout"]) for name in (FLASH, CUDNN)}
        times = _medians(calls, 7)
        dense = dense or {name: times[name] for name in (FLASH, CUDNN)}
        for name, baseline in (dense | {k: v for k, v in times.items() if k == OFFICIAL}).items():
            has_bar = topk == SHARES[0] or name == OFFICIAL
            yield measured(
                "backward", shape, times["released" if name == OFFICIAL else "ours"], "ms", better="lower",
                baseline_name=name, baseline=baseline, required=BARS[name][1] if has_bar else None,
            )  # fmt: skip
        index, counts = lists_of(block_classes(x["query"], x["key"], topk=topk))
        index = index[..., : class_counts(index.shape[2], topk, 0.10)[0]].contiguous()
        alone = _medians({"invert": partial(invert, index, counts, -(-TOKENS // 64))}, 7)["invert"]
        yield measured("part of the backward: the inverse of the lists", shape, alone, "ms", better="lower")


def _critical(
    heads: Sequence[torch.Tensor], index: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = heads
    return selected_attention(query, key, value, index, counts, query_block_size=64, block_size=64)


def _gradients(out: torch.Tensor, leaves: Sequence[torch.Tensor], dout: torch.Tensor) -> Callable[[], object]:
    return partial(torch.autograd.grad, out, leaves, dout, retain_graph=True)


def _medians(calls: Calls, samples: int) -> dict[str, float]:
    """Median milliseconds of a few single calls in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(samples + 1):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if turn:
                times[name].append(start.elapsed_time(end))
    return {name: median(own) for name, own in times.items()}


@torch.no_grad()
def _step(device: str, quick: bool) -> Iterator[Row]:
    """One denoising step of a transformer of Wan2.1-1.3B's shape, eager, with dense attention and with SLA."""
    if device != "cuda":
        return
    with torch.device("cuda"):
        model = _wan_shape.WanShaped().to(torch.bfloat16)
        x = torch.randn(1, TOKENS, _wan_shape.WIDTH).bfloat16()
        text = torch.randn(1, _wan_shape.TEXT_TOKENS, _wan_shape.WIDTH).bfloat16()
        time = torch.randn(6, _wan_shape.WIDTH).bfloat16()
    run = partial(model, x, text, time, _wan_shape.GRID)
    dense: dict[str, float] = {}
    for name in (FLASH, CUDNN):
        with _kernels(name):
            dense[name] = _medians({name: run}, 1)[name]
    convert_sla(model, topk=SHARES[0])
    with _kernels(FLASH):
        own = _medians({"SLA": run}, 2)["SLA"]
    shape = f"{_wan_shape.LAYERS} layers, width {_wan_shape.WIDTH}, {HEADS} heads, {TOKENS} tokens, 5% critical, bf16"
    for name, baseline in dense.items():
        yield measured(
            "denoising step of a transformer with random weights", shape, own, "ms", better="lower",
            baseline_name=name, baseline=baseline, required=STEP,
        )  # fmt: skip


@torch.no_grad()
def _others(device: str, quick: bool) -> Iterator[Row]:
    """Four Russians at half of the blocks, other shapes and shares, wider rows, and FlexAttention."""
    if device != "cuda":
        return
    yield from _russians()
    x = problem()
    heads = heads_of(x)
    ours = partial(sparse_linear_attention, *heads, x["weight"], x["bias"])
    cases = {
        (0.03, 64): partial(ours, topk=0.03),
        (0.05, 128): partial(ours, topk=0.05, query_block_size=128),
    }
    dense = _graphed({CUDNN: partial(_dense, CUDNN, *heads)})[CUDNN]
    for (topk, rows), case in cases.items():
        own = _graphed({"ours": case})["ours"]
        yield measured(
            "forward, map and projection included", shape_of(x, topk, rows), own, "ms", better="lower",
            baseline_name=CUDNN, baseline=dense,
        )  # fmt: skip
    yield from _joint(x)
    yield from _flex(x)
    for batch, count, length in ((2, 16, TOKENS), (1, HEADS, 4096), (1, HEADS, 1024)):
        y = problem(batch, count, length)
        heads = heads_of(y)
        call = partial(sparse_linear_attention, *heads, y["weight"], y["bias"], topk=0.05)
        times = _graphed({"ours": call, CUDNN: partial(_dense, CUDNN, *heads)})
        yield measured(
            "forward, map and projection included", shape_of(y, 0.05), times["ours"], "ms", better="lower",
            baseline_name=CUDNN, baseline=times[CUDNN],
        )  # fmt: skip


def _russians(heads: int = 2, blocks: int = 512, group: int = 4) -> Iterator[Row]:
    """Sums over half of the blocks by subset tables and by a product with the map, for two heads: tables are large."""
    seen = torch.rand(heads, blocks, blocks, device="cuda") < 0.5
    sums = torch.randn(heads, blocks, DIM * (DIM + 1), device="cuda").bfloat16()
    shares = seen.bfloat16()

    def by_subsets() -> torch.Tensor:
        tables = _four_russians.subset_tables(sums, group)
        return _four_russians.add_subsets(tables, _four_russians.subset_codes(seen, group))

    torch.testing.assert_close(by_subsets(), torch.matmul(shares, sums), rtol=0.05, atol=1.0)
    times = _graphed({"product": partial(torch.matmul, shares, sums), "subsets": by_subsets})
    yield measured(
        "sums over marginal blocks: product with the map", f"{heads} heads, {blocks} blocks, half of them, bf16",
        times["product"], "ms", better="lower", baseline_name=f"Method of Four Russians, groups of {group}",
        baseline=times["subsets"],
    )  # fmt: skip


def _joint(x: dict[str, torch.Tensor], text: int = 512) -> Iterator[Row]:
    """Attention to an image and a text: the text's keys and queries stay dense."""
    words = [torch.randn(1, HEADS, text, DIM, device="cuda").bfloat16() for _ in range(3)]
    heads = heads_of(x)
    joined = [torch.cat(pair, 2) for pair in zip(words, heads, strict=True)]

    def ours() -> torch.Tensor:
        image = sparse_linear_attention(
            *heads, x["weight"], x["bias"], additional_key=words[1], additional_value=words[2]
        )
        of_text = F.scaled_dot_product_attention(words[0], joined[1], joined[2])
        return torch.cat([of_text, image], 2)

    times = _graphed({"ours": ours, CUDNN: partial(_dense, CUDNN, *joined)})
    yield measured(
        f"forward beside a text of {text} tokens, whose queries and keys stay dense", shape_of(x, SHARES[0]),
        times["ours"], "ms", better="lower", baseline_name=CUDNN, baseline=times[CUDNN],
    )  # fmt: skip


def _flex(x: dict[str, torch.Tensor]) -> Iterator[Row]:
    from torch._inductor.exc import InductorError
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    heads = heads_of(x)
    lists = lists_of(block_classes(x["query"], x["key"], topk=0.05))
    index = lists.index.where(lists.index >= 0, 0)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(lists.counts), torch.zeros_like(index), lists.counts, index, BLOCK_SIZE=(64, 64),
        seq_lengths=(TOKENS, TOKENS),
    )  # fmt: skip
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    # Its own tiles are larger than these blocks.
    options: dict[str, Any] = {
        "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32,
    }  # fmt: skip
    rival = partial(compiled, block_mask=mask, kernel_options=options)
    shape = shape_of(x, 0.05)
    short = lists.index[..., : int(lists.counts.max())].contiguous()
    own = partial(_critical, heads, short, lists.counts)
    times = _graphed({"ours": own, FLEX: partial(rival, *heads)})
    yield measured(
        "forward of the critical blocks alone", shape, times["ours"], "ms", better="lower", baseline_name=FLEX,
        baseline=times[FLEX],
    )  # fmt: skip
    with torch.enable_grad():
        leaves = tuple(head.detach().requires_grad_() for head in heads)
        calls = {"ours": _gradients(_critical(leaves, short, lists.counts)[0], leaves, x["dout"])}
        theirs = _gradients(rival(*leaves), leaves, x["dout"])
        try:
            theirs()
            calls[FLEX] = theirs
        except InductorError:
            # PyTorch 2.11 looks for tiles of its own that divide the blocks, and has none for 64.
            pass
        times = _medians(calls, 5)
    yield measured(
        "backward of the critical blocks alone", shape, times["ours"], "ms", better="lower",
        baseline_name=FLEX if FLEX in times else None, baseline=times.get(FLEX),
    )  # fmt: skip


_SPEED: dict[str, Measure] = {
    "forward": _forward,
    "backward": _backward,
    "step": _step,
    "split": _split,
    "others": _others,
}
_PARTS: dict[str, Measure] = {"speed": all_of(_SPEED), "quality": quality, **_SPEED}
CLAIM = Claim(
    slug="sla",
    source="arXiv 2509.24006, section 6",
    paper=(
        "Kernels on an RTX 5090 at 95 % sparsity against FlashAttention-2: forward 13.7x, backward 6.8x; 1.93x VSA and "
        "3.36x VMoBA; 2.2x a generated video of Wan2.1-1.3B end to end, attention from 97 s to 11 s.",
        "Wan2.1-1.3B, VA / VT: full 76.78 / 82.88, SLA at 95 % 76.96 / 83.92, sparse only at 85 % 64.00 / 70.50, "
        "linear only 0.042 / 0.099, their sum at 90 % 29.65 / 41.15, elu+1 75.50 / 81.01, hedgehog 74.59 / 82.62.",
        "LightningDiT, FID at 512 x 512: full 31.87, SLA at 87.5 % 31.49.",
        "8.1 % of the weights exceed 1 / N; the stable rank of the lowest 92 % is about 9, that of all 6226.",
    ),
    gate=gate,
    measure=all_of({"speed": _PARTS["speed"], "quality": quality}),
    parts=_PARTS,
)
