from __future__ import annotations

import math

import pytest
import torch

from tests.tiny import VOCAB_SIZE, tiny_model
from undivided.convert import convert_nsa
from undivided.models.causal_lm import UndividedForCausalLM

SMALL = {"block_size": 4, "topk": 5, "window": 4, "kernel_size": 4, "kernel_stride": 2}


@pytest.mark.parametrize("base", ["llama", "qwen2", "mistral"])
def test_short_texts_are_nearly_those_of_the_model(base):
    native = tiny_model(base).double()
    ids = torch.randint(VOCAB_SIZE, (2, 20))
    expected = native(ids).logits
    host, report = convert_nsa(native, **SMALL)
    off = (host(ids).logits - expected).abs().max() / expected.abs().max()
    assert 0 < off < 0.1
    for layer in host.attention_layers():
        # With open and closed gates it is the model's own attention.
        layer.gate_proj.bias.data.copy_(torch.tensor([-1e9, 1e9, -1e9]))
    torch.testing.assert_close(host(ids).logits, expected, rtol=1e-10, atol=1e-10)
    assert math.isclose(report.cache_bytes_per_token_per_rank, report_bytes(native), abs_tol=1)


def report_bytes(native):
    config = native.config
    head_dim = config.hidden_size // config.num_attention_heads
    return 1.5 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 8


def test_weights_are_shared_and_the_result_is_saved_and_trained(tmp_path):
    native = tiny_model("llama")
    host, _ = convert_nsa(native, **SMALL)
    layer, source = host.attention_layers()[0], native.model.layers[0].self_attn
    assert layer.q_proj.weight.data_ptr() == source.q_proj.weight.data_ptr()
    ids = torch.randint(VOCAB_SIZE, (2, 30))
    host(ids, labels=ids).loss.backward()
    assert layer.gate_proj.weight.grad.abs().max() > 0 and layer.compress_key.weight.grad.abs().max() > 0
    host.save_pretrained(tmp_path)
    loaded = UndividedForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, host(ids).logits)


def test_a_wrong_number_of_blocks_is_named():
    with pytest.raises(ValueError, match="topk=0 must be at least 1"):
        convert_nsa(tiny_model("llama"), topk=0)
