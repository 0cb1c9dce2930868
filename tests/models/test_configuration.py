from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from tests.tiny import tiny_config
from undivided.models.configuration import UndividedConfig


def test_json_round_trip_keeps_base_and_attention(tmp_path):
    entry = {"mechanism": "tpla", "latent_dim": 16, "num_shards": 2}
    config = UndividedConfig(base_config=tiny_config("gemma2").to_dict(), attention=[entry, None])
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "undivided" and stored["base_config"]["model_type"] == "gemma2"
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, UndividedConfig)
    assert loaded.attention == [entry, None]
    assert loaded.base_config.to_dict() == config.base_config.to_dict()


def test_sizes_are_found_where_caches_and_generation_look():
    base = tiny_config("llama")
    config = UndividedConfig(base_config=base)
    assert config.get_text_config(decoder=True) is base
    assert config.eos_token_id == base.eos_token_id and config.tie_word_embeddings == base.tie_word_embeddings


def test_one_entry_a_layer_is_asked_for():
    with pytest.raises(ValueError, match="attention has 1 entries, but the base model has 2 layers"):
        UndividedConfig(base_config=tiny_config("llama"), attention=[None])


def test_an_entry_needs_a_mechanism():
    with pytest.raises(
        ValueError, match=r"attention\[1\]=.* must be None or a dict with the key \"mechanism\""
    ):
        UndividedConfig(base_config=tiny_config("llama"), attention=[None, {"latent_dim": 8}])


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_query_and_key_norms_are_refused_with_the_reason(model_type):
    with pytest.raises(ValueError, match=f'"{model_type}" is not supported: it normalises query and key'):
        UndividedConfig(base_config=CONFIG_MAPPING[model_type]())


def test_another_model_type_lists_the_supported_ones():
    with pytest.raises(ValueError, match='"gpt2" is not supported.*Supported: llama, qwen2, mistral'):
        UndividedConfig(base_config={"model_type": "gpt2"})
