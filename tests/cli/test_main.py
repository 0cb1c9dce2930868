"""The command line as a whole: what it loads, how it refuses, how it exits."""

from __future__ import annotations

import importlib
import re
import types

import pytest

from undivided import cli
from undivided.cli import VERBS, main


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    return exit_info.value.code or 0


@pytest.fixture
def verb(monkeypatch):
    """Puts a function in the place of the verb `plan`."""

    def put(command):
        def load(name):
            return (
                types.SimpleNamespace(command=command)
                if name == "undivided.cli.plan"
                else importlib_import(name)
            )

        importlib_import = importlib.import_module
        monkeypatch.setattr(cli.importlib, "import_module", load)

    return put


def test_help_lists_every_verb_with_its_summary(capsys):
    assert run("--help") == 0
    words = " ".join(capsys.readouterr().out.split())
    for name, summary in VERBS.items():
        assert f"{name} {summary}" in words


def test_no_arguments_show_the_help(capsys):
    run()
    captured = capsys.readouterr()
    assert "Usage: undivided [OPTIONS] COMMAND" in captured.out + captured.err


def test_help_loads_neither_torch_nor_transformers(run_python):
    code = """
import sys
from undivided.cli import main
try:
    main(["--help"])
finally:
    print("loaded", *(name for name in ("torch", "transformers", "numpy") if name in sys.modules))
"""
    assert run_python(code).stdout.endswith("loaded\n")


def test_a_verb_is_imported_only_when_called(run_python):
    code = """
import sys
from undivided.cli import main
try:
    main(["systems", "--json"])
finally:
    print(*sorted(name for name in sys.modules if name.startswith("undivided.cli.")), file=sys.stderr)
"""
    loaded = run_python(code).stderr.split()
    assert "undivided.cli.systems" in loaded
    assert "undivided.cli.doctor" not in loaded


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help_of_its_own(name, capsys):
    assert run(name, "--help") == 0
    printed = capsys.readouterr().out
    assert f"Usage: undivided {name} [OPTIONS]" in printed
    assert "Stands for a verb" not in printed


def test_version_is_printed_on_stdout(capsys):
    assert run("--version") == 0
    assert re.fullmatch(r"undivided \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("kind", [ValueError, TypeError, FileNotFoundError, OSError, ImportError])
def test_bad_input_is_one_line_on_stderr_and_status_2(kind, verb, capsys):
    def command() -> None:
        raise kind(
            "num_shards=3 does not divide latent_dim=256; 2, 4, 8, ... would. " + "word " * 30 + "[end]"
        )

    verb(command)
    assert run("plan") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: num_shards=3 does not divide latent_dim=256")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("[end]\n")


@pytest.mark.parametrize("argv", [("--debug", "plan"), ("plan", "--debug")])
def test_debug_lets_the_error_through(argv, verb):
    def command() -> None:
        raise ValueError("topk=0 must be positive.")

    verb(command)
    with pytest.raises(ValueError, match="topk=0 must be positive"):
        main(argv)


def test_a_fault_of_ours_is_not_hidden(verb):
    def command() -> None:
        raise ZeroDivisionError

    verb(command)
    with pytest.raises(ZeroDivisionError):
        main(["plan"])


def test_interrupt_exits_with_130(verb):
    def command() -> None:
        raise KeyboardInterrupt

    verb(command)
    assert run("plan") == 130


def test_unknown_verb_is_refused(capsys):
    assert run("sistems") == 2
    assert "No such command 'sistems'" in capsys.readouterr().err


def test_unknown_option_is_refused(capsys):
    assert run("doctor", "--jsn") == 2
    assert "No such option: --jsn" in capsys.readouterr().err


def test_python_dash_m_is_the_same_command(run_python):
    code = (
        "import runpy, sys; sys.argv[1:] = ['--version']; runpy.run_module('undivided', run_name='__main__')"
    )
    assert run_python(code).stdout.startswith("undivided ")
