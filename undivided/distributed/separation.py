"""Prefill ranks and decode ranks of one process group: meetings, messages, and what happens when a rank is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
import torch.distributed as dist

from undivided.distributed.collectives import Collectives, LostPeerError, waiting
from undivided.distributed.loading import load_distributed, open_folder
from undivided.distributed.roles import Roles, as_mla
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Meetings have a tag of their own, so that none is taken for a message of the hand-over.
_HANDOVER, _MEETING, _NOTHING = 0, 1, 2


class Separation:
    """Separated prefill and decoding over the ranks of the default process group; a context in which both sides work.

    The ranks meet when the context is entered, before and after the model is loaded, and at its end, each meeting being
    one number to every other rank. Leaving the context by an error closes this process's connections, so that the
    others learn of it without waiting for their timeout. After an error the process group is of no more use.

    What is cached travels on the model's device (NCCL for CUDA, gloo for the CPU), headers, tokens and meetings on the
    host. So on CUDA the process group needs both: `init_process_group("cpu:gloo,cuda:nccl")`, with a timeout longer
    than this one, at the end of which NCCL ends the process.

    Args:
        prefill_ranks: ranks that read prompts, or how many of the first ranks do.
        decode_ranks: ranks that decode; by default all others.
        timeout: longest wait for one step of another rank: a layer of a prompt, a decoded token, and at a meeting the
            difference between the ranks' times of loading.

    Attributes:
        roles: the two groups.
        counts: bytes that this rank has sent or received, by purpose: "cache", "header", "token", "meeting". The sums
            within a group are counted by `model.collectives`.

    Raises:
        ValueError: the groups do not fit the process group.
        LostPeerError: a rank does not come.

    Source: TPLA (arXiv 2508.15881).
    """

    def __init__(
        self,
        prefill_ranks: int | Sequence[int],
        decode_ranks: Sequence[int] | None = None,
        *,
        timeout: timedelta = timedelta(minutes=2),
    ) -> None:
        if timeout <= timedelta(0):
            raise ValueError(f"timeout={timeout} must be more than zero.")
        world_size = dist.get_world_size()
        if decode_ranks is None:
            self.roles = Roles.of(prefill_ranks, world_size)
        else:
            first = range(prefill_ranks) if isinstance(prefill_ranks, int) else prefill_ranks
            self.roles = Roles(tuple(first), tuple(decode_ranks))
        if sorted(self.roles.ranks) != list(range(world_size)):
            raise ValueError(
                f"the roles name ranks {sorted(self.roles.ranks)}, but the process group has ranks 0 to "
                f"{world_size - 1}; every one needs a task."
            )
        if "cpu" not in dist.get_backend_config():
            raise ValueError(
                f'the process group has the backend "{dist.get_backend_config()}"; the ranks also talk on the host: '
                'use init_process_group("cpu:gloo,cuda:nccl").'
            )
        self.rank = dist.get_rank()
        self.timeout = timeout
        self.counts: Counter[str] = Counter()
        self.requests = 0
        # Tokens that the decode ranks may still be at when a prefill rank waits for them.
        self.steps_ahead = 1
        self._config: UndividedConfig | None = None
        self._collectives: Collectives | None = None
        self._sent: list[tuple[dist.Work, torch.Tensor, int, str]] = []

    @property
    def prefills(self) -> bool:
        """Whether this rank reads prompts; else it decodes."""
        return self.rank in self.roles.prefill_ranks

    def __enter__(self) -> Self:
        self._meet("to start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._hang_up()
            return
        self._meet("to finish")
        if self._collectives is not None:
            self._collectives.close()

    def open(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        shard_mlp: bool = False,
    ) -> tuple[UndividedForCausalLM, PreTrainedTokenizerBase]:
        """Loads this rank's part of a checkpoint, as MLA with split heads or as TPLA, and the tokenizer.

        Args:
            path: a folder written by a converter, MLA or TPLA.
            dtype, device, shard_mlp: as in `load_distributed`.

        Raises:
            ValueError: the folder is damaged, or the groups do not fit its heads and shards.
            LostPeerError: a rank is lost while it loads.
        """
        config, tokenizer = open_folder(path)
        num_shards = self.roles.check(config)
        self._config = config
        # Forming a group with a lost rank takes the whole timeout and does not tell which; a meeting does.
        self._meet("to read the checkpoint's config")
        ranks = self.roles.prefill_ranks if self.prefills else self.roles.decode_ranks
        whole = self.prefills or len(ranks) == 1
        self._collectives = Collectives(1 if whole else num_shards, ranks, self.timeout)
        model = load_distributed(
            path,
            dtype=dtype,
            device=device,
            shard_mlp=shard_mlp,
            config=as_mla(config) if self.prefills else config,
            collectives=self._collectives,
        )
        self._meet("to load its part of the model")
        self._connect(model.device)
        return model, tokenizer

    def _connect(self, device: torch.device) -> None:
        # NCCL makes the connection of two ranks with their first message, which takes a second.
        if device.type != "cuda":
            return
        word = torch.zeros(1, device=device)
        if self.prefills:
            for rank in self.roles.receivers(self.rank):
                self.send(word, rank, "meeting", "to connect")
            self.flush()
        else:
            sender = self.roles.sender(self.rank)
            self.wait(self.receive(word, sender, "meeting", "to connect"), sender, "to connect")

    def columns(self, layer_idx: int, latent_dim: int, decode_rank: int) -> slice:
        """Returns the columns of a layer's latent that a decode rank holds; for the checkpoint that was opened."""
        if self._config is None:
            raise ValueError("no checkpoint is open; call Separation.open first.")
        return self.roles.columns(self._config, layer_idx, latent_dim, decode_rank)

    def send(self, tensor: torch.Tensor, rank: int, purpose: str, what: str) -> None:
        """Begins to send; `flush` waits for it. `what` completes "rank 0 waited for rank 2 ..." if that is lost."""
        self.counts[purpose] += tensor.nbytes
        with self._waiting_for(rank, what):
            self._sent.append((dist.isend(tensor, rank, tag=_HANDOVER), tensor, rank, what))

    def flush(self) -> None:
        """Waits until all that was sent has been taken."""
        for work, _, rank, what in self._sent:
            self.wait(work, rank, what)
        self._sent.clear()

    def receive(self, tensor: torch.Tensor, rank: int, purpose: str, what: str) -> dist.Work:
        """Begins to receive into `tensor`; `wait` waits for it."""
        self.counts[purpose] += tensor.nbytes
        with self._waiting_for(rank, what):
            return dist.irecv(tensor, rank, tag=_HANDOVER)

    def wait(self, work: dist.Work, rank: int, what: str) -> None:
        """Waits for a message, at most `timeout` for each step that the other rank may have to make first.

        Raises:
            LostPeerError: the rank was lost or did nothing in that time.
        """
        with self._waiting_for(rank, what):
            work.wait(self.timeout * self.steps_ahead)

    def _waiting_for(self, rank: int, what: str) -> AbstractContextManager[None]:
        return waiting(f"rank {self.rank} waited for rank {rank} {what}", self.timeout * self.steps_ahead)

    def _meet(self, what: str) -> None:
        here = torch.zeros(1, dtype=torch.int64)
        others = [rank for rank in self.roles.ranks if rank != self.rank]
        there = torch.zeros(len(others), 1, dtype=torch.int64)
        works = []
        try:
            for rank, place in zip(others, there, strict=True):
                with self._waiting_for(rank, what):
                    works.append((dist.irecv(place, rank, tag=_MEETING), rank))
                    works.append((dist.isend(here, rank, tag=_MEETING), rank))
            for work, rank in works:
                self.wait(work, rank, what)
        except LostPeerError:
            self._hang_up()
            raise
        self.counts["meeting"] += 2 * here.nbytes * len(others)

    def _hang_up(self) -> None:
        # Gloo closes all connections of a process when one wait of it runs out. Were it otherwise, the others
        # would still come to their own timeouts.
        groups = [] if self._collectives is None else [self._collectives.group, self._collectives.peers]
        for group in [None, *groups]:
            for rank in dist.get_process_group_ranks(group):
                if rank != self.rank:
                    with suppress(RuntimeError):
                        nothing = dist.irecv(torch.empty(1), rank, group=group, tag=_NOTHING)
                        nothing.wait(timedelta(milliseconds=1))
        # What a lost rank has left unfinished on the device would hold up the end of this process. Torch has no public
        # way to give up NCCL's part of a group alone.
        if "nccl" in dist.get_backend_config():
            for group in {dist.group.WORLD, *groups} - {None}:
                with suppress(RuntimeError):
                    group._get_backend(torch.device("cuda")).abort()
