from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import VOCAB_SIZE, tiny_config, tiny_model
from undivided.convert import converter
from undivided.convert.gda_grow import convert_gda_grow, grow_signal_heads, shared_columns
from undivided.layers.gda import GDAttention, split_heads
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig

ENTRY = {"mechanism": "gda", "num_signal_heads": 4, "num_noise_heads": 2, "num_key_value_heads": 4}
# Largest change of a logit that rounding makes where sums are taken in another order.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-11}


def source(base="llama", dtype=torch.float64, attention=(ENTRY, ENTRY), **overrides):
    config = UndividedConfig(base_config=tiny_config(base, **overrides), attention=list(attention))
    model = UndividedForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Embeddings as transformers draws them: logits of order one.
            scale = 0.1 if "embed" in name or "lm_head" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * noise if parameter.dim() > 1 or "lambda" in name else 1 + 0.2 * noise)
    return model.to(dtype).eval()


def ids():
    return torch.randint(1, VOCAB_SIZE, (2, 17))


def largest_change(one, other):
    tokens = ids()
    with torch.no_grad():
        return (one(tokens).logits - other(tokens).logits).abs().max().item()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("symmetry_break", [0.0, 0.1])
def test_more_signal_heads_leave_the_function_as_it_is(factor, symmetry_break, dtype):
    model = source(dtype=dtype)
    grown, report = convert_gda_grow(model, signal_factor=factor, symmetry_break=symmetry_break)
    assert largest_change(model, grown) < ROUNDING[dtype]
    assert grown.attention_layers()[1].signal_ratio == 2 * factor
    assert report.approximations == []
    assert report.options["signal_factor"] == factor


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("base", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("signal_factor", [1, 2])
def test_more_width_leaves_the_function_as_it_is(base, signal_factor, dtype):
    model = source(base, dtype, tie_word_embeddings=base == "llama", attention=(ENTRY, None))
    grown, _ = convert_gda_grow(model, signal_factor=signal_factor, width_factor=2, symmetry_break=0.1)
    assert largest_change(model, grown) < ROUNDING[dtype]
    assert grown.get_input_embeddings().weight.shape == (VOCAB_SIZE, 64)
    layer = grown.attention_layers()[0]
    assert (layer.num_noise_heads, layer.num_signal_heads) == (2, 4 * signal_factor)
    assert layer.q_proj.in_features == layer.o_proj.out_features == 64


def test_several_signal_keys_and_biases_grow_too():
    entry = ENTRY | {"key_ratio": 2, "query_bias": True, "output_bias": True}
    model = source(attention=(entry, None))
    grown, _ = convert_gda_grow(model, signal_factor=2)
    assert largest_change(model, grown) < ROUNDING[torch.float64]


def test_noise_heads_and_all_they_share_are_the_weights_they_were():
    model = source()
    grown, _ = convert_gda_grow(model, signal_factor=3)
    for old, new in zip(model.attention_layers(), grown.attention_layers(), strict=True):
        for name in ("k_proj.weight", "v_proj.weight", "subln.weight", "lambda_q1", "lambda_k2"):
            assert new.get_parameter(name) is old.get_parameter(name), name
        (old_signal, old_noise), (new_signal, new_noise) = (
            split_heads(layer.q_proj.weight.unflatten(0, (-1, 8)), 2, dim=0) for layer in (old, new)
        )
        assert torch.equal(new_noise, old_noise)
        assert torch.equal(new_signal, old_signal.repeat_interleave(3, dim=0))
    assert model.attention_layers()[0].num_signal_heads == 4
    assert model.config.attention[0] == ENTRY


@pytest.mark.parametrize("factor", [2, 3])
def test_the_layer_grows_by_the_parameters_it_says(factor):
    layer = GDAttention(24, 10, 4, 8, num_noise_heads=2)
    before = sum(parameter.numel() for parameter in layer.parameters())
    shapes = grow_signal_heads(layer, factor)
    after = sum(parameter.numel() for parameter in layer.parameters())
    assert after - before == 8 * (factor - 1) * 8 * (24 + 2 * 24)
    assert shapes["q_proj"] == ([80, 24], [(8 * factor + 2) * 8, 24])
    assert shapes["o_proj"] == ([24, 128], [24, 128 * factor])


def test_copies_get_different_gradients_only_where_the_symmetry_is_broken():
    def gradients(**options):
        grown, _ = convert_gda_grow(source(), signal_factor=2, **options)
        tokens = ids()
        grown(tokens, labels=tokens).loss.backward()
        layer = grown.attention_layers()[0]
        signal, _ = split_heads(layer.q_proj.weight.grad.unflatten(0, (-1, 8)), 2, dim=0)
        return signal[0::2], signal[1::2]

    torch.testing.assert_close(*gradients(symmetry_break=0.0), rtol=1e-9, atol=1e-12)
    first, second = gradients(symmetry_break=0.1)
    assert (first - second).norm() > 0.05 * first.norm()


def test_noise_on_queries_is_an_approximation_that_leaves_the_originals_alone():
    model = source()
    scores = iter([10.0, 10.5])
    grown, report = convert_gda_grow(model, query_noise=0.001, evaluate=lambda _: next(scores))
    assert report.perplexity == {"original": 10.0, "grown": 10.5}
    assert report.approximations == [
        "the queries of copied heads have noise of 0.001 standard deviations: perplexity 10 -> 10.5"
    ]
    assert 1e-9 < largest_change(model, grown) < 1e-2
    old, new = (
        split_heads(layer.q_proj.weight.unflatten(0, (-1, 8)), 2, dim=0)[0]
        for layer in (model.attention_layers()[0], grown.attention_layers()[0])
    )
    assert torch.equal(new[0::2], old)
    assert not torch.equal(new[1::2], old)


def test_shares_add_up():
    weight = torch.randn(5, 3, 4, dtype=torch.float64)
    for copies in (1, 2, 5):
        shares = shared_columns(weight, copies, 0.3, torch.Generator().manual_seed(0))
        assert shares.shape == (5, copies, 3, 4)
        torch.testing.assert_close(shares.sum(1), weight, rtol=1e-12, atol=1e-12)
    assert (shares[:, 0] - shares[:, 1]).abs().min() > 0


def test_a_grown_model_is_saved_and_loaded(tmp_path: Path):
    grown, report = converter("gda-grow")(source(attention=(None, ENTRY)), signal_factor=2, width_factor=2)
    grown.save_pretrained(tmp_path)
    loaded = UndividedForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert largest_change(grown, loaded) < ROUNDING[torch.float64]
    # A native layer with two heads of keys and values, and one with four of both, eight wide, float64.
    assert report.cache_bytes_per_token_per_rank == 8 * (2 * 2 * 8 + 2 * 4 * 8)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(signal_factor=0), "signal_factor=0 must be at least 1"),
        (dict(width_factor=0), "width_factor=0 must be at least 1"),
        (dict(symmetry_break=-1.0), "symmetry_break=-1.0 must be a number from 0 on"),
        (dict(query_noise=float("nan")), "query_noise=nan must be a number from 0 on"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        convert_gda_grow(source(), **options)


def test_models_it_cannot_grow_are_named():
    with pytest.raises(ValueError, match='no layer of the model has the mechanism "gda"'):
        convert_gda_grow(tiny_model())
    with pytest.raises(
        ValueError, match='width_factor=2: model_type "gemma2" cannot be widened; llama, qwen2, mistral can'
    ):
        convert_gda_grow(source("gemma2"), width_factor=2)
