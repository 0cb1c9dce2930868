"""The sums that cross ranks, counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# Of a timeout, after which a sum on the device is given up: before NCCL's own end of it.
_SHARE = 0.8


class LostPeerError(ConnectionError):
    """Another rank did not answer: its process ended, it gave up, or nothing came from it in time."""


@contextmanager
def waiting(sentence: str, timeout: timedelta | None) -> Iterator[None]:
    """Turns the backend's error inside the context into a sentence: who waited for whom and for what, and why in vain.

    Raises:
        LostPeerError: the backend raised.
    """
    began = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        reason = "the connection is closed: that rank was lost, or has given up itself"
        if timeout is None:
            reason += ", or nothing came in time"
        elif time.monotonic() - began >= timeout.total_seconds():
            reason = f"nothing came within {timeout.total_seconds():g} s"
        raise LostPeerError(f"{sentence}; {reason}.") from error


class Collectives:
    """The process groups of a grid of shards and head parts, and a count of what was sent through them.

    Args:
        num_shards: shards of the latent; ranks with the same part of the heads, one of each shard, are peers.
        ranks: those that hold the model together, in the order of the grid; by default all.
        timeout: longest wait for the others of the group; by default that of the process group.

    Attributes:
        counts: how many all-reduces were made, by purpose: "output", "norm", "logits", "mlp".

    Raises:
        LostPeerError: a rank of the grid does not come to form the groups, or to a sum.
    """

    def __init__(
        self, num_shards: int, ranks: Sequence[int] | None = None, timeout: timedelta | None = None
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.timeout = timeout
        self.rank = dist.get_rank()
        self.ranks = list(range(dist.get_world_size()) if ranks is None else ranks)
        num_parts = len(self.ranks) // num_shards
        self.peer_ranks = self.ranks[self.ranks.index(self.rank) % num_parts :: num_parts]
        # When the device has made the last sum; the host's sums have ended when they return.
        self._made: torch.cuda.Event | None = None
        self.group = None if ranks is None else self._new_group(self.ranks)
        together = self.peer_ranks == self.ranks
        self.peers = self.group if together else self._new_group(self.peer_ranks)
        self._closed = False

    def sum_over_world(self, x: torch.Tensor, purpose: str, layer_idx: int) -> torch.Tensor:
        """Returns the sum of `x` over all ranks of the grid, the same bits on each."""
        return self._sum(x, self.group, self.ranks, purpose, layer_idx)

    def sum_over_shards(self, x: torch.Tensor, purpose: str, layer_idx: int) -> torch.Tensor:
        """Returns the sum of `x` over the ranks that hold the other shards of the same heads."""
        return self._sum(x, self.peers, self.peer_ranks, purpose, layer_idx)

    def settle(self) -> None:
        """Waits until the device has made all sums so far, for four fifths of `timeout`; without one not at all.

        NCCL's sums return at once. With a lost rank they never end, and nor would the next copy to the host; when the
        whole of `timeout` is over NCCL ends the process.

        Raises:
            LostPeerError: they have not ended in that time.
        """
        if self.timeout is None or self._made is None:
            return
        longest = _SHARE * self.timeout.total_seconds()
        end = time.monotonic() + longest
        while not self._made.query():
            if time.monotonic() > end:
                sentence = f"{self._waits_for(self.ranks)} to make the sums of a step"
                raise LostPeerError(f"{sentence}; nothing came within {longest:g} s.")

    def close(self) -> None:
        """Gives back the groups that were formed here; nothing can be summed afterwards."""
        for group in {self.group, self.peers} - {None}:
            dist.destroy_process_group(group)
        # Gloo's threads end with the last reference; at the end of the interpreter they may crash it.
        self.group = self.peers = None
        self._closed = True

    def _sum(
        self,
        x: torch.Tensor,
        group: dist.ProcessGroup | None,
        ranks: Sequence[int],
        purpose: str,
        layer_idx: int,
    ) -> torch.Tensor:
        if self._closed:
            raise ValueError(
                "the process groups of this model are closed; open it in a Separation that is going on."
            )
        self.counts[purpose] += 1
        x = x.contiguous()
        with waiting(f"{self._waits_for(ranks)} to sum the {purpose} of layer {layer_idx}", self.timeout):
            dist.all_reduce(x, group=group)
        if x.is_cuda:
            self._made = self._made or torch.cuda.Event()
            self._made.record()
        return x

    def _new_group(self, ranks: list[int]) -> dist.ProcessGroup:
        with waiting(f"{self._waits_for(ranks)} to form a process group", self.timeout):
            return dist.new_group(ranks, timeout=self.timeout, use_local_synchronization=True)

    def _waits_for(self, ranks: Sequence[int]) -> str:
        others = [str(rank) for rank in ranks if rank != self.rank]
        return f"rank {self.rank} waited for rank {' or '.join(others)}"
