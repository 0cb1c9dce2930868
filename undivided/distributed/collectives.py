"""The sums that cross ranks, counted."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist


class Collectives:
    """The process groups of a grid of shards and head parts, and a count of what was sent through them.

    Args:
        num_shards: shards of the latent; ranks with the same part of the heads, one of each shard, are peers.

    Attributes:
        counts: how many all-reduces were made, by purpose: "output", "norm", "logits", "mlp".
    """

    def __init__(self, num_shards: int) -> None:
        self.counts: Counter[str] = Counter()
        world_size, rank = dist.get_world_size(), dist.get_rank()
        num_parts = world_size // num_shards
        self.peers = None
        # Every rank must create every group, in the same order.
        for part in range(num_parts):
            ranks = [shard * num_parts + part for shard in range(num_shards)]
            group = dist.new_group(ranks)
            if rank in ranks:
                self.peers = group

    def sum_over_world(self, x: torch.Tensor, purpose: str) -> torch.Tensor:
        """Returns the sum of `x` over all ranks, the same bits on each."""
        return self._sum(x, None, purpose)

    def sum_over_shards(self, x: torch.Tensor, purpose: str) -> torch.Tensor:
        """Returns the sum of `x` over the ranks that hold the other shards of the same heads."""
        return self._sum(x, self.peers, purpose)

    def _sum(self, x: torch.Tensor, group: dist.ProcessGroup | None, purpose: str) -> torch.Tensor:
        self.counts[purpose] += 1
        x = x.contiguous()
        dist.all_reduce(x, group=group)
        return x
