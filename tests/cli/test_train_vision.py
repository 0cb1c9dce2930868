"""`undivided train-vision`, as a user runs it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")
from tests.cli.conversion import run  # noqa: E402

SIZES = '{"embed_dim": 16, "num_heads": 4, "depth": 2, "gpsa_layers": 1, "patch_size": 2}'
BRIEF = ("--data", "digits", "--epochs", "2", "--batch-size", "256", "--model-options", SIZES)


def test_trains_on_real_images_and_prints_its_epochs(tmp_path, capsys):
    out = tmp_path / "out"
    status, printed, err = run(capsys, "train-vision", "undivided_convit_tiny", "--out", out, *BRIEF)
    assert status == 0, err
    rows = [line.split() for line in printed.splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "2"]
    kept = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert [f"{row['loss']:.4f}" for row in kept] == [row[1] for row in rows]
    assert "epoch 2/2: 5/5" in err and "curve in" in err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--model-options", "{"), "--model-options { is no JSON"),
        (("--model-options", "[1]"), "--model-options [1] must be an object"),
        (("--epochs", "1"), "warmup_epochs=1 must be below epochs=1"),
        (("--data", "elsewhere"), "data=elsewhere is neither a folder nor one of"),
    ],
)
def test_bad_options_are_one_sentence(options, text, tmp_path, capsys):
    status, _, err = run(capsys, "train-vision", "resnet18", "--out", tmp_path / "out", *BRIEF, *options)
    assert status == 2 and text in err and err.startswith("error: ")
    assert not list(tmp_path.iterdir())
