"""RCMHA: memory and time of attention with distances in one kernel, and its four forms as small language models.

The paper claims memory for a form that keeps more activations than its baseline; nothing in the method saves any. What
does is a kernel that never holds the scores: eager Transformer-XL attention makes several tensors of all pairs. The
paper's order of accuracies is looked for in small models of bytes of real text, three seeds each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import measured_ceilings, time_rivals
from undivided.claims._tiny_lm import VOCABULARY, as_bytes, mean_and_deviation, train
from undivided.layers.rcmha import RelativeConvAttention
from undivided.models.transformer_xl import TransformerXL
from undivided.ops import relative_attention
from undivided.testing import compare_op

HEADS, HEAD_DIM = 8, 64
FASTER, SMALLER, BAR_LENGTH = 3.0, 3.0, 4096
_TOKENS = 16384
_LENGTHS = (4096, 8192, 1024, 16384, 2048)
_EAGER, _BLOCKED = "Transformer-XL in eager PyTorch", "blocks of queries, computed again for gradients"
_FLEX = "FlexAttention, products with distances of all pairs made before"

_SEEDS = (0, 1, 2)
_SEGMENT, _MEMORY, _SEGMENTS = 64, 64, 2
# The paper's four forms; without convolutions and distances positions are absolute, and there is no memory.
_FORMS = {"RCMHA": "rcmha", "RMHA": "rmha", "MDHA": "mdha", "MHA": "mha"}


def gate(device: str) -> None:
    """Raises unless all backends, forward and backward, are as accurate as eager PyTorch, with and without a memory."""
    # Kernels in float32 are the tests' concern: what is measured is in bfloat16.
    dtype, backends = (
        (torch.float32, ("blocked",)) if device == "cpu" else (torch.bfloat16, ("triton", "blocked"))
    )
    reference = _attention("reference")
    for heads, queries, keys in (((8, 8), 333, 333), ((8, 2), 150, 400), ((2, 2), 1, 777)):
        x = _inputs(2, queries, keys, device, heads=heads, dtype=torch.float64)
        for backend in backends:
            compare_op(_attention(backend), reference, reference, x, dtype, factor=3.0)
    x = _inputs(1, 20, 33, device, dtype=torch.float64)
    torch.testing.assert_close(eager(**x), reference(**x), rtol=1e-10, atol=1e-10)


def _inputs(
    batch: int, queries: int, keys: int, device: str, *, heads: tuple[int, int] = (HEADS, HEADS),
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:  # fmt: skip
    draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
    return {
        "query": draw(batch, queries, heads[0], HEAD_DIM).transpose(1, 2),
        "key": draw(batch, keys, heads[1], HEAD_DIM).transpose(1, 2),
        "value": draw(batch, keys, heads[1], HEAD_DIM).transpose(1, 2),
        "content_bias": draw(heads[0], HEAD_DIM),
        "distance_vectors": draw(keys, heads[0], HEAD_DIM),
        "distance_bias": draw(keys, heads[0]),
    }


def _attention(backend: str) -> Callable[..., torch.Tensor]:
    return lambda **x: relative_attention(**x, backend=backend)


def eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    content_bias: torch.Tensor,
    distance_vectors: torch.Tensor,
    distance_bias: torch.Tensor,
) -> torch.Tensor:
    """Transformer-XL's form in the dtype of the inputs: products with all distances, shifted by padding a column."""
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    # Column p is distance K - 1 - p of the last query.
    vectors, biases = distance_vectors[:num_keys].flip(0), distance_bias[:num_keys].flip(0)
    products = torch.einsum("bhqd,phd->bhqp", query, vectors) + biases.T[:, None]
    padded = F.pad(products, (1, 0)).view(batch, heads, num_keys + 1, num_queries)
    shifted = padded[:, :, 1:].reshape(batch, heads, num_queries, num_keys)
    scores = head_dim**-0.5 * ((query + content_bias[:, None]) @ key.mT + shifted)
    later = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
    scores = scores.masked_fill(later.triu(num_keys - num_queries + 1), float("-inf"))
    return scores.softmax(-1) @ value


def speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields times and peak memory of attention, forward and backward, on a GPU."""
    if device == "cuda":
        for length in _LENGTHS[:1] if quick else _LENGTHS:
            yield from _training(length)


def forward(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of attention, forward, on a GPU."""
    if device == "cuda":
        for length in (BAR_LENGTH,) if quick else (BAR_LENGTH, 1024):
            yield from _forward(length)


def layer(device: str, quick: bool) -> Iterator[Row]:
    """Yields times and peak memory of a layer, forward and backward, on a GPU."""
    if device == "cuda":
        yield from _layer(BAR_LENGTH)


def _training(length: int) -> Iterator[Row]:
    batch = _TOKENS // length
    x = {name: t.requires_grad_() for name, t in _inputs(batch, length, length, "cuda").items()}
    dout = torch.randn(batch, HEADS, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    def with_backward(function: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(**x), list(x.values()), dout)

    calls = {"ours": with_backward(_attention("triton")), _EAGER: with_backward(eager)}
    if length == BAR_LENGTH:
        calls[_BLOCKED] = with_backward(_attention("blocked"))
    peaks = {name: _peak(call) for name, call in calls.items()}
    times = {name: timing.median for name, timing in time_rivals(calls, "cuda", seconds=0.1).items()}
    # Forward three products, backward eight, two of them the forward's again.
    fraction = measured_ceilings("cuda").fraction(times["ours"], flops=11 / 3 * _flops(batch, length))
    shape = f"batch {batch}, {HEADS} heads of {HEAD_DIM}, {length} tokens, bf16"
    for name in list(calls)[1:]:
        is_bar = name == _EAGER and length == BAR_LENGTH
        yield measured(
            f"attention forward and backward, against {name}", shape, times["ours"], "ms", better="lower",
            baseline_name=name, baseline=times[name], required=FASTER if is_bar else None,
            fraction_of_ceiling=fraction,
        )  # fmt: skip
        yield measured(
            f"peak memory of attention forward and backward, against {name}", shape, peaks["ours"], "MiB",
            better="lower", baseline_name=name, baseline=peaks[name], required=SMALLER if is_bar else None,
        )  # fmt: skip


def _flops(batch: int, length: int) -> float:
    """Operations of the three products of the forward, over the pairs of a causal mask."""
    return 6 * HEAD_DIM * HEADS * batch * length * (length + 1) / 2


def _peak(call: Callable[[], object]) -> float:
    """MiB that a call allocates beside what is there."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@torch.no_grad()
def _forward(length: int) -> Iterator[Row]:
    batch = _TOKENS // length
    x = _inputs(batch, length, length, "cuda")
    calls = {
        "ours": lambda: _attention("triton")(**x), _EAGER: lambda: eager(**x), _FLEX: _flex(x, length),
    }  # fmt: skip
    torch.testing.assert_close(calls[_FLEX](), calls["ours"](), rtol=0.1, atol=0.1)
    times = time_rivals(calls, "cuda", seconds=0.1)
    ours = times.pop("ours").median
    fraction = measured_ceilings("cuda").fraction(ours, flops=_flops(batch, length))
    for name, timing in times.items():
        yield measured(
            f"attention forward, against {name}", f"batch {batch}, {HEADS} heads of {HEAD_DIM}, {length} tokens, bf16",
            ours, "ms", better="lower", baseline_name=name, baseline=timing.median, fraction_of_ceiling=fraction,
        )  # fmt: skip


def _flex(x: dict[str, torch.Tensor], length: int) -> Callable[[], torch.Tensor]:
    """A score of FlexAttention is a lookup: it cannot multiply vectors, so the products are made for all pairs."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: k <= q, None, None, length, length, device="cuda")

    def attend(query, key, value, content_bias, distance_vectors, distance_bias):
        products = torch.einsum("bhqd,phd->bhqp", query, distance_vectors) + distance_bias.T[:, None]
        products = products * HEAD_DIM**-0.5

        def add(score, b, h, q, k):
            return score + products[b, h, q, torch.where(k <= q, q - k, 0)]

        return flex_attention(query + content_bias[:, None], key, value, score_mod=add, block_mask=mask)

    compiled = torch.compile(attend, dynamic=False)
    return lambda: compiled(**x)


class _EagerAttention(RelativeConvAttention):
    """The layer with Transformer-XL's eager form."""

    def attend(self, query, key, value, mask):
        tables = (x.to(query.dtype) for x in (self.content_bias, self.distance_vectors, self.distance_bias))
        return eager(query, key, value, *tables)


def _layer(length: int) -> Iterator[Row]:
    batch, width = _TOKENS // length, HEADS * HEAD_DIM
    x = torch.randn(batch, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step(kind: type[RelativeConvAttention], variant: str) -> Callable[[], object]:
        layer = kind(width, HEADS, variant=variant, max_distance=length).to("cuda", torch.bfloat16)
        return lambda: torch.autograd.grad(layer.with_memory(x, None).sum(), [x, *layer.parameters()])

    calls = {
        "ours": step(RelativeConvAttention, "rcmha"),
        "RMHA, fused": step(RelativeConvAttention, "rmha"),
        "RCMHA, eager": step(_EagerAttention, "rcmha"),
        "RMHA, eager": step(_EagerAttention, "rmha"),
    }
    peaks = {name: _peak(call) for name, call in calls.items()}
    times = time_rivals(calls, "cuda", seconds=0.1)
    shape = f"batch {batch}, hidden size {width}, {HEADS} heads, {length} tokens, bf16"
    for name in list(calls)[1:]:
        yield measured(
            f"RCMHA layer forward and backward, against {name}", shape, times["ours"].median, "ms", better="lower",
            baseline_name=name, baseline=times[name].median,
        )  # fmt: skip
        yield measured(
            f"peak memory of an RCMHA layer forward and backward, against {name}", shape, peaks["ours"], "MiB",
            better="lower", baseline_name=name, baseline=peaks[name],
        )  # fmt: skip


def quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields accuracies of the next byte of the four forms, with bits, and with longer memories than trained."""
    from undivided.data import demo_texts

    texts = demo_texts()
    text, heldout = texts.calibration, "\n".join(texts.heldout.values())
    steps, batch, layers = (300, 32, 4) if device == "cuda" else (120, 8, 2)
    if device == "cpu":
        heldout = heldout[:16384]
    if quick:
        steps //= 5
    seeds = _SEEDS[:1] if quick else _SEEDS
    longer = (_MEMORY, 2 * _MEMORY, 4 * _MEMORY)
    memories = {"RCMHA": longer, "RMHA": longer, "MDHA": (_MEMORY,), "MHA": (0,)}
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    weights = {}
    for seed in seeds:
        for name in _FORMS:
            model = _model(_FORMS[name], layers, seed, max(memories[name])).to(device)
            weights[name] = sum(p.numel() for p in model.parameters())
            train(
                model, text, steps=steps, batch_size=batch, length=_SEGMENTS * _SEGMENT + 1, learning_rate=2e-3,
                seed=seed, loss=_segments_loss,
            )  # fmt: skip
            for memory in memories[name]:
                model.memory_length = memory
                found.setdefault((name, memory), []).append(_evaluate(model.eval(), heldout))
    where = (
        f"{layers} layers of 128, segments of {_SEGMENT} bytes, {steps} steps of {batch}, {len(seeds)} seeds"
    )
    means = {key: mean_and_deviation([accuracy for accuracy, _ in values]) for key, values in found.items()}
    bits = {key: mean_and_deviation([b for _, b in values]) for key, values in found.items()}
    ours = "RCMHA", _MEMORY
    for key, (accuracy, deviation) in means.items():
        name, memory = key
        label = f"{name}, memory of {memory}, {weights[name]} weights"
        is_rival = memory <= _MEMORY and name != "RCMHA"
        yield measured(
            f"accuracy of the next byte, {label}", where, accuracy, "%", better="higher", deviation=deviation
        )
        yield measured(
            f"bits a byte, {label}", where, bits[key][0], "bits", better="lower", deviation=bits[key][1]
        )
        if is_rival:
            yield measured(
                f"accuracy of the next byte, RCMHA against {name}", where, means[ours][0], "%", better="higher",
                deviation=means[ours][1], baseline_name=name, baseline=accuracy, required=1.0,
            )  # fmt: skip


def _model(variant: str, layers: int, seed: int, longest: int) -> TransformerXL:
    torch.manual_seed(seed)
    return TransformerXL(
        VOCABULARY, num_layers=layers, variant=variant, memory_length=0 if variant == "mha" else _MEMORY,
        max_distance=_SEGMENT + longest,
    )  # fmt: skip


def _segments_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next byte over a window that is read segment by segment."""
    total, memory = ids.new_zeros((), dtype=torch.float32), None
    for start in range(0, ids.shape[1] - 1, _SEGMENT):
        logits, memory = model(ids[:, start : start + _SEGMENT], memory)
        targets = ids[:, start + 1 : start + 1 + _SEGMENT]
        total = total + F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    return total * _SEGMENT / (ids.shape[1] - 1)


@torch.no_grad()
def _evaluate(
    model: TransformerXL, text: str, streams: int = 32, most_bytes: int = 65536
) -> tuple[float, float]:
    """Returns accuracy in percent and bits a byte of the next byte of a text, read in streams that keep a memory."""
    device = next(model.parameters()).device
    data = as_bytes(text)[:most_bytes]
    data = data[: len(data) // streams * streams].view(streams, -1).to(device)
    right, nats, count, memory = 0.0, 0.0, 0, None
    for start in range(0, data.shape[1] - _SEGMENT, _SEGMENT):
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            logits, memory = model(data[:, start : start + _SEGMENT], memory)
        targets = data[:, start + 1 : start + 1 + _SEGMENT]
        right += (logits.argmax(-1) == targets).sum().item()
        nats += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return 100 * right / count, nats / count / math.log(2)


_PARTS: dict[str, Measure] = {"speed": speed, "forward": forward, "layer": layer, "quality": quality}
CLAIM = Claim(
    slug="rcmha",
    source="arXiv 2308.03429, abstract",
    paper=(
        "Accuracy 0.572, the best of MHA, MDHA, RMHA and RCMHA.",
        "Average memory 2.98 GB, against 3.5 GB of RMHA; the hardware is not named.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
)
