from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.conversion import ROOT, SIZES, prepare, run
from tests.tiny import tiny_config, tiny_text, tiny_tokenizer
from undivided.convert.targets import TARGETS
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.checkpoint import save_checkpoint
from undivided.models.configuration import UndividedConfig
from undivided.models.evaluation import perplexity


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("convert"))


def convert(capsys, here: Path, out: Path, *options: str) -> tuple[int, str, str]:
    return run(capsys, "convert", here / "source", out, "--calibration", here / "text.txt", *options)


def test_mla_is_a_transformers_folder_with_its_report(capsys, here, tmp_path):
    out = tmp_path / "mla"
    status, printed, noted = convert(capsys, here, out, "--to", "mla", *SIZES)
    assert status == 0, noted
    assert {p.suffix for p in out.iterdir()} <= {".json", ".safetensors", ".jinja"}
    report = json.loads((out / "conversion.json").read_text())
    assert list(report["perplexity"]) == ["original", "partial_rope", "mla"]
    assert report["cache_bytes_per_token_per_rank"] == {"original": 2 * 32 * 4, "transmla": 2 * 20 * 4}
    origin = report["provenance"]
    assert (
        origin["method"] == "mla" and origin["source"] == "source" and len(origin["calibration_sha256"]) == 64
    )
    assert origin["options"]["transmla"]["latent_dim"] == 16
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.attention[0]["mechanism"] == "mla"
    assert "perplexity" in printed and f"{report['perplexity']['mla']:.3f}" in printed
    # The reported perplexity is that of the folder, on the last tenth of the text.
    text = (here / "text.txt").read_text()
    cut = text.rfind(" ", 0, int(len(text) * 0.9))
    found = perplexity(model, tiny_tokenizer(), text[cut:].strip()).perplexity
    assert found == pytest.approx(report["perplexity"]["mla"], rel=1e-6)


def test_tpla_from_grouped_queries_goes_through_mla_and_from_mla_does_not(capsys, here, tmp_path):
    options = ("--shards", "2", "--transform", "hadamard", "--logit-scale", "one", "--softmax", "local")
    status, _, noted = convert(capsys, here, tmp_path / "tpla", "--to", "tpla", *SIZES, *options)
    assert status == 0, noted
    stages = ["original", "partial_rope", "mla", "reparameterised", "tpla"]
    report = json.loads((tmp_path / "tpla" / "conversion.json").read_text())
    assert list(report["perplexity"]) == stages
    assert report["perplexity"]["reparameterised"] == pytest.approx(report["perplexity"]["mla"], rel=1e-4)
    assert report["cache_bytes_per_token_per_rank"]["tpla"] == 2 * (16 // 2 + 4) * 4

    convert(capsys, here, tmp_path / "mla", "--to", "mla", *SIZES)
    again = (
        "convert",
        tmp_path / "mla",
        tmp_path / "second",
        "--to",
        "tpla",
        "--calibration",
        here / "text.txt",
    )
    status, _, noted = run(capsys, *again, "--samples", "4", "--sample-length", "32", *options)
    assert status == 0, noted
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("tpla", "second"))
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        torch.testing.assert_close(second(ids).logits, first(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--to", "mqa"), "to='mqa' is not one of mla, tpla, gqa"),
        (("--to", "mla", "--shards", "2"), 'takes no num_shards; num_shards is an option of "tpla"'),
        (("--to", "gda-grow"), 'to="gda-grow" takes no calibration: no activations decide this conversion'),
        (("--to", "mla", "--latent-dim", "500", "--rope-dim", "4"), "latent_dim=500"),
        (("--to", "mla", "--latent-dim", "16", "--rope-dim", "3"), "rope_dim=3"),
        (("--to", "mla", "--latent-dim", "16", "--rope-dim", "4", "--freqfold", "3"), "freqfold=3"),
        (("--to", "mla", "--freqfold", "many"), '--freqfold many is neither "auto" nor a number'),
        (("--to", "gqa", "--pool", "mean"), 'to="gqa" needs num_key_value_heads'),
        (("--to", "sqa", "--keep-heads", "1-2"), "--keep-heads 1-2 is no list of heads; write it as 0,1,4."),
        (("--to", "mla", "--dtype", "int8"), "--dtype int8 is not one of float32, bfloat16"),
        (
            ("--to", "tpla", "--latent-dim", "16", "--rope-dim", "4", "--shards", "3"),
            "num_shards=3 does not divide",
        ),
        (
            ("--to", "tpla", "--latent-dim", "12", "--rope-dim", "4", "--transform", "hadamard"),
            "latent_dim=12 is not a power of two",
        ),
        (("--to", "mla", "--samples", "0"), "samples=0 must be at least 1"),
        (
            ("--to", "mla", "--sample-length", "100000"),
            "calibration has fewer than sample_length=100000 tokens",
        ),
    ],
)
def test_bad_options_are_one_sentence_and_write_nothing(capsys, here, tmp_path, options, text):
    small = ("--samples", "4", "--sample-length", "32") if "--latent-dim" in options else ()
    status, printed, noted = convert(capsys, here, tmp_path / "out", *options, *small)
    assert status == 2 and printed == "" and text in noted
    assert not (tmp_path / "out").exists()


def test_bad_sources_and_texts_are_refused(capsys, here, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    out = tmp_path / "out"
    for source, calibration, text in (
        (tmp_path, here / "text.txt", "is not a checkpoint: no config.json"),
        (here / "nowhere", here / "text.txt", "does not exist"),
        (here / "source", tmp_path / "empty.txt", "is empty"),
        (here / "source", None, "calibration is missing"),
    ):
        options = () if calibration is None else ("--calibration", calibration)
        status, _, noted = run(capsys, "convert", source, out, "--to", "mla", *options)
        assert status == 2 and text in noted, noted
    assert not out.exists()


@pytest.mark.parametrize(
    ("to", "options", "stages"),
    [
        ("gqa", ("--num-key-value-heads", "1"), ["original", "pooled"]),
        ("kdgqa", ("--num-key-value-heads", "2", "--rule", "kd"), ["original", "pooled", "mapped"]),
        ("sqa", ("--num-query-heads", "2"), ["original", "sqa"]),
        ("sqa", ("--keep-heads", "1,2", "--refit"), ["original", "sqa"]),
        ("moh", ("--shared-heads", "1", "--top-k", "2"), ["original", "routed"]),
    ],
)
def test_every_other_target_is_written_and_reads_back_with_its_perplexity(
    capsys, here, tmp_path, to, options, stages
):
    out = tmp_path / to
    if TARGETS[to].calibrates:
        text = (
            "--calibration",
            here / "text.txt",
            "--evaluation",
            here / "text.txt",
            "--samples",
            "4",
            "--sample-length",
            "32",
        )
    else:
        text = ("--evaluation", here / "text.txt")
    status, _, noted = run(capsys, "convert", here / "source", out, "--to", to, *options, *text)
    assert status == 0, noted
    report = json.loads((out / "conversion.json").read_text())
    assert list(report["perplexity"]) == stages
    found = perplexity(
        AutoModelForCausalLM.from_pretrained(out), tiny_tokenizer(), (here / "text.txt").read_text()
    )
    assert found.perplexity == pytest.approx(report["perplexity"][stages[-1]], rel=1e-5)
    assert report["provenance"]["method"] == to


@pytest.fixture(scope="module")
def differential(tmp_path_factory) -> Path:
    """A checkpoint with grouped differential attention."""
    folder = tmp_path_factory.mktemp("differential")
    entry = {"mechanism": "gda", "num_signal_heads": 4, "num_noise_heads": 2}
    torch.manual_seed(0)
    model = UndividedForCausalLM(UndividedConfig(base_config=tiny_config("llama"), attention=[entry] * 2))
    save_checkpoint(model, tiny_tokenizer(), folder / "source", {})
    (folder / "text.txt").write_text(tiny_text(2000))
    return folder


def grow(capsys, folder: Path, out: Path, *options: str) -> tuple[int, str, str]:
    return run(
        capsys,
        "convert",
        folder / "source",
        out,
        "--to",
        "gda-grow",
        "--evaluation",
        folder / "text.txt",
        *options,
    )


def test_growth_reports_the_perplexity_it_started_with(capsys, differential, tmp_path):
    out = tmp_path / "grown"
    status, printed, noted = grow(capsys, differential, out, "--signal-factor", "3")
    assert status == 0, noted
    report = json.loads((out / "conversion.json").read_text())
    assert list(report["perplexity"]) == ["original", "grown"]
    assert report["perplexity"]["grown"] == pytest.approx(report["perplexity"]["original"], rel=1e-5)
    assert report["approximations"] == []
    assert report["provenance"]["calibration_sha256"] is None
    assert report["provenance"]["options"]["gda-grow"]["signal_factor"] == 3
    assert (
        report["cache_bytes_per_token_per_rank"]["gda-grow"]
        == report["cache_bytes_per_token_per_rank"]["original"]
    )
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.attention[0] | {"num_signal_heads": 12} == model.config.attention[0]
    assert [line.split()[0] for line in printed.splitlines()] == ["stage", "original", "grown"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--signal-factor", "0"), "signal_factor=0 must be at least 1"),
        (("--latent-dim", "8"), 'to="gda-grow" takes no latent_dim; latent_dim is an option of "mla"'),
        (("--samples", "8"), 'to="gda-grow" takes no samples: no activations decide this conversion'),
    ],
)
def test_growth_refuses_what_is_not_its_own(capsys, differential, tmp_path, options, text):
    status, printed, noted = grow(capsys, differential, tmp_path / "out", *options)
    assert status == 2 and printed == "" and text in noted
    assert not (tmp_path / "out").exists()


def test_growth_needs_differential_attention_and_a_text(capsys, here, tmp_path):
    status, _, noted = grow(capsys, here, tmp_path / "out")
    assert status == 2 and 'no layer of the model has the mechanism "gda"' in noted
    status, _, noted = run(capsys, "convert", here / "source", tmp_path / "out", "--to", "gda-grow")
    assert status == 2 and "evaluation is missing" in noted
    assert not (tmp_path / "out").exists()


def test_help_has_a_heading_for_each_target(capsys):
    _, printed, _ = run(capsys, "convert", "--help")
    sections = printed.split("\n\n")
    for to, row in TARGETS.items():
        section = next(part for part in sections if row.title in " ".join(part.split()))
        assert section.startswith(f"--to {to}:")
        for name, option in row.options.items():
            flag = option.flag or f"--{name.replace('_', '-')}"
            assert f"  {flag} " in section
    plain = next(part for part in sections if part.startswith("Options:"))
    assert "--overwrite" in plain and "--latent-dim" not in plain


def test_an_existing_target_is_refused_before_any_work(capsys, here, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    status, _, noted = convert(capsys, here, out, "--to", "mla", *SIZES)
    assert status == 2 and "exists" in noted and (out / "mine.txt").read_text() == "keep"


_KILLED = """
import os, signal, sys
from undivided.convert import transmla
from undivided.data import folders

point = sys.argv.pop(1)
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
if point == "latents":
    transmla.latent_moments = die
elif point == "writing":
    folders._flush = die
from undivided.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("point", ["latents", "writing"])
def test_a_killed_conversion_leaves_nothing_and_the_next_one_resumes(capsys, here, tmp_path, point):
    out = tmp_path / "out"
    options = ("--to", "mla", "--calibration", str(here / "text.txt"), *SIZES)
    arguments = [sys.executable, "-c", _KILLED, point, "convert", str(here / "source"), str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    work = tmp_path / ".out.work"
    kept = " ".join(p.name for p in work.glob("*.safetensors"))
    assert "keys" in kept and ("latents" in kept) == (point == "writing")

    status, _, noted = convert(capsys, here, out, "--to", "mla", *SIZES)
    assert status == 0, noted
    assert "calibrating keys" not in noted
    AutoModelForCausalLM.from_pretrained(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "options", [("--latent-dim", "250", "--transform", "hadamard"), ("--latent-dim", "16", "--shards", "3")]
)
def test_what_tpla_cannot_cut_is_refused_before_anything_is_loaded(capsys, here, tmp_path, options):
    status, _, noted = convert(capsys, here, tmp_path / "out", "--to", "tpla", "--rope-dim", "4", *options)
    assert status == 2 and ("not a power of two" in noted or "does not divide" in noted)
    assert "loading" not in noted and "calibrating" not in noted
