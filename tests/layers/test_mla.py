from __future__ import annotations

import copy

import pytest
import torch

from tests.layers.latents import (
    EXACT,
    HEADS,
    HIDDEN,
    causal_softmax,
    hidden_states,
    in_float64,
    logits,
    normalised,
    positions,
    random_layer,
)
from tests.tiny import VOCAB_SIZE, tiny_model
from undivided.layers.gqa import GQAttention
from undivided.layers.latent import grouped_latent_attention
from undivided.layers.mla import MLAttention
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig
from undivided.testing import assert_as_accurate

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
NATIVE = {
    "deepseek_v2": {},
    "deepseek_v2 without a query latent": {"q_lora_rank": None},
    "deepseek_v2 with YaRN": {"rope_parameters": _YARN},
    "deepseek_v3": {},
    "deepseek_v3 without a query latent": {"q_lora_rank": None},
    "deepseek_v3 with bias": {"attention_bias": True},
    "deepseek_v3 with halves": {"rope_interleave": False},
    "deepseek_v3 with YaRN": {"rope_parameters": _YARN},
}


def exchanged(native: torch.nn.Module) -> UndividedForCausalLM:
    config = UndividedConfig(
        base_config=native.config.to_dict(),
        attention=[{"mechanism": "mla"}] * native.config.num_hidden_layers,
    )
    model = UndividedForCausalLM(config).eval()
    model.native.load_state_dict(native.state_dict())
    return in_float64(model)


@pytest.mark.parametrize("name", [name for name in NATIVE if name.startswith("deepseek_v3")])
def test_is_the_native_attention_of_deepseek(name: str) -> None:
    native = in_float64(tiny_model("deepseek_v3", **copy.deepcopy(NATIVE[name])))
    model = exchanged(native)
    ids = torch.randint(VOCAB_SIZE, (2, 17))
    torch.testing.assert_close(model(ids).logits, native(ids).logits, **EXACT)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded, expected = model(ids, attention_mask=mask).logits, native(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[0, 5:], expected[0, 5:], **EXACT)
    torch.testing.assert_close(padded[1], expected[1], **EXACT)


@pytest.mark.parametrize("name", NATIVE)
def test_is_the_native_attention_of_deepseek_in_float32(name: str) -> None:
    native = tiny_model(name.split()[0], **copy.deepcopy(NATIVE[name]))
    model = exchanged(native).float()
    ids = torch.randint(VOCAB_SIZE, (2, 17))
    theirs, ours = native(ids).logits, model(ids).logits
    # Version 2 rotates in float32 at best, so it is theirs that is held against float64.
    assert_as_accurate(theirs, ours, exchanged(native)(ids).logits, factor=4)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_generates_what_the_base_model_generates(name: str) -> None:
    native = in_float64(tiny_model(name))
    ids = torch.randint(1, VOCAB_SIZE, (2, 7))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(exchanged(native).generate(ids, **options), native.generate(ids, **options))


def test_is_what_its_formula_says() -> None:
    layer = random_layer(MLAttention)
    hidden = hidden_states()
    latent, (up_key, up_value) = normalised(layer, hidden), layer.up_projections()
    heads = []
    for head in range(HEADS):
        content, rotary = logits(layer, hidden, head, latent, up_key[head])
        weights = causal_softmax((content + rotary) * (6 + 4) ** -0.5)
        heads.append(weights @ latent @ up_value[head].T)
    expected = layer.o_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(layer(hidden, positions(9))[0], expected, **EXACT)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rope_dim", [4, 0])
def test_absorbed_and_expanded_are_one_function(groups: int, softcap: float | None, rope_dim: int) -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    latent, rope_key = draw(2, groups, 11, 7), draw(2, 1, 11, rope_dim)
    inputs = (draw(2, 4, 5, 6), draw(2, 4, 5, rope_dim), latent, rope_key, draw(4, 6, 7), draw(4, 3, 7))
    # Every query sees at least the first key.
    seen = (torch.rand(2, 4, 5, 11) < 0.6) | (torch.arange(11) == 0)
    for mask in (None, seen, torch.where(seen, draw(2, 4, 5, 11), float("-inf"))):
        expanded, absorbed = (
            grouped_latent_attention(*inputs, scale=0.3, softcap=softcap, attention_mask=mask, form=form)
            for form in ("expanded", "absorbed")
        )
        assert expanded.shape == (2, 4, 5, 3)
        torch.testing.assert_close(absorbed, expanded, **EXACT)


def test_an_unknown_form_is_named() -> None:
    x = torch.zeros(1, 1, 1, 2)
    with pytest.raises(ValueError, match='form=\'naive\' is not one of "auto", "expanded", "absorbed"'):
        grouped_latent_attention(x, x, x, x, x[0], x[0], scale=1.0, form="naive")


def test_caches_one_latent_and_one_rotary_key_a_token() -> None:
    model = exchanged(tiny_model("deepseek_v3", dtype=torch.float64))
    cache = model(torch.randint(VOCAB_SIZE, (3, 5)), use_cache=True).past_key_values
    for layer in cache.layers:
        assert layer.keys.shape == (3, 1, 5, 16)
        assert layer.values.shape == (3, 1, 5, 4)


def test_scale_does_not_depend_on_the_latent() -> None:
    assert random_layer(MLAttention, latent_dim=8).scale == random_layer(MLAttention, latent_dim=16).scale
    assert random_layer(MLAttention).scale == 10**-0.5
    assert random_layer(MLAttention, scale=0.25).scale == 0.25


def test_any_grouped_query_attention_is_one() -> None:
    groups, head_dim = 2, 4
    gqa = GQAttention(HIDDEN, HEADS, groups, head_dim).double()
    width, pairs = groups * head_dim, head_dim // 2
    mla = MLAttention(
        HIDDEN, HEADS, width, width, 0, head_dim,
        latent_norm=False, scale=gqa.scale, rope_interleaved=False, rope_repeats=groups,
    ).double()  # fmt: skip
    # Halves over the whole rotary key: the first of each pair of every group, then the second of each.
    order = torch.arange(width).view(groups, 2, pairs).transpose(0, 1).flatten()
    with torch.no_grad():
        for weight in mla.parameters():
            weight.zero_()
        mla.kv_a_proj_with_mqa.weight[:width] = gqa.v_proj.weight
        mla.kv_a_proj_with_mqa.weight[width:] = gqa.k_proj.weight[order]
        mla.o_proj.weight.copy_(gqa.o_proj.weight)
        for head in range(HEADS):
            columns = slice(head // (HEADS // groups) * head_dim, (head // (HEADS // groups) + 1) * head_dim)
            rows = slice(head * head_dim, (head + 1) * head_dim)
            block = torch.zeros(width, HIDDEN, dtype=torch.float64)
            block[columns] = gqa.q_proj.weight[rows]
            mla.q_proj.weight[head * width : (head + 1) * width] = block[order]
            mla.kv_b_proj.weight[rows, columns] = torch.eye(head_dim, dtype=torch.float64)
    hidden, tables = hidden_states(), positions(9, pairs)
    torch.testing.assert_close(mla(hidden, tables)[0], gqa(hidden, tables)[0], **EXACT)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"latent_dim": 0}, "latent_dim=0 and value_dim=5 must be at least 1"),
        ({"rope_dim": 3}, "nope_dim=6 and rope_dim=3 must be 0 or more, rope_dim even"),
        ({"nope_dim": 0, "rope_dim": 0}, "nope_dim and rope_dim are both 0"),
    ],
)
def test_sizes_that_make_no_layer_are_named(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_layer(MLAttention, **sizes)


def test_sizes_that_the_base_model_cannot_tell_are_named() -> None:
    from tests.tiny import tiny_config

    with pytest.raises(ValueError, match='"mla" needs latent_dim, nope_dim, value_dim: the llama config'):
        MLAttention.from_config(tiny_config("llama"), 0, rope_dim=4)
