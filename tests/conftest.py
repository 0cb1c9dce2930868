"""Shared rules of the test run.

Triton's kernels run in the ordinary CPU test run through Triton's interpreter. Triton decides that when it is
imported, so the variable is set here, before anything imports it, and only where there is no CUDA device: on
a GPU the same tests run the compiled kernels. A test that needs the compiler without a GPU (ahead-of-time
compilation) runs its code through the `run_python` fixture, whose subprocess does not interpret.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# No test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-cuda", action="store_true", help="fail at once where there is no CUDA device")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--require-cuda") and not HAS_CUDA:
        raise pytest.UsageError("--require-cuda was given, but torch finds no CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without_cuda = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("on_device")
        if not HAS_CUDA and item.get_closest_marker("gpu") is not None:
            item.add_marker(without_cuda)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def device() -> torch.device:
    """The device kernels are tested on: CUDA where there is one, else the CPU (Triton's interpreter)."""
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a fresh process without Triton's interpreter; returns the finished process.

    `run_python(code)` fails the test with the child's stderr if the child fails; `check=False` hands it back.
    """

    def run(
        code: str, *args: str, check: bool = True, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["OMP_NUM_THREADS"] = "1"
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            pytest.fail(f"the child process exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    return run
