"""The rows of the engine, on a tiny model."""

from __future__ import annotations

import pytest
import torch

from tests.engine.models import model_of, random_prompts
from tests.tiny import tiny_llama
from undivided.claims import _end_to_end
from undivided.claims._end_to_end import EngineStudy, in_dtype, rate_rows, token_rows


@pytest.fixture
def study():
    mla = model_of("mla")
    return EngineStudy(tiny_llama(), in_dtype(mla, torch.bfloat16), mla, random_prompts(3, 9, 5), "tiny", 8)


def test_texts_are_counted_up_to_the_first_difference(study, monkeypatch) -> None:
    rows = list(token_rows(study))
    assert [(row.ours, row.baseline) for row in rows] == [(3, 3), (24, 24)]
    completed = study.complete

    def spoiled(engine):
        texts = completed(engine)
        if engine is study.fast:
            texts[1].tokens[5:] = [(token + 1) % 256 for token in texts[1].tokens[5:]]
        return texts

    monkeypatch.setattr(study, "complete", spoiled)
    rows = list(token_rows(study))
    assert [row.ours for row in rows[:2]] == [2, 21]
    # A wrong token is no matter of rounding.
    assert rows[2].holds is False


def test_throughputs_are_of_all_new_tokens(study, monkeypatch) -> None:
    given = []
    native = _end_to_end._native

    def noted(model, study, cache_implementation=None):
        given.append((model is study.model, cache_implementation))
        return native(model, study)

    monkeypatch.setattr(_end_to_end, "_native", noted)
    monkeypatch.setattr(_end_to_end, "_seconds", lambda run, **options: run() and 2.0)
    rows = list(rate_rows(study))
    assert [(row.ours, row.baseline) for row in rows] == [(12.0, 12.0)] * 2
    assert given == [(False, "static"), (True, None)]


def test_texts_of_transformers_are_of_full_length(study) -> None:
    assert [len(text) for text in _end_to_end._native(study.wide, study)] == [8] * 3


def test_a_margin_is_that_of_the_two_tokens(study) -> None:
    prompt, text = study.prompts[0], study.complete(study.fast)[0].tokens
    other = [*text[:3], (text[3] + 1) % 256, *text[4:]]
    assert _end_to_end._common(text, other) == 3
    margin, error = _end_to_end._margin(study, prompt, text, other, 3)
    with torch.no_grad():
        logits = study.wide(torch.tensor([prompt + text[:3]])).logits[0, -1]
    assert margin == pytest.approx(float((logits[text[3]] - logits[other[3]]).abs()), rel=1e-4)
    assert 0 < error < 1


def test_weights_change_and_rotary_frequencies_do_not() -> None:
    model = model_of("mla")
    rounded = in_dtype(model, torch.bfloat16)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {b.dtype for b in rounded.get_decoder().rotary_emb.buffers()} == {torch.float32}
