from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_config, tiny_llama, tiny_model, tiny_text, tiny_tokenizer
from undivided.convert.pipeline import (
    calibration_ids,
    conversion_texts,
    evaluation_text,
    is_latent,
    perplexity_of,
)
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.checkpoint import Checkpoint
from undivided.models.configuration import UndividedConfig
from undivided.models.evaluation import perplexity


@pytest.fixture
def source(tmp_path):
    return Checkpoint(tiny_llama(), tiny_tokenizer(), tmp_path, "tiny")


def test_the_last_tenth_of_a_text_is_kept_for_evaluation(tmp_path):
    text = tiny_text(3000)
    (tmp_path / "a.txt").write_text(text)
    calibration, evaluation = conversion_texts("model", tmp_path / "a.txt", None)
    assert text.startswith(calibration) and text.rstrip().endswith(evaluation)
    assert 0.85 < len(calibration) / len(text) <= 0.9 and len(calibration) + len(evaluation) <= len(text)


def test_a_given_evaluation_text_leaves_all_of_the_other_to_calibration(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 50)
    assert conversion_texts("model", tmp_path / "a.txt", tmp_path / "b.txt") == ("a" * 50, "b" * 50)


def test_without_calibration_one_text_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 50)
    assert evaluation_text("model", tmp_path / "a.txt") == "a" * 50
    with pytest.raises(ValueError, match="evaluation is missing; only smollm2-135m has a text by default"):
        evaluation_text("model", None)


def test_samples_are_whole_and_drawn_evenly(source):
    text = tiny_text(4000)
    ids = calibration_ids(source, text, samples=3, sample_length=40)
    assert ids.shape == (3, 40) and ids.dtype == torch.int64
    tokens = source.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    starts = [next(i for i in range(0, len(tokens), 40) if tokens[i : i + 40] == row.tolist()) for row in ids]
    step = len(tokens) // 40 // 3 * 40
    assert starts == [0, step, 2 * step]


def test_evaluation_shows_its_blocks_and_equals_the_perplexity(source):
    shown = []

    def progress(items, description):
        for item in items:
            shown.append((description, item.shape[1]))
            yield item

    found = perplexity_of(source, tiny_text(4000), 600, progress)(source.model)
    expected = perplexity(source.model, source.tokenizer, tiny_text(4000), max_tokens=600)
    assert found == expected.perplexity
    # The tiny model's context is 256 tokens.
    assert shown == [("perplexity", 256), ("perplexity", 256), ("perplexity", 88)]


def test_latent_attention_is_recognised():
    assert is_latent(tiny_model("deepseek_v2")) and not is_latent(tiny_model("llama"))
    config = UndividedConfig(base_config=tiny_config("deepseek_v3"), attention=[{"mechanism": "mla"}] * 2)
    assert is_latent(UndividedForCausalLM(config))
    assert not is_latent(UndividedForCausalLM(UndividedConfig(base_config=tiny_config("llama"))))
