from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.layers.latents import positions
from tests.tiny import VOCAB_SIZE, tiny_config
from undivided.layers.gda import (
    GDAttention,
    lam_init,
    one_below_another,
    side_by_side,
    split_heads,
    stripe_heads,
)
from undivided.layers.rotary import apply_rotary, rotary_tables
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig

EXACT = {"rtol": 1e-12, "atol": 1e-12}
WIDTH, LENGTH = 24, 9


def random_layer(heads=10, key_value_heads=4, head_dim=8, **options):
    """A layer in float64 whose maps are far from flat, with every weight drawn afresh."""
    layer = GDAttention(WIDTH, heads, key_value_heads, head_dim, **{"num_noise_heads": 2, **options})
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.3 * noise if "subln" in name else 2 * noise * parameter.shape[-1] ** -0.5)
    return layer.double()


def hidden_states():
    return torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)


def head_by_head(layer, x, tables):
    """The equations of the paper, one signal head at a time, from the rows of the weights."""
    width, groups, ratio = layer.head_dim, layer.num_value_heads, layer.key_ratio
    per_noise, per_value = layer.signal_ratio, layer.num_signal_heads // groups
    cos, sin = rotary_tables(tables)
    turn = lambda rows: apply_rotary((x @ rows.T)[:, None], cos, sin, interleaved=False)[:, 0]  # noqa: E731
    rows = lambda projection, head: projection.weight[head * width : (head + 1) * width]  # noqa: E731
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()

    def apply_map(query_row, key_row, values):
        scores = turn(rows(layer.q_proj, query_row)) @ turn(rows(layer.k_proj, key_row)).transpose(1, 2)
        return torch.softmax((scores / math.sqrt(width)).masked_fill(~seen, -math.inf), -1) @ values

    lam = (
        torch.exp(layer.lambda_q1 @ layer.lambda_k1)
        - torch.exp(layer.lambda_q2 @ layer.lambda_k2)
        + layer.lam_init
    )
    outs = []
    for head in range(layer.num_signal_heads):
        noise, value = head // per_noise, head // per_value
        values = torch.cat([x @ rows(layer.v_proj, 2 * value).T, x @ rows(layer.v_proj, 2 * value + 1).T], -1)
        key = value * (ratio + 1) + head % per_value // (per_value // ratio)
        signal = apply_map(noise * (per_noise + 1) + head % per_noise, key, values)
        mixed = signal - lam * apply_map(
            noise * (per_noise + 1) + per_noise, value * (ratio + 1) + ratio, values
        )
        outs.append(F.rms_norm(mixed, (2 * width,), layer.subln.weight, layer.subln.eps))
    return (1 - layer.lam_init) * torch.cat(outs, -1) @ layer.o_proj.weight.T


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 4, "num_noise_heads": 2},
        {"heads": 5, "num_noise_heads": 1, "key_value_heads": 2},
        {"key_value_heads": 2},
        {"key_ratio": 2},
        {"heads": 8, "key_ratio": 3},
        {"layer_idx": 3},
        {"variant": "released", "layer_idx": 0},
    ],
)
def test_is_what_the_paper_says_head_by_head(options):
    layer, x, tables = random_layer(**options), hidden_states(), positions(LENGTH, 4)
    torch.testing.assert_close(layer(x, tables)[0], head_by_head(layer, x, tables), **EXACT)


def test_a_released_layer_counts_from_minus_one():
    assert lam_init(0, "released") == pytest.approx(0.8 - 0.6 * math.exp(0.3))
    assert lam_init(0, "released") < 0 < lam_init(0, "paper")
    for layer in range(5):
        assert lam_init(layer + 1, "released") == lam_init(layer, "paper")
    assert lam_init(0, "paper") == pytest.approx(0.2)


def test_lam_is_not_clamped_and_a_bfloat16_layer_sums_it_in_float32():
    layer = GDAttention(WIDTH, 10, 4, 64, num_noise_heads=2)
    with torch.no_grad():
        for name in ("lambda_q1", "lambda_k1"):
            getattr(layer, name).fill_(0.2)
    assert layer.lam().item() > 10
    layer = layer.bfloat16()
    assert layer.lam().dtype == torch.float32
    exact = torch.exp((layer.lambda_q1.double() * layer.lambda_k1.double()).sum())
    exact = exact - torch.exp((layer.lambda_q2.double() * layer.lambda_k2.double()).sum()) + layer.lam_init
    torch.testing.assert_close(layer.lam().double(), exact, rtol=1e-5, atol=0)


def test_the_output_projection_reads_two_widths_of_each_signal_head_and_of_no_noise_head():
    layer = GDAttention(4096, 40, 16, 128, num_noise_heads=8)
    assert (layer.num_signal_heads, layer.signal_ratio, layer.num_value_heads) == (32, 4, 8)
    shapes = {name: tuple(weight.shape) for name, weight in layer.named_parameters() if "proj" in name}
    assert shapes == {
        "q_proj.weight": (5120, 4096),
        "k_proj.weight": (2048, 4096),
        "v_proj.weight": (2048, 4096),
        "o_proj.weight": (4096, 8192),
    }


@pytest.mark.parametrize("dim", [0, 1])
def test_striping_is_a_permutation(dim):
    heads = torch.arange(10.0).view(-1, 1).expand(10, 10) + 100 * torch.arange(10.0)
    heads = heads if dim == 0 else heads.T
    signal, noise = split_heads(heads, 2, dim)
    assert signal.shape[dim] == 8 and noise.shape[dim] == 2
    assert torch.equal(noise, heads.index_select(dim, torch.tensor([4, 9])))
    assert torch.equal(stripe_heads(signal, noise, dim), heads)
    rows = side_by_side(torch.arange(48.0).view(1, 6, 2, 4), 2)
    assert rows.shape == (1, 2, 2, 12)
    assert torch.equal(one_below_another(rows, 3), torch.arange(48.0).view(1, 6, 2, 4))


@pytest.mark.parametrize(("options", "numbers"), [({}, 4 * 2 * 8), ({"key_ratio": 4}, 7 * 2 * 8)])
def test_caches_what_it_says(options, numbers):
    entry = {
        "mechanism": "gda",
        "num_noise_heads": 2,
        "num_signal_heads": 8,
        "num_key_value_heads": 4,
        **options,
    }
    model = UndividedForCausalLM(UndividedConfig(base_config=tiny_config(), attention=[entry, entry])).eval()
    cache = model(torch.randint(VOCAB_SIZE, (3, 5)), use_cache=True).past_key_values
    for layer in cache.layers:
        assert layer.keys.shape[:3] == layer.values.shape[:3] == (3, 2, 5)
        assert layer.keys.shape[3] + layer.values.shape[3] == numbers // 2


@pytest.mark.parametrize("base", ["llama", "qwen2", "mistral", "gemma2"])
def test_stands_in_any_layer_of_a_base_model(base):
    entry = {"mechanism": "gda", "num_noise_heads": 1}
    config = UndividedConfig(base_config=tiny_config(base), attention=[None, entry])
    model = UndividedForCausalLM(config).double().eval()
    ids = torch.randint(1, VOCAB_SIZE, (2, 13))
    expected = model(ids).logits
    assert expected.isfinite().all()
    assert model.attention_layers()[1].signal_ratio == 3
    first = model(ids[:, :7], use_cache=True)
    second = model(ids[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, rtol=1e-9, atol=1e-9)


def test_half_of_the_heads_are_noise_heads_by_default():
    layer = GDAttention.from_config(tiny_config(), 0)
    assert (layer.num_signal_heads, layer.num_noise_heads, layer.num_value_heads) == (2, 2, 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(num_noise_heads=3), "num_signal_heads=7 is no multiple of num_noise_heads=3"),
        (dict(num_noise_heads=0), "num_signal_heads=10 is no multiple of num_noise_heads=0"),
        (dict(key_value_heads=3), "num_key_value_heads=3 must be even and at least 2"),
        (
            dict(key_value_heads=8),
            "num_key_value_heads=8 means 4 noise keys, which do not divide num_noise_heads=2",
        ),
        (dict(key_ratio=3), "key_ratio=3 does not divide the 4 signal heads of a noise head; 1, 2, 4 would"),
        (dict(variant="motif"), "variant='motif' is not one of 'paper', 'released'"),
    ],
)
def test_head_counts_that_do_not_divide_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        random_layer(**options)
