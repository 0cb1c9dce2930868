"""`undivided heal`, as a user runs it."""

from __future__ import annotations

import json

import pytest

from tests.cli.conversion import SIZES, prepare, run
from undivided.models.checkpoint import open_checkpoint

BRIEF = ("--length", "32", "--batch-size", "4", "--evaluations", "1", "--evaluation-tokens", "256")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = prepare(tmp_path_factory.mktemp("heal"))
    from undivided.cli import main

    with pytest.raises(SystemExit) as caught:
        main(
            ["convert", str(folder / "source"), str(folder / "mla"), "--to", "mla", *SIZES, "--calibration"]
            + [str(folder / "text.txt")]
        )
    assert not caught.value.code
    return folder


def heal(capsys, folder, out, *options):
    common = ("--teacher", folder / "source", "--text", folder / "text.txt", *BRIEF)
    return run(capsys, "heal", folder / "mla", out, *common, *options)


def test_writes_a_checkpoint_with_its_log_and_a_figure(converted, tmp_path, capsys):
    options = ("--tokens", "2K", "--learning-rate", "3e-3", "--layers-tokens", "1K")
    status, out, err = heal(capsys, converted, tmp_path / "healed", *options)
    assert status == 0, err
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["layers", "layers", "logits", "logits"]
    assert float(rows[-1][2]) < float(rows[0][2])
    healed = tmp_path / "healed"
    assert (healed / "healing.png").read_bytes().startswith(b"\x89PNG")
    log = [json.loads(line) for line in (healed / "healing.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in log} == {0, 1} and any("loss" in row for row in log)
    report = json.loads((healed / "conversion.json").read_text())
    assert report["method"] == "mla" or report["provenance"]
    assert report["healing"]["recipes"][0]["stage"] == "layers"
    assert open_checkpoint(healed).model.config.model_type == "undivided"
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens", "many"), "--tokens many is not a number of tokens; write 500000, 500K or 20M."),
        (("--tokens", "1K", "--kl", "0"), "at least one above 0"),
        (("--tokens", "1K", "--length", "100000"), "fewer than length=100000 tokens"),
        (("--tokens", "1K", "--train-on", "heads"), "train_on='heads' is neither"),
    ],
)
def test_says_what_is_wrong(converted, tmp_path, capsys, options, message):
    status, _, err = heal(capsys, converted, tmp_path / "healed", *options)
    assert status == 2
    assert message in err
    assert not (tmp_path / "healed").exists()
