"""The ways to spread one model's attention over ranks, each with the formula of every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from undivided.cost import attention as formulas
from undivided.cost.attention import AttentionShape, GroupedShape, LatentShape, RankAttention
from undivided.cost.presets import ModelShape

OWN = "own attention"
CONVERTED = "after conversion"
UNCONVERTED = "before conversion"
SLICED = "approximates MLA"
TRAINED = "needs training"
OTHER = "another model"

GroupedFormula = Callable[[GroupedShape, int], RankAttention]
LatentFormula = Callable[[LatentShape, int], RankAttention]


@dataclass(frozen=True)
class Arrangement:
    """One arrangement of all layers.

    Args:
        key: "gqa", "mla-tensor", "mla-data", "mla-context", "gla" or "tpla".
        label: the same in words.
        relation: what it is to the model as it stands; `OWN` if it computes the model's own attention.
        layers: the attention of every layer.
        grouped: formula of the layers with grouped-query attention.
        latent: formula of the layers with latent attention.
        num_shards: parts of the latent, for GLA and TPLA.
    """

    key: str
    label: str
    relation: str
    layers: tuple[AttentionShape, ...]
    grouped: GroupedFormula
    latent: LatentFormula
    num_shards: int = 1

    def loads(self, world_size: int) -> list[RankAttention]:
        """What one rank does for every layer."""
        return [
            self.grouped(layer, world_size)
            if isinstance(layer, GroupedShape)
            else self.latent(layer, world_size)
            for layer in self.layers
        ]


def arrangements(
    model: ModelShape,
    world_size: int,
    latent_dim: int | None = None,
    rope_dim: int | None = None,
    num_shards: int | None = None,
) -> list[Arrangement]:
    """List the arrangements of a model's attention.

    A model that is all grouped-query has its own and, as if converted, the latent ones. A latent model has
    those with its own dims, and if it was converted the attention it was made from. Layers of a latent model
    that are grouped-query stay so: split like the latent ones under data and context parallelism, else by
    heads.

    Args:
        model: the model.
        world_size: ranks.
        latent_dim: latent of a grouped-query model after conversion; default as in `to_latent`.
        rope_dim: its rotated key; default 64.
        num_shards: shards of TPLA and groups of GLA; default the model's own, or 2 where 2 divides latent,
            heads and ranks, or else 1.

    Returns:
        The arrangements, without marks.

    Raises:
        ValueError: if dims are given for a model that has its own, or do not fit it.
    """
    if all(isinstance(layer, GroupedShape) for layer in model.attention):
        layers: tuple[AttentionShape, ...] = tuple(
            formulas.to_latent(layer, latent_dim, 64 if rope_dim is None else rope_dim)
            for layer in model.attention
            if isinstance(layer, GroupedShape)
        )
        own = [_grouped(model.attention, OWN)]
        return own + _latent(
            layers, world_size, num_shards, {"mla": CONVERTED, "tpla": CONVERTED, "gla": TRAINED}
        )
    for name, value in (("latent_dim", latent_dim), ("rope_dim", rope_dim)):
        if value is not None:
            raise ValueError(
                f"{name}={value} is for a grouped-query model; {model.name} is latent and has its own."
            )
    base = model.base_attention or ()
    before = [_grouped(base, UNCONVERTED)] if base and all(isinstance(b, GroupedShape) for b in base) else []
    mechanisms = {layer.mechanism for layer in model.attention if isinstance(layer, LatentShape)}
    relations = {"mla": OTHER, "tpla": SLICED, "gla": TRAINED}
    if len(mechanisms) == 1:
        relations[mechanisms.pop()] = OWN
    return before + _latent(model.attention, world_size, num_shards, relations)


def _grouped(layers: tuple[AttentionShape, ...], relation: str) -> Arrangement:
    first = layers[0]
    kind = "GQA"
    if isinstance(first, GroupedShape) and first.num_key_value_heads in (1, first.num_heads):
        kind = "MHA" if first.num_key_value_heads == first.num_heads else "MQA"
    return Arrangement(
        "gqa",
        f"{kind}, tensor parallel",
        relation,
        layers,
        grouped=formulas.grouped_tensor_parallel,
        latent=formulas.latent_tensor_parallel,
    )


def _latent(
    layers: tuple[AttentionShape, ...],
    world_size: int,
    num_shards: int | None,
    relations: dict[str, str],
) -> list[Arrangement]:
    latents = [layer for layer in layers if isinstance(layer, LatentShape)]
    shards = _default_shards(latents, world_size) if num_shards is None else num_shards
    if any(layer.num_shards not in (1, shards) for layer in latents):
        relations = {key: OTHER if relation == OWN else relation for key, relation in relations.items()}
    plural = "s" if shards > 1 else ""
    by_heads = formulas.grouped_tensor_parallel
    table: list[tuple[str, str, GroupedFormula, LatentFormula]] = [
        ("mla-tensor", "MLA, tensor parallel", by_heads, formulas.latent_tensor_parallel),
        ("mla-data", "MLA, data parallel", formulas.grouped_data_parallel, formulas.latent_data_parallel),
        (
            "mla-context",
            "MLA, context parallel",
            formulas.grouped_context_parallel,
            formulas.latent_context_parallel,
        ),
        (
            "gla",
            f"GLA, {shards} group{plural}",
            by_heads,
            partial(formulas.latent_grouped, num_shards=shards),
        ),
        (
            "tpla",
            f"TPLA, {shards} shard{plural}",
            by_heads,
            partial(formulas.latent_sharded, num_shards=shards),
        ),
    ]
    groups_divide_heads = shards > 0 and all(layer.num_heads % shards == 0 for layer in latents)
    return [
        Arrangement(
            key=key,
            label=label,
            relation=relations[key.partition("-")[0]],
            layers=layers,
            grouped=grouped,
            latent=latent,
            num_shards=shards if key in ("gla", "tpla") else 1,
        )
        for key, label, grouped, latent in table
        if key != "gla" or groups_divide_heads
    ]


def _default_shards(latents: list[LatentShape], world_size: int) -> int:
    own = max(layer.num_shards for layer in latents)
    if own > 1:
        return own
    even = all(layer.latent_dim % 2 == 0 and layer.num_heads % 2 == 0 for layer in latents)
    return 2 if even and (world_size == 1 or world_size % 2 == 0) else 1
