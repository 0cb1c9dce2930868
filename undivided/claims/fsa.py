"""FSA: attention of single tokens to selected blocks, with the key blocks outside, against the order of NSA and cuDNN.

Blocks are drawn at random, with the first and the two local ones forced as in the layer: choices that share nothing
beyond these are the hardest for either order. All times of the selected branch contain the index of tokens by blocks.
The rival in the order of NSA, tokens outside, is the reference kernel of the authors' release where it can be imported
(`nsa_ref`), and always our own kernel in that order. cuDNN computes full causal attention.

The layer is timed whole, with its compressed branch, selection and window, and by branches. Quality is measured on
byte-level models trained for seconds: NSA, full attention, and a window with as many keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import measured_ceilings
from undivided.claims._tiny_lm import mean_and_deviation, train_tiny_lm
from undivided.cost.fsa import SelectedShape
from undivided.ops.block_map import BlockLists, num_blocks, select_topk
from undivided.ops.selected import selected_attention
from undivided.testing import compare_op

HEADS, HEAD_DIM, BLOCK_SIZE, TOPK = 32, 128, 64, 16
GROUPS = (1, 8, 4, 2)
LENGTH = 32768
CROSSING = (2048, 4096, 8192, 16384)
CUDNN, OWN_ORDER, RELEASE = (
    "cuDNN (SDPA), all keys",
    "our kernel with tokens outside (the order of NSA)",
    "the NSA kernel of the authors' release",
)
SEEDS = (0, 1, 2)
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def gate(device: str) -> None:
    """Raises unless both orders of the kernels are as accurate as eager PyTorch, lse and gradients too."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    orders = ("key_outer", "query_outer") if device == "cuda" else ("reference",)
    for heads, key_heads, length in ((4, 4, 700), (8, 1, 300)):
        lists = draw_lists(key_heads, length, device, topk=4)
        x = {
            name: torch.randn(1, count, length, HEAD_DIM, device=device)
            for name, count in (("query", heads), ("key", key_heads), ("value", key_heads))
        }
        reference = _selected("reference", lists, with_lse=True)
        for order in orders:
            compare_op(_selected(order, lists, with_lse=True), reference, reference, x, dtype)


@torch.no_grad()
def draw_lists(key_heads: int, length: int, device: str, topk: int = TOPK) -> BlockLists:
    """Returns lists for every token: its own block, the one before it, the first, and others before it at random."""
    blocks = num_blocks(length, BLOCK_SIZE)
    column = torch.arange(blocks, device=device)
    parts = []
    for first in range(0, length, 8192):
        own = torch.arange(first, min(first + 8192, length), device=device)[:, None] // BLOCK_SIZE
        given = (column == 0) | ((column <= own) & (column > own - 2))
        scores = torch.rand(1, key_heads, len(own), blocks, device=device)
        parts.append(select_topk(scores, topk, allowed=column <= own, always=given))
    return BlockLists(*(torch.cat(part, dim=2) for part in zip(*parts, strict=True)))


def _selected(backend: str, lists: BlockLists, with_lse: bool = False) -> Callable[..., Any]:
    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        found = selected_attention(
            query,
            key,
            value,
            *lists,
            query_block_size=1,
            block_size=BLOCK_SIZE,
            is_causal=True,
            backend=backend,
        )
        return found if with_lse else found[0]

    return run


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _release(lists: BlockLists) -> Callable[..., torch.Tensor] | None:
    """The reference kernel of the authors' release, in our layout; None where it is not installed."""
    try:
        from nsa_ref.ops.topk_sparse_attention import topk_sparse_attention
    except ImportError:
        return None
    chosen = lists.index[0]
    ends = torch.tensor([0, chosen.shape[1]], dtype=torch.int32, device=chosen.device)

    def run(*heads: torch.Tensor) -> torch.Tensor:
        query, key, value = (x[0].transpose(0, 1).contiguous() for x in heads)
        return topk_sparse_attention(query, key, value, chosen, BLOCK_SIZE, ends, None).transpose(0, 1)[None]

    return run


def _heads(key_heads: int, length: int) -> Heads:
    query, key, value = (
        torch.randn(1, length, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (HEADS, key_heads, key_heads)
    )
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def _medians(calls: dict[str, Callable[[], object]], samples: int) -> dict[str, float]:
    """Returns the median milliseconds of a few calls in turns: calls of tens of milliseconds need no thirty."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(samples):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: median(own) for name, own in times.items()}


def _both(
    functions: dict[str, Callable[..., torch.Tensor]], heads: Heads, samples: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the milliseconds of the forward, without what a gradient needs, and of the backward."""
    with torch.no_grad():
        forward = _medians({name: partial(function, *heads) for name, function in functions.items()}, samples)
    dout = torch.randn_like(heads[0])
    backward = _medians(
        {
            name: partial(torch.autograd.grad, function(*heads), heads, dout, retain_graph=True)
            for name, function in functions.items()
        },
        samples,
    )
    return forward, backward


def _shape(group: int, length: int) -> str:
    return (
        f"{HEADS} heads of {HEAD_DIM}, {HEADS // group} key heads, {length} tokens, {TOPK} blocks of {BLOCK_SIZE}, "
        "batch 1, bf16"
    )


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of the selected branch on a GPU: what has a bar first."""
    if device != "cuda":
        return
    found: dict[int, tuple[dict[str, float], dict[str, float]]] = {}
    rival = OWN_ORDER
    for group in GROUPS[:2] if quick else GROUPS:
        heads, lists = _heads(HEADS // group, LENGTH), draw_lists(HEADS // group, LENGTH, device)
        functions = {
            "ours": _selected("key_outer", lists),
            CUDNN: _dense,
            OWN_ORDER: _selected("query_outer", lists),
        }
        release = _release(lists)
        if release is not None:
            functions[RELEASE], rival = release, RELEASE
        found[group] = _both(functions, heads, 2)
        yield from _group_rows(group, *found[group], rival)
        yield _memory(group, heads, lists)
        del heads, functions
    if not quick:
        yield _average(found, rival)
        yield from _crossings()


def _group_rows(
    group: int, forward: dict[str, float], backward: dict[str, float], rival: str
) -> Iterator[Row]:
    shape = _shape(group, LENGTH)
    pairs = sum(min(n + 1, TOPK * BLOCK_SIZE - BLOCK_SIZE + n % BLOCK_SIZE + 1) for n in range(LENGTH))
    for what, times, factor in (("forward", forward, 1.0), ("backward", backward, 2.5)):
        fraction = measured_ceilings("cuda").fraction(
            times["ours"], flops=factor * 4 * HEAD_DIM * HEADS * pairs
        )
        for name in times:
            if name == "ours":
                continue
            required = 1.0 if name == CUDNN else None
            if name == rival and group == 1 and what == "forward":
                required = 3.5
            yield measured(
                f"selected attention {what}, group {group}, against {name}", shape, times["ours"], "ms",
                better="lower", baseline_name=name, baseline=times[name], required=required,
                fraction_of_ceiling=fraction,
            )  # fmt: skip


def _average(found: dict[int, tuple[dict[str, float], dict[str, float]]], rival: str) -> Row:
    """The mean over groups of forward and backward together, as a ratio to the rival."""
    ratios = [(f[rival] + b[rival]) / (f["ours"] + b["ours"]) for f, b in found.values()]
    return measured(
        f"selected attention forward and backward, mean speed-up over groups {', '.join(map(str, sorted(found)))}",
        _shape(1, LENGTH).replace(f"{HEADS} key heads", "32 to 4 key heads"), sum(ratios) / len(ratios), "times",
        better="higher", baseline_name=rival, baseline=1.0, required=2.0,
    )  # fmt: skip


@torch.no_grad()
def _memory(group: int, heads: Heads, lists: BlockLists) -> Row:
    """The peak of memory over inputs and outputs, beside the formula of the partial outputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = _selected("key_outer", lists)(*heads)
    peak = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    formula = SelectedShape(LENGTH, HEADS, HEADS // group, HEAD_DIM, BLOCK_SIZE, TOPK).buffer_bytes()
    return measured(
        f"peak memory of the forward beyond inputs and outputs, group {group}", _shape(group, LENGTH), peak / 2**30,
        "GiB", better="lower", baseline_name="partial outputs by the formula", baseline=formula / 2**30,
    )  # fmt: skip


def _crossings() -> Iterator[Row]:
    """The shortest measured length from which ours is faster than full attention, forward and backward together."""
    for group in GROUPS:
        crossing = LENGTH
        for length in sorted(CROSSING, reverse=True):
            heads, lists = _heads(HEADS // group, length), draw_lists(HEADS // group, length, "cuda")
            forward, backward = _both({"ours": _selected("key_outer", lists), CUDNN: _dense}, heads, 3)
            ours, dense = (forward[name] + backward[name] for name in ("ours", CUDNN))
            yield measured(
                f"selected attention forward and backward, group {group}, against {CUDNN}", _shape(group, length),
                ours, "ms", better="lower", baseline_name=CUDNN, baseline=dense,
            )  # fmt: skip
            if ours > dense:
                break
            crossing = length
        yield measured(
            f"shortest measured length from which the selected branch is faster than {CUDNN}, group {group}",
            _shape(group, crossing), crossing, "tokens", better="lower",
        )  # fmt: skip


def _layer(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of one layer of the width of an 8B model on a GPU, whole and by branches."""
    if device != "cuda":
        return
    from undivided.layers._nsa_blocks import select_blocks
    from undivided.layers.gqa import GQAttention
    from undivided.layers.nsa import NSAttention
    from undivided.ops import dense_attention

    length, width, key_heads = 8192 if quick else LENGTH, HEADS * HEAD_DIM, 8
    with torch.device("cuda"):
        layer, full = (
            kind(width, HEADS, key_heads, HEAD_DIM).to(torch.bfloat16) for kind in (NSAttention, GQAttention)
        )
        x = torch.randn(1, length, width, dtype=torch.bfloat16, requires_grad=True)
        angles = torch.arange(length)[:, None] * 10000 ** -torch.linspace(0, 1, HEAD_DIM // 2)
    angles = torch.cat([angles, angles], dim=-1)[None]
    tables = (angles.cos().bfloat16(), angles.sin().bfloat16())
    shape = (
        f"width {width}, {HEADS} heads of {HEAD_DIM}, {key_heads} key heads, {length} tokens, batch 1, bf16"
    )
    calls = {"ours": partial(layer, x, tables), "full": partial(full, x, tables)}
    with torch.no_grad():
        times = {"forward": _medians(dict(calls), 2)}
    times["forward and backward"] = _medians({n: partial(_step, call, x) for n, call in calls.items()}, 2)
    for what, found in times.items():
        yield measured(
            f"attention layer {what}", shape, found["ours"], "ms", better="lower",
            baseline_name="full attention (grouped-query layer)", baseline=found["full"],
        )  # fmt: skip
    query, key, value = (y.detach() for y in layer.heads(x, tables))
    raw = layer.k_proj(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2).detach()
    half = tuple(table[..., : HEAD_DIM // 2] for table in tables)
    with torch.no_grad():
        compressed = layer.compress(raw, value, *half)
        choose = partial(
            select_blocks, query, compressed[0], length, kernel_size=32, kernel_stride=16, block_size=BLOCK_SIZE,
            topk=TOPK, init_blocks=1, local_blocks=2, scale=layer.scale,
        )  # fmt: skip
        lists = choose()
        parts: dict[str, Callable[[], object]] = {
            "compressing keys and values": partial(layer.compress, raw, value, *half),
            "the compressed branch": partial(layer.attend_compressed, query, *compressed, length),
            "the choice of blocks": choose,
            "the selected branch": partial(_selected("auto", lists), query, key, value),
            "the window": partial(dense_attention, query, key, value, is_causal=True, window=layer.window),
        }
        for name, own in _medians(parts, 2).items():
            yield measured(f"of the attention layer forward, {name}", shape, own, "ms", better="lower")


def _step(call: Callable[[], Any], x: torch.Tensor) -> None:
    call()[0].sum().backward()
    x.grad = None


# Keys of a query: 48 in selected blocks and 16 in the window; beside these NSA has its compressed blocks.
ARMS: dict[str, dict[str, Any]] = {
    "window": {"mechanism": "sqa", "window": 64},
    "NSA": {
        "mechanism": "nsa", "kernel_size": 8, "kernel_stride": 4, "block_size": 16, "topk": 3, "init_blocks": 1,
        "local_blocks": 1, "window": 16,
    },
    "full": {"mechanism": "gqa"},
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "steps": 300, "batch_size": 16, "length": 512, "learning_rate": 3e-3,
    },
    "cpu": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "steps": 15, "batch_size": 4, "length": 128, "learning_rate": 3e-3,
    },
}  # fmt: skip


def _quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields bits a byte of small language models with NSA, with a window of as many keys, and with full attention."""
    from undivided.data import demo_texts

    texts, options = demo_texts(), dict(SIZES[device])
    if quick:
        options["steps"] = 10
    seeds = SEEDS if device == "cuda" else SEEDS[:1]
    shape = (
        f"{options['num_hidden_layers']} layers, width {options['hidden_size']}, 64 of {options['length']} keys, "
        f"{options['steps']} steps of {options['batch_size']} x {options['length']} bytes, {len(seeds)} seeds"
    )
    found: dict[str, float] = {}
    for name, entry in ARMS.items():
        runs = train_tiny_lm(
            entry, texts.calibration, texts.heldout["2024-Biden-1"], seeds=seeds, device=device, **options
        )
        found[name], deviation = mean_and_deviation([run.bits_per_byte for run in runs])
        has_baseline = name != "window"
        yield measured(
            f"bits a byte of a tiny model, {name}", f"{shape}, {runs[0].parameters} parameters", found[name],
            "bits/byte", better="lower", deviation=deviation, baseline_name="window" if has_baseline else None,
            baseline=found["window"] if has_baseline else None, required=1.0 if name == "NSA" else None,
        )  # fmt: skip


_PARTS: dict[str, Measure] = {"speed": _speed, "layer": _layer, "quality": _quality}
CLAIM = Claim(
    slug="fsa",
    source="arXiv 2508.18224, section 4",
    paper=(
        "Kernel against that of NSA: up to 3.5x faster, 1.6x on average; on an H200 at 16 blocks of 64, 8K / 16K / 32K "
        "/ 64K tokens: 1.2x / 2.6x / 2.4x / 2.1x with one head a group, 1.0x with eight.",
        "Against full attention in Triton on an H200: 2.3x on average, at most 4.9x; NSA is slower than full attention "
        "with one head a group at 32K.",
        "Training of models up to 1.25x faster than with NSA, prefill up to 1.36x; loss curves of FSA, NSA and full "
        "attention agree.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
    devices=("cuda", "cpu"),
)
