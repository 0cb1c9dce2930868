"""A source checkpoint, a text, and the command line run as a user would, for the tests of the verbs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_llama, tiny_text, tiny_tokenizer
from undivided.cli import main
from undivided.models.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SIZES = ("--latent-dim", "16", "--rope-dim", "4", "--samples", "4", "--sample-length", "32")


def prepare(folder: Path) -> Path:
    """Writes `source` and `text.txt` into a folder and returns it."""
    save_checkpoint(tiny_llama(), tiny_tokenizer(), folder / "source", {})
    (folder / "text.txt").write_text(tiny_text(3000))
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    """Runs a verb in this process; returns exit status, stdout and stderr."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def start(*argv: str | Path, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, or in several under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, "-m", "undivided", *map(str, argv)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
