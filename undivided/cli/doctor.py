"""`undivided doctor`: what a maintainer asks first, and why a backend does not run on this machine."""

from __future__ import annotations

import importlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from undivided import __version__
from undivided.cli import _console

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "accelerate",
    "numpy",
    "gguf",
    "timm",
    "torchvision",
    "peft",
)


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the documentation's table of operators and backends.")
    ] = False,
) -> None:
    """Report versions, devices, and for every operator which backends can run here, and why not."""
    if markdown:
        typer.echo(support_table())
        return
    versions, devices, ops = _versions(), _devices(), _ops()
    if as_json:
        typer.echo(json.dumps({"versions": versions, "devices": devices, "ops": ops}, indent=2))
        return
    _console.table(
        ["package", "version"],
        [(name, found or "not installed") for name, found in versions.items()],
    )
    typer.echo()
    _console.table(["device", "name", "details"], [list(device.values()) for device in devices])
    typer.echo()
    rows = [
        (op, backend, "runs" if not reasons else "; ".join(reasons))
        for op, backends in ops.items()
        for backend, reasons in backends.items()
    ]
    _console.table(["operator", "backend", "on this machine"], rows)


def support_table() -> str:
    """Returns the operators, their backends in the order of preference, and where "auto" chooses them."""
    from undivided.ops import OPS

    lines = [
        "# Operators and backends",
        "",
        '`backend="auto"` takes the first that can run the inputs; an explicit one never becomes another. Why a',
        "backend cannot run on your machine `undivided doctor` says; why it cannot run your inputs the error says.",
        "",
        '| operator | backend | chosen by "auto" on | what it is |',
        "|---|---|---|---|",
    ]
    for op, backends in OPS.items():
        for backend in backends:
            module = importlib.import_module(backend.run.__module__)
            what = (backend.run.__doc__ or module.__doc__ or "").strip().splitlines()[0].rstrip(".:")
            lines.append(f"| `{op}` | {backend.name} | {', '.join(backend.automatic)} | {what} |")
    return "\n".join(lines)


def _versions() -> dict[str, str | None]:
    """Installed versions without importing the packages; None where there is none."""
    found: dict[str, str | None] = {"undivided": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _devices() -> list[dict[str, str]]:
    import torch

    processor = platform.processor() or platform.machine()
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores used by torch"
    devices = [{"device": "cpu", "name": processor, "details": threads}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        capability = f"compute capability {properties.major}.{properties.minor}"
        details = f"{memory}, {capability}, CUDA {torch.version.cuda}"
        devices.append({"device": f"cuda:{index}", "name": properties.name, "details": details})
    return devices


def _ops() -> dict[str, dict[str, Any]]:
    """For each operator and backend, the sentences that say why it cannot run here; none if it can."""
    from undivided.ops import OPS

    return {
        op: {backend.name: backend.availability() for backend in backends} for op, backends in OPS.items()
    }
