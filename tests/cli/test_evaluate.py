from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_llama, tiny_text, tiny_tokenizer
from undivided.cli import main
from undivided.models.checkpoint import save_checkpoint
from undivided.models.evaluation import compare, perplexity

# Keys and values of 2 layers, 2 heads, head_dim 8.
CACHE_NUMBERS = 2 * 2 * 2 * 8


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints and a text."""
    folder = tmp_path_factory.mktemp("evaluate")
    for seed, name in ((0, "source"), (1, "converted")):
        save_checkpoint(tiny_llama(seed=seed), tiny_tokenizer(), folder / name, {})
    (folder / "text.txt").write_text(tiny_text(300))
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *map(str, argv), "--device", "cpu"])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_json_holds_what_the_functions_measure(here: Path, capsys) -> None:
    arguments = (
        here / "source",
        "--text",
        here / "text.txt",
        "--block",
        "64",
        "--max-tokens",
        "200",
        "--json",
    )
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    expected = perplexity(tiny_llama(), tiny_tokenizer(), tiny_text(300), block=64, max_tokens=200)
    assert json.loads(out) == {
        "text": str(here / "text.txt"),
        "model": {
            "name": "source",
            "dtype": "float32",
            **asdict(expected),
            "cache_bytes_per_token": CACHE_NUMBERS * 4,
        },
    }


def test_json_beside_a_reference_has_both_and_their_distance(here: Path, capsys) -> None:
    _, out, _ = run(
        capsys, here / "converted", "--text", here / "text.txt", "--reference", here / "source", "--json"
    )
    report = json.loads(out)
    expected = compare(tiny_llama(seed=1), tiny_llama(), tiny_tokenizer(), tiny_text(300))
    assert (report["kl"], report["agreement"]) == (expected.kl, expected.agreement)
    assert report["model"]["name"] == "converted"
    assert report["model"]["perplexity"] == expected.model.perplexity
    assert report["reference"]["name"] == "source"
    assert report["reference"]["perplexity"] == expected.reference.perplexity


def test_table_has_a_row_a_checkpoint_and_the_distance(here: Path, capsys) -> None:
    status, out, err = run(
        capsys, here / "converted", "--text", here / "text.txt", "--reference", here / "source"
    )
    assert status == 0
    result = compare(tiny_llama(seed=1), tiny_llama(), tiny_tokenizer(), tiny_text(300))
    heads, first, second, distance = out.splitlines()
    assert heads.split()[:3] == ["checkpoint", "dtype", "perplexity"]
    for row, name, evaluation in (
        (first, "converted", result.model),
        (second, "source", result.reference),
    ):
        numbers = [f"{evaluation.perplexity:.3f}", f"{evaluation.nll:.4f}", "298", f"{CACHE_NUMBERS * 4}"]
        assert row.split() == [name, "float32", *numbers]
    assert distance == (
        f"KL from source: {result.kl:.4f} nats a token; same most probable token: {result.agreement:.1%}"
    )
    assert "loading converted" in err
    assert "comparison" in err


def test_dtype_is_that_of_the_option(here: Path, capsys) -> None:
    arguments = (here / "source", "--text", here / "text.txt", "--dtype", "bfloat16", "--json")
    report = json.loads(run(capsys, *arguments)[1])
    assert report["model"]["dtype"] == "bfloat16"
    assert report["model"]["cache_bytes_per_token"] == CACHE_NUMBERS * 2
    expected = perplexity(tiny_llama(dtype=torch.bfloat16), tiny_tokenizer(), tiny_text(300))
    assert report["model"]["perplexity"] == expected.perplexity


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["source", "--text", "absent.txt"], r"text file .*absent.txt does not exist\."),
        (["nowhere", "--text", "text.txt"], r"nowhere does not exist; give a checkpoint folder, .*"),
        (
            ["source", "--text", "text.txt", "--block", "512"],
            r"block=512 exceeds the model's context; .* 256\.",
        ),
        (["source", "--text", "text.txt", "--block", "1"], r"block=1 is too small; .*"),
        (["source", "--text", "text.txt", "--dtype", "int8"], r"--dtype int8 is not one of .*"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    here: Path, capsys, monkeypatch, arguments, sentence: str
) -> None:
    monkeypatch.chdir(here)
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(f"error: {sentence}", err.splitlines()[-1])


def test_checkpoints_of_different_vocabularies_are_not_compared(here: Path, tmp_path: Path, capsys) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["head"])
    save_checkpoint(tiny_llama(vocab_size=257), tokenizer, tmp_path / "other", {})
    status, _, err = run(
        capsys, here / "source", "--text", here / "text.txt", "--reference", tmp_path / "other"
    )
    assert status == 2
    assert err.splitlines()[-1].endswith("have different vocabularies; they cannot be compared.")
