from __future__ import annotations

import math

import pytest
import torch

from tests.layers.latents import positions
from tests.tiny import VOCAB_SIZE, tiny_config
from undivided.layers.gda import GDAttention
from undivided.layers.gda_v2 import GDAttentionV2, token_factor
from undivided.layers.gqa import GQAttention
from undivided.layers.rotary import apply_rotary, rotary_tables
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig

EXACT = {"rtol": 1e-12, "atol": 1e-12}
WIDTH, LENGTH, HEAD_DIM = 24, 9, 8


def random_layer(heads=8, key_value_heads=2, layer_class=GDAttentionV2, **options):
    """A layer in float64 whose maps are far from flat."""
    layer = layer_class(WIDTH, heads, key_value_heads, HEAD_DIM, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(2 * torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return layer


def inputs():
    return torch.randn(2, LENGTH, WIDTH, dtype=torch.float64), positions(LENGTH, HEAD_DIM // 2)


def head_by_head(layer, x, tables):
    """The equations, one signal head at a time, from the rows of the weights."""
    cos, sin = rotary_tables(tables)
    rows = lambda projection, head: projection.weight[head * HEAD_DIM : (head + 1) * HEAD_DIM]  # noqa: E731
    turn = lambda weight: apply_rotary((x @ weight.T)[:, None], cos, sin, interleaved=False)[:, 0]  # noqa: E731
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    ratio = layer.num_signal_heads // layer.num_noise_heads
    share = layer.num_noise_heads * (ratio + 1) // layer.num_key_value_heads

    def attend(query_row):
        key, value = (
            turn(rows(layer.k_proj, query_row // share)),
            x @ rows(layer.v_proj, query_row // share).T,
        )
        scores = turn(rows(layer.q_proj, query_row)) @ key.transpose(1, 2) / math.sqrt(HEAD_DIM)
        return torch.softmax(scores.masked_fill(future, -math.inf), -1) @ value

    outs = []
    for head in range(layer.num_signal_heads):
        group, place = divmod(head, ratio)
        factor = 1 / (1 + torch.exp(-x @ layer.lambda_proj.weight[head]))
        first = group * (ratio + 1)
        outs.append(attend(first + place) - factor[..., None] * attend(first + ratio))
    return torch.cat(outs, -1) @ layer.o_proj.weight.T


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"key_value_heads": 4},
        {"num_noise_heads": 2},
        {"num_noise_heads": 2, "num_signal_heads": 8, "key_value_heads": 1},
        {"num_noise_heads": 1, "key_value_heads": 1},
    ],
)
def test_is_what_the_equations_say_head_by_head(options):
    layer, (x, tables) = random_layer(**options), inputs()
    torch.testing.assert_close(layer(x, tables)[0], head_by_head(layer, x, tables), **EXACT)


def test_one_noise_head_a_signal_head_is_differential_transformer_v2():
    """One attention over twice the heads; then every second head is subtracted from the one before it."""
    layer, (x, tables) = random_layer(), inputs()
    plain = GQAttention(WIDTH, 8, 2, HEAD_DIM).double()
    plain.o_proj = torch.nn.Identity()
    plain.load_state_dict({f"{x}_proj.weight": layer.get_parameter(f"{x}_proj.weight") for x in "qkv"})
    heads = plain(x, tables)[0].unflatten(-1, (8, HEAD_DIM))
    factor = torch.sigmoid(x @ layer.lambda_proj.weight.T)
    mixed = heads[:, :, 0::2] - factor[..., None] * heads[:, :, 1::2]
    torch.testing.assert_close(layer(x, tables)[0], layer.o_proj(mixed.flatten(2)), **EXACT)


@pytest.mark.parametrize("num_noise_heads", [2, 4])
def test_normalised_it_is_the_first_version_whose_noise_keys_are_its_keys(num_noise_heads):
    """The first version with twice the same value, the same keys for both maps, and lam one half."""
    heads = num_noise_heads + 4
    layer, (x, tables) = random_layer(heads, num_noise_heads=num_noise_heads), inputs()
    first = random_layer(heads, 4, GDAttention, num_noise_heads=num_noise_heads, norm_eps=0.0)
    twice = lambda weight: weight.unflatten(0, (2, 1, HEAD_DIM)).expand(2, 2, HEAD_DIM, WIDTH).flatten(0, 2)  # noqa: E731
    with torch.no_grad():
        layer.lambda_proj.weight.zero_()
        first.q_proj.weight.copy_(layer.q_proj.weight)
        first.k_proj.weight.copy_(twice(layer.k_proj.weight))
        first.v_proj.weight.copy_(twice(layer.v_proj.weight))
        first.subln.weight.fill_(1 / (1 - first.lam_init))
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            getattr(first, name).zero_()
        first.lambda_q1[0], first.lambda_k1[0] = 1.0, math.log(1.5 - first.lam_init)
    torch.testing.assert_close(first.lam().item(), 0.5)
    layer.o_proj = first.o_proj = torch.nn.Identity()
    mixed = layer(x, tables)[0].unflatten(-1, (4, HEAD_DIM))
    normalised = first(x, tables)[0].unflatten(-1, (4, 2 * HEAD_DIM))
    root = mixed.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(normalised * root, torch.cat([mixed, mixed], -1), rtol=1e-9, atol=1e-10)


def test_the_factor_is_of_each_token_and_head_and_in_float32():
    projection = torch.nn.Linear(WIDTH, 3, bias=False).bfloat16()
    x = torch.randn(2, LENGTH, WIDTH).bfloat16()
    factor = token_factor(projection, x)
    assert factor.shape == (2, 3, LENGTH) and factor.dtype == torch.float32
    assert ((factor > 0) & (factor < 1)).all() and factor.std(dim=2).min() > 0
    torch.testing.assert_close(factor[1, 2, 4], torch.sigmoid(projection(x)[1, 4, 2].float()))


def test_caches_what_grouped_query_attention_caches():
    entry = {"mechanism": "gda_v2", "num_noise_heads": 2, "num_signal_heads": 6}
    model = UndividedForCausalLM(UndividedConfig(base_config=tiny_config(), attention=[entry, None])).eval()
    first, native = model(torch.randint(VOCAB_SIZE, (3, 5)), use_cache=True).past_key_values.layers
    assert first.keys.shape == native.keys.shape and first.values.shape == native.values.shape


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_noise_heads": 3}, "num_signal_heads=5 is no multiple of num_noise_heads=3"),
        ({"num_noise_heads": 0}, "num_signal_heads=8 is no multiple of num_noise_heads=0"),
        (
            {"num_noise_heads": 2, "key_value_heads": 4},
            "num_key_value_heads=4 does not divide num_noise_heads=2",
        ),
    ],
)
def test_head_counts_that_do_not_divide_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        random_layer(**options)
