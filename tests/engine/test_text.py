from __future__ import annotations

from tests.tiny import tiny_text, tiny_tokenizer
from undivided.engine.text import TextStream


def pieces(tokens: list[int], tokenizer) -> list[str]:
    stream = TextStream(tokenizer)
    return [stream.push(token, index == len(tokens) - 1) for index, token in enumerate(tokens)]


def test_pieces_joined_are_the_text() -> None:
    tokenizer = tiny_tokenizer()
    for text in (tiny_text(200), "a \u00e4\u20ac\U0001f600 b", "\u20ac", " leading"):
        tokens = tokenizer(text).input_ids
        assert "".join(pieces(tokens, tokenizer)) == text


def test_a_character_comes_when_it_is_complete() -> None:
    tokenizer = tiny_tokenizer()
    assert pieces(tokenizer("\u20acx").input_ids, tokenizer) == ["", "", "\u20ac", "x"]


def test_an_incomplete_end_is_shown_as_such() -> None:
    tokenizer = tiny_tokenizer()
    assert pieces(tokenizer("a\u20ac").input_ids[:-1], tokenizer)[-1] == "\ufffd"


def test_special_tokens_have_no_text() -> None:
    tokenizer = tiny_tokenizer()
    assert pieces([*tokenizer("ab").input_ids, 0], tokenizer) == ["a", "b", ""]


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert pieces([1, 2], None) == ["", ""]
