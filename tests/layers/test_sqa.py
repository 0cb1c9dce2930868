from __future__ import annotations

import math

import pytest
import torch

from tests.layers.latents import positions
from tests.tiny import VOCAB_SIZE, tiny_config, tiny_model
from undivided.cost import GroupedShape, grouped_tensor_parallel
from undivided.cost.head_counts import PRESETS, sparse_head_counts
from undivided.layers.gqa import GQAttention
from undivided.layers.sqa import SQAttention, within_window
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig
from undivided.spec import interpret
from undivided.testing import assert_as_accurate

EXACT = {"rtol": 1e-12, "atol": 1e-12}
WIDTH, HEADS, DIM, LENGTH = 32, 8, 4, 9
# Query heads, key/value heads and the rest of the options.
SHAPES = {
    "mha": {"num_query_heads": 8, "num_key_value_heads": 8},
    "gqa": {"num_query_heads": 8, "num_key_value_heads": 2},
    "sqa": {"preset": "sqa"},
    "ssqa": {"preset": "ssqa"},
    "xsqa": {"preset": "xsqa"},
    "xsmqa": {"preset": "xsmqa"},
    "lsqa": {"preset": "lsqa"},
    "reverse": {"num_query_heads": 2, "num_key_value_heads": 6, "reverse": True},
    "window": {"preset": "sqa", "window": 3},
    "reverse, window": {"num_query_heads": 2, "num_key_value_heads": 4, "reverse": True, "window": 4},
    "softcap, window": {"preset": "sqa", "window": 3, "softcap": 1.5, "scale": 0.9},
}


def randomised(layer: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The layer in float64, its logits far from flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(2 * noise * parameter.shape[-1] ** -0.5)
    return layer.double()


def layer_of(**options):
    return randomised(SQAttention(WIDTH, HEADS, **options))


def hidden_states(length: int = LENGTH) -> torch.Tensor:
    return torch.randn(2, length, WIDTH, dtype=torch.float64)


def tables(length: int = LENGTH):
    return positions(length, DIM // 2)


def model_of(base: str = "llama", config: dict | None = None, **options) -> UndividedForCausalLM:
    entry = {"mechanism": "sqa", **options}
    host = UndividedForCausalLM(
        UndividedConfig(base_config=tiny_config(base, **(config or {})), attention=[entry, entry])
    )
    return randomised(host).eval()


def head_by_head(layer: SQAttention, x: torch.Tensor) -> torch.Tensor:
    """The definition, one head at a time, from the rows of the weights."""
    cos, sin = (table[..., : DIM // 2] for table in tables(x.shape[1]))

    def turned(rows):
        a, b = (x @ rows.T).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    rows = lambda projection, head: projection.weight[head * DIM : (head + 1) * DIM]  # noqa: E731
    place = torch.arange(x.shape[1])
    seen = place[None] <= place[:, None]
    if layer.window is not None:
        seen &= place[None] > place[:, None] - layer.window
    outs = []
    queries, groups = layer.num_query_heads, layer.num_key_value_heads
    for head in range(max(queries, groups)):
        query = turned(rows(layer.q_proj, head * queries // max(queries, groups)))
        group = head * groups // max(queries, groups)
        scores = layer.scale * query @ turned(rows(layer.k_proj, group)).transpose(1, 2)
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        weights = torch.softmax(scores.masked_fill(~seen, -math.inf), -1)
        outs.append(weights @ (x @ rows(layer.v_proj, group).T))
    return torch.cat(outs, -1) @ layer.o_proj.weight.T


@pytest.mark.parametrize("name", SHAPES)
def test_is_what_the_paper_says_head_by_head(name):
    layer, x = layer_of(**SHAPES[name]), hidden_states()
    torch.testing.assert_close(layer(x, tables())[0], head_by_head(layer, x), **EXACT)


@pytest.mark.parametrize("name", SHAPES)
def test_is_its_specification(name):
    layer, x = layer_of(**SHAPES[name]), hidden_states()
    out = interpret(layer.spec, layer.spec_inputs(x, tables())).out
    torch.testing.assert_close(layer(x, tables())[0], layer.o_proj(out.transpose(1, 2).flatten(2)), **EXACT)


@pytest.mark.parametrize(
    ("preset", "counts"),
    [("sqa", (8, 4)), ("ssqa", (8, 8)), ("xsqa", (4, 4)), ("xsmqa", (4, 1)), ("lsqa", (12, 4))],
)
def test_presets_of_sixteen_heads_are_those_of_the_paper(preset, counts):
    assert sparse_head_counts(16, preset=preset) == counts
    layer = SQAttention(256, 16, preset=preset)
    assert (layer.num_query_heads, layer.num_key_value_heads, layer.head_dim) == (*counts, 16)
    same = SQAttention(256, 16, counts[1], num_query_heads=counts[0], preset=preset)
    assert same.q_proj.weight.shape == layer.q_proj.weight.shape


@pytest.mark.parametrize("groups", [8, 2, 1])
def test_with_all_heads_it_is_grouped_query_attention(groups):
    layer = layer_of(num_key_value_heads=groups)
    other = GQAttention(WIDTH, HEADS, groups, DIM).double()
    other.load_state_dict(layer.state_dict())
    x = hidden_states()
    assert torch.equal(layer(x, tables())[0], other(x, tables())[0])


def test_the_symmetric_variant_is_multi_head_attention_with_half_the_heads_and_a_rectangular_output():
    layer = layer_of(preset="ssqa")
    other = GQAttention(WIDTH, HEADS // 2, HEADS // 2, DIM).double()
    other.load_state_dict(layer.state_dict())
    assert layer.o_proj.weight.shape == (WIDTH, WIDTH // 2)
    x = hidden_states()
    assert torch.equal(layer(x, tables())[0], other(x, tables())[0])


@pytest.mark.parametrize("name", ["sqa", "xsmqa", "reverse", "window"])
def test_gradients_are_those_of_finite_differences(name):
    layer = layer_of(**SHAPES[name])
    x = hidden_states(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x, tables(5))[0], (x,))


def test_grouped_heads_are_repeated_heads():
    layer, x = layer_of(preset="sqa"), hidden_states()
    query, key, value = layer.heads(x, tables())
    repeated = (y.repeat_interleave(2, dim=1) for y in (key, value))
    torch.testing.assert_close(
        layer.attend(query, key, value, None), layer.attend(query, *repeated, None), **EXACT
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_and_operations_are_those_of_the_formulas(preset):
    queries, groups = sparse_head_counts(HEADS, preset=preset)
    layer = SQAttention(WIDTH, HEADS, preset=preset)
    weights = sum(parameter.numel() for parameter in layer.parameters())
    assert weights == 2 * WIDTH * queries * DIM + 2 * WIDTH * groups * DIM
    cost = grouped_tensor_parallel(GroupedShape(WIDTH, queries, groups, DIM), 1)
    assert cost.weight_elements == weights
    # A multiply-accumulate is two operations: 4 N^2 H_q D for scores and values of N queries and N keys.
    assert 2 * cost.macs_per_row == 4 * queries * DIM
    assert cost.cache_elements == 2 * groups * DIM
    with_bias = SQAttention(WIDTH, HEADS, preset=preset, output_bias=True)
    assert sum(parameter.numel() for parameter in with_bias.parameters()) == weights + WIDTH


@pytest.mark.parametrize(("name", "groups"), [("sqa", 2), ("ssqa", 4), ("xsmqa", 1), ("reverse", 6)])
def test_caches_keys_and_values_of_the_key_value_heads_alone(name, groups):
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    cache = model_of(config=sizes, **SHAPES[name])(torch.randint(VOCAB_SIZE, (3, 5)), use_cache=True)
    for layer in cache.past_key_values.layers:
        assert layer.keys.shape == layer.values.shape == (3, groups, 5, DIM)


@pytest.mark.parametrize(
    "options",
    [
        {"num_query_heads": 2},
        {"preset": "xsmqa"},
        {"num_query_heads": 1, "num_key_value_heads": 2, "reverse": True},
        {"window": 1},
        {"window": 4},
        {"preset": "sqa", "window": 6},
        {"preset": "sqa", "window": 50},
    ],
)
@pytest.mark.parametrize("base", ["llama", "mistral", "gemma2"])
def test_decoding_equals_the_whole_forward(base, options):
    model = model_of(base, **options)
    ids = torch.randint(1, VOCAB_SIZE, (2, 13))
    expected = model(ids).logits
    output = model(ids[:, :5], use_cache=True)
    logits = [output.logits]
    for piece in ids[:, 5:].split([1, 3, 1, 3], dim=1):
        output = model(piece, past_key_values=output.past_key_values)
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_window_of_a_padded_batch_counts_from_each_query(implementation):
    model = model_of(preset="sqa", window=4)
    model.set_attn_implementation(implementation)
    ids = torch.randint(1, VOCAB_SIZE, (2, 13))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(padded[:1, 5:], model(ids[:1, 5:]).logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(padded[1:], model(ids[1:]).logits, rtol=1e-9, atol=1e-9)
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    both = model.generate(ids, attention_mask=mask, **options)
    static = model.generate(
        ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **options
    )
    alone = model.generate(ids[:1, 5:], **options)
    assert torch.equal(both[:1, 5:], alone)
    assert torch.equal(static, both)


def test_a_window_is_the_mask_of_a_sliding_window():
    layer, x = layer_of(preset="sqa", window=4), hidden_states(40)
    place = torch.arange(40)
    mask = (place[None] <= place[:, None]) & (place[None] > place[:, None] - 4)
    full = layer_of(preset="sqa")
    expected = full(x, tables(40), attention_mask=mask[None, None])[0]
    torch.testing.assert_close(layer(x, tables(40))[0], expected, **EXACT)
    causal = (place[None] <= place[:, None])[None, None]
    torch.testing.assert_close(layer(x, tables(40), attention_mask=causal)[0], expected, **EXACT)
    assert not torch.allclose(full(x, tables(40))[0], expected)


def test_a_window_cuts_masks_of_both_kinds_and_leaves_rows_that_see_nothing():
    mask = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    cut = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]).bool()
    assert torch.equal(within_window(mask, 2), cut)
    lowest = torch.finfo(torch.float32).min
    bias = torch.zeros(4, 5).masked_fill(~mask, lowest)
    assert torch.equal(within_window(bias, 2) > lowest / 2, cut)
    assert torch.equal(within_window(bias, 2)[0], bias[0])


@pytest.mark.parametrize("base", ["llama", "qwen2", "mistral", "gemma2"])
def test_without_options_it_is_the_attention_of_the_base_model(base):
    native = tiny_model(base)
    entry = {"mechanism": "sqa"}
    model = UndividedForCausalLM(UndividedConfig(base_config=native.config.to_dict(), attention=[entry] * 2))
    model.native.load_state_dict(native.state_dict())
    ids = torch.randint(VOCAB_SIZE, (2, 17))
    ours, theirs = model(ids).logits, native(ids).logits
    # The softmax of transformers may be float32 at best, so it is theirs that is held against float64.
    assert_as_accurate(theirs, ours, model.double()(ids).logits)


def test_the_authors_weights_with_their_pairs_of_neighbours():
    sizes = {"num_attention_heads": 4, "preset": "sqa", "output_bias": True}
    layer = randomised(SQAttention(WIDTH, **sizes))
    theirs = {name.replace("o_proj", "out_proj"): weight for name, weight in layer.state_dict().items()}
    theirs |= {"rope.inv_freq": torch.ones(2), "rope.cache": torch.ones(9, 2)}
    ours = SQAttention(WIDTH, **sizes).double()
    ours.load_official(theirs)
    x, places = hidden_states(), positions(LENGTH, 4)
    cos, sin = (table[..., :4] for table in places)

    def turned(weight):
        y = (x @ weight.T).unflatten(-1, (-1, 8)).transpose(1, 2)
        a, b = y[..., 0::2], y[..., 1::2]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    query, key = turned(layer.q_proj.weight), turned(layer.k_proj.weight)
    value = layer.v_proj(x).unflatten(-1, (-1, 8)).transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    expected = layer.o_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(ours(x, places)[0], expected, **EXACT)
    with pytest.raises(RuntimeError, match="o_proj.bias"):
        SQAttention(WIDTH, 4, preset="sqa").load_official(theirs)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(preset="zsqa"), "preset='zsqa' is not one of 'sqa', 'ssqa', 'xsqa', 'xsmqa', 'lsqa'."),
        (
            dict(preset="xsqa", num_attention_heads=6, head_dim=4),
            'preset="xsqa" needs a multiple of 4 heads, but num_attention_heads=6.',
        ),
        (
            dict(preset="sqa", num_query_heads=2),
            'num_query_heads=2 contradicts preset="sqa", which has 4 for num_attention_heads=8; give one of the two.',
        ),
        (
            dict(preset="sqa", num_key_value_heads=4),
            'num_key_value_heads=4 contradicts preset="sqa", which has 2 for num_attention_heads=8; '
            "give one of the two.",
        ),
        (dict(num_query_heads=9), "num_query_heads=9 is not in 1 to num_attention_heads=8."),
        (dict(num_query_heads=0), "num_query_heads=0 is not in 1 to num_attention_heads=8."),
        (dict(num_key_value_heads=16), "num_key_value_heads=16 is not in 1 to num_attention_heads=8."),
        (
            dict(num_query_heads=2, num_key_value_heads=4),
            "num_key_value_heads=4 is more than num_query_heads=2; reverse=True allows it.",
        ),
        (
            dict(num_query_heads=4, num_key_value_heads=4, reverse=True),
            "reverse=True needs fewer query heads than key/value heads, but num_query_heads=4 and "
            "num_key_value_heads=4.",
        ),
        (
            dict(num_query_heads=6, num_key_value_heads=4),
            "num_key_value_heads=4 does not divide num_query_heads=6; 1, 2, 3, 6 would.",
        ),
        (
            dict(num_query_heads=4, num_key_value_heads=6, reverse=True),
            "num_query_heads=4 does not divide num_key_value_heads=6; 1, 2, 3, 6 would.",
        ),
        (
            dict(num_attention_heads=5),
            "num_attention_heads=5 does not divide hidden_size=32; give head_dim, or a number of heads that does.",
        ),
        (dict(window=0), "window=0 must be at least 1: a query sees itself."),
    ],
)
def test_head_counts_and_windows_that_do_not_fit_are_named(options, text):
    with pytest.raises(ValueError) as raised:
        SQAttention(WIDTH, **{"num_attention_heads": HEADS, **options})
    assert str(raised.value) == text


def test_in_a_config_the_base_model_decides_what_is_not_said():
    config = tiny_config("llama", attention_bias=True)
    own = SQAttention.from_config(config, 0, num_query_heads=2)
    assert (own.num_query_heads, own.num_key_value_heads, own.head_dim) == (2, 2, 8)
    assert own.o_proj.bias is not None
    preset = SQAttention.from_config(config, 0, preset="xsmqa", output_bias=False)
    assert (preset.num_query_heads, preset.num_key_value_heads) == (1, 1)
    assert preset.o_proj.bias is None
    with pytest.raises(ValueError, match="num_key_value_heads=2 is more than num_query_heads=1"):
        SQAttention.from_config(config, 0, num_query_heads=1)
