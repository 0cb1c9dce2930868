"""Process groups for tests: ranks forked from a process that has imported the library once, so that many are cheap."""

from __future__ import annotations

import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["undivided.distributed", "transformers.models.auto.modeling_auto"])


def run_ranks(
    target: Callable[..., Any],
    world_size: int,
    folder: Path,
    *arguments: Any,
    timeout: float = 60,
    stopped: Sequence[int] = (),
) -> list[Any]:
    """Runs `target(rank, *arguments)` on every rank of a gloo process group; returns what each returned.

    It must be of JSON types; a rank that died returned None. A rank that raised fails the test with its traceback.
    Ranks that are `stopped` are not waited for.
    """
    folder.mkdir()
    ranks = [
        _CONTEXT.Process(target=_run, args=(target, rank, world_size, folder, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    end = time.monotonic() + timeout
    for rank, process in enumerate(ranks):
        if rank not in stopped:
            process.join(max(0.0, end - time.monotonic()))
    alive = [rank for rank, process in enumerate(ranks) if process.is_alive() and rank not in stopped]
    for process in ranks:
        process.kill()
        process.join()
        process.close()
    assert not alive, f"ranks {alive} are still running after {timeout} s"
    reports = [folder / f"{rank}.json" for rank in range(world_size)]
    found = [json.loads(report.read_text()) if report.exists() else None for report in reports]
    raised = [report["traceback"] for report in found if isinstance(report, dict) and "traceback" in report]
    assert not raised, "\n".join(raised)
    return found


def _run(target: Callable[..., Any], rank: int, world_size: int, folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=30),
    )
    try:
        found = target(rank, *arguments)
    except BaseException:
        found = {"traceback": f"rank {rank}: {traceback.format_exc()}"}
    # Renamed into place: another process may be looking at it.
    written = folder / f"{rank}.part"
    written.write_text(json.dumps(found))
    written.rename(folder / f"{rank}.json")
