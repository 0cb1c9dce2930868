from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.layers.latents import (
    EXACT,
    HIDDEN,
    causal_softmax,
    hidden_states,
    logits,
    normalised,
    positions,
    random_layer,
)
from undivided.layers.gda_v2 import GDAttentionV2
from undivided.layers.gdla import GDLAttention
from undivided.layers.mla import MLAttention

GATED = {"query_latent_dim": 12, "output_gate": True}


def head_by_head(layer, x):
    """The equations, one signal head at a time, from the rows of the weights."""
    latent = normalised(layer, x)
    ratio = layer.num_signal_heads // layer.num_noise_heads
    share = layer.num_heads // layer.num_key_value_heads
    group_rows = layer.kv_b_proj.weight.chunk(layer.num_key_value_heads)

    def attend(head):
        up_key, up_value = group_rows[head // share].split([layer.nope_dim, layer.value_dim])
        content, rotary = logits(layer, x, head, latent, up_key)
        return causal_softmax(layer.scale * (content + rotary)) @ (latent @ up_value.T)

    outs = []
    for head in range(layer.num_signal_heads):
        group, place = divmod(head, ratio)
        factor = torch.sigmoid(x @ layer.lambda_proj.weight[head])[..., None]
        first = group * (ratio + 1)
        outs.append(attend(first + place) - factor * attend(first + ratio))
    out = torch.cat(outs, -1)
    if layer.q_b_gate_proj is not None:
        query_latent = layer.q_a_layernorm(layer.q_a_proj(x))
        out = out * torch.sigmoid(query_latent @ layer.q_b_gate_proj.weight.T)
    return out @ layer.o_proj.weight.T


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_noise_heads": 1},
        {"num_noise_heads": 2, "num_signal_heads": 8},
        {"num_noise_heads": 2, "num_signal_heads": 6, "num_key_value_heads": 1},
        {"num_noise_heads": 1, **GATED},
    ],
)
def test_is_what_the_equations_say_head_by_head(options):
    layer, x = random_layer(GDLAttention, **options), hidden_states()
    torch.testing.assert_close(layer(x, positions(9))[0], head_by_head(layer, x), **EXACT)


def test_equal_maps_and_half_of_the_noise_leave_half_of_latent_attention():
    layer = random_layer(GDLAttention)
    mla = MLAttention(HIDDEN, 2, 16, 4, 6, 5).double()
    with torch.no_grad():
        layer.lambda_proj.weight.zero_()
        pairs = layer.q_proj.weight.unflatten(0, (2, 2, 10))
        pairs[:, 1] = pairs[:, 0]
        state = {name: tensor for name, tensor in layer.state_dict().items() if name in mla.state_dict()}
        mla.load_state_dict(state | {"q_proj.weight": pairs[:, 0].flatten(0, 1)})
    x, tables = hidden_states(), positions(9)
    torch.testing.assert_close(layer(x, tables)[0], mla(x, tables)[0] / 2, **EXACT)


@pytest.mark.parametrize("num_noise_heads", [1, 2])
def test_with_keys_and_values_in_its_latent_it_is_the_form_without_one(num_noise_heads):
    """A latent that holds each group's key and value as they are, and no rotary positions."""
    groups, width = num_noise_heads, 6
    heads = {"num_noise_heads": num_noise_heads, "num_signal_heads": 4}
    latent = random_layer(
        GDLAttention, latent_dim=2 * width * groups, rope_dim=0, nope_dim=width, value_dim=width,
        latent_norm=False, **heads,
    )  # fmt: skip
    plain = GDAttentionV2(HIDDEN, 8, groups, width, **heads).double()
    rows = latent.kv_a_proj_with_mqa.weight.unflatten(0, (groups, 2 * width))
    with torch.no_grad():
        latent.kv_b_proj.weight.copy_(torch.eye(2 * width * groups))
    plain.load_state_dict(
        {
            "q_proj.weight": latent.q_proj.weight,
            "k_proj.weight": rows[:, :width].flatten(0, 1),
            "v_proj.weight": rows[:, width:].flatten(0, 1),
            "lambda_proj.weight": latent.lambda_proj.weight,
            "o_proj.weight": latent.o_proj.weight,
        }
    )
    x = hidden_states()
    still = torch.ones(1, 9, width, dtype=torch.float64), torch.zeros(1, 9, width, dtype=torch.float64)
    torch.testing.assert_close(latent(x, None)[0], plain(x, still)[0], **EXACT)


def test_caches_the_latent_and_the_rope_key_alone():
    layer, cache = random_layer(GDLAttention, num_noise_heads=1), DynamicCache()
    layer(hidden_states(), positions(9), None, cache)
    (rows,) = cache.layers
    assert rows.keys.shape == (2, 1, 9, 16) and rows.values.shape == (2, 1, 9, 4)


def test_weights_are_those_of_the_groups_and_of_the_signal_heads():
    with torch.device("meta"):
        layer = GDLAttention(
            4096, 80, 512, 64, 128, 128, num_noise_heads=16, query_latent_dim=1024, output_gate=True
        )
    shapes = {name: tuple(weight.shape) for name, weight in layer.named_parameters() if "proj" in name}
    assert shapes == {
        "q_a_proj.weight": (1024, 4096),
        "q_b_proj.weight": (80 * 192, 1024),
        "q_b_gate_proj.weight": (64 * 128, 1024),
        "kv_a_proj_with_mqa.weight": (576, 4096),
        "kv_b_proj.weight": (16 * 256, 512),
        "lambda_proj.weight": (64, 4096),
        "o_proj.weight": (4096, 64 * 128),
    }


def test_a_bfloat16_layer_takes_the_difference_in_float32():
    layer = GDLAttention(HIDDEN, 4, 16, 4, 6, 5).bfloat16()
    heads, x = torch.randn(2, 4, 9, 5).bfloat16(), torch.randn(2, 9, HIDDEN).bfloat16()
    heads[:, 1::2] = heads[:, 0::2]
    factor = torch.sigmoid(layer.lambda_proj(x).float()).transpose(1, 2)[..., None]
    expected = (heads[:, 0::2].double() * (1 - factor.double())).bfloat16()
    torch.testing.assert_close(layer.mix(heads, x), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_noise_heads": 3}, "num_signal_heads=1 is no multiple of num_noise_heads=3"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4 does not divide num_noise_heads=2"),
        ({"output_gate": True}, "output_gate=True reads the latent of the query; set query_latent_dim"),
    ],
)
def test_what_does_not_fit_is_named(options, text):
    with pytest.raises(ValueError, match=text):
        random_layer(GDLAttention, **options)
