"""FSA: attention of single tokens to selected blocks, with the key blocks outside, against the order of NSA and cuDNN.

Blocks are drawn at random, with the first and the two local ones forced as in the layer: choices that share nothing
beyond these are the hardest for either order. Beside them are blocks that compressed attention chose, and the most
skewed choice, in which all tokens have the same blocks. All times of the selected branch contain the index of tokens by
blocks. The rival in the order of NSA, tokens outside, is the reference kernel of the authors' release where it can be
imported (`nsa_ref`), and always our own kernel in that order. cuDNN and flash compute full causal attention;
FlexAttention the same blocks, of which 128 queries share a tile, so that it visits nearly all.

The layer is timed whole, with its compressed branch, choice and window, and by branches. Quality is measured on
byte-level models trained for seconds: NSA, full attention, and a window with as many keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from undivided.claims._fsa_layer import layer_rows, medians, model_rows, quality_rows, recall_rows
from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import measured_ceilings
from undivided.cost.fsa import SelectedShape
from undivided.ops.block_map import BlockLists, block_mask, num_blocks, select_topk
from undivided.ops.compressed import compressed_attention, select_compressed
from undivided.ops.selected import selected_attention
from undivided.testing import compare_op

HEADS, HEAD_DIM, BLOCK_SIZE, TOPK = 32, 128, 64, 16
GROUPS = (1, 8, 4, 2)
LENGTH = 32768
CROSSING = (2048, 4096, 8192, 16384)
# Sizes of a block and blocks of a token in the paper's grid, and its lengths.
CHOICES, GRID = ((64, 16), (128, 8)), (8192, 16384, 32768, 65536)
CUDNN, FLASH, FLEX, OWN_ORDER, TWO_PASSES, RELEASE = (
    "cuDNN (SDPA), all keys",
    "flash (SDPA), all keys",
    "FlexAttention, the same blocks",
    "our kernel with tokens outside (the order of NSA)",
    "our kernels with a pass for the maxima (as in the paper)",
    "the NSA kernel of the authors' release",
)
PAPER_GRID = 1.3
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def gate(device: str) -> None:
    """Raises unless all kernels are as accurate as eager PyTorch, lse and gradients too, and choose the same blocks."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    orders = ("key_outer", "query_outer", "two_pass") if device == "cuda" else ("reference",)
    for heads, key_heads, length, head_dim in (
        (4, 4, 700, HEAD_DIM),
        (8, 1, 300, HEAD_DIM),
        (2, 1, 300, 192),
    ):
        lists = draw_lists(key_heads, length, device, topk=4)
        x = {
            name: torch.randn(1, count, length, head_dim, device=device)
            for name, count in (("query", heads), ("key", key_heads), ("value", key_heads))
        }
        reference = _selected("reference", lists, with_lse=True)
        # Wide heads in the order that is chosen for them.
        for order in orders if head_dim == HEAD_DIM else orders[:1]:
            compare_op(_selected(order, lists, with_lse=True), reference, reference, x, dtype)
    _compressed_gate(device, dtype)


def _compressed_gate(device: str, dtype: torch.dtype) -> None:
    backend = "triton" if device == "cuda" else "reference"
    sizes = {"num_keys": 700, "kernel_size": 32, "kernel_stride": 16}
    x = {
        name: torch.randn(1, heads, length, HEAD_DIM, device=device)
        for name, heads, length in (("query", 8, 700), ("key", 2, 42), ("value", 2, 42))
    }

    def attend(name: str) -> Callable[..., Any]:
        return lambda **x: compressed_attention(**x, **sizes, backend=name)

    compare_op(attend(backend), attend("reference"), attend("reference"), x, dtype)
    query, key, value = (tensor.to(dtype) for tensor in x.values())
    _, lse = attend("reference")(query=query, key=key, value=value)
    ours, theirs = (
        select_compressed(query, key, lse, **sizes, block_size=BLOCK_SIZE, topk=8, backend=name)
        for name in (backend, "reference")
    )
    differ = (ours.index != theirs.index).any(-1).float().mean().item()
    # Scores that rounding cannot tell apart may be chosen otherwise, and they are rare.
    if differ > 2e-3 or not torch.equal(ours.counts, theirs.counts):
        raise ValueError(f"{differ:.2%} of the tokens have other blocks than those of the reference.")


@torch.no_grad()
def draw_lists(
    key_heads: int,
    length: int,
    device: str,
    topk: int = TOPK,
    block_size: int = BLOCK_SIZE,
    is_skewed: bool = False,
) -> BlockLists:
    """Returns lists for every token: its own block, the one before it, the first, and others before it at random.

    With `is_skewed` the others are the first ones, the same for all tokens.
    """
    blocks = num_blocks(length, block_size)
    column = torch.arange(blocks, device=device)
    parts = []
    for first in range(0, length, 8192):
        own = torch.arange(first, min(first + 8192, length), device=device)[:, None] // block_size
        given = (column == 0) | ((column <= own) & (column > own - 2))
        scores = torch.rand(1, key_heads, len(own), blocks, device=device)
        if is_skewed:
            scores = scores.zero_()
        parts.append(select_topk(scores, topk, allowed=column <= own, always=given))
    return BlockLists(*(torch.cat(part, dim=2) for part in zip(*parts, strict=True)))


@torch.no_grad()
def chosen_lists(query: torch.Tensor, key: torch.Tensor) -> BlockLists:
    """Returns the lists that compressed attention chooses, with the means of 32 keys, every 16, as compressed keys."""
    size, stride, length = 32, 16, key.shape[2]
    compressed = key.unfold(2, size, stride).mean(-1)
    _, lse = compressed_attention(
        query, compressed, compressed, length, kernel_size=size, kernel_stride=stride
    )
    return select_compressed(
        query,
        compressed,
        lse,
        length,
        kernel_size=size,
        kernel_stride=stride,
        block_size=BLOCK_SIZE,
        topk=TOPK,
    )


def _selected(
    backend: str, lists: BlockLists, with_lse: bool = False, block_size: int = BLOCK_SIZE
) -> Callable[..., Any]:
    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        found = selected_attention(
            query,
            key,
            value,
            *lists,
            query_block_size=1,
            block_size=block_size,
            is_causal=True,
            backend=backend,
        )
        return found if with_lse else found[0]

    return run


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, name: str = CUDNN) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {CUDNN: SDPBackend.CUDNN_ATTENTION, FLASH: SDPBackend.FLASH_ATTENTION}
    with sdpa_kernel(kernels[name]):
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


def _both(
    functions: dict[str, Callable[..., torch.Tensor]], heads: Heads, samples: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the milliseconds of the forward, without what a gradient needs, and of the backward."""
    with torch.no_grad():
        forward = medians({name: partial(function, *heads) for name, function in functions.items()}, samples)
    dout = torch.randn_like(heads[0])
    backward = medians(
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
        functions: dict[str, Callable[..., Any]] = {
            "ours": _selected("key_outer", lists),
            CUDNN: _dense,
            FLASH: partial(_dense, name=FLASH),
            OWN_ORDER: _selected("query_outer", lists),
            TWO_PASSES: _selected("two_pass", lists),
        }
        release = _release(lists)
        if release is not None:
            functions[RELEASE], rival = release, RELEASE
        found[group] = _both(functions, heads, 3)
        yield from _group_rows(group, *found[group], rival)
        yield from _memory(group, heads, lists)
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
            if name == "ours" or (name == TWO_PASSES and what == "backward"):
                # The backward of both forms is the same.
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


def _memory(group: int, heads: Heads, lists: BlockLists) -> Iterator[Row]:
    """The peaks of memory over inputs and outputs, beside the formula of the partial outputs."""
    formula = SelectedShape(LENGTH, HEADS, HEADS // group, HEAD_DIM, BLOCK_SIZE, TOPK).buffer_bytes()
    ours = _selected("key_outer", lists)
    with torch.no_grad():
        peaks = {"forward": _peak(partial(ours, *heads))}
    out = ours(*heads)
    peaks["backward"] = _peak(partial(torch.autograd.grad, out, heads, torch.ones_like(out)))
    for what, peak in peaks.items():
        yield measured(
            f"peak memory of the {what} beyond inputs and outputs, group {group}", _shape(group, LENGTH), peak / 2**30,
            "GiB", better="lower", baseline_name="partial outputs by the formula", baseline=formula / 2**30,
        )  # fmt: skip


def _peak(call: Callable[[], Any]) -> int:
    """Returns the most bytes that a call has allocated at a time, without those of what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = call()
    torch.cuda.synchronize()
    outputs = (found,) if isinstance(found, torch.Tensor) else found
    return torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in outputs)


def _crossings() -> Iterator[Row]:
    """The lengths from which ours is faster than full attention, forward and backward together."""
    for group in GROUPS:
        slower, faster = None, None
        ratios: dict[int, float] = {}
        for length in sorted((*CROSSING, LENGTH), reverse=True):
            heads, lists = _heads(HEADS // group, length), draw_lists(HEADS // group, length, "cuda")
            forward, backward = _both({"ours": _selected("key_outer", lists), CUDNN: _dense}, heads, 3)
            ours, dense = (forward[name] + backward[name] for name in ("ours", CUDNN))
            ratios[length] = dense / ours
            yield measured(
                f"selected attention forward and backward, group {group}, against {CUDNN}", _shape(group, length),
                ours, "ms", better="lower", baseline_name=CUDNN, baseline=dense,
            )  # fmt: skip
            if ours > dense:
                slower = length
                break
            faster = length
        if faster is None:
            continue
        yield measured(
            f"shortest measured length from which the selected branch is faster than {CUDNN}, group {group}",
            _shape(group, faster), faster, "tokens", better="lower",
        )  # fmt: skip
        if slower is not None:
            yield measured(
                f"length at which the selected branch is as fast as {CUDNN}, between two measured ones, group {group}",
                _shape(group, faster), crossing(slower, ratios[slower], faster, ratios[faster]), "tokens",
                better="lower",
            )  # fmt: skip


def crossing(shorter: int, low: float, longer: int, high: float) -> float:
    """Returns the length at which a ratio of times is 1, a power of the length between two measured ones."""
    share = -math.log(low) / (math.log(high) - math.log(low))
    return shorter * (longer / shorter) ** share


def _grid(device: str, quick: bool) -> Iterator[Row]:
    """Yields the paper's grid on a GPU: forward and backward together, against the order of NSA and cuDNN."""
    if device != "cuda":
        return
    ratios: dict[str, list[float]] = {OWN_ORDER: [], CUDNN: []}
    for length in GRID[:1] if quick else GRID:
        for block_size, topk in CHOICES:
            for group in GROUPS:
                heads = _heads(HEADS // group, length)
                lists = draw_lists(HEADS // group, length, device, topk, block_size)
                functions = {
                    "ours": _selected("key_outer", lists, block_size=block_size),
                    OWN_ORDER: _selected("query_outer", lists, block_size=block_size),
                    CUDNN: _dense,
                }
                forward, backward = _both(functions, heads, 2)
                times = {name: forward[name] + backward[name] for name in functions}
                shape = _shape(group, length).replace(
                    f"{TOPK} blocks of {BLOCK_SIZE}", f"{topk} blocks of {block_size}"
                )
                for name, own in ratios.items():
                    own.append(times[name] / times["ours"])
                    yield measured(
                        f"selected attention forward and backward, group {group}, in the grid, against {name}", shape,
                        times["ours"], "ms", better="lower", baseline_name=name, baseline=times[name],
                    )  # fmt: skip
                del heads, lists, functions
    for name, own in ratios.items():
        yield measured(
            "selected attention forward and backward, mean speed-up over the grid",
            f"{HEADS} heads of {HEAD_DIM}, {len(own)} cells of groups, choices and lengths, batch 1, bf16",
            sum(own) / len(own), "times", better="higher", baseline_name=name, baseline=1.0,
            required=PAPER_GRID if name == OWN_ORDER else None,
        )  # fmt: skip


def _choices(device: str, quick: bool) -> Iterator[Row]:
    """Yields times with other choices of blocks on a GPU, and of FlexAttention, which compiles long, with a mask."""
    if device != "cuda":
        return
    group = 4
    heads = _heads(HEADS // group, LENGTH)
    for words, lists in (
        ("blocks that compressed attention chose", chosen_lists(heads[0], heads[1])),
        ("the same blocks for all tokens", draw_lists(HEADS // group, LENGTH, device, is_skewed=True)),
    ):
        functions = {
            "ours": _selected("key_outer", lists),
            OWN_ORDER: _selected("query_outer", lists),
            CUDNN: _dense,
        }
        forward, backward = _both(functions, heads, 2 if quick else 3)
        for what, times in (("forward", forward), ("backward", backward)):
            for name in (OWN_ORDER, CUDNN):
                yield measured(
                    f"selected attention {what}, group {group}, {words}, against {name}", _shape(group, LENGTH),
                    times["ours"], "ms", better="lower", baseline_name=name, baseline=times[name],
                )  # fmt: skip
    if quick:
        return
    lists = draw_lists(HEADS // group, LENGTH, device)
    functions = {"ours": _selected("key_outer", lists), FLEX: _flex(lists, LENGTH, group)}
    with torch.no_grad():
        torch.testing.assert_close(functions[FLEX](*heads), functions["ours"](*heads), rtol=0.02, atol=0.02)
    forward, backward = _both(functions, heads, 2)
    for what, times in (("forward", forward), ("backward", backward)):
        yield measured(
            f"selected attention {what}, group {group}, against {FLEX}", _shape(group, LENGTH), times["ours"], "ms",
            better="lower", baseline_name=FLEX, baseline=times[FLEX],
        )  # fmt: skip


def _flex(lists: BlockLists, length: int, group: int) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, block_mask=flex_mask(lists, length, group), enable_gqa=True)


def flex_mask(lists: BlockLists, length: int, group: int, size: int = 128) -> Any:
    """Returns FlexAttention's mask of the listed blocks, without the `length x length` mask of its own builder.

    Args:
        lists: of single tokens, blocks of BLOCK_SIZE keys.
        length: queries and keys.
        group: query heads of a list.
        size: queries and keys of a tile of FlexAttention.
    """
    from torch.nn.attention.flex_attention import BlockMask

    listed = block_mask(lists, num_blocks(length, BLOCK_SIZE))[0]
    # A tile of queries visits a tile of keys if one of its tokens lists a block in it.
    tiles = F.pad(listed, (0, -listed.shape[2] % (size // BLOCK_SIZE), 0, -length % size))
    tiles = tiles.unflatten(-1, (-1, size // BLOCK_SIZE)).any(-1).unflatten(1, (-1, size)).any(2)
    order = tiles.int().argsort(dim=-1, descending=True, stable=True).int()
    counts, order = (x.repeat_interleave(group, dim=0)[None] for x in (tiles.sum(-1).int(), order))

    def seen(b: torch.Tensor, h: torch.Tensor, n: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (m <= n) & listed[h // group, n, m // BLOCK_SIZE]

    return BlockMask.from_kv_blocks(
        counts.contiguous(), order.contiguous(), BLOCK_SIZE=size, mask_mod=seen, seq_lengths=(length, length)
    )


_PARTS: dict[str, Measure] = {
    "speed": _speed,
    "grid": _grid,
    "choices": _choices,
    "layer": layer_rows,
    "model": model_rows,
    "quality": quality_rows,
    "recall": recall_rows,
}
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
