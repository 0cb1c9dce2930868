from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.layers.latents import EXACT, in_float64
from tests.tiny import VOCAB_SIZE, tiny_model
from undivided.layers.gqa import GQAttention
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig
from undivided.testing import assert_as_accurate

NATIVE = {
    "llama": {},
    "llama with bias": {"attention_bias": True},
    "llama with another head_dim": {"head_dim": 12},
    "qwen2": {},
    "mistral": {},
    "mistral with a window": {"sliding_window": 6},
}


def exchanged(native: torch.nn.Module) -> UndividedForCausalLM:
    config = UndividedConfig(
        base_config=native.config.to_dict(),
        attention=[{"mechanism": "gqa"}] * native.config.num_hidden_layers,
    )
    model = UndividedForCausalLM(config).eval()
    model.native.load_state_dict(native.state_dict())
    return model.to(native.dtype)


@pytest.mark.parametrize("name", NATIVE)
def test_is_the_native_attention_of_the_base_models(name: str) -> None:
    native = in_float64(tiny_model(name.split()[0], **NATIVE[name]))
    model = in_float64(exchanged(native))
    ids = torch.randint(VOCAB_SIZE, (2, 17))
    torch.testing.assert_close(model(ids).logits, native(ids).logits, **EXACT)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded, expected = model(ids, attention_mask=mask).logits, native(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[0, 5:], expected[0, 5:], **EXACT)
    torch.testing.assert_close(padded[1], expected[1], **EXACT)


def test_is_the_native_attention_of_gemma_with_its_softcap() -> None:
    native = tiny_model("gemma2")
    model = exchanged(native)
    ids = torch.randint(VOCAB_SIZE, (2, 17))
    ours, theirs = model(ids).logits, native(ids).logits
    # The native softmax is float32 at best, so it is theirs that is held against float64.
    assert_as_accurate(theirs, ours, model.double()(ids).logits)


@pytest.mark.parametrize("name", [*NATIVE, "gemma2"])
def test_generates_what_the_base_model_generates(name: str) -> None:
    native = tiny_model(name.split()[0], dtype=torch.float64, **NATIVE.get(name, {}))
    ids = torch.randint(1, VOCAB_SIZE, (2, 7))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(exchanged(native).generate(ids, **options), native.generate(ids, **options))


def test_caches_keys_and_values_of_the_key_value_heads_alone() -> None:
    model = exchanged(tiny_model("llama", dtype=torch.float64))
    cache = model(torch.randint(VOCAB_SIZE, (3, 5)), use_cache=True).past_key_values
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (3, 2, 5, 8)


def test_head_counts_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match="num_key_value_heads=3 does not divide num_attention_heads=8"):
        GQAttention(32, 8, 3, 4)
