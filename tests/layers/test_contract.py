"""What every attention mechanism of a language model must do, whatever it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import VOCAB_SIZE, tiny_config
from undivided.layers import CAUSAL_MECHANISMS, causal_attention
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig

# In float64, where two orders of the same sums differ by far less and two different functions by far more.
EXACT = {"rtol": 1e-10, "atol": 1e-10}

_LATENT = {"latent_dim": 16, "rope_dim": 4, "nope_dim": 8, "value_dim": 6, "rope_stride": 2}
# Options that a mechanism needs beside what a Llama config tells; a new mechanism adds its own here.
OPTIONS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "sqa": {"num_query_heads": 2, "window": 5},
    "dha": {"key_head_map": [0, 0, 1, 0], "value_head_map": [2, 1, 0, 1]},
    "gate_swa": {"window": 4, "sinks": 2},
    "neighborhood": {"kernel_size": 3, "dilation": 2},
    "core_context": {"group_size": 2, "window": 4},
    # Prompts of up to the budget are read in full, as what is decoded always is.
    "dhsa": {"boundaries": "fixed"},
    "nsa": {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "topk": 3, "window": 3},
    "kdgqa": {"head_map": [0, 1, 1, 1]},
    "dma": {"keep_window_size": 5},
    "mla": _LATENT,
    "gla": _LATENT | {"num_latent_heads": 2},
    "tpla": _LATENT | {"num_shards": 2},
    "moh": {"shared_heads": 1, "top_k": 2},
    "gdla": _LATENT | {"query_latent_dim": 12, "output_gate": True},
}
every_mechanism = pytest.mark.parametrize("mechanism", sorted(CAUSAL_MECHANISMS))


def build(mechanism: str, dtype: torch.dtype = torch.float64) -> UndividedForCausalLM:
    """A two-layer Llama with the mechanism in both layers; every parameter and buffer is drawn afresh."""
    entry = {"mechanism": mechanism, **OPTIONS.get(mechanism, {})}
    model = UndividedForCausalLM(UndividedConfig(base_config=tiny_config("llama"), attention=[entry] * 2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1.5 * tensor.shape[-1] ** -0.5 * noise if "proj" in name else tensor + 0.1 * noise)
    return model.to(dtype).eval()


def tokens(batch: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (batch, length))


@every_mechanism
def test_is_what_its_name_says(mechanism: str) -> None:
    layer_class = causal_attention(mechanism)
    assert layer_class.mechanism == mechanism
    assert layer_class.__doc__
    model = build(mechanism)
    for index, layer in enumerate(model.attention_layers()):
        assert type(layer) is layer_class
        assert layer.layer_idx == index


@every_mechanism
def test_returns_a_tensor_like_its_input_and_none(mechanism: str) -> None:
    model = build(mechanism, torch.float32)
    hidden = torch.randn(2, 5, 32)
    positions = model.get_decoder().rotary_emb(hidden, torch.arange(5)[None])
    out, weights = model.attention_layers()[0](hidden_states=hidden, position_embeddings=positions)
    assert (out.shape, out.dtype, weights) == (hidden.shape, hidden.dtype, None)


@every_mechanism
def test_gradients_reach_every_parameter(mechanism: str) -> None:
    model = build(mechanism)
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    for index, layer in enumerate(model.attention_layers()):
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, f"layer {index}: {name} has no gradient"
            assert parameter.grad.isfinite().all(), f"layer {index}: the gradient of {name} is not finite"
            assert parameter.grad.abs().max() > 0, f"layer {index}: the gradient of {name} is zero"


@every_mechanism
def test_saved_and_loaded_it_is_the_same(mechanism: str, tmp_path: Path) -> None:
    model = build(mechanism)
    ids = tokens()
    expected = model(ids).logits
    fresh = UndividedForCausalLM(model.config).to(torch.float64).eval()
    assert not torch.allclose(fresh(ids).logits, expected)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = UndividedForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    torch.testing.assert_close(loaded(ids).logits, expected, **EXACT)


@every_mechanism
def test_decoding_equals_prefill_token_by_token(mechanism: str) -> None:
    model = build(mechanism)
    ids = tokens()
    expected = model(ids).logits
    cache, steps = None, []
    for token in ids.split(1, dim=1):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, **EXACT)


@every_mechanism
def test_a_prompt_in_two_pieces_is_one_prompt(mechanism: str) -> None:
    model = build(mechanism)
    ids = tokens()
    expected = model(ids).logits
    first = model(ids[:, :6], use_cache=True)
    second = model(ids[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), expected, **EXACT)


@every_mechanism
def test_a_later_token_changes_no_earlier_output(mechanism: str) -> None:
    model = build(mechanism)
    ids = tokens()
    other = ids.clone()
    other[:, -4:] = (other[:, -4:] + 1) % VOCAB_SIZE
    before, after = model(ids).logits, model(other).logits
    torch.testing.assert_close(before[:, :-4], after[:, :-4], **EXACT)
    assert not torch.allclose(before[:, -4:], after[:, -4:])


@every_mechanism
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_on_the_left_is_not_seen(mechanism: str, implementation: str) -> None:
    model = build(mechanism)
    model.set_attn_implementation(implementation)
    ids, padding = tokens(), 5
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(padded[:1, padding:], model(ids[:1, padding:]).logits, **EXACT)
    torch.testing.assert_close(padded[1:], model(ids[1:]).logits, **EXACT)
    assert padded.isfinite().all()


@every_mechanism
def test_padding_is_not_seen_when_decoding(mechanism: str) -> None:
    model = build(mechanism)
    ids, padding = tokens(), 4
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], use_cache=True)
    last = model(
        ids[:, -1:],
        attention_mask=mask,
        position_ids=positions[:, -1:],
        past_key_values=output.past_key_values,
    ).logits
    torch.testing.assert_close(last[:1], model(ids[:1, padding:]).logits[:, -1:], **EXACT)
    torch.testing.assert_close(last[1:], model(ids[1:]).logits[:, -1:], **EXACT)


@every_mechanism
def test_a_row_is_the_same_alone_and_in_a_batch(mechanism: str) -> None:
    model = build(mechanism)
    ids = tokens(batch=3)
    together = model(ids).logits
    for row in range(3):
        torch.testing.assert_close(model(ids[row : row + 1]).logits, together[row : row + 1], **EXACT)


@every_mechanism
def test_one_token_alone(mechanism: str) -> None:
    logits = build(mechanism)(tokens(length=1)).logits
    assert logits.shape == (2, 1, VOCAB_SIZE)
    assert logits.isfinite().all()


@every_mechanism
def test_a_static_cache_gives_what_a_growing_one_gives(mechanism: str) -> None:
    model = build(mechanism)
    ids = tokens(length=6)
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    growing = model.generate(ids, **options)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert growing.shape == (2, 13)
    assert torch.equal(growing, static)


@every_mechanism
def test_beam_search_reorders_the_cache(mechanism: str) -> None:
    model = build(mechanism)
    ids = tokens(length=6)
    options = {
        "max_new_tokens": 5,
        "num_beams": 3,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@every_mechanism
def test_compiles_into_one_graph(mechanism: str) -> None:
    model = build(mechanism)
    ids = tokens()
    expected = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    # aot_eager traces forward and backward as every compiler would, and needs no C++ compiler.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, **EXACT)


@every_mechanism
def test_an_unknown_option_is_named(mechanism: str) -> None:
    with pytest.raises(ValueError, match=f"mechanism \"{mechanism}\" has no option 'num_wheels'; it has "):
        causal_attention(mechanism).from_config(tiny_config("llama"), 0, num_wheels=4)


@every_mechanism
def test_refuses_what_it_does_not_compute(mechanism: str) -> None:
    layer = build(mechanism, torch.float32).attention_layers()[0]
    with pytest.raises(ValueError, match=f"{mechanism} got s_aux, which it does not compute"):
        layer(torch.randn(1, 2, 32), s_aux=torch.zeros(4))


@every_mechanism
def test_refuses_a_mask_of_another_implementation(mechanism: str) -> None:
    model = build(mechanism, torch.float32)
    hidden = torch.randn(1, 4, 32)
    positions = model.get_decoder().rotary_emb(hidden, torch.arange(4)[None])
    with pytest.raises(TypeError, match='load the model with attn_implementation="sdpa" or "eager"'):
        model.attention_layers()[0](hidden, positions, attention_mask=torch.ones(1, 4))


@every_mechanism
def test_refuses_attention_dropout(mechanism: str) -> None:
    config = tiny_config("llama", attention_dropout=0.1)
    with pytest.raises(ValueError, match="attention_dropout=0.1 is not supported"):
        causal_attention(mechanism).from_config(config, 0, **OPTIONS.get(mechanism, {}))


def test_an_unknown_mechanism_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="mechanism='mha' is not one of .*gqa.*mla.*tpla"):
        causal_attention("mha")
