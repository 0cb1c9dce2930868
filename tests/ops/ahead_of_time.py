"""For a process without a GPU: kernels of Triton are compiled for Hopper in place of being launched."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class _NoDevice:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_only(report: Callable[[str, Any, dict[str, Any]], tuple]) -> None:
    """From now on a launch compiles its kernel and prints a line: what `report(name, kernel, options)` returns."""
    driver.set_active(_NoDevice())
    run = JITFunction.run

    def compile_kernel(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        print(*report(self.fn.__name__, kernel, options), flush=True)

    JITFunction.run = compile_kernel


def name_and_shared(name, kernel, options):
    """The kernel's name and its bytes of shared memory."""
    return name, kernel.metadata.shared


def ptxas(kernel) -> str:
    """Returns what the assembler says about a kernel: spills, and products of wgmma that it had to serialise."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            "--gpu-name=sm_90a",
            source,
            "-o",
            Path(folder, "kernel.cubin"),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
