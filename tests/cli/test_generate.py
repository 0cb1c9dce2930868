from __future__ import annotations

import pytest

from tests.cli.conversion import SIZES, prepare, run, start
from undivided.cli import generate
from undivided.models.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a source, a text, and the source as TPLA."""
    folder = prepare(tmp_path_factory.mktemp("generate"))
    made = start(
        "convert",
        folder / "source",
        folder / "tpla",
        "--to",
        "tpla",
        "--calibration",
        folder / "text.txt",
        *SIZES,
    )
    assert made.returncode == 0, made.stderr
    return folder


def test_stdout_has_the_text_alone_and_it_is_repeatable(capsys, here):
    arguments = ("generate", here / "source", "the cat", "--max-new-tokens", "12", "--device", "cpu")
    status, first, noted = run(capsys, *arguments)
    assert status == 0, noted
    assert first.strip() and "loading" not in first
    assert run(capsys, *arguments)[1] == first


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_write_what_one_process_writes(here, ranks):
    arguments = ("generate", here / "tpla", "the cat", "--max-new-tokens", "12", "--device", "cpu")
    alone = start(*arguments)
    assert alone.returncode == 0, alone.stderr
    together = start(*arguments, ranks=ranks)
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout and alone.stdout.strip()


def test_the_engine_writes_what_transformers_writes(here):
    checkpoint = open_checkpoint(here / "tpla", device="cpu")
    assert generate._is_latent(checkpoint.model)
    assert not generate._is_latent(open_checkpoint(here / "source", device="cpu").model)
    arguments = (checkpoint.model, checkpoint.tokenizer, "the cat", 12, 0.0, 0)
    pieces = list(generate._by_engine(*arguments))
    assert len(pieces) > 1
    assert "".join(pieces) == "".join(generate._by_transformers(*arguments))


def test_sampling_depends_on_the_seed_only(capsys, here):
    arguments = ("generate", here / "source", "the cat", "--temperature", "1.5", "--device", "cpu")
    texts = [run(capsys, *arguments, "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_world_that_does_not_fit_says_which_would(here):
    done = start("generate", here / "tpla", "the cat", "--device", "cpu", ranks=3)
    assert done.returncode != 0
    assert "world_size=3 does not fit num_shards=2 and num_attention_heads=4; 2, 4, 8 would" in done.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("",), "PROMPT is empty"),
        (("a", "--max-new-tokens", "0"), "--max-new-tokens 0 is too small"),
        (("a", "--temperature", "-1"), "--temperature -1.0 is negative"),
        (("a", "--shard-mlp"), "--shard-mlp needs several ranks"),
    ],
)
def test_bad_options_are_one_sentence(capsys, here, options, text):
    status, printed, noted = run(capsys, "generate", here / "source", *options, "--device", "cpu")
    assert status == 2 and printed == "" and text in noted


def test_another_attention_reads_the_same_weights(capsys, here):
    prompt = "the cat sat on the mat " * 8
    arguments = ("generate", here / "source", prompt, "--max-new-tokens", "8", "--device", "cpu")
    full = run(capsys, *arguments)[1]
    for attention, wide, narrow in (
        ("core_context", ("window=4096",), ("window=4", "group_size=4")),
        (
            "dhsa",
            ("boundaries=fixed", "budget=4096"),
            ("mode=a", "query_block=8", "key_block=4", "density=0.2"),
        ),
    ):
        for options, same in ((wide, True), (narrow, None)):
            chosen = [word for option in options for word in ("--option", option)]
            status, text, noted = run(capsys, *arguments, "--attention", attention, *chosen)
            assert status == 0, noted
            assert text.strip()
            assert same is None or text == full


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--option", "budget=4"), "--option budget=4 belongs to an attention; name it with --attention."),
        (("--attention", "dhsa", "--option", "budget"), "--option budget is not of the form name=value"),
        (("--attention", "dhsa"), 'or boundaries="fixed"'),
        (("--attention", "dhsa", "--option", "wheels=4"), "has no option 'wheels'"),
        (("--attention", "mla"), 'mechanism "mla" needs latent_dim'),
    ],
)
def test_wrong_attentions_are_named(capsys, here, options, message):
    status, _, noted = run(capsys, "generate", here / "source", "the cat", "--device", "cpu", *options)
    assert status == 2
    assert message in noted.replace("\n", " ")
