from __future__ import annotations

import pytest
import torch

from undivided.data.recall import RecallVocabulary, recall_texts, recall_vocabulary

VOCABULARY = recall_vocabulary(6, 5, 4)


def read(text, key_length, value_length, num_queries, vocabulary=VOCABULARY):
    """Reads one text token by token: pairs with the columns of their values, fillers, and questions with answers."""
    length = num_queries * (1 + key_length + value_length)
    ids = text.tolist()
    body, tail = ids[: len(ids) - length], ids[len(ids) - length :]
    pairs, fillers, place = {}, [], 0
    while place < len(body):
        if body[place] not in vocabulary.keys:
            fillers.append(body[place])
            place += 1
            continue
        key, value = (tuple(body[place + a : place + b]) for a, b in
                      ((0, key_length), (key_length, key_length + value_length)))  # fmt: skip
        assert key not in pairs
        pairs[key] = (value, place + key_length)
        place += key_length + value_length
    questions = []
    for start in range(0, length, 1 + key_length + value_length):
        assert tail[start] == vocabulary.query
        key = tuple(tail[start + 1 : start + 1 + key_length])
        questions.append((key, tuple(tail[start + 1 + key_length :][:value_length])))
    return pairs, fillers, questions


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize(("key_length", "value_length", "num_fillers"), [(1, 1, 0), (2, 3, 7), (3, 1, 1)])
def test_every_question_has_the_one_answer_that_stands_in_its_text(
    key_length, value_length, num_fillers, near
):
    num_pairs, num_queries = (2, 1) if key_length == 1 else (5, 3)
    texts = recall_texts(
        50, VOCABULARY, num_pairs=num_pairs, num_queries=num_queries, key_length=key_length,
        value_length=value_length, num_fillers=num_fillers, near_distractors=near, seed=1,
    )  # fmt: skip
    assert texts.ids.dtype == torch.int64
    for row, text in enumerate(texts.ids):
        pairs, fillers, questions = read(text, key_length, value_length, num_queries)
        assert len(pairs) == num_pairs and len(fillers) == num_fillers
        assert set(fillers) <= set(VOCABULARY.fillers)
        assert len({key for key, _ in questions}) == num_queries
        for index, (key, value) in enumerate(questions):
            assert pairs[key] == (value, texts.evidence_positions[row, index])
            assert tuple(texts.answers[row, index].tolist()) == value
            assert set(value) <= set(VOCABULARY.values)
        if near:
            asked = [key for key, _ in questions]
            for key in pairs.keys() - set(asked):
                assert min(sum(a != b for a, b in zip(key, other, strict=True)) for other in asked) == 1


def test_all_keys_of_a_small_vocabulary_can_stand_in_one_text():
    texts = recall_texts(20, VOCABULARY, num_pairs=6, num_queries=6)
    assert (texts.ids[:, 0:12:2].sort(dim=1).values == torch.tensor(VOCABULARY.keys)).all()
    # The order of the questions is not that of the pairs.
    assert (texts.ids[:, 0:12:2] != texts.ids[:, 13::3]).any()


def test_many_keys_of_a_large_space_are_different_too():
    texts = recall_texts(40, recall_vocabulary(9, 2), num_pairs=15, num_queries=1, key_length=2)
    for text in texts.ids:
        assert len(read(text, 2, 1, 1, recall_vocabulary(9, 2))[0]) == 15


@pytest.mark.parametrize(("depth", "before"), [(0.0, 0), (0.25, 10), (1.0, 40)])
def test_a_passkey_stands_at_its_depth(depth, before):
    texts = recall_texts(
        8, VOCABULARY, num_pairs=1, num_queries=1, value_length=5, num_fillers=40, depth=depth
    )
    assert (texts.evidence_positions == before + 1).all()
    with_others = recall_texts(8, VOCABULARY, num_pairs=3, num_queries=1, num_fillers=40, depth=depth)
    shift = with_others.evidence_positions - before - 1
    assert ((shift >= 0) & (shift <= 2 * 2)).all()


def test_pairs_stand_anywhere_without_a_depth():
    texts = recall_texts(400, VOCABULARY, num_pairs=1, num_queries=1, num_fillers=4)
    assert texts.evidence_positions.unique().tolist() == [1, 2, 3, 4, 5]


def test_a_haystack_of_ones_own_is_cut_in_whole_windows():
    vocabulary = RecallVocabulary(100, (101, 102), (103, 104))
    texts = recall_texts(
        30, vocabulary, num_pairs=1, num_queries=1, num_fillers=6, haystack=torch.arange(9), seed=2
    )
    assert vocabulary.size == 105
    firsts = set()
    for text in texts.ids:
        fillers = [token for token in text.tolist() if token < 100]
        assert fillers == list(range(fillers[0], fillers[0] + 6))
        firsts.add(fillers[0])
    assert firsts == {0, 1, 2, 3}


def test_the_seed_decides():
    draw = lambda seed: recall_texts(5, VOCABULARY, num_pairs=4, num_queries=2, num_fillers=3, seed=seed).ids  # noqa: E731
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_an_answer_is_right_when_all_its_tokens_are():
    texts = recall_texts(6, VOCABULARY, num_pairs=4, num_queries=2, value_length=2, key_length=2)
    logits = torch.zeros(*texts.ids.shape, VOCABULARY.size)
    logits[:, :-1].scatter_(2, texts.ids[:, 1:, None], 1.0)
    assert texts.correct(logits).all()
    wrong = texts.answer_positions[1, 1] - 1
    logits[2, wrong] = 0
    logits[2, wrong, VOCABULARY.query] = 1.0
    expected = torch.ones(6, 2, dtype=torch.bool)
    expected[2, 1] = False
    assert torch.equal(texts.correct(logits), expected)
    part = texts.part(2, 4)
    assert torch.equal(part.correct(logits[2:4]), expected[2:4])
    assert torch.equal(part.evidence_positions, texts.evidence_positions[2:4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_texts": 0}, "num_texts=0 must be at least 1"),
        ({"key_length": 0}, "key_length=0 must be at least 1"),
        ({"num_queries": 5}, "num_queries=5 must be between 1 and num_pairs=4"),
        ({"num_pairs": 7}, "num_pairs=7 needs as many different keys; 6 tokens make 6 keys of key_length=1"),
        ({"near_distractors": True}, "near_distractors with num_pairs=4: 6 tokens .* at most 2 pairs"),
        ({"depth": 1.5}, "depth=1.5 must be between 0 and 1"),
        ({"num_fillers": -1}, "num_fillers=-1 must be at least 0"),
        (
            {"vocabulary": recall_vocabulary(6, 5), "num_fillers": 2},
            "num_fillers=2 needs fillers in the vocabulary, or a haystack",
        ),
        (
            {"haystack": torch.arange(3), "num_fillers": 4},
            r"haystack has shape \[3\]; it needs .* num_fillers=4",
        ),
        ({"vocabulary": recall_vocabulary(6, 0)}, "the vocabulary has no values"),
    ],
)
def test_what_cannot_be_drawn_is_named(options, message):
    arguments = {"num_texts": 2, "vocabulary": VOCABULARY, "num_pairs": 4, "num_queries": 2, **options}
    with pytest.raises(ValueError, match=message):
        recall_texts(**arguments)
