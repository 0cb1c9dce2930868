"""`undivided systems`: the list, one system, JSON, and the README's table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from undivided.catalog import SYSTEMS
from undivided.claims import _results, measured
from undivided.cli import main, systems

README = "# Title\n\n<!-- systems:begin -->\nold\n<!-- systems:end -->\n\nRest.\n"


def _run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as raised:
        main(["systems", *arguments])
    printed = capsys.readouterr()
    return raised.value.code or 0, printed.out, printed.err


def test_lists_every_system_once_a_line_where_there_is_no_terminal(capsys):
    status, out, err = _run(capsys)
    heading, *lines = out.splitlines()
    assert status == 0
    assert heading.split() == ["#", "system", "paper", "kind", "state", "where", "fidelity"]
    assert [line.split()[:3] for line in lines] == [[str(s.number), s.slug, s.arxiv] for s in SYSTEMS]
    assert err.startswith("54 systems: ")


@pytest.mark.parametrize("width", [80, 100, 200])
def test_fits_a_terminal_and_cuts_no_name(capsys, monkeypatch, width):
    from rich.console import Console

    monkeypatch.setattr(
        "undivided.cli._console.out", Console(force_terminal=True, width=width, color_system=None)
    )
    _, out, _ = _run(capsys)
    assert max(len(line.rstrip()) for line in out.splitlines()) <= width
    assert "…" not in out
    words = set(out.replace(",", " ").split())
    assert {row.slug for row in SYSTEMS} | {row.arxiv for row in SYSTEMS} <= words
    assert {"models.multimodal", "ops.sparse_linear", "ops.neighborhood"} <= words


def test_kind_and_state_narrow_the_list(capsys):
    _, out, err = _run(capsys, "--kind", "linear")
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["vig", "rala"]
    assert err.startswith("2 systems: ")
    _, out, _ = _run(capsys, "--kind", "linear", "--state", "partial")
    assert (
        len(out.splitlines()) == sum(row.kind == "linear" and row.state == "partial" for row in SYSTEMS) + 1
    )


def test_json_has_every_field_of_every_system(capsys):
    status, out, _ = _run(capsys, "--json")
    rows = json.loads(out)
    assert status == 0 and len(rows) == 54
    names = "number slug name title year arxiv kind summary code state fidelity link"
    assert all(set(row) == set(names.split()) for row in rows)
    assert [row["slug"] for row in rows] == [row.slug for row in SYSTEMS]
    assert rows[0]["link"] == "https://arxiv.org/abs/2508.15881"


def test_describes_one_system_in_full(capsys):
    status, out, _ = _run(capsys, "gna")
    assert status == 0
    assert out.startswith("GNA, system 4 of 54\n")
    assert "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention" in out
    assert "undivided.layers.gna, undivided.layers.causal_neighborhood" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gmna"], 'no system is called "gmna"; near matches: gna'),
        (["--kind", "fast"], '--kind "fast" is none of latent, heads, local, sparse'),
        (["--state", "done"], '--state "done" is none of planned, partial, works.'),
        (["--json", "--markdown"], "--json, --markdown and --write exclude each other; give one."),
        (["--write", "README.md", "--kind", "heads"], "--write puts in every system; leave out"),
        (["gna", "--kind", "local"], "--kind and --state choose from the list; leave them out"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(capsys, arguments, message):
    status, out, err = _run(capsys, *arguments)
    assert status == 2 and out == ""
    assert message in err and len(err.splitlines()) == 1


def test_markdown_is_a_table_of_every_system(capsys):
    _, out, _ = _run(capsys, "--markdown")
    lines = out.splitlines()
    assert len(lines) == 2 + 54
    assert {line.count(" | ") for line in lines} == {6}
    assert lines[2].startswith("| 1 | [TPLA](https://arxiv.org/abs/2508.15881) | Splits the MLA latent")


def test_the_table_says_how_many_bars_hold(tmp_path: Path):
    for shape, required in (("a", 1.4), ("b", 1.6), ("c", None)):
        row = measured(
            "x", shape, 2.0, "ms", better="lower", baseline_name="e", baseline=3.0, required=required
        )
        _results.append(tmp_path, dataclasses.replace(row, slug="gna"))
    lines = systems.markdown_table(list(SYSTEMS), tmp_path).splitlines()
    assert lines[2 + 3].endswith("| [1 of 2 bars hold](results/RESULTS.md#gna) |")
    assert lines[2 + 4].endswith("|  |")


def test_write_replaces_only_what_is_between_the_markers(tmp_path: Path, capsys):
    path = tmp_path / "README.md"
    path.write_text(README)
    status, out, err = _run(capsys, "--write", str(path))
    assert status == 0 and out == "" and "wrote the table of 54 systems" in err
    before, rest = path.read_text().split("<!-- systems:begin -->\n")
    table, after = rest.split("<!-- systems:end -->")
    assert (before, after) == ("# Title\n\n", "\n\nRest.\n")
    assert table.rstrip("\n") == systems.markdown_table(list(SYSTEMS), tmp_path / "results")


def test_writing_twice_changes_nothing(tmp_path: Path, capsys):
    path = tmp_path / "README.md"
    path.write_text(README)
    _run(capsys, "--write", str(path))
    first = path.read_text(), path.stat().st_ino
    _, _, err = _run(capsys, "--write", str(path))
    assert (path.read_text(), path.stat().st_ino) == first
    assert "is up to date" in err


@pytest.mark.parametrize(
    "text",
    [
        "# Title\n",
        "<!-- systems:begin -->\n",
        "<!-- systems:end -->\n<!-- systems:begin -->\n",
        README + README,
    ],
)
def test_write_without_markers_fails_and_leaves_the_file_alone(tmp_path: Path, capsys, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    status, _, err = _run(capsys, "--write", str(path))
    assert status == 2 and path.read_text() == text
    assert (
        "must hold the line <!-- systems:begin --> once and, below it, the line <!-- systems:end --> once"
        in err
    )


def test_a_missing_readme_is_named(tmp_path: Path, capsys):
    status, _, err = _run(capsys, "--write", str(tmp_path / "NOTES.md"))
    assert status == 2 and "NOTES.md" in err


def test_listing_needs_neither_torch_nor_transformers(run_python):
    done = run_python(
        "import sys\n"
        "from undivided.cli import main\n"
        "try:\n"
        "    main(['systems'])\n"
        "except SystemExit:\n"
        "    print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])\n"
    )
    assert done.stdout.splitlines()[-1] == "[]"
