"""Text from tokens as they come."""

from __future__ import annotations

from typing import Any

_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns tokens into text piece by piece; the pieces joined are the text of all tokens.

    A token's text depends on its neighbours (a leading space, a character of several bytes), so each piece is the
    difference of two texts that begin a little earlier. A character that is not complete yet is held back.

    Args:
        tokenizer: of transformers; None gives no text.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._begin = self._read = 0

    def push(self, token: int, is_last: bool) -> str:
        """Returns what the next token adds."""
        self._tokens.append(token)
        if self._tokenizer is None:
            return ""
        known, text = (
            self._tokenizer.decode(self._tokens[self._begin : end], skip_special_tokens=True)
            for end in (self._read, len(self._tokens))
        )
        if text.endswith(_INCOMPLETE) and not is_last:
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return text[len(known) :]
