"""FSA in a layer and in models: the layer whole and by branches, small language models, and associative recall."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from types import MethodType
from typing import Any, TypeVar

import torch

from undivided.claims import _dma_quality
from undivided.claims._dma_quality import FULL, NATIVE, WINDOW, Recall
from undivided.claims._harness import Row, measured
from undivided.claims._tiny_lm import mean_and_deviation, tiny_lm, train_tiny_lm
from undivided.layers.gqa import GQAttention
from undivided.layers.nsa import NSAttention
from undivided.ops import dense_attention
from undivided.ops.selected import selected_attention

HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128
# The length with the most to tell first.
LENGTHS = (32768, 65536, 16384, 8192)
SEEDS = (0, 1, 2)
Layer = TypeVar("Layer", bound=GQAttention)
NSA, TOKENS_OUTSIDE, DENSE = (
    "NSA",
    "the same layer with tokens outside",
    "full attention (grouped-query layer)",
)


def medians(calls: dict[str, Callable[[], object]], samples: int) -> dict[str, float]:
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


class TokensOutside(NSAttention):
    """The layer with the selected branch in the order of NSA."""

    def attend_selected(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index: torch.Tensor,
        counts: torch.Tensor,
    ) -> torch.Tensor:
        out, _ = selected_attention(
            query, key, value, index, counts, query_block_size=1, block_size=self.block_size, scale=self.scale,
            is_causal=True, backend="query_outer",
        )  # fmt: skip
        return out


def layer_rows(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of one layer of the width of an 8B model on a GPU, whole and by branches."""
    if device != "cuda":
        return
    for length in LENGTHS[-1:] if quick else LENGTHS:
        yield from _whole(length, 3)
    yield from _by_branches(LENGTHS[-1] if quick else LENGTHS[0], 3)


def _inputs(length: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(1, length, HEADS * HEAD_DIM, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    rates = 10000 ** -torch.linspace(0, 1, HEAD_DIM // 2, device="cuda")
    angles = torch.arange(length, device="cuda")[:, None] * rates
    angles = torch.cat([angles, angles], dim=-1)[None]
    return x, (angles.cos().bfloat16(), angles.sin().bfloat16())


def _layer(kind: type[Layer]) -> Layer:
    with torch.device("cuda"):
        return kind(HEADS * HEAD_DIM, HEADS, KEY_HEADS, HEAD_DIM).to(torch.bfloat16)


def _shape(length: int) -> str:
    width = HEADS * HEAD_DIM
    return (
        f"width {width}, {HEADS} heads of {HEAD_DIM}, {KEY_HEADS} key heads, {length} tokens, batch 1, bf16"
    )


def _step(call: Callable[[], Any], x: torch.Tensor) -> None:
    call()[0].sum().backward()
    x.grad = None


def _whole(length: int, samples: int) -> Iterator[Row]:
    x, tables = _inputs(length)
    kinds = {"ours": NSAttention, TOKENS_OUTSIDE: TokensOutside, DENSE: GQAttention}
    calls = {name: partial(_layer(kind), x, tables) for name, kind in kinds.items()}
    with torch.no_grad():
        times = {"forward": medians(dict(calls), samples)}
    times["forward and backward"] = medians(
        {name: partial(_step, call, x) for name, call in calls.items()}, samples
    )
    for what, found in times.items():
        for name in (DENSE, TOKENS_OUTSIDE):
            yield measured(
                f"attention layer {what}, against {name}", _shape(length), found["ours"], "ms", better="lower",
                baseline_name=name, baseline=found[name],
            )  # fmt: skip


def _by_branches(length: int, samples: int) -> Iterator[Row]:
    """The parts of the layer one by one; what is left of the whole are projections, rotations and gates."""
    x, tables = _inputs(length)
    layer = _layer(NSAttention)
    half = (tables[0][..., : HEAD_DIM // 2], tables[1][..., : HEAD_DIM // 2])
    with torch.no_grad():
        query, key, value = (y.detach().requires_grad_() for y in layer.heads(x, tables))
        raw = layer.k_proj(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2).detach().requires_grad_()
        short_key, short_value = (y.detach().requires_grad_() for y in layer.compress(raw, value, *half))
        _, lse = layer.attend_compressed(query, short_key, short_value, length)
        lists = layer.select(query, short_key, lse, length)
    parts: dict[str, tuple[Callable[[], Any], list[torch.Tensor]]] = {
        "compressing keys and values": (partial(layer.compress, raw, value, *half), [raw, value]),
        "the compressed branch": (
            lambda: layer.attend_compressed(query, short_key, short_value, length)[0],
            [query, short_key, short_value],
        ),
        "the choice of blocks": (partial(layer.select, query, short_key, lse, length), []),
        "the selected branch": (
            partial(layer.attend_selected, query, key, value, lists.index, lists.counts),
            [query, key, value],
        ),
        "the window": (
            partial(
                dense_attention, query, key, value, is_causal=True, window=layer.window, scale=layer.scale
            ),
            [query, key, value],
        ),
    }
    whole = partial(layer, x, tables)
    with torch.no_grad():
        forward = medians({"whole": whole} | {name: call for name, (call, _) in parts.items()}, samples)
    backward = medians({"whole": _backward(lambda: whole()[0], [x, *layer.parameters()])} | {
        name: _backward(call, leaves) for name, (call, leaves) in parts.items() if leaves
    }, samples)  # fmt: skip
    for what, times in (("forward", forward), ("backward", backward)):
        for name in times:
            if name != "whole":
                yield measured(
                    f"of the attention layer {what}, {name}", _shape(length), times[name], "ms", better="lower",
                    baseline_name="the whole layer", baseline=times["whole"],
                )  # fmt: skip
        # Not measured: within the noise where the parts are nearly all.
        rest = times["whole"] - sum(own for name, own in times.items() if name != "whole")
        if rest > 0:
            yield measured(
                f"of the attention layer {what}, projections, rotations and gates (the rest)", _shape(length), rest,
                "ms", better="lower", baseline_name="the whole layer", baseline=times["whole"],
            )  # fmt: skip


def _backward(call: Callable[[], Any], leaves: list[torch.Tensor]) -> Callable[[], object]:
    found = call()
    outs = [found] if isinstance(found, torch.Tensor) else list(found)
    return partial(
        torch.autograd.grad, outs, leaves, [torch.ones_like(out) for out in outs], retain_graph=True
    )


def model_rows(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of blocks of an 8B Llama, attention and MLP, forward and backward, on a GPU."""
    if device != "cuda":
        return
    length = 8192 if quick else LENGTHS[0]
    for blocks in (1, 4):
        calls: dict[str, Callable[[], object]] = {}
        for name, mechanism in (("ours", "nsa"), (TOKENS_OUTSIDE, "nsa"), (DENSE, "gqa")):
            with torch.device("cuda"):
                model = tiny_lm(
                    {"mechanism": mechanism}, hidden_size=HEADS * HEAD_DIM, intermediate_size=14336,
                    num_hidden_layers=blocks, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS,
                    head_dim=HEAD_DIM, max_position_embeddings=length,
                ).to(torch.bfloat16)  # fmt: skip
                ids = torch.randint(256, (1, length))
            for module in model.modules():
                if name == TOKENS_OUTSIDE and isinstance(module, NSAttention):
                    module.attend_selected = MethodType(TokensOutside.attend_selected, module)  # type: ignore[method-assign]
            calls[name] = partial(_model_step, model, ids)
        times = medians(calls, 2)
        for name in (DENSE, TOKENS_OUTSIDE):
            yield measured(
                f"{blocks} Llama block{'s' * (blocks > 1)} forward and backward, against {name}",
                f"{_shape(length)}, MLPs of 14336", times["ours"], "ms", better="lower", baseline_name=name,
                baseline=times[name],
            )  # fmt: skip
        del calls


def _model_step(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=False).logits.sum().backward()
    model.zero_grad(set_to_none=True)


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


def quality_rows(device: str, quick: bool) -> Iterator[Row]:
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


def recall_rows(device: str, quick: bool) -> Iterator[Row]:
    """Yields shares of right answers in associative recall on a GPU: NSA, a window of as many keys, all keys."""
    if device == "cuda":
        problem = Recall(steps=50) if quick else Recall()
        yield from _dma_quality.recall_rows(problem, device, (WINDOW, NATIVE, FULL), NATIVE)
