"""CCA: what attention in a narrow latent saves from the projections to the output, and what its parts are worth.

The paper times fused kernels for an H100. Here every arm has the same attention kernel, PyTorch's flash attention, one
product for all its projections and one kernel from there to rotated queries and keys: the baselines are the same layer
with convolutions, means, norms and shifts off, which is grouped-query attention. What differs is the method. Multi-head
latent attention is the library's own layer in its expanded form, with heads of 64 + 64 dims, so that flash attention
takes them as they are. The products of the whole block bound the gain: with four times narrower latents they are a
quarter of multi-head attention's. Blocks at other lengths than 16384 tokens, training steps and decode steps are
replays of CUDA graphs: where they are short, the host would be what is timed.

Quality comes from tiny byte models of equal size, trained for seconds, three seeds each: that a part of the method
helps, or does not hurt, at that size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import Timing, measured_ceilings, time_rivals
from undivided.claims._tiny_lm import TinyRun, mean_and_deviation, train_tiny_lm
from undivided.layers.cca import CCAttention
from undivided.layers.mla import MLAttention
from undivided.ops.conv import convolved_heads, history_of
from undivided.testing import assert_as_accurate, compare_op

HIDDEN, HEAD_DIM, LONG = 2048, 128, 16384
FORWARD_BAR, BACKWARD_BAR = 1.7, 1.3
MHA, CCA, CCGQA = "MHA 16/16", "CCA 4/4", "CCGQA 8/2"
# Query and key-value heads of the arms that are one layer with everything off.
_PLAIN = {MHA: (16, 16), "GQA 16/4": (16, 4), "GQA 16/2": (16, 2)}
_OFF: dict[str, Any] = {"conv_kernels": (), "qk_mean": False, "value_shift": False, "qk_norm": False}
_COMPOSED = "CCA 4/4, prologue in plain PyTorch"


def gate(device: str) -> None:
    """Raises unless the kernels are as accurate as eager PyTorch and decoding repeats the whole sequence."""
    if device == "cuda":
        for heads, groups, length, prefix in ((4, 4, 333, 0), (8, 2, 150, 2), (8, 2, 1, 2)):
            x = _inputs(heads, groups, length, prefix, device)
            backends = {
                name: _heads(heads, groups, name, prefix) for name in ("triton", "composed", "reference")
            }
            # A single token is a step of decoding, which has no gradient.
            _check_kernels(backends, x, with_gradients=length > 1)
            if length > 1:
                _check_temperature(backends, x, length)
        # Documents in one row, and half of the dims rotated.
        x = _inputs(4, 4, 333, 0, device)
        x |= {name: x[name][..., : HEAD_DIM // 4] for name in ("cos", "sin")}
        x["history"] = history_of(torch.tensor([0, 70, 71, 333], device=device), 333)
        _check_kernels({name: _heads(4, 4, name) for name in ("triton", "composed", "reference")}, x)
    _check_decoding(device)


_Backends = dict[str, Callable[..., tuple[torch.Tensor, ...]]]


def _heads(heads: int, groups: int, backend: str, prefix: int = 0) -> Callable[..., tuple[torch.Tensor, ...]]:
    return lambda **x: convolved_heads(
        num_heads=heads, num_key_value_heads=groups, value_shift=True, prefix=prefix, backend=backend, **x
    )


def _check_kernels(backends: _Backends, x: dict[str, torch.Tensor], with_gradients: bool = True) -> None:
    # One sum that cancels, the gradient of a temperature has a rounding error of luck: it is checked by itself.
    without = ("cos", "sin", "temperature", "history")
    gradients = [name for name in x if with_gradients and name not in without]
    compare_op(backends["triton"], backends["composed"], backends["reference"], x, torch.bfloat16, gradients)


def _check_temperature(backends: _Backends, x: dict[str, torch.Tensor], length: int) -> None:
    """Where a loss is half of the keys' square, whose norm is `sqrt(D) tau`, the gradient is `D tau` a token."""
    x = {name: tensor.to(torch.bfloat16) for name, tensor in x.items()}
    tau = x.pop("temperature").requires_grad_()
    ours, eager = (
        torch.autograd.grad(backends[name](**x, temperature=tau)[1].float().square().sum() / 2, tau)[0]
        for name in ("triton", "composed")
    )
    exact = HEAD_DIM * x["latents"].shape[0] * length * tau.detach().double()
    assert_as_accurate(ours, eager, exact, name="gradient of the temperature")


def _inputs(heads: int, groups: int, length: int, prefix: int, device: str) -> dict[str, torch.Tensor]:
    draw = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    channels = (heads + groups) * HEAD_DIM
    cos, sin = _tables(length, HEAD_DIM, device, torch.float32)
    return {
        "latents": draw(2, prefix + length, channels + groups * HEAD_DIM),
        "depthwise_weight": 0.5 * draw(channels, 1, 2),
        "depthwise_bias": 0.3 * draw(channels),
        "grouped_weight": (2 * HEAD_DIM) ** -0.5 * draw(channels, HEAD_DIM, 2),
        "grouped_bias": 0.3 * draw(channels),
        "temperature": draw(groups).exp(),
        "cos": cos[..., : HEAD_DIM // 2],
        "sin": sin[..., : HEAD_DIM // 2],
    }


@torch.no_grad()
def _check_decoding(device: str) -> None:
    from transformers import DynamicCache

    layer = CCAttention(64, 4, 2, 16).to(device, torch.float64)
    for parameter in layer.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(2, 9, 64, device=device, dtype=torch.float64)
    cos, sin = _tables(9, 16, device, torch.float64)
    whole = layer(x, (cos, sin))[0]
    for pieces in ([1] * 9, [1, 3, 5], [8, 1]):
        cache, at, outputs = DynamicCache(), 0, []
        for size in pieces:
            here = slice(at, at + size)
            outputs.append(layer(x[:, here], (cos[:, here], sin[:, here]), past_key_values=cache)[0])
            at += size
        torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-10, atol=1e-10)


def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields cache bytes, and on CUDA times, those of the claim's bars first."""
    yield from _cache()
    if device == "cpu":
        return
    blocks = _blocks()
    yield from _forward(blocks, 1, LONG, "events")
    yield from _backward(blocks, LONG)
    yield from _core(blocks, LONG)
    for batch in (1, 8):
        yield from _decode(blocks, batch, 2 * LONG)
    if quick:
        return
    few = {name: blocks[name] for name in (MHA, "GQA 16/2", "MLA", CCA, CCGQA)}
    for length in (2048, 2 * LONG, 8192, 512, 4096, 1024):
        yield from _forward(few, 1, length, "graph")
    for length in (2048, 8192, 512):
        yield from _forward(few, 4, length, "graph")
    for kernels, is_causal in (("cuDNN", True), ("flash", False)):
        yield from _forward(_one_layer(few), 1, LONG, "events", kernels, is_causal)
    for batch, length in ((1, 4096), (4, 4096), (1, 1024)):
        yield from _training(few, batch, length)


def _tables(
    length: int, dims: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(length), 1e4 ** -(torch.arange(dims // 2) / (dims // 2))).repeat(1, 2)
    cos, sin = (f(angles)[None].to(device, dtype) for f in (torch.cos, torch.sin))
    return cos, sin


class _Composed(CCAttention):
    """The layer with plain PyTorch between the projections and attention."""

    def convolve(self, latents, cos, sin, prefix, history, backend="composed"):
        return super().convolve(latents, cos, sin, prefix, history, backend)


def _blocks() -> dict[str, Any]:
    with torch.device("cuda"):
        blocks: dict[str, nn.Module] = {
            name: CCAttention(HIDDEN, *heads, HEAD_DIM, **_OFF) for name, heads in _PLAIN.items()
        }
        blocks["MLA"] = MLAttention(
            HIDDEN, 16, HIDDEN // 4, 64, 64, HEAD_DIM, query_latent_dim=HIDDEN // 2, rope_interleaved=False,
            rope_stride=2,
        )  # fmt: skip
        blocks[CCA] = CCAttention(HIDDEN, 4, 4, HEAD_DIM)
        blocks[CCGQA] = CCAttention(HIDDEN, 8, 2, HEAD_DIM)
        blocks[_COMPOSED] = _Composed(HIDDEN, 4, 4, HEAD_DIM)
    return {name: block.to(torch.bfloat16) for name, block in blocks.items()}


def _one_layer(blocks: Mapping[str, Any]) -> dict[str, CCAttention]:
    """The arms that differ in nothing but options of one layer."""
    return {name: block for name, block in blocks.items() if type(block) is CCAttention}


def _within(kernels: str, function: Callable[[], Any]) -> Callable[[], Any]:
    """Restricts scaled_dot_product_attention to one family of kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    family = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}[kernels]

    def run() -> Any:
        with sdpa_kernel(family):
            return function()

    return run


def _input(batch: int, length: int) -> torch.Tensor:
    return torch.randn(batch, length, HIDDEN, device="cuda", dtype=torch.bfloat16)


def _run(block: Any, x: torch.Tensor, tables: Any, is_causal: bool = True) -> Callable[[], torch.Tensor]:
    if is_causal:
        return lambda: block(x, tables)[0]

    # The layers are causal: without that, the same block around the same kernel.
    def run() -> torch.Tensor:
        query, key, value = block.project(x, tables)
        out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return block.o_proj(out.transpose(1, 2).flatten(2))

    return run


def _attention_flops(block: CCAttention, batch: int, length: int, is_causal: bool = True) -> float:
    pairs = length * (length + 1) / 2 if is_causal else length**2
    return 4 * batch * block.num_query_heads * HEAD_DIM * pairs


def _block_flops(block: CCAttention, batch: int, length: int, is_causal: bool = True) -> float:
    weights = block.qkv_proj.weight.numel() + block.o_proj.weight.numel()
    return 2 * batch * length * weights + _attention_flops(block, batch, length, is_causal)


def _words(batch: int, length: int, is_causal: bool = True) -> str:
    causal = "causal" if is_causal else "not causal"
    return f"hidden size {HIDDEN}, head_dim {HEAD_DIM}, batch {batch}, {length} tokens, {causal}, bf16"


def _rows(
    what: str, shape: str, times: dict[str, Timing], flops: dict[str, float], bar: float | None = None
) -> Iterator[Row]:
    for ours, rivals in ((CCA, (*_PLAIN, "MLA", _COMPOSED)), (CCGQA, (*_PLAIN, "MLA"))):
        for name in rivals:
            if name in times:
                yield measured(
                    f"{ours}, {what}, against {name}", shape, times[ours].median, "ms", better="lower",
                    baseline_name=name, baseline=times[name].median,
                    required=bar if (ours, name) == (CCA, MHA) else None,
                    fraction_of_ceiling=measured_ceilings("cuda").fraction(times[ours].median, flops=flops[ours]),
                )  # fmt: skip


@torch.no_grad()
def _forward(
    blocks: Mapping[str, Any],
    batch: int,
    length: int,
    method: str,
    kernels: str = "flash",
    is_causal: bool = True,
) -> Iterator[Row]:
    x, tables = _input(batch, length), _tables(length, HEAD_DIM, "cuda")
    rivals = {name: _within(kernels, _run(block, x, tables, is_causal)) for name, block in blocks.items()}
    times = time_rivals(rivals, "cuda", method=method, samples=30)
    flops = {
        name: _block_flops(block, batch, length, is_causal) for name, block in _one_layer(blocks).items()
    }
    what = "whole block forward" + (" with cuDNN attention" if kernels == "cuDNN" else "")
    bar = FORWARD_BAR if length == LONG and kernels == "flash" and is_causal else None
    yield from _rows(what, _words(batch, length, is_causal), times, flops, bar)


def _core(blocks: Mapping[str, Any], length: int) -> Iterator[Row]:
    """Attention alone, of heads that lie there."""
    arms = _one_layer(blocks)
    flops = {name: _attention_flops(block, 1, length) for name, block in arms.items()}
    for kernels in ("flash", "cuDNN"):
        forwards, backwards = {}, {}
        for name, block in arms.items():
            heads = (block.num_query_heads, block.num_key_value_heads, block.num_key_value_heads)
            forwards[name], backwards[name] = _attention(heads, length, kernels)
        for what, rivals, share in (("forward", forwards, 1.0), ("backward", backwards, 2.5)):
            times = time_rivals(rivals, "cuda", samples=30)
            scaled = {name: share * count for name, count in flops.items()}
            yield from _rows(f"attention alone ({kernels}) {what}", _words(1, length), times, scaled)


def _attention(
    heads: tuple[int, ...], length: int, kernels: str
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    inputs = [
        torch.randn(1, length, n, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for n in heads
    ]
    query, key, value = inputs
    forward = _within(
        kernels, lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    )
    out = forward()
    dout = torch.randn_like(out)

    @torch.no_grad()
    def without_gradient() -> Any:
        return forward()

    return without_gradient, lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def _backward(blocks: Mapping[str, Any], length: int) -> Iterator[Row]:
    """The backward pass alone, at lengths where the host keeps ahead of the device."""
    x, tables = _input(1, length).requires_grad_(), _tables(length, HEAD_DIM, "cuda")
    dout = torch.randn_like(x)

    def gradient(block: nn.Module) -> Callable[[], Any]:
        out = _within("flash", _run(block, x, tables))()
        leaves = [x, *block.parameters()]
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    times = time_rivals({name: gradient(block) for name, block in blocks.items()}, "cuda", samples=30)
    flops = {name: _backward_flops(block, 1, length) for name, block in _one_layer(blocks).items()}
    bar = BACKWARD_BAR if length == LONG else None
    yield from _rows("whole block backward", _words(1, length), times, flops, bar)


def _backward_flops(block: CCAttention, batch: int, length: int) -> float:
    """Twice the products of the projections, and five in place of two for attention."""
    return 2 * _block_flops(block, batch, length) + 0.5 * _attention_flops(block, batch, length)


def _training(blocks: Mapping[str, Any], batch: int, length: int) -> Iterator[Row]:
    """Forward and backward as one CUDA graph."""
    x, tables = _input(batch, length).requires_grad_(), _tables(length, HEAD_DIM, "cuda")
    dout = torch.randn_like(x)

    def step(block: nn.Module) -> Callable[[], Any]:
        leaves = [x, *block.parameters()]
        return _within("flash", lambda: torch.autograd.grad(_run(block, x, tables)(), leaves, dout))

    rivals = {name: step(block) for name, block in blocks.items()}
    times = time_rivals(rivals, "cuda", method="graph", samples=30)
    flops = {
        name: _block_flops(block, batch, length) + _backward_flops(block, batch, length)
        for name, block in _one_layer(blocks).items()
    }
    yield from _rows("whole block forward and backward", _words(batch, length), times, flops)


@torch.no_grad()
def _decode(blocks: Mapping[str, Any], batch: int, keys: int) -> Iterator[Row]:
    x, tables = _input(batch, 1), _tables(1, HEAD_DIM, "cuda")
    rivals, moved = {}, {}
    for name, block in _one_layer(blocks).items():
        shape = (batch, block.num_key_value_heads, keys, HEAD_DIM)
        cached = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        rivals[name] = _within("flash", _step(block, x, tables, *cached))
        weights = block.qkv_proj.weight.numel() + block.o_proj.weight.numel()
        moved[name] = 2 * (weights + 2 * cached[0].numel())
    times = time_rivals(rivals, "cuda", method="graph", samples=50)
    for ours in (CCA, CCGQA):
        for name in _PLAIN:
            yield measured(
                f"{ours}, decode step of the whole block, against {name}",
                f"hidden size {HIDDEN}, head_dim {HEAD_DIM}, batch {batch}, {keys} cached tokens, bf16",
                1e3 * times[ours].median, "us", better="lower", baseline_name=name, baseline=1e3 * times[name].median,
                fraction_of_ceiling=measured_ceilings("cuda").fraction(times[ours].median, bytes_moved=moved[ours]),
            )  # fmt: skip


def _step(
    block: CCAttention, x: torch.Tensor, tables: Any, keys: torch.Tensor, values: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """One token through a block, its key and value written to the last place of what is cached."""
    from transformers import DynamicCache

    from undivided.layers._streams import streaming_layer

    states = None
    if block.value_shift:
        states = streaming_layer(DynamicCache(), 0)
        block.project(_input(x.shape[0], 8), _tables(8, HEAD_DIM, "cuda"), cache=states)

    def run() -> torch.Tensor:
        query, key, value = block.project(x, tables, cache=states)
        keys[:, :, -1:].copy_(key)
        values[:, :, -1:].copy_(value)
        out = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        return block.o_proj(out.transpose(1, 2).flatten(2))

    return run


def _cache() -> Iterator[Row]:
    for name, groups in ((CCA, 4), (CCGQA, 2)):
        yield measured(
            f"{name}, cache a token and layer, against {MHA}", f"head_dim {HEAD_DIM}, bf16",
            2 * 2 * groups * HEAD_DIM, "bytes", better="lower", baseline_name=MHA, baseline=2 * 2 * 16 * HEAD_DIM,
            required=16 / groups,
        )  # fmt: skip


# Heads of 32 in a model of width 256: multi-head attention would cache four times as much as the others.
_CUDA_SIZES = dict[str, Any](hidden_size=256, num_hidden_layers=4, num_attention_heads=8, head_dim=32)
_CPU_SIZES = dict[str, Any](hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
_SEEDS = (0, 1, 2)
_GQA, _NO_CONVOLUTION = "GQA", "CCGQA without convolutions, means and shift"


def _arms(sizes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    heads = sizes["num_attention_heads"]
    groups = heads // 4
    narrow = {"mechanism": "cca", "num_query_heads": heads // 2, "num_key_value_heads": groups}
    bare = narrow | {"qk_mean": False, "value_shift": False}
    return {
        "MHA": {"mechanism": "gqa", "num_key_value_heads": heads},
        _GQA: {"mechanism": "gqa", "num_key_value_heads": groups},
        _NO_CONVOLUTION: bare | {"conv_kernels": []},
        "with the depthwise convolution": bare | {"conv_kernels": [2]},
        "with both convolutions": bare,
        "with both convolutions and means": bare | {"qk_mean": True},
        "CCGQA": narrow,
        "CCA": narrow | {"num_query_heads": groups},
    }


def _quality(device: str, quick: bool) -> Iterator[Row]:
    from undivided.data import demo_texts

    texts = demo_texts()
    text, heldout = texts.calibration, texts.heldout["2024-Biden-1"]
    on_cuda = device == "cuda"
    sizes = _CUDA_SIZES if on_cuda else _CPU_SIZES
    training = dict[str, Any](steps=60, parameters=120_000, batch_size=16, length=128, learning_rate=3e-3)
    if on_cuda:
        training = dict(steps=300, parameters=4_000_000, batch_size=32, length=256, learning_rate=2e-3)
    if quick:
        training["steps"] //= 5
    arms = _arms(sizes)
    if not on_cuda:
        arms = {name: arms[name] for name in (_GQA, _NO_CONVOLUTION, "CCGQA")}
    runs = {
        name: train_tiny_lm(entry, text, heldout, seeds=_SEEDS, device=device, **training, **sizes)
        for name, entry in arms.items()
    }
    for name, own in runs.items():
        rivals = {"CCGQA": ("MHA", _GQA, _NO_CONVOLUTION), "CCA": (_GQA,)}.get(name, ())
        rivals = tuple(rival for rival in rivals if rival in runs)
        mean, deviation = mean_and_deviation([run.bits_per_byte for run in own])
        what, words = f"bits a byte of a tiny model, {name}", _quality_words(sizes, training, own)
        if not rivals:
            yield measured(what, words, mean, "bits/byte", better="lower", deviation=deviation)
        for rival in rivals:
            baseline, _ = mean_and_deviation([run.bits_per_byte for run in runs[rival]])
            has_bar = on_cuda and not quick and name == "CCGQA" and rival != "MHA"
            yield measured(
                f"{what}, against {rival}", words, mean, "bits/byte", better="lower", deviation=deviation,
                baseline_name=rival, baseline=baseline, required=1.0 if has_bar else None,
            )  # fmt: skip


def _quality_words(sizes: dict[str, Any], training: dict[str, Any], runs: list[TinyRun]) -> str:
    window = training["batch_size"] * training["length"]
    return (
        f"{sizes['num_hidden_layers']} layers, width {sizes['hidden_size']}, {runs[0].parameters} parameters, "
        f"{training['steps']} steps of {window} bytes, {len(runs)} seeds"
    )


_PARTS: dict[str, Measure] = {"speed": _speed, "quality": _quality}
CLAIM = Claim(
    slug="cca",
    source="arXiv 2510.04476, abstract, sections 3 to 5 and Table III",
    paper=(
        "On an H100 in bf16 with hidden size 2048, prefill of 16k tokens takes 1.6 to 1.7 times less with CCA at 4x "
        "compression than with MHA, 1.3 to 1.4 times less than GQA-8, 1.3 to 1.5 times less than MLA; the backward "
        "pass 1.2 to 1.3 times less than MHA.",
        "Dense 1B models: loss 2.297 with MHA and GQA, 2.321 with MLA, 2.307 with CCA, 2.286 with CCGQA; without "
        "convolutions 2.330, with one 2.327, with two 2.319, with means 2.317, with the value shift 2.315.",
        "CCGQA with 8 query and 2 key-value heads caches 8 times less than MHA.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
)
