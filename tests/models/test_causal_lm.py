from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from tests.tiny import MODEL_TYPES, tiny_model, tiny_tokenizer
from undivided.models.bases import SUPPORTED
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.checkpoint import open_checkpoint
from undivided.models.configuration import UndividedConfig


def neutral(model_type):
    """A native model, and a host in which every layer is the same attention as a module of this library."""
    native = tiny_model(model_type)
    entry = {"mechanism": "mla" if model_type.startswith("deepseek") else "gqa"}
    host = UndividedForCausalLM(
        UndividedConfig(base_config=native.config.to_dict(), attention=[entry] * 2)
    ).eval()
    host.native.load_state_dict(native.state_dict())
    return native, host


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture
def ids():
    return torch.randint(1, 256, (2, 17))


def test_the_tiny_models_cover_every_supported_base():
    assert set(MODEL_TYPES) == set(SUPPORTED)


@pytest.mark.parametrize("model_type", SUPPORTED)
@torch.no_grad()
def test_the_neutral_exchange_leaves_logits_and_generation_alone(model_type, ids):
    native, host = neutral(model_type)
    close(host(ids).logits, native(ids).logits)
    options = dict(max_new_tokens=9, do_sample=False, attention_mask=torch.ones_like(ids[:, :7]))
    assert torch.equal(host.generate(ids[:, :7], **options), native.generate(ids[:, :7], **options))


@pytest.mark.parametrize("model_type", SUPPORTED)
@torch.no_grad()
def test_padding_and_beams_follow_the_native_model(model_type, ids):
    native, host = neutral(model_type)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    close(host(ids, attention_mask=mask).logits[:, 5:], native(ids, attention_mask=mask).logits[:, 5:])
    options = dict(max_new_tokens=5, num_beams=3, do_sample=False, attention_mask=mask)
    assert torch.equal(host.generate(ids, **options), native.generate(ids, **options))


@pytest.mark.parametrize("model_type", SUPPORTED)
@torch.no_grad()
def test_decoding_with_every_cache_equals_the_full_forward(model_type, ids):
    native, host = neutral(model_type)
    whole = host(ids).logits
    for cache in (DynamicCache(config=host.config), StaticCache(config=host.config, max_cache_len=24)):
        first = host(ids[:, :9], past_key_values=cache).logits
        rest = [host(ids[:, n : n + 1], past_key_values=cache).logits for n in range(9, 17)]
        close(torch.cat([first, *rest], dim=1), whole)


@torch.no_grad()
def test_native_layers_of_gemma_cap_their_logits_whatever_transformers_would_take(ids, tmp_path):
    native = tiny_model("gemma2", attn_logit_softcapping=0.5)
    expected = native(ids).logits
    native.config._attn_implementation = None
    native.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = open_checkpoint(tmp_path).model
    assert torch.equal(loaded(ids).logits, expected)
    chosen_by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(UndividedForCausalLM.from_native(chosen_by_transformers)(ids).logits, expected)
    entry = {"mechanism": "gqa"}
    half = UndividedForCausalLM(
        UndividedConfig(base_config=native.config.to_dict(), attention=[entry, None])
    ).eval()
    half.native.load_state_dict(native.state_dict())
    close(half(ids).logits, expected)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "deepseek_v3"])
@torch.no_grad()
def test_saving_and_loading_through_auto_classes_is_bit_identical(model_type, ids, tmp_path):
    _, host = neutral(model_type)
    host.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, UndividedForCausalLM)
    assert loaded.config.attention == host.config.attention
    assert torch.equal(loaded(ids).logits, host(ids).logits)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_a_fresh_process_loads_a_converted_folder_after_import_undivided(tmp_path, run_python, ids):
    _, host = neutral("llama")
    host.save_pretrained(tmp_path)
    done = run_python(
        "import sys, undivided, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.arange(1, 9)[None]\n"
        "print(type(model).__name__, model(ids).logits.double().sum().item())",
        str(tmp_path),
    )
    name, total = done.stdout.split()
    with torch.no_grad():
        expected = host(torch.arange(1, 9)[None]).logits.double().sum().item()
    assert name == "UndividedForCausalLM" and float(total) == expected


@torch.no_grad()
def test_wrapping_shares_the_weights_and_changes_nothing(ids):
    native = tiny_model("qwen2")
    host = UndividedForCausalLM.from_native(native)
    assert host.native is native and host.config.attention == [None, None]
    assert torch.equal(host(ids).logits, native(ids).logits)
    assert not any(p.is_meta for p in host.parameters())


def test_every_weight_of_the_host_gets_a_gradient(ids):
    _, host = neutral("llama")
    host(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in host.parameters())


def test_gradient_checkpointing_gives_the_same_gradients(ids):
    _, host = neutral("llama")
    host.train()
    gradients = []
    for _ in range(2):
        host.zero_grad()
        host(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in host.parameters()])
        # Named anew in transformers 5.2x; the old name warns there.
        enable = getattr(host, "activation_checkpointing_enable", None) or host.gradient_checkpointing_enable
        enable()
    torch.testing.assert_close(gradients[0], gradients[1])


def test_lora_adapters_train_on_an_exchanged_layer(ids):
    peft = pytest.importorskip("peft")
    _, host = neutral("deepseek_v3")
    model = peft.get_peft_model(host, peft.LoraConfig(target_modules=["kv_b_proj", "o_proj"], r=2))
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2 and all("lora" in name for name in trained)


def test_a_mechanism_that_does_not_exist_lists_those_that_do():
    config = UndividedConfig(
        base_config=tiny_model("llama").config.to_dict(), attention=[{"mechanism": "mqa"}, None]
    )
    with pytest.raises(ValueError, match="mechanism='mqa' is not one of .*gqa.*mla"):
        UndividedForCausalLM(config)


def test_an_option_that_does_not_exist_lists_those_that_do():
    entry = {"mechanism": "mla", "latent_size": 8}
    config = UndividedConfig(base_config=tiny_model("llama").config.to_dict(), attention=[entry, None])
    with pytest.raises(
        ValueError, match=r'mechanism "mla" has no option \'latent_size\'; it has latent_dim, rope_dim'
    ):
        UndividedForCausalLM(config)


def test_sizes_that_a_base_model_cannot_tell_are_asked_for():
    config = UndividedConfig(
        base_config=tiny_model("llama").config.to_dict(), attention=[{"mechanism": "mla"}, None]
    )
    with pytest.raises(ValueError, match="needs latent_dim, rope_dim, nope_dim, value_dim: the llama config"):
        UndividedForCausalLM(config)


def test_attention_dropout_is_refused():
    base = tiny_model("llama").config.to_dict() | {"attention_dropout": 0.1}
    with pytest.raises(ValueError, match="attention_dropout=0.1 is not supported"):
        UndividedForCausalLM(UndividedConfig(base_config=base, attention=[{"mechanism": "gqa"}] * 2))
