"""What the host relies on in transformers: a release that changes it fails here, with a sentence."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig, StaticCache

from tests.tiny import tiny_config, tiny_model
from undivided.models.bases import SUPPORTED

WRITTEN_FOR = f"the host was written for transformers 5.17 to 5.23; this is {transformers.__version__}"


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_native_attention_is_called_with_what_ours_takes(model_type):
    layer = tiny_model(model_type).get_decoder().layers[0]
    wanted = {"hidden_states", "position_embeddings", "attention_mask", "past_key_values"}
    assert wanted <= set(inspect.signature(layer.self_attn.forward).parameters), WRITTEN_FOR
    assert hasattr(layer, "mlp"), WRITTEN_FOR


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_rotary_tables_come_as_two_equal_halves_or_as_one_complex_tensor(model_type):
    decoder = tiny_model(model_type).get_decoder()
    tables = decoder.rotary_emb(torch.zeros(1, 5, 32), torch.arange(5)[None])
    if isinstance(tables, torch.Tensor):
        assert tables.is_complex(), WRITTEN_FOR
        return
    for table in tables:
        first, second = table.chunk(2, dim=-1)
        assert torch.equal(first, second), WRITTEN_FOR


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_cache_layers_take_keys_and_values_of_unequal_widths(cache_class):
    options = {"max_cache_len": 8} if cache_class is StaticCache else {}
    cache = cache_class(config=tiny_config("llama"), **options)
    assert isinstance(cache, Cache)
    latent, rope = cache.update(torch.ones(1, 1, 3, 16), torch.ones(1, 1, 3, 4), 0)
    assert latent.shape[-1] == 16 and rope.shape[-1] == 4, WRITTEN_FOR
    assert int(cache.get_seq_length(0)) == 3, WRITTEN_FOR


def test_auto_classes_register_and_configs_tell_their_text_config():
    assert {"model_type", "config", "exist_ok"} <= set(inspect.signature(AutoConfig.register).parameters), (
        WRITTEN_FOR
    )
    register = inspect.signature(AutoModelForCausalLM.register).parameters
    assert {"config_class", "model_class", "exist_ok"} <= set(register), WRITTEN_FOR
    assert "decoder" in inspect.signature(PreTrainedConfig.get_text_config).parameters, WRITTEN_FOR
