"""Which arrangement of a model's attention decodes fastest on a group of devices: a roofline.

A decode step reads every cached row and every weight once and produces one token a sequence. For each part of
the step the time is `max(bytes / bandwidth, FLOPs / rate)`, a bound from below; parts and layers run one
after the other. `ASSUMPTIONS` says what is and is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from undivided.cost import attention as formulas
from undivided.cost.arrangements import Arrangement, arrangements
from undivided.cost.attention import AttentionShape, GroupedShape, LatentShape, RankAttention
from undivided.cost.config import load_model
from undivided.cost.devices import ITEMSIZE, Device, get_device
from undivided.cost.presets import ModelShape

# Part of the memory that is left to activations, buffers of the runtime and fragmentation.
RESERVED = 0.1

ASSUMPTIONS = (
    "Bounds from nominal datasheet figures: no kernel reaches them, and launch overhead is not counted.",
    "MLPs, experts, embedding and output head are split evenly over all ranks in every arrangement; routing "
    "is balanced. MTP modules are not counted.",
    "Collectives are counted by bytes over the link of one host, as rings, without latency or overlap.",
    "Data parallel: a rank serves its part of the batch with all attention weights. Context parallel: a rank "
    "holds its part of each sequence's rows; queries are gathered, partial outputs merged by log-sum-exp.",
)


@dataclass(frozen=True)
class PlanRow:
    """One arrangement of the attention on a group of ranks, for one decode step.

    Bytes, FLOPs and seconds are those of one rank (the fullest) and one step, over all layers.

    Args:
        arrangement: "gqa", "mla-tensor", "mla-data", "mla-context", "gla" or "tpla".
        label: the same in words.
        relation: what it is to the model as it stands; `OWN` where it computes the model's own attention.
        cache_bytes_per_token: cache a rank spends for each token that the group caches, all layers, on
            average.
        cache_bytes_per_token_per_layer: the same, mean over the layers.
        weight_bytes: weights the rank holds.
        largest_batch: sequences of this context that the group can hold.
        fits: the batch asked for is not larger.
        core_bytes: bytes the attention core moves: cached rows, queries and outputs.
        core_flops: FLOPs of the attention core.
        arithmetic_intensity: `core_flops / core_bytes`.
        bound: "memory" or "compute", whichever limits the core.
        projection_bytes: attention weights read.
        projection_flops: FLOPs of the attention's projections.
        other_bytes: other weights read: MLPs, the experts reached, output head.
        other_flops: their FLOPs.
        link_bytes: bytes sent to other ranks.
        core_seconds: roofline time of the core.
        weight_seconds: roofline time of projections and other weights.
        link_seconds: `link_bytes` over the link's bandwidth; 0 where that is not known.
        step_seconds: their sum.
        tokens_per_second: tokens of the whole group a second, `batch / step_seconds`.
        best: the largest `tokens_per_second` of the rows that fit.
        notes: sentences on this row.
    """

    arrangement: str
    label: str
    relation: str
    cache_bytes_per_token: float
    cache_bytes_per_token_per_layer: float
    weight_bytes: float
    largest_batch: int
    fits: bool
    core_bytes: float
    core_flops: float
    arithmetic_intensity: float
    bound: str
    projection_bytes: float
    projection_flops: float
    other_bytes: float
    other_flops: float
    link_bytes: float
    core_seconds: float
    weight_seconds: float
    link_seconds: float
    step_seconds: float
    tokens_per_second: float
    best: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Work:
    """Bytes and FLOPs that run together, so that the slower of the two decides."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class _Workload:
    device: Device
    context: int
    batch: int
    world_size: int
    dtype: str
    weight_dtype: str
    reserve_gb: float

    def seconds(self, parts: Sequence[_Work], dtype: str) -> float:
        """Roofline time of parts that run one after the other."""
        rate = self.device.flops_per_second(dtype)
        return sum(max(part.bytes / self.device.bytes_per_second, part.flops / rate) for part in parts)

    @property
    def activation_size(self) -> int:
        """Bytes of an activation element: an fp8 cache or weight is still met by 16-bit activations."""
        return max(2, ITEMSIZE[self.dtype])


def plan(
    model: ModelShape | str,
    device: Device | str = "h100",
    *,
    context: int = 32768,
    batch: int = 64,
    world_size: int = 1,
    latent_dim: int | None = None,
    rope_dim: int | None = None,
    num_shards: int | None = None,
    dtype: str = "bf16",
    weight_dtype: str | None = None,
    reserve_gb: float | None = None,
) -> list[PlanRow]:
    """Compare the arrangements of a model's attention for one decode step.

    A grouped-query model gets its own attention (tensor parallel over key/value heads) and, as if converted,
    MLA (tensor, data and context parallel), GLA and TPLA; a latent model gets those with its own dims.

    Args:
        model: a shape, or what `load_model` takes: a preset's name or a folder with a `config.json`.
        device: a device, or a key of `DEVICES`.
        context: rows cached for each sequence.
        batch: sequences that the group decodes together.
        world_size: ranks (devices) of the group; divides the query heads.
        latent_dim: latent of a grouped-query model after conversion; default 512, or lossless where that is
            less.
        rope_dim: its rotated key; default 64.
        num_shards: shards of TPLA and groups of GLA; default the model's own, or 2 where 2 divides latent,
            heads and ranks, or else 1.
        dtype: of the cache and, unless `weight_dtype` says otherwise, the weights: "bf16", "fp16", "fp8",
            "fp32".
        weight_dtype: of the weights.
        reserve_gb: memory kept free on each device for activations and the runtime, 10**9 bytes; default a
            tenth.

    Returns:
        One row an arrangement; the best one that fits is marked.

    Raises:
        ValueError: an argument is out of range, or a number does not divide another; the message says what
            would.
    """
    model = load_model(model) if isinstance(model, str) else model
    device = get_device(device) if isinstance(device, str) else device
    for name, value in (("context", context), ("batch", batch), ("world_size", world_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    for name, chosen in (("dtype", dtype), ("weight_dtype", weight_dtype)):
        if chosen not in ITEMSIZE:
            raise ValueError(f'{name} "{chosen}" is not known; {", ".join(ITEMSIZE)} are.')
    if reserve_gb is None:
        reserve_gb = RESERVED * device.memory_gb
    if not 0 <= reserve_gb < device.memory_gb:
        raise ValueError(
            f"reserve_gb is {reserve_gb}; it must be at least 0 and below the device's {device.memory_gb}."
        )
    workload = _Workload(device, context, batch, world_size, dtype, weight_dtype, reserve_gb)
    rows = [
        _row(model, arrangement, workload)
        for arrangement in arrangements(model, world_size, latent_dim, rope_dim, num_shards)
    ]
    fastest = max((row.tokens_per_second for row in rows if row.fits), default=None)
    # Arrangements that coincide (MLA on one rank) are told apart by nothing: the first of them is marked.
    marked = next((row.arrangement for row in rows if row.fits and row.tokens_per_second == fastest), None)
    return [replace(row, best=row.arrangement == marked) for row in rows]


def num_parameters(model: ModelShape) -> int:
    """Parameters of a model, MTP modules and router biases aside."""
    loads = [
        formulas.grouped_tensor_parallel(layer, 1)
        if isinstance(layer, GroupedShape)
        else _latent_on_one_rank(layer)
        for layer in model.attention
    ]
    return round(_rank_weights(model, loads, 1))


def _latent_on_one_rank(layer: LatentShape) -> RankAttention:
    if layer.mechanism == "gla":
        return formulas.latent_grouped(layer, 1, layer.num_shards)
    return formulas.latent_tensor_parallel(layer, 1)


def _row(model: ModelShape, arrangement: Arrangement, workload: _Workload) -> PlanRow:
    world_size, batch, device = workload.world_size, workload.batch, workload.device
    loads = arrangement.loads(world_size)
    # One arrangement splits the batch in all its layers or in none.
    batch_split = loads[0].batch_split
    rank_batch = math.ceil(batch / batch_split)
    itemsize, weight_size = ITEMSIZE[workload.dtype], ITEMSIZE[workload.weight_dtype]

    rows = [
        _rank_rows(layer, load, workload.context)
        for layer, load in zip(arrangement.layers, loads, strict=True)
    ]
    sequence_bytes = itemsize * sum(
        count * load.cache_elements for count, load in zip(rows, loads, strict=True)
    )
    core = [
        _Work(
            bytes=rank_batch
            * (
                count * load.cache_elements * itemsize + load.query_output_elements * workload.activation_size
            ),
            flops=2 * rank_batch * count * load.macs_per_row,
        )
        for count, load in zip(rows, loads, strict=True)
    ]
    projections = [
        _Work(bytes=load.weight_elements * weight_size, flops=2 * rank_batch * load.projection_macs)
        for load in loads
    ]
    others = _other_work(model, batch, world_size, weight_size)
    mlp_link = 2 * model.hidden_size * (world_size - 1) / world_size
    link_bytes = batch * workload.activation_size * sum(load.link_elements + mlp_link for load in loads)

    weight_bytes = weight_size * _rank_weights(model, loads, world_size)
    free = 1e9 * (device.memory_gb - workload.reserve_gb) - weight_bytes
    largest = batch_split * max(0, math.floor(free / sequence_bytes))

    core_seconds = workload.seconds(core, workload.dtype)
    weight_seconds = workload.seconds([*projections, *others], workload.weight_dtype)
    link_seconds = 0.0 if device.link_gb is None else link_bytes / (1e9 * device.link_gb)
    step_seconds = core_seconds + weight_seconds + link_seconds
    core_bytes, core_flops = sum(part.bytes for part in core), sum(part.flops for part in core)
    ridge = device.flops_per_second(workload.dtype) / device.bytes_per_second
    intensity = core_flops / core_bytes
    cache_bytes_per_token = sequence_bytes / workload.context / batch_split
    return PlanRow(
        arrangement=arrangement.key,
        label=arrangement.label,
        relation=arrangement.relation,
        cache_bytes_per_token=cache_bytes_per_token,
        cache_bytes_per_token_per_layer=cache_bytes_per_token / model.num_layers,
        weight_bytes=weight_bytes,
        largest_batch=largest,
        fits=batch <= largest,
        core_bytes=core_bytes,
        core_flops=core_flops,
        arithmetic_intensity=intensity,
        bound="memory" if intensity <= ridge else "compute",
        projection_bytes=sum(part.bytes for part in projections),
        projection_flops=sum(part.flops for part in projections),
        other_bytes=sum(part.bytes for part in others),
        other_flops=sum(part.flops for part in others),
        link_bytes=link_bytes,
        core_seconds=core_seconds,
        weight_seconds=weight_seconds,
        link_seconds=link_seconds,
        step_seconds=step_seconds,
        tokens_per_second=batch / step_seconds,
        best=False,
        notes=_notes(arrangement, workload, free, largest, rank_batch, batch_split),
    )


def _rank_rows(layer: AttentionShape, load: RankAttention, context: int) -> int:
    """Rows of one sequence that the fullest rank holds in one layer."""
    seen = context if layer.sliding_window is None else min(context, layer.sliding_window)
    return math.ceil(seen / load.row_split)


def _rank_weights(model: ModelShape, loads: Sequence[RankAttention], world_size: int) -> float:
    """Weights, in elements, that one rank holds."""
    width = model.hidden_size
    split = model.vocab_size * width * (1 if model.tie_word_embeddings else 2)
    norms = width * (model.norms_per_layer * model.num_layers + 1)
    routers = 0
    experts = model.experts
    dense_layers = model.num_layers
    if experts is not None:
        dense_layers = min(experts.first_dense_layers, model.num_layers)
        expert_layers = model.num_layers - dense_layers
        per_layer = experts.num_experts + experts.num_shared_experts
        split += expert_layers * per_layer * 3 * width * experts.intermediate_size
        routers = expert_layers * width * experts.num_experts
    split += dense_layers * 3 * width * model.intermediate_size
    return sum(load.weight_elements for load in loads) + norms + routers + split / world_size


def _other_work(model: ModelShape, batch: int, world_size: int, weight_size: int) -> list[_Work]:
    """One rank's part of every MLP and of the output head."""
    width = model.hidden_size

    def work(weights: float, macs_per_token: float) -> _Work:
        return _Work(bytes=weights * weight_size / world_size, flops=2 * batch * macs_per_token / world_size)

    dense = 3 * width * model.intermediate_size
    parts = [work(model.vocab_size * width, model.vocab_size * width)]
    experts = model.experts
    if experts is None:
        return parts + [work(dense, dense)] * model.num_layers
    dense_layers = min(experts.first_dense_layers, model.num_layers)
    one = 3 * width * experts.intermediate_size
    router = experts.num_experts * width
    mixture = work(
        (experts.touched(batch) + experts.num_shared_experts) * one + router * world_size,
        (experts.experts_per_token + experts.num_shared_experts) * one + router * world_size,
    )
    return parts + [work(dense, dense)] * dense_layers + [mixture] * (model.num_layers - dense_layers)


def _notes(
    arrangement: Arrangement,
    workload: _Workload,
    free: float,
    largest: int,
    rank_batch: int,
    batch_split: int,
) -> tuple[str, ...]:
    notes = []
    world_size = workload.world_size
    first = arrangement.layers[0]
    if arrangement.key == "gqa" and isinstance(first, GroupedShape):
        heads = first.num_key_value_heads
        held = formulas.key_value_heads_per_rank(first.num_heads, heads, world_size)
        if held * world_size > heads:
            notes.append(
                f"{heads} key/value heads over {world_size} ranks: a rank holds {held}, so the group caches "
                f"every token {held * world_size / heads:.3g} times."
            )
    if batch_split > 1 and workload.batch % batch_split:
        notes.append(
            f"batch {workload.batch} over {batch_split} ranks: the fullest serves {rank_batch}, others wait."
        )
    if arrangement.key in ("gla", "tpla") and arrangement.num_shards == 1:
        notes.append("an undivided latent: the same as MLA, tensor parallel.")
    if free <= 0:
        device = workload.device
        notes.append(
            f"does not fit: the rank's weights exceed its {device.memory_gb:g} GB, less a reserve of "
            f"{workload.reserve_gb:g} GB, by {-free / 1e9:,.1f} GB."
        )
    elif largest < workload.batch:
        notes.append(f"does not fit: the largest batch is {largest:,}.")
    return tuple(notes)
