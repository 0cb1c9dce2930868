"""Which ranks read prompts and which decode, and who hands what to whom."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from undivided.distributed.layout import Layout
from undivided.models.configuration import UndividedConfig


@dataclass(frozen=True)
class Roles:
    """The two groups of ranks of separated prefill and decoding.

    The prefill ranks split the heads of the MLA that a TPLA checkpoint was cut from; each of them has the whole latent.
    The decode ranks form the grid of `Layout` (a single one holds all shards). Decode rank number i of the group gets
    its columns of the latent from prefill rank number `i % len(prefill_ranks)`.

    Args:
        prefill_ranks: of `torch.distributed`, in the order of their heads.
        decode_ranks: of `torch.distributed`, in the order of the grid.

    Raises:
        ValueError: a group is empty, or a rank is named twice or negative.

    Source: TPLA (arXiv 2508.15881).
    """

    prefill_ranks: tuple[int, ...]
    decode_ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("prefill_ranks", "decode_ranks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; separation needs at least one rank for each task.")
        named = self.ranks
        twice = sorted({rank for rank in named if named.count(rank) > 1})
        if twice or min(named) < 0:
            raise ValueError(
                f"prefill_ranks={list(self.prefill_ranks)} and decode_ranks={list(self.decode_ranks)} "
                + (
                    f"name rank {twice[0]} twice."
                    if twice
                    else f"name rank {min(named)}; the first rank is 0."
                )
            )

    @classmethod
    def of(cls, prefill_ranks: int | Sequence[int], world_size: int) -> Roles:
        """Returns the roles of all ranks: those named, or the first so many, read prompts; the others decode.

        Raises:
            ValueError: no rank is left for one of the tasks.
        """
        if isinstance(prefill_ranks, int):
            if not 1 <= prefill_ranks < world_size:
                could = f"use 1 to {world_size - 1}" if world_size > 1 else "start at least 2"
                raise ValueError(
                    f"prefill_ranks={prefill_ranks} of {world_size} ranks leaves none for one of the tasks; {could}."
                )
            prefill_ranks = range(prefill_ranks)
        return cls(tuple(prefill_ranks), tuple(r for r in range(world_size) if r not in prefill_ranks))

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.prefill_ranks + self.decode_ranks

    def sender(self, decode_rank: int) -> int:
        """Returns the prefill rank that hands over to a decode rank."""
        return self.prefill_ranks[self.decode_ranks.index(decode_rank) % len(self.prefill_ranks)]

    def receivers(self, prefill_rank: int) -> list[int]:
        """Returns the decode ranks that a prefill rank hands over to."""
        return [rank for rank in self.decode_ranks if self.sender(rank) == prefill_rank]

    def columns(self, config: UndividedConfig, layer_idx: int, latent_dim: int, decode_rank: int) -> slice:
        """Returns the columns of a layer's latent that a decode rank holds."""
        if len(self.decode_ranks) == 1:
            return slice(0, latent_dim)
        place, num_heads = self.decode_ranks.index(decode_rank), config.get_text_config().num_attention_heads
        layout = Layout.of_entry(
            (config.attention or [])[layer_idx], num_heads, place, len(self.decode_ranks)
        )
        return layout.columns(latent_dim)

    def check(self, config: UndividedConfig) -> int:
        """Returns into how many shards a checkpoint's latents are cut, if the groups fit these and its heads.

        Raises:
            ValueError: they do not fit (the message says which would), or a layer has neither MLA nor TPLA.
        """
        num_heads = config.get_text_config().num_attention_heads
        divisors = [d for d in range(1, num_heads + 1) if num_heads % d == 0]
        shards = [_num_shards(index, entry) for index, entry in enumerate(config.attention or [])]
        if len(set(shards)) > 1:
            raise ValueError("the layers differ in their number of shards; ranks can hold only one grid.")
        if len(self.prefill_ranks) not in divisors:
            raise ValueError(
                f"{len(self.prefill_ranks)} prefill ranks cannot share num_attention_heads={num_heads}; "
                f"{', '.join(map(str, divisors))} could."
            )
        grids = sorted({1, *(shards[0] * parts for parts in divisors)})
        if len(self.decode_ranks) not in grids:
            raise ValueError(
                f"{len(self.decode_ranks)} decode ranks do not fit num_shards={shards[0]} and "
                f"num_attention_heads={num_heads}; {', '.join(map(str, grids))} would."
            )
        return shards[0]


def as_mla(config: UndividedConfig) -> UndividedConfig:
    """Returns the config under which the weights of a TPLA checkpoint are read as the MLA they were cut from."""
    exact = copy.deepcopy(config)
    cut = ("num_shards", "norm", "softmax", "prefill")
    exact.attention = [
        {name: value for name, value in entry.items() if name not in cut} | {"mechanism": "mla"}
        for entry in config.attention or []
    ]
    return exact


def _num_shards(layer_idx: int, entry: dict[str, Any] | None) -> int:
    if entry is None or entry["mechanism"] not in ("mla", "tpla"):
        found = "its native attention" if entry is None else f'mechanism "{entry["mechanism"]}"'
        raise ValueError(
            f"layer {layer_idx} has {found}; only a prompt read by MLA is handed over: convert to mla or tpla."
        )
    return 1 if entry["mechanism"] == "mla" else entry.get("num_shards", 2)
