"""What the host relies on in transformers: a release that changes it fails here, with a sentence."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig, StaticCache

from tests.tiny import tiny_config, tiny_llama, tiny_model
from undivided.models.bases import SUPPORTED, cache_argument, cache_of
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig

WRITTEN_FOR = f"the host was written for transformers 5.17 to 5.24; this is {transformers.__version__}"


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_native_attention_is_called_with_what_ours_takes(model_type):
    layer = tiny_model(model_type).get_decoder().layers[0]
    wanted = {"hidden_states", "position_embeddings", "attention_mask", cache_argument()}
    assert wanted <= set(inspect.signature(layer.self_attn.forward).parameters), WRITTEN_FOR
    assert hasattr(layer, "mlp"), WRITTEN_FOR


@pytest.mark.parametrize("model_type", SUPPORTED)
@torch.no_grad()
def test_native_models_take_and_return_their_cache_by_one_name(model_type):
    model, ids = tiny_model(model_type), torch.randint(1, 256, (2, 9))
    decoder = model.get_decoder()
    for module in (model, decoder, decoder.layers[0], decoder.layers[0].self_attn):
        names = {"cache", "past_key_values"} & set(inspect.signature(module.forward).parameters)
        assert names == {cache_argument()}, WRITTEN_FOR
    cache = cache_of(model(ids[:, :6], use_cache=True))
    assert isinstance(cache, Cache), WRITTEN_FOR
    rest = model(ids[:, 6:], **{cache_argument(): cache})
    torch.testing.assert_close(rest.logits, model(ids).logits[:, 6:], rtol=1e-5, atol=1e-5)


@pytest.fixture
def host():
    config = UndividedConfig(
        base_config=tiny_config("llama").to_dict(), attention=[{"mechanism": "gqa"}, None]
    )
    host = UndividedForCausalLM(config).eval()
    host.native.load_state_dict(tiny_llama().state_dict())
    return host


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_the_host_takes_its_cache_by_either_name(host, name):
    ids = torch.randint(1, 256, (2, 9))
    cache = DynamicCache()
    for part in (ids[:, :6], ids[:, 6:]):
        output = host(part, **{name: cache})
        assert cache_of(output) is cache
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(output.logits, host(ids).logits[:, 6:], rtol=1e-5, atol=1e-5)
    assert name in host._skip_keys_device_placement
    assert name in host.config.keys_to_ignore_at_inference


@torch.no_grad()
def test_the_host_goes_on_generating_from_a_cache(host):
    ids = torch.randint(1, 256, (2, 9))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cache = cache_of(host(ids[:, :6], use_cache=True))
    continued = host.generate(ids, **{cache_argument(): cache}, **options)
    assert torch.equal(continued, host.generate(ids, **options))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_our_layers_take_their_cache_by_either_name(host, name):
    layer, x = host.attention_layers()[0], torch.randn(1, 5, 32)
    tables = host.get_decoder().rotary_emb(x, torch.arange(5)[None])
    cache = DynamicCache()
    first = layer(x[:, :3], tuple(table[:, :3] for table in tables), **{name: cache})[0]
    rest = layer(x[:, 3:], tuple(table[:, 3:] for table in tables), **{name: cache})[0]
    assert cache.get_seq_length() == 5
    expected = layer(x, tables, **{name: None})[0]
    torch.testing.assert_close(torch.cat([first, rest], dim=1), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_cache_by_both_names_is_refused(host):
    both = {"cache": DynamicCache(), "past_key_values": DynamicCache()}
    message = "got both cache and past_key_values, two names of one argument; give one."
    with pytest.raises(ValueError, match=f"UndividedForCausalLM {message}"):
        host(torch.ones(1, 2, dtype=torch.long), **both)
    with pytest.raises(ValueError, match=f"GQAttention {message}"):
        host.attention_layers()[0](torch.zeros(1, 2, 32), **both)


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
