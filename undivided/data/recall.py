"""Associative recall: texts of key-value pairs, then questions about some of them, with known answers.

One form serves many tasks. Many pairs and no filler is multi-query associative recall; one pair in a long filler, at a
chosen depth, is the passkey and the needle test; pairs that nobody asks for are its distractors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True)
class RecallVocabulary:
    """Which token ids are what.

    Attributes:
        query: the mark before a question.
        keys, values, fillers: ids that keys, values and fillers are drawn from, each a sequence of distinct ones. Where
            the three share no id, no text can be read in two ways.
    """

    query: int
    keys: tuple[int, ...]
    values: tuple[int, ...]
    fillers: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.query, *self.keys, *self.values, *self.fillers)


def recall_vocabulary(num_keys: int, num_values: int, num_fillers: int = 0) -> RecallVocabulary:
    """Returns ids from zero on: the mark of a question, then keys, values and fillers."""
    ends = [1, 1 + num_keys, 1 + num_keys + num_values, 1 + num_keys + num_values + num_fillers]
    keys, values, fillers = (tuple(range(*pair)) for pair in zip(ends, ends[1:], strict=False))
    return RecallVocabulary(0, keys, values, fillers)


@dataclass(frozen=True)
class RecallTexts:
    """Texts, where their answers stand, and where one has to look for them.

    Attributes:
        ids: `[texts, length]`, int64; the answers stand behind their questions.
        answer_positions: `[queries, value_length]`: columns of the answers, the same in every text. The logits of the
            column before predict them.
        evidence_positions: `[texts, queries]`: column of the first token of the value that the answer repeats.
    """

    ids: Tensor
    answer_positions: Tensor
    evidence_positions: Tensor

    @property
    def answers(self) -> Tensor:
        """What is to be answered, `[texts, queries, value_length]`."""
        return self.ids[:, self.answer_positions]

    def part(self, start: int, stop: int) -> RecallTexts:
        """Returns the texts from `start` to before `stop`."""
        return RecallTexts(self.ids[start:stop], self.answer_positions, self.evidence_positions[start:stop])

    def correct(self, logits: Tensor) -> Tensor:
        """Returns whether each answer is the likeliest, token by token, `[texts, queries]`.

        Args:
            logits: of a model that was given `ids`, `[texts, length, vocabulary]`.
        """
        likeliest = logits[:, self.answer_positions - 1].argmax(dim=-1)
        return (likeliest == self.answers.to(likeliest.device)).all(dim=-1)


def recall_texts(
    num_texts: int,
    vocabulary: RecallVocabulary,
    *,
    num_pairs: int,
    num_queries: int,
    key_length: int = 1,
    value_length: int = 1,
    num_fillers: int = 0,
    haystack: Tensor | None = None,
    depth: float | None = None,
    near_distractors: bool = False,
    seed: int = 0,
) -> RecallTexts:
    """Draws texts: key-value pairs among fillers, then a question and its answer for some of the pairs.

    `filler .. key value .. filler .. key value .. | query key value, query key value, ...`. The keys of a text are all
    different, so that each question has one answer. Values are drawn independently.

    Args:
        num_texts: texts to draw.
        vocabulary: which ids are what.
        num_pairs: pairs in a text.
        num_queries: how many of them are asked for, once each, in an order that tells nothing about their places; the
            others are distractors.
        key_length, value_length: tokens of a key and of a value.
        num_fillers: filler tokens in a text, before, between and behind the pairs.
        haystack: token ids `[num_tokens]`; fillers are then a window of it instead of random ones.
        depth: share of the fillers that stands before the pairs that are asked for, from 0 to 1; None for anywhere.
        near_distractors: the key of a distractor differs in one token only from one that is asked for.
        seed: the same seed gives the same texts.

    Returns:
        The texts, their length `num_fillers + num_pairs * (key_length + value_length) + num_queries * (1 + key_length +
        value_length)`.

    Raises:
        ValueError: a number is out of range, or there are too few different keys, fillers or tokens of the haystack.

    Source: Zoology (arXiv 2312.04927), section 3.1, multi-query associative recall; Landmark Attention (arXiv
    2305.16300), section 4.2, passkey retrieval.
    """
    import torch

    for name, number in (
        ("num_texts", num_texts),
        ("key_length", key_length),
        ("value_length", value_length),
    ):
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1.")
    if num_fillers < 0:
        raise ValueError(f"num_fillers={num_fillers} must be at least 0.")
    if not 1 <= num_queries <= num_pairs:
        raise ValueError(f"num_queries={num_queries} must be between 1 and num_pairs={num_pairs}.")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must be between 0 and 1.")
    _check_vocabulary(vocabulary, num_pairs, key_length, near_distractors and num_queries < num_pairs)
    generator = torch.Generator().manual_seed(seed)
    codes = _distinct(num_texts, num_queries if near_distractors else num_pairs,
                      len(vocabulary.keys) ** key_length, generator)  # fmt: skip
    keys = _digits(codes, len(vocabulary.keys), key_length)
    if near_distractors:
        keys = _with_neighbours(keys, num_pairs, len(vocabulary.keys), generator)
    keys = torch.tensor(vocabulary.keys)[keys]
    drawn = torch.randint(len(vocabulary.values), (num_texts, num_pairs, value_length), generator=generator)
    pairs = torch.cat([keys, torch.tensor(vocabulary.values)[drawn]], dim=2)

    # A pair stands where the fillers before it and the pairs before it end.
    before = torch.randint(num_fillers + 1, (num_texts, num_pairs), generator=generator)
    if depth is not None:
        before[:, :num_queries] = round(depth * num_fillers)
    order = (before + torch.rand(before.shape, generator=generator)).argsort(dim=1)
    starts = before + order.argsort(dim=1) * pairs.shape[2]
    body = torch.full((num_texts, num_fillers + pairs[0].numel()), -1)
    columns = (starts[..., None] + torch.arange(pairs.shape[2])).flatten(1)
    body.scatter_(1, columns, pairs.flatten(1))
    body[body == -1] = _fillers(num_texts, num_fillers, vocabulary, haystack, generator).flatten()

    marks = torch.full((num_texts, num_queries, 1), vocabulary.query)
    questions = torch.cat([marks, pairs[:, :num_queries]], dim=2)
    first = body.shape[1] + torch.arange(num_queries) * questions.shape[2] + 1 + key_length
    return RecallTexts(
        torch.cat([body, questions.flatten(1)], dim=1),
        first[:, None] + torch.arange(value_length),
        starts[:, :num_queries] + key_length,
    )


def _check_vocabulary(vocabulary: RecallVocabulary, num_pairs: int, key_length: int, near: bool) -> None:
    num_keys = len(vocabulary.keys)
    if num_pairs > num_keys**key_length:
        raise ValueError(
            f"num_pairs={num_pairs} needs as many different keys; {num_keys} tokens make {num_keys**key_length} keys "
            f"of key_length={key_length}."
        )
    # Half of the neighbours of one key: so many can be drawn without long search, whatever the other keys are.
    most = key_length * (num_keys - 1) // 2
    if near and num_pairs > most:
        raise ValueError(
            f"near_distractors with num_pairs={num_pairs}: {num_keys} tokens make keys of key_length={key_length} with "
            f"neighbours for at most {most} pairs."
        )
    if not vocabulary.values:
        raise ValueError("the vocabulary has no values.")


def _distinct(num_texts: int, count: int, space: int, generator: Generator) -> Tensor:
    """Draws `count` different numbers below `space` for each text."""
    import torch

    if space <= 4 * count:
        return torch.rand(num_texts, space, generator=generator).argsort(dim=1)[:, :count]
    drawn = torch.randint(space, (num_texts, count), generator=generator)
    while (again := _repeated(drawn)).any():
        drawn[again] = torch.randint(space, (int(again.sum()),), generator=generator)
    return drawn


def _repeated(numbers: Tensor) -> Tensor:
    """Returns which numbers of a row stand in it before, in any order of equal ones."""
    import torch

    ordered, places = numbers.sort(dim=1, stable=True)
    same = torch.zeros_like(ordered, dtype=torch.bool)
    same[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(same).scatter_(1, places, same)


def _digits(codes: Tensor, base: int, length: int) -> Tensor:
    import torch

    return codes[..., None] // base ** torch.arange(length) % base


def _with_neighbours(keys: Tensor, num_pairs: int, num_keys: int, generator: Generator) -> Tensor:
    """Adds keys that differ from one of `keys` `[texts, queries, length]` in one token, until there are `num_pairs`."""
    import torch

    num_texts, num_queries, length = keys.shape
    draw = lambda below: torch.randint(below, (num_texts, num_pairs), generator=generator)  # noqa: E731
    powers = num_keys ** torch.arange(length)
    found = torch.cat([keys, keys.new_zeros(num_texts, num_pairs - num_queries, length)], dim=1)
    again = torch.arange(num_pairs).expand(num_texts, -1) >= num_queries
    while again.any():
        near = keys.gather(1, draw(num_queries)[..., None].expand(-1, -1, length))
        place = draw(length)[..., None]
        near.scatter_(2, place, (near.gather(2, place) + 1 + draw(num_keys - 1)[..., None]) % num_keys)
        found[again] = near[again]
        again = _repeated((found * powers).sum(dim=2))
    return found


def _fillers(
    num_texts: int, count: int, vocabulary: RecallVocabulary, haystack: Tensor | None, generator: Generator
) -> Tensor:
    import torch

    if count and haystack is None and not vocabulary.fillers:
        raise ValueError(f"num_fillers={count} needs fillers in the vocabulary, or a haystack.")
    if haystack is not None:
        if haystack.dim() != 1 or len(haystack) < count:
            raise ValueError(
                f"haystack has shape {list(haystack.shape)}; it needs one axis and num_fillers={count} tokens."
            )
        starts = torch.randint(len(haystack) - count + 1, (num_texts, 1), generator=generator)
        return haystack[starts + torch.arange(count)]
    if count == 0:
        return torch.empty(num_texts, 0, dtype=torch.int64)
    ids = torch.tensor(vocabulary.fillers)
    return ids[torch.randint(len(ids), (num_texts, count), generator=generator)]
