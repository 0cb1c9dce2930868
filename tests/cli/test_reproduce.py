"""`undivided reproduce`, on a toy claim that is found the way real ones are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from undivided import claims
from undivided.claims import _results
from undivided.cli import main, reproduce

TOY = """
from undivided.claims import Claim, measured
from undivided.claims._harness import Figure

def gate(device):
    if {wrong}:
        raise AssertionError("out differs from the reference")

def measure(device, quick):
    for size, ours in (("small", {small}), ("large", {large})):
        yield measured("adding [b]one[/b]", size, ours, "ms", better="lower", baseline_name="eager",
                       baseline=3.0, required={required}, fraction_of_ceiling=0.5)
        if quick:
            return
    {last}

CLAIM = Claim(slug="{slug}", source="arXiv 0000.00000, section 3", paper=("1.5x at size [2] on one card",),
              gate=gate, measure=measure, parts=dict(sums=measure), devices={devices})
"""
GOOD = dict(wrong=False, small=2.0, large=1.0, required=1.2, last="", devices=("cpu",))


@pytest.fixture
def claim(tmp_path: Path, monkeypatch):
    """Makes claims from TOY; the package then holds these alone."""
    folder = tmp_path / "claims"
    folder.mkdir()
    monkeypatch.setattr(claims, "__path__", [str(folder)])
    made = []

    def make(slug: str = "toy", **changes) -> None:
        (folder / f"{slug}.py").write_text(TOY.format(**{**GOOD, **changes}, slug=slug))
        made.append(f"undivided.claims.{slug}")

    yield make
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture
def run(tmp_path: Path, capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as raised:
            main(["reproduce", *arguments, "--output", str(tmp_path / "results")])
        printed = capsys.readouterr()
        return raised.value.code or 0, printed.out, printed.err

    return call


def test_prints_the_papers_figure_and_ours_and_keeps_the_rows(claim, run, tmp_path: Path):
    claim()
    status, out, err = run("toy", "--device", "cpu")
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[:2] == ["arXiv 0000.00000, section 3:", "1.5x at size [2] on one card"]
    assert "adding [b]one[/b] small 2 ms 3 ms, eager 1.50 1.20 yes 50%" in lines
    assert "adding [b]one[/b]; small: 2 ms" in err and "torch " in err
    rows = _results.read(tmp_path / "results" / "toy.jsonl")
    assert [(row.shape, row.ratio, row.holds) for row in rows] == [("small", 1.5, True), ("large", 3.0, True)]
    assert rows[0].command == "undivided reproduce toy --device cpu"
    assert "| adding [b]one[/b] | small | 2 ms |" in (tmp_path / "results" / "RESULTS.md").read_text()


def test_rows_are_added_never_replaced(claim, run, tmp_path: Path):
    claim()
    run("toy")
    first = (tmp_path / "results" / "toy.jsonl").read_bytes()
    run("toy", "--quick")
    second = (tmp_path / "results" / "toy.jsonl").read_bytes()
    assert second.startswith(first) and second.count(b"\n") == 3


def test_a_bar_that_does_not_hold_is_printed_and_is_the_exit_status(claim, run, tmp_path: Path):
    claim(small=4.0)
    status, out, err = run("toy")
    assert status == 1
    assert "4 ms" in out
    assert "adding [b]one[/b]; small: ratio 0.75 is below the bar, 1.20." in err
    assert [row.holds for row in _results.read(tmp_path / "results" / "toy.jsonl")] == [False, True]


def test_a_lost_shape_without_a_bar_is_no_failure_but_is_red(claim, run, monkeypatch):
    from rich.console import Console

    claim(small=4.0, required=None)
    console = Console(force_terminal=True, width=100, color_system="standard")
    monkeypatch.setattr(reproduce, "out", console)
    status, out, _ = run("toy")
    red = [line for line in out.splitlines() if "\x1b[31m" in line]
    assert status == 0
    assert len(red) == 1 and "small" in red[0]


def test_fits_a_terminal(claim, run, monkeypatch):
    from rich.console import Console

    claim()
    monkeypatch.setattr(reproduce, "out", Console(force_terminal=True, width=80, color_system=None))
    _, out, _ = run("toy")
    assert max(len(line) for line in out.splitlines()) <= 80


def test_wrong_results_are_neither_timed_nor_kept(claim, run, tmp_path: Path):
    claim(wrong=True)
    status, out, err = run("toy")
    assert status == 1 and out == ""
    assert 'the gate of "toy" failed, so nothing was timed: out differs from the reference' in err
    assert not (tmp_path / "results").exists()


def test_what_was_measured_before_a_crash_is_kept(claim, run, tmp_path: Path):
    claim(last="raise RuntimeError('out of memory')")
    status, out, err = run("toy")
    assert status == 1
    assert "toy: out of memory" in err and "Traceback" in err
    assert len(_results.read(tmp_path / "results" / "toy.jsonl")) == 2
    assert "large" in out and "large" in (tmp_path / "results" / "RESULTS.md").read_text()


def test_all_runs_what_the_device_allows_even_after_a_failure(claim, run, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    claim("first", wrong=True)
    claim("second")
    claim("third", devices=("cuda",))
    status, _, err = run("--all")
    assert status == 1
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["RESULTS.md", "second.jsonl"]
    assert 'skipped: device="auto": claim "third" runs on cuda, and torch sees no CUDA device.' in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a system or --all."),
        (["toy", "--all"], "give either a system or --all."),
        (["toy", "--device", "tpu"], '--device "tpu" is none of auto, cpu, cuda.'),
        (["toy", "--device", "cuda"], 'device="cuda": claim "toy" runs on cpu.'),
        (["ela"], '"ela" (ELA) has no claim yet; claims exist for: toy.'),
        (["tplaa"], 'no system is called "tplaa"; near matches: tpla'),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(claim, run, arguments, message):
    claim()
    status, out, err = run(*arguments)
    assert status == 2 and out == ""
    assert message in err and len(err.splitlines()) == 1


def test_a_figure_is_written_beside_the_rows_and_shown_above_the_table(claim, run, tmp_path):
    claim(last="yield Figure(name='shape', save=lambda path: path.write_text('drawn'))")
    status, printed, _ = run("toy")
    assert status == 0 and printed.count("adding [b]one[/b]") == 2
    assert (tmp_path / "results" / "toy-shape.png").read_text() == "drawn"
    assert "![toy-shape](toy-shape.png)" in (tmp_path / "results" / "RESULTS.md").read_text()


def test_a_part_is_one_of_a_named_claim(claim, run):
    claim()
    assert run("toy", "--part", "sums", "--device", "cpu")[0] == 0
    status, _, err = run("--all", "--part", "sums", "--device", "cpu")
    assert status == 2 and "--part sums is a part of one claim; name its system." in err
