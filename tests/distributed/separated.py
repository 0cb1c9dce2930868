"""What the ranks run in test_handover."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from undivided.cli import main
from undivided.distributed import LostPeerError, Separation, prefill_and_send, receive_and_decode

PATIENCE = timedelta(seconds=20)


def answer(
    rank: int, names: list[str], folder: Path, num_prefill: int, requests: list[dict[str, Any]]
) -> Any:
    """Answers requests with every checkpoint of a folder; returns tokens and counts of each."""
    found = {}
    for name in names:
        with counted_messages() as messages, Separation(num_prefill, timeout=PATIENCE) as separation:
            model, _ = separation.open(folder / name)
            tokens = []
            for request in requests:
                if separation.prefills:
                    tokens.append(prefill_and_send(model, separation, **request))
                else:
                    tokens.append(receive_and_decode(model, separation))
        sums = dict(model.collectives.counts)
        if sums:
            try:
                model(torch.ones(1, 1, dtype=torch.int64))
            except ValueError as error:
                assert "the process groups of this model are closed" in str(error)
            else:
                raise AssertionError("a model was used after its separation")
        found[name] = {"tokens": tokens, "bytes": dict(separation.counts), "sums": sums} | messages
    return found


@contextmanager
def counted_messages() -> Iterator[dict[str, int]]:
    """Counts the bytes of all messages between two ranks, below the library's own count."""
    messages = {"sent": 0, "received": 0}
    originals = {"sent": dist.isend, "received": dist.irecv}

    def counted(way: str) -> Callable[..., dist.Work]:
        def message(tensor: torch.Tensor, *arguments: Any, **options: Any) -> dist.Work:
            messages[way] += tensor.nbytes
            return originals[way](tensor, *arguments, **options)

        return message

    dist.isend, dist.irecv = counted("sent"), counted("received")
    try:
        yield messages
    finally:
        dist.isend, dist.irecv = originals["sent"], originals["received"]


def misuse(rank: int) -> list[str]:
    """Returns what is said to wrong arguments."""
    texts = []

    def note(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        try:
            call(*arguments, **options)
        except ValueError as error:
            texts.append(str(error))

    note(Separation, 1, (1, 2))
    note(Separation, 2)
    note(Separation, 1, timeout=timedelta(0))
    separation = Separation(1)
    if separation.prefills:
        note(receive_and_decode, None, separation)
    note(prefill_and_send, None, separation, [[1], []])
    note(prefill_and_send, None, separation, [[1]], max_new_tokens=0)
    return texts


def command(rank: int, words: list[str], port: int) -> list[Any]:
    """Runs the command line as torchrun would have started it; returns its status, stdout and stderr."""
    world_size = dist.get_world_size()
    dist.destroy_process_group()
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
    }  # fmt: skip
    printed, noted = io.StringIO(), io.StringIO()
    status = 0
    with redirect_stdout(printed), redirect_stderr(noted):
        try:
            main(words)
        except SystemExit as end:
            status = end.code
    return [status, printed.getvalue(), noted.getvalue()]


class Observed(Separation):
    """Calls `seen(event, what)` before something is sent, and after something has arrived."""

    def seen(self, event: str, what: str) -> None:
        raise NotImplementedError

    def send(self, tensor, rank, purpose, what):
        super().send(tensor, rank, purpose, what)
        self.seen("sent", what)

    def wait(self, work, rank, what):
        super().wait(work, rank, what)
        self.seen("done", what)


class Logged(Observed):
    def __init__(self, *arguments: Any, mark: Path, **options: Any) -> None:
        self.events: list[str] = []
        self.mark = mark
        super().__init__(*arguments, **options)

    def seen(self, event: str, what: str) -> None:
        self.events.append(f"{event} {what}")
        if event == "done" and "hand over layer 0" in what:
            self.mark.touch()


def overlap(rank: int, path: Path, prompt: list[int], mark: Path) -> list[str]:
    """Holds up layer 1 of the prefill until the decode rank has layer 0; returns the order of events."""
    with Logged(1, timeout=PATIENCE, mark=mark) as separation:
        model, _ = separation.open(path)
        separation.events.clear()

        def wait_for_mark(*_: Any) -> None:
            end = time.monotonic() + 10
            while not mark.exists() and time.monotonic() < end:
                time.sleep(0.005)
            separation.events.append(f"layer 0 is there: {mark.exists()}")

        for index, layer in enumerate(model.decoder_layers):
            layer.register_forward_hook(
                lambda *_, index=index: separation.events.append(f"computed layer {index}")
            )
        if separation.prefills:
            model.decoder_layers[1].register_forward_pre_hook(wait_for_mark)
            prefill_and_send(model, separation, [prompt], max_new_tokens=2)
        else:
            receive_and_decode(model, separation)
    return separation.events


class Mortal(Observed):
    """Is struck by a signal at a moment of its first request, if it is the victim."""

    def __init__(
        self, *arguments: Any, moment: str | None, strike_with: int, mark: Path, **options: Any
    ) -> None:
        self.moment, self.strike_with, self.mark = moment, strike_with, mark
        super().__init__(*arguments, **options)

    def strike(self, moment: str) -> None:
        if moment == self.moment:
            # Renamed into place: who sees the mark reads a whole number.
            part = self.mark.with_suffix(".part")
            part.write_text(repr(time.monotonic()))
            part.rename(self.mark)
            os.kill(os.getpid(), self.strike_with)

    def seen(self, event: str, what: str) -> None:
        if "layer 1 of request 0" in what:
            self.strike("during")


def lose(
    rank: int, path: Path, victim: int, moment: str, strike_with: int, timeout: float, mark: Path
) -> dict[str, Any]:
    """Loses a rank at a moment; returns each survivor's error, and how long after the loss it was raised."""
    mine = moment if rank == victim else None
    patience = timedelta(seconds=timeout)
    try:
        with Mortal(2, timeout=patience, moment=mine, strike_with=strike_with, mark=mark) as separation:
            separation.strike("loading")
            model, _ = separation.open(path)
            separation.strike("before")
            if separation.prefills:
                prefill_and_send(model, separation, [[1, 2, 3], [4, 5]], max_new_tokens=3)
                separation.strike("after")
            else:
                model.register_forward_pre_hook(lambda *_: separation.strike("after"))
                receive_and_decode(model, separation)
    except LostPeerError as error:
        found = {"seconds": time.monotonic() - float(mark.read_text()), "text": str(error)}
    else:
        found = {"seconds": 0.0, "text": "nothing was noticed"}
    # The others must learn of it from the library, not from the end of this process.
    mark.with_suffix(f".{rank}").touch()
    end = time.monotonic() + 2 * timeout
    while len(list(mark.parent.glob(f"{mark.stem}.[0-9]"))) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    return found
