from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_model
from undivided.convert import converter
from undivided.convert.kdgqa import calibrate_head_maps, convert_kdgqa, mha_to_gqa, pooled
from undivided.cost.config import model_from_config
from undivided.layers.head_maps import allocate_query_heads
from undivided.layers.kdgqa import KDGQAttention, KeyDrivenGQA, key_norms
from undivided.layers.pgqa import PerturbedGQA
from undivided.layers.vision_gqa import VisionGQA
from undivided.models.causal_lm import UndividedForCausalLM

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(3)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 3}
    model = VisionTransformer(**sizes, **options).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn" in name:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return model


def images(count=5):
    return torch.randn(count, 3, 8, 8, dtype=torch.float64)


def ids(batch=3):
    return torch.randint(1, VOCAB_SIZE, (batch, 15))


def with_equal_runs(linear, num_heads, groups):
    """Makes the heads of each run equal, weights and biases."""
    with torch.no_grad():
        for tensor in (linear.weight, linear.bias):
            if tensor is not None:
                runs = tensor.unflatten(0, (groups, num_heads // groups, -1))
                runs.copy_(runs[:, :1].expand_as(runs).clone())


@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("options", [{"qkv_bias": True}, {"qkv_bias": False, "qk_norm": True}])
def test_heads_that_are_equal_are_pooled_without_loss(pool, options):
    model, x = vit(**options), images()
    for block in model.blocks:
        qkv = block.attn.qkv
        for part in range(1, 3):
            rows = slice(24 * part, 24 * (part + 1))
            view = nn.Linear(24, 24, bias=qkv.bias is not None)
            view.weight.data = qkv.weight.data[rows]
            if qkv.bias is not None:
                view.bias.data = qkv.bias.data[rows]
            with_equal_runs(view, 4, 2)
    converted, report = mha_to_gqa(model, 2, pool=pool)
    torch.testing.assert_close(converted(x), model(x), **EXACT)
    assert report.options == {"num_key_value_heads": 2, "pool": pool}
    assert all(block.attn.k_proj.out_features == 12 for block in converted.blocks)


def test_with_all_its_heads_it_is_the_model_it_was():
    model, x = vit(), images()
    converted, _ = mha_to_gqa(model, 4)
    torch.testing.assert_close(converted(x), model(x), **EXACT)


def test_pools_the_mean_of_neighbours_weights_and_biases():
    linear = nn.Linear(5, 12)
    result = pooled(linear, 6, 2)
    assert result.weight.shape == (4, 5)
    torch.testing.assert_close(
        result.weight[:2], (linear.weight[:2] + linear.weight[2:4] + linear.weight[4:6]) / 3
    )
    torch.testing.assert_close(result.bias[2:], (linear.bias[6:8] + linear.bias[8:10] + linear.bias[10:]) / 3)
    first = pooled(linear, 6, 2, "first")
    assert torch.equal(first.weight, torch.cat([linear.weight[:2], linear.weight[6:8]]))


def test_the_source_stays_and_lends_what_is_not_pooled():
    model, x = vit(), images()
    before = model(x)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted, _ = mha_to_gqa(model, 2)
    assert torch.equal(model(x), before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert converted.blocks[0].attn.proj.weight is model.blocks[0].attn.proj.weight
    assert converted.blocks[0].mlp.fc1.weight is model.blocks[0].mlp.fc1.weight
    converted.blocks[0].attn.q_proj.weight.data.zero_()
    assert torch.equal(model(x), before)


def test_one_attention_module_is_converted_alone():
    model = vit(qkv_bias=True)
    layer, _ = mha_to_gqa(model.blocks[0].attn, 4)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    assert type(layer) is KeyDrivenGQA
    torch.testing.assert_close(layer(x), model.blocks[0].attn(x), **EXACT)


@pytest.mark.parametrize(
    ("options", "layer_class"),
    [
        ({}, KeyDrivenGQA),
        ({"rule": "dgqa_diff", "window": 3, "variant": "released"}, KeyDrivenGQA),
        ({"target": "output"}, PerturbedGQA),
    ],
)
def test_vision_layers_get_their_options(options, layer_class):
    converted, report = mha_to_gqa(vit(), 2, **options)
    for block in converted.blocks:
        assert type(block.attn) is layer_class
        for name, value in options.items():
            assert getattr(block.attn, name) == value
    assert report.options == {"num_key_value_heads": 2, "pool": "mean"} | options
    assert json.loads(json.dumps(asdict(report))) == asdict(report)
    assert report.approximations == ["keys and values pooled to 2 heads (mean of neighbours)"]


def test_a_calibrated_vision_transformer_is_static():
    model, x = vit(), images(9)
    live, _ = convert_kdgqa(model, 2)
    assert not live.blocks[0].attn.frozen
    frozen, report = convert_kdgqa(model, 2, x)
    assert report.method == "kdgqa"
    layer = frozen.blocks[0].attn
    assert layer.frozen
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    frozen(x)
    handle.remove()
    norms = key_norms(layer.heads(seen[0])[1]).mean(0)
    assert torch.equal(layer.head_map, allocate_query_heads(norms, 4))
    torch.testing.assert_close(frozen(50 * x)[:1], frozen(50 * x[:1]), **EXACT)


@pytest.mark.parametrize("base", ["llama", "qwen2"])
def test_language_models_keep_their_function_where_heads_are_equal(base):
    model, tokens = tiny_model(base, dtype=torch.float64, num_key_value_heads=4), ids()
    for layer in model.get_decoder().layers:
        for name in ("k_proj", "v_proj"):
            with_equal_runs(getattr(layer.self_attn, name), 4, 2)
    converted, report = mha_to_gqa(model, 2)
    torch.testing.assert_close(converted(tokens).logits, model(tokens).logits, **EXACT)
    assert converted.config.attention == [{"mechanism": "gqa", "num_key_value_heads": 2}] * 2
    # Two layers, keys and values of two heads, eight wide, float64.
    assert report.cache_bytes_per_token_per_rank == 2 * 2 * 2 * 8 * 8
    # From four heads over two to one: the mean of all.
    once, _ = mha_to_gqa(model, 1)
    twice = pooled(converted.attention_layers()[0].k_proj, 2, 1)
    torch.testing.assert_close(twice.weight, once.attention_layers()[0].k_proj.weight, **EXACT)


def test_head_maps_of_a_language_model_are_those_of_the_norms_of_its_keys():
    model, tokens = tiny_llama(dtype=torch.float64, num_key_value_heads=4), ids()
    scores = iter([4.0, 5.0, 5.5])
    converted, report = convert_kdgqa(model, 2, tokens, evaluate=lambda _: next(scores))
    assert report.perplexity == {"original": 4.0, "pooled": 5.0, "mapped": 5.5}
    assert report.approximations == [
        "keys and values pooled to 2 heads (mean of neighbours): perplexity 4 -> 5",
        'query heads re-allocated by rule "kd": perplexity 5 -> 5.5',
    ]
    uniform, _ = mha_to_gqa(model, 2)
    seen = []
    first = uniform.attention_layers()[0]
    heads = first.heads
    first.heads = lambda *a: seen.append(heads(*a)) or seen[-1]
    uniform(tokens)
    # Rotary positions are on these keys, and leave their norms as they are.
    expected = allocate_query_heads(key_norms(seen[0][1]).mean(0), 4)
    assert torch.equal(converted.attention_layers()[0].head_map, expected)
    for entry, layer in zip(converted.config.attention, converted.attention_layers(), strict=True):
        assert isinstance(layer, KDGQAttention)
        assert entry == {
            "mechanism": "kdgqa",
            "num_key_value_heads": 2,
            "head_map": layer.head_map.tolist(),
        }


def test_a_mapped_language_model_is_saved_loaded_and_generates(tmp_path: Path):
    converted, _ = convert_kdgqa(tiny_llama(dtype=torch.float64, num_key_value_heads=4), 2, ids())
    tokens = ids(2)
    converted.save_pretrained(tmp_path)
    loaded = UndividedForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(tokens).logits, converted(tokens).logits, **EXACT)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        loaded.generate(tokens, **options), loaded.generate(tokens, use_cache=False, **options)
    )


def test_the_plan_of_a_mapped_model_counts_its_cache():
    converted, report = convert_kdgqa(tiny_llama(num_key_value_heads=4), 2, ids())
    shape = model_from_config(converted.config.to_dict(), "mapped")
    elements = sum(layer.cache_elements for layer in shape.attention)
    assert 4 * elements == report.cache_bytes_per_token_per_rank


def test_the_registry_has_both():
    assert converter("gqa") is mha_to_gqa
    assert converter("kdgqa") is convert_kdgqa


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: mha_to_gqa(vit(), 3),
            "num_key_value_heads=3 does not divide the 4 key heads there are; 1, 2, 4 would",
        ),
        (lambda: mha_to_gqa(tiny_llama(), 4), "num_key_value_heads=4 does not divide the 2 key heads"),
        (lambda: mha_to_gqa(vit(), 2, pool="sum"), "pool='sum' is not one of 'mean', 'first'"),
        (
            lambda: mha_to_gqa(nn.Linear(2, 2), 2),
            "Linear has no timm.layers.Attention and is no language model",
        ),
        (lambda: mha_to_gqa(vit(attn_drop_rate=0.1), 2), "attn_drop=0.1 is not supported"),
        (lambda: mha_to_gqa(tiny_llama(), 1, rule="kd"), "rule: options of vision layers"),
        (lambda: mha_to_gqa(vit(), 2, evaluate=lambda m: 1.0), "evaluate returns perplexities"),
        (lambda: convert_kdgqa(tiny_llama(), 1), "calibration is missing: head maps of a language model"),
        (lambda: calibrate_head_maps(vit(), images()), "no layer of the model is key-driven"),
    ],
)
def test_what_does_not_fit_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_converted_model_trains():
    model, _ = mha_to_gqa(vit(), 2, rule="dgqa_ema")
    model.train()
    model(images()).square().sum().backward()
    for layer in (module for module in model.modules() if isinstance(module, VisionGQA)):
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
