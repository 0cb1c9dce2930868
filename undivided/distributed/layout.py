"""Which part of a latent attention layer a rank holds: one shard of the latent, one run of the heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """The place of one rank in the grid of `num_shards` latent shards times `num_parts` parts of the heads.

    Rank r holds shard `r // num_parts` and part `r % num_parts`. In TPLA every shard has all heads, so a part is a
    run of `num_heads / num_parts` of them; in GLA a shard has only the heads of its group, so a part is a run of
    `num_heads / num_shards / num_parts`. MLA is the case of one shard: the heads are split, the latent is not.

    Args:
        rank: of this process.
        world_size: processes; `num_shards * num_parts`.
        num_shards: shards of the latent.
        num_heads: query heads of the layer.
        grouped: whether a shard has only its group's heads (GLA).

    Source: TPLA (arXiv 2508.15881).
    """

    rank: int
    world_size: int
    num_shards: int
    num_heads: int
    grouped: bool = False

    def __post_init__(self) -> None:
        heads = self.num_heads // self.num_shards if self.grouped else self.num_heads
        allowed = [self.num_shards * parts for parts in range(1, heads + 1) if heads % parts == 0]
        if self.world_size not in allowed:
            raise ValueError(
                f"world_size={self.world_size} does not fit num_shards={self.num_shards} and "
                f"num_attention_heads={self.num_heads}; {', '.join(map(str, allowed))} would."
            )

    @classmethod
    def of_entry(cls, entry: dict[str, Any], num_heads: int, rank: int, world_size: int) -> Layout:
        """Returns the layout of a layer from its entry in `UndividedConfig.attention`.

        Raises:
            ValueError: the mechanism has no latent to shard, or the world size does not fit.
        """
        shards = {"mla": 1, "tpla": entry.get("num_shards", 2), "gla": entry.get("num_latent_heads", 2)}
        mechanism = entry["mechanism"]
        if mechanism not in shards:
            raise ValueError(f'mechanism "{mechanism}" cannot be spread over ranks; {", ".join(shards)} can.')
        return cls(rank, world_size, shards[mechanism], num_heads, grouped=mechanism == "gla")

    @property
    def num_parts(self) -> int:
        return self.world_size // self.num_shards

    @property
    def shard(self) -> int:
        return self.rank // self.num_parts

    @property
    def heads(self) -> slice:
        """The heads this rank computes."""
        total = self.num_heads // self.num_shards if self.grouped else self.num_heads
        count = total // self.num_parts
        start = (self.shard * total if self.grouped else 0) + (self.rank % self.num_parts) * count
        return slice(start, start + count)

    def columns(self, latent_dim: int) -> slice:
        """The columns of the latent this rank holds."""
        width = latent_dim // self.num_shards
        return slice(self.shard * width, (self.shard + 1) * width)
