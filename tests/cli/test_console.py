"""Results on stdout, notes on stderr, and nothing cut where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from undivided.cli import _console
from undivided.cli._console import note, progress, table


def test_note_goes_to_stderr_as_it_is(capsys):
    note("[1, 2] of " + "x" * 200)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "[1, 2] of " + "x" * 200 + "\n"


def test_table_is_neither_wrapped_nor_padded_without_a_terminal(capsys):
    table(["name", "bytes"], [["[bold]a[/bold]", 7], ["b" * 120, None]], numeric=["bytes"], title="Cache")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Cache"
    assert [line.split() for line in lines[1:]] == [["name", "bytes"], ["[bold]a[/bold]", "7"], ["b" * 120]]
    assert lines[2].endswith("    7")


def test_table_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(_console, "out", Console(force_terminal=True, width=40, color_system=None))
    table(["name"], [["word " * 30]])
    assert max(len(line.rstrip()) for line in capsys.readouterr().out.splitlines()) <= 40


def test_progress_without_a_terminal_ends_with_a_count(capsys):
    assert list(progress([1, 2, 3], "perplexity")) == [1, 2, 3]
    captured = capsys.readouterr()
    assert captured.err == "perplexity: 3/3, 0 s\n"
    assert captured.out == ""


def test_progress_counts_what_has_no_length(capsys):
    assert list(progress(iter("ab"), "layers")) == ["a", "b"]
    assert capsys.readouterr().err == "layers: 2, 0 s\n"


def test_progress_speaks_at_intervals(capsys, monkeypatch):
    monkeypatch.setattr(_console, "_SECONDS_BETWEEN_LINES", 0.0)
    list(progress("ab", "layers"))
    assert capsys.readouterr().err.splitlines() == [
        "layers: 1/2, 0 s",
        "layers: 2/2, 0 s",
        "layers: 2/2, 0 s",
    ]


@pytest.mark.parametrize("items", [[1, 2, 3], iter([1, 2, 3])])
def test_progress_on_a_terminal_yields_the_same_items(items, monkeypatch):
    monkeypatch.setattr(_console, "err", Console(force_terminal=True, stderr=True, width=60))
    assert list(progress(items, "layers")) == [1, 2, 3]


def test_a_bar_within_a_bar_is_left_out_and_loses_no_item(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(_console, "err", Console(file=screen, force_terminal=True, width=80))
    pairs = [(a, b) for a in progress([1, 2], "outer") for b in progress("xy", "inner")]
    assert pairs == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    assert "outer" in screen.getvalue() and "inner" not in screen.getvalue()
    list(progress([1], "next"))
    assert "next" in screen.getvalue()
