"""The doctor reports what is there and says why a backend does not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from undivided import ops
from undivided.cli import main
from undivided.ops._backends import Backend


def doctor(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(["doctor", *argv])
    assert not exit_info.value.code
    return capsys.readouterr().out


def test_json_has_versions_devices_and_every_backend(capsys):
    report = json.loads(doctor(capsys, "--json"))
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["devices"][0]["device"] == "cpu"
    assert len(report["devices"]) == 1 + torch.cuda.device_count()
    expected = {op: [backend.name for backend in backends] for op, backends in ops.OPS.items()}
    assert {op: list(backends) for op, backends in report["ops"].items()} == expected


def test_every_op_can_run_somewhere_here(capsys):
    for op, backends in json.loads(doctor(capsys, "--json"))["ops"].items():
        assert [] in backends.values(), op


def test_reasons_are_printed_in_full(capsys, monkeypatch):
    reason = (
        "no CUDA device is visible to torch; " + "a long explanation that must not be cut, " * 5 + "[end]"
    )
    broken = Backend("triton", run=print, reasons=lambda: [reason], availability=lambda: [reason])
    monkeypatch.setitem(ops.OPS, "some_attention", (broken,))
    (line,) = (line for line in doctor(capsys).splitlines() if line.startswith("some_attention "))
    assert line.split(maxsplit=2) == ["some_attention", "triton", reason]
    assert json.loads(doctor(capsys, "--json"))["ops"]["some_attention"]["triton"] == [reason]


def test_missing_package_is_named(capsys, monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from undivided.cli import doctor as module

    def version(name):
        if name == "timm":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(module, "version", version)
    assert ["timm", "not", "installed"] in [line.split() for line in doctor(capsys).splitlines()]
    assert json.loads(doctor(capsys, "--json"))["versions"]["timm"] is None


def test_the_support_table_names_every_backend_and_the_docs_have_it(capsys):
    table = doctor(capsys, "--markdown")
    for op, backends in ops.OPS.items():
        for backend in backends:
            assert f"| `{op}` | {backend.name} | {', '.join(backend.automatic)} |" in table
    written = Path(__file__).resolve().parents[2] / "docs" / "support.md"
    assert written.read_text() == table, "run `make docs`"
