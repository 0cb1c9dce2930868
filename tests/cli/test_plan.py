"""`undivided plan`: the table, its notes, JSON, and errors."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from tests.tiny import tiny_config
from undivided.cli import main
from undivided.cost import PRESETS, plan


def _run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as raised:
        main(["plan", *arguments])
    printed = capsys.readouterr()
    return raised.value.code or 0, printed.out, printed.err


@pytest.mark.parametrize("model", PRESETS)
@pytest.mark.parametrize(
    "shape", [("--context", "1", "--batch", "1"), ("--context", "1000000", "--batch", "4096")]
)
def test_fits_100_columns_where_there_is_no_terminal(capsys, model, shape):
    status, out, err = _run(capsys, model, *shape, "--device", "h200")
    assert (status, err) == (0, "")
    assert max(len(line) for line in out.splitlines()) <= 100


@pytest.mark.parametrize("width", [80, 100, 200])
def test_fits_a_terminal_and_cuts_nothing(capsys, monkeypatch, width):
    console = Console(force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr("undivided.cli._console.out", console)
    _, out, _ = _run(capsys, "DeepSeek-V3", "--device", "h200", "--world-size", "8", "--weight-dtype", "fp8")
    assert "…" not in out
    table = out[out.index("arrangement") : out.index("Best: ")]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= width
    assert ("--json has all numbers" in out) == (width < 100)


def test_table_has_the_rows_of_the_plan_and_marks_one(capsys):
    _, out, _ = _run(capsys, "DeepSeek-V3", "--device", "h200", "--world-size", "8", "--weight-dtype", "fp8")
    rows = plan("DeepSeek-V3", "h200", world_size=8, weight_dtype="fp8")
    lines = out.splitlines()
    for row in rows:
        first = next(index for index, line in enumerate(lines) if line.startswith(row.label))
        assert f" {row.cache_bytes_per_token:,.0f} " in lines[first]
        assert lines[first + 1].startswith(row.relation)
        assert lines[first].endswith("does not") != row.fits
        assert lines[first + 1].endswith("best") == row.best
    best = next(row for row in rows if row.best)
    assert f"Best: {best.label} (own attention), {best.tokens_per_second:,.0f} tokens/s." in lines


def test_notes_stand_below_the_table(capsys):
    _, out, _ = _run(capsys, "Llama-3-8B", "--world-size", "16")
    below = " ".join(out[out.index("Best: ") :].split())
    assert (
        "GQA, tensor parallel: 8 key/value heads over 16 ranks: a rank holds 1, so the group caches" in below
    )
    assert "Best with the model's own attention: GQA, tensor parallel" in below
    assert "Bounds from nominal datasheet figures" in below


def test_best_without_training_is_told_where_gla_wins(capsys):
    _, out, _ = _run(capsys, "Llama-2-7B", "--context", "8192")
    lines = out.splitlines()
    assert any(line.startswith("Best: GLA, 2 groups (needs training)") for line in lines)
    assert any(line.startswith("Best without training: MLA, ") for line in lines)
    assert "Best with the model's own attention: none fits." in lines


def test_says_when_nothing_fits(capsys):
    status, out, _ = _run(capsys, "DeepSeek-V3", "--world-size", "8")
    assert status == 0
    assert "No arrangement fits this batch." in out
    assert "the rank's weights exceed its 80 GB" in out


def test_json_has_every_number(capsys):
    options = [
        "--world-size",
        "4",
        "--shards",
        "4",
        "--latent-dim",
        "256",
        "--rope-dim",
        "32",
        "--dtype",
        "fp8",
    ]
    _, out, _ = _run(capsys, "Llama-3-8B", "--json", *options)
    printed = json.loads(out)
    rows = plan("Llama-3-8B", world_size=4, num_shards=4, latent_dim=256, rope_dim=32, dtype="fp8")
    assert [row["step_seconds"] for row in printed["rows"]] == [row.step_seconds for row in rows]
    assert printed["device"]["tflops"]["bf16"] == 989
    assert (printed["dtype"], printed["weight_dtype"], printed["reserve_gb"]) == ("fp8", "fp8", 8)


def test_custom_device_and_a_config_folder(capsys, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    custom = ["--device", "custom", "--memory-gb", "1", "--bandwidth-tb", "1", "--tflops", "1"]
    status, out, _ = _run(
        capsys, str(tmp_path), *custom, "--world-size", "2", "--rope-dim", "4", "--context", "128"
    )
    assert status == 0
    assert f"{tmp_path.name}, " in out.splitlines()[0]
    assert "Time on links is not counted: this device has no link_gb." in out


def test_coinciding_rows_and_left_out_ones_are_explained(capsys):
    _, out, _ = _run(capsys, "SmolLM2-135M", "--shards", "2", "--context", "128")
    assert "On one rank the three arrangements of MLA are the same." in out
    assert "GLA is left out: its groups do not divide the heads." in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Lama-3-8B",), "Did you mean Llama-3-8B or Llama-2-7B?"),
        (
            ("Llama-3-8B", "--world-size", "6"),
            "world_size=6 does not divide num_heads=32; 2, 4, 8, 16, 32 would.",
        ),
        (("Llama-3-8B", "--device", "h10"), 'device "h10" is not known. Did you mean "h100"?'),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, message):
    status, out, err = _run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
