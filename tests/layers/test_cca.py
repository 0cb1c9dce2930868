from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import DynamicCache, StaticCache

from tests.tiny import tiny_config
from undivided.layers._streams import streaming_layer
from undivided.layers.cca import CCAttention
from undivided.layers.gqa import GQAttention
from undivided.models.bases import cache_argument
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig

EXACT = {"rtol": 1e-10, "atol": 1e-10}
WIDTH, HEAD_DIM = 24, 8
OFF = {"conv_kernels": (), "qk_mean": False, "value_shift": False, "qk_norm": False}


def build(heads=4, groups=2, dtype=torch.float64, **options) -> CCAttention:
    layer = CCAttention(WIDTH, heads, groups, HEAD_DIM, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.to(dtype).eval()


def tables(length, pairs=HEAD_DIM // 2, dtype=torch.float64):
    angles = torch.outer(
        torch.arange(length, dtype=torch.float64), 100.0 ** -(torch.arange(pairs) / pairs)
    ).repeat(1, 2)[None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def draw(length, batch=2, dtype=torch.float64):
    return torch.randn(batch, length, WIDTH, dtype=dtype)


def in_pieces(layer, x, position_embeddings, pieces, cache):
    outputs, at = [], 0
    for size in pieces:
        here = slice(at, at + size)
        cos_sin = tuple(table[:, here] for table in position_embeddings)
        outputs.append(layer(x[:, here], cos_sin, past_key_values=cache)[0])
        at += size
    return torch.cat(outputs, dim=1)


def test_with_everything_off_it_is_multi_head_attention():
    for heads, groups in ((4, 4), (4, 2)):
        layer = build(heads, groups, **OFF)
        plain = GQAttention(WIDTH, heads, groups, HEAD_DIM).double()
        sizes = [heads * HEAD_DIM, groups * HEAD_DIM, groups * HEAD_DIM]
        with torch.no_grad():
            for projection, weight in zip(
                (plain.q_proj, plain.k_proj, plain.v_proj), layer.qkv_proj.weight.split(sizes), strict=True
            ):
                projection.weight.copy_(weight)
            plain.o_proj.weight.copy_(layer.o_proj.weight)
        x = draw(7)
        torch.testing.assert_close(layer(x, tables(7))[0], plain(x, tables(7))[0], **EXACT)
        assert [name for name, _ in layer.named_parameters()] == ["qkv_proj.weight", "o_proj.weight"]


def official(config):
    zaya = pytest.importorskip("transformers.models.zaya.modeling_zaya")
    attention = zaya.ZayaAttention(config, layer_idx=0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return attention.double().eval()


def zaya_config(**options):
    configuration = pytest.importorskip("transformers.models.zaya.configuration_zaya")
    config = configuration.ZayaConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=HEAD_DIM,
        **options,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return config


@pytest.mark.parametrize("kernels", [(2, 2), (3, 2)])
def test_it_is_the_public_layer_of_zaya(kernels):
    config = zaya_config(cca_time0=kernels[0], cca_time1=kernels[1])
    theirs = official(config)
    ours = CCAttention(
        WIDTH, 4, 2, HEAD_DIM, rotary_fraction=0.5, variant="released", conv_kernels=kernels
    ).double()
    ours.load_official(
        {f"layers.0.{name}": weight for name, weight in theirs.state_dict().items()}, "layers.0."
    )
    x, cos_sin = draw(9), tables(9, HEAD_DIM // 4)
    found = ours.project(x, tables(9))
    query, key, value = theirs.qkv_proj(x, None)
    query, key = theirs.qk_norm(query, key)
    from transformers.models.zaya.modeling_zaya import apply_rotary_pos_emb

    query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *cos_sin)
    for mine, official_heads in zip(found, (query, key, value.transpose(1, 2)), strict=True):
        torch.testing.assert_close(mine, official_heads, rtol=1e-5, atol=1e-5)
    causal = torch.full((9, 9), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)[None, None]
    expected = theirs(x, {"causal": causal, "conv": None}, position_embeddings=cos_sin)[0]
    torch.testing.assert_close(ours(x, tables(9))[0], expected, rtol=1e-5, atol=1e-5)


def test_its_cached_steps_are_those_of_zaya():
    config = zaya_config()
    theirs = official(config)
    ours = CCAttention(WIDTH, 4, 2, HEAD_DIM, rotary_fraction=0.5, variant="released").double()
    ours.load_official(theirs.state_dict())
    x, cos_sin, whole = draw(8), tables(8, HEAD_DIM // 4), tables(8)
    our_cache, their_cache, at = DynamicCache(), DynamicCache(config=config), 0
    for size in (1, 1, 4, 2):
        here = slice(at, at + size)
        causal = torch.full((size, at + size), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1 + at)[
            None, None
        ]
        expected = theirs(
            x[:, here], {"causal": causal, "conv": None},
            position_embeddings=tuple(table[:, here] for table in cos_sin), **{cache_argument(): their_cache},
        )[0]  # fmt: skip
        found = ours(x[:, here], tuple(table[:, here] for table in whole), past_key_values=our_cache)[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        at += size
    mine, official_layer = our_cache.layers[0], their_cache.layers[0]
    for name in ("keys", "values"):
        torch.testing.assert_close(getattr(mine, name), getattr(official_layer, name), **EXACT)
    ours_kept, latents = mine.conv_states[0], 6 * HEAD_DIM
    torch.testing.assert_close(ours_kept[:, :latents], official_layer.conv_states[0], **EXACT)
    torch.testing.assert_close(ours_kept[:, -HEAD_DIM:, -1], official_layer.recurrent_states[0], **EXACT)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64])
def test_token_by_token_is_the_whole_sequence(length):
    layer, x, cos_sin = build(), draw(length), tables(length)
    found = in_pieces(layer, x, cos_sin, [1] * length, DynamicCache())
    torch.testing.assert_close(found, layer(x, cos_sin)[0], **EXACT)


@pytest.mark.parametrize(
    "options", [{}, {"conv_kernels": [4, 3]}, {"conv_kernels": [1, 1]}, {"value_shift": False}]
)
@pytest.mark.parametrize("pieces", [[1, 3, 8], [5, 1, 6], [2, 10], [11, 1]])
def test_a_prompt_in_any_pieces_is_one_prompt(options, pieces):
    layer, x, cos_sin = build(**options), draw(12), tables(12)
    expected = layer(x, cos_sin)[0]
    torch.testing.assert_close(in_pieces(layer, x, cos_sin, pieces, DynamicCache()), expected, **EXACT)
    static = StaticCache(config=tiny_config(), max_cache_len=15)
    torch.testing.assert_close(in_pieces(layer, x, cos_sin, pieces, static), expected, **EXACT)


def test_it_caches_narrow_keys_and_values_and_a_short_state():
    layer, x, cache = build(), draw(9), DynamicCache()
    layer(x, tables(9), past_key_values=cache)
    kept = cache.layers[0]
    assert kept.keys.shape == kept.values.shape == (2, 2, 9, HEAD_DIM)
    assert kept.conv_states[0].shape == (2, 8 * HEAD_DIM, 2)
    alone = DynamicCache()
    build(conv_kernels=(1, 1), value_shift=False)(x, tables(9), past_key_values=alone)
    assert type(alone.layers[0]).__name__ == "DynamicLayer"


def test_a_cache_that_is_reordered_goes_on_rightly():
    layer, x, cos_sin = build(), draw(6, batch=3), tables(6)
    cache, order = DynamicCache(), torch.tensor([2, 0, 0])
    layer(x[:, :4], tuple(table[:, :4] for table in cos_sin), past_key_values=cache)
    cache.reorder_cache(order)
    x = torch.cat([x[order, :4], x[:, 4:]], dim=1)
    found = layer(x[:, 4:], tuple(table[:, 4:] for table in cos_sin), past_key_values=cache)[0]
    torch.testing.assert_close(found, layer(x, cos_sin)[0][:, 4:], **EXACT)


def test_a_cache_that_is_reset_begins_anew():
    layer, x, cos_sin = build(), draw(6), tables(6)
    cache = StaticCache(config=tiny_config(), max_cache_len=8)
    in_pieces(layer, draw(6), cos_sin, [4, 2], cache)
    cache.reset()
    torch.testing.assert_close(in_pieces(layer, x, cos_sin, [4, 2], cache), layer(x, cos_sin)[0], **EXACT)


def test_caches_without_place_for_the_states_are_refused():
    layer, cache = build(), DynamicCache()
    build(**OFF)(draw(3), tables(3), past_key_values=cache)
    with pytest.raises(ValueError, match="layer 0 of the cache holds keys but no state of convolutions"):
        layer(draw(1), tables(1), past_key_values=cache)
    config = tiny_config("mistral", sliding_window=4)
    windowed = StaticCache(config=config, max_cache_len=9)
    with pytest.raises(ValueError, match="is a StaticSlidingWindowLayer, which has no place for a state"):
        layer(draw(1), tables(1), past_key_values=windowed)
    kept = streaming_layer(DynamicCache(config=config), 1)
    assert kept.sliding_window == 4


def test_a_base_model_with_windows_decodes_as_it_reads():
    config = tiny_config("gemma2", num_hidden_layers=2)
    model = UndividedForCausalLM(UndividedConfig(base_config=config, attention=[{"mechanism": "cca"}] * 2))
    model = model.double().eval()
    ids = torch.randint(256, (2, 13))
    expected, cache = model(ids).logits, None
    for position, token in enumerate(ids.split(1, dim=1)):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        torch.testing.assert_close(output.logits[:, 0], expected[:, position], **EXACT)


@pytest.mark.parametrize("additive", [False, True])
def test_padding_on_the_left_begins_the_sequence_anew(additive):
    layer, x, padding = build(), draw(8), 3
    seen = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    seen[0, :, :, :padding] = False
    hidden = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
    mask = hidden if additive else seen
    cos, sin = (table.repeat(2, 1, 1) for table in tables(8))
    for table in (cos, sin):
        table[0] = table[0].roll(padding, 0)
    x[0, :padding] = 1e6
    alone = layer(x[:1, padding:], tables(5))[0]
    torch.testing.assert_close(layer(x, (cos, sin), mask)[0][:1, padding:], alone, **EXACT)
    history = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2], [0, 1, 2, 2, 2, 2, 2, 2]])
    value = layer.project(x, (cos, sin), history)[2]
    assert (value[0, 1, padding] == 0).all()
    assert (value[1, 1, padding] != 0).any()
    cache = DynamicCache()
    pieces = [
        layer(x[:, a:b], (cos[:, a:b], sin[:, a:b]), mask[:, :, a:b, :b], past_key_values=cache)[0]
        for a, b in ((0, 2), (2, 5), (5, 8))
    ]
    torch.testing.assert_close(torch.cat(pieces, 1)[:1, padding:], alone, **EXACT)


def test_documents_packed_in_one_row_do_not_see_each_other():
    layer, starts = build(), (0, 4, 5, 11)
    x, cos_sin = draw(11, batch=1), tables(11)
    document = torch.tensor([0] * 4 + [1] + [2] * 6)
    mask = (document[:, None] == document[None, :]).tril()[None, None]
    found = layer(x, cos_sin, mask)[0]
    for a, b in zip(starts, starts[1:], strict=False):
        alone = layer(x[:, a:b], tuple(table[:, a:b] for table in cos_sin))[0]
        torch.testing.assert_close(found[:, a:b], alone, **EXACT)


def test_an_output_depends_on_no_later_token():
    layer, x = build(), draw(6, batch=1).requires_grad_()
    out = layer(x, tables(6))[0]
    for token in range(6):
        (gradient,) = torch.autograd.grad(out[0, token].sum(), x, retain_graph=True)
        assert (gradient[0, token + 1 :] == 0).all()
        assert (gradient[0, : token + 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("groups", [2, 1])
def test_half_of_the_values_are_those_of_the_token_before(groups):
    layer, x = build(groups=groups), draw(5)
    value = layer.project(x, tables(5))[2].transpose(1, 2).flatten(2)
    plain = layer.qkv_proj(x)[..., -groups * HEAD_DIM :]
    half = groups * HEAD_DIM // 2
    torch.testing.assert_close(value[..., :half], plain[..., :half])
    torch.testing.assert_close(value[:, 1:, half:], plain[:, :-1, half:])
    assert (value[:, 0, half:] == 0).all()


def test_scores_are_bounded_by_the_temperature_and_variants_differ_in_it_alone():
    paper, released = build(), build(variant="released")
    x = draw(6)
    query, key, _ = paper.project(x, tables(6))
    tau = paper.temperature.exp()
    torch.testing.assert_close(query.norm(dim=-1), torch.full_like(query[..., 0], math.sqrt(HEAD_DIM)))
    torch.testing.assert_close(key.norm(dim=-1), math.sqrt(HEAD_DIM) * tau[:, None].expand(2, 2, 6))
    released.load_state_dict(paper.state_dict() | {"temperature": tau.detach()})
    torch.testing.assert_close(released(x, tables(6))[0], paper(x, tables(6))[0], **EXACT)


def test_a_fresh_layer_has_temperature_one_and_small_convolutions():
    torch.manual_seed(1)
    for variant in ("paper", "released"):
        layer = CCAttention(WIDTH, 4, 2, HEAD_DIM, variant=variant)
        torch.testing.assert_close(layer.tau(), torch.ones(2))
        assert 0.015 < float(layer.conv_grouped.weight.detach().std()) < 0.025
        assert 0.015 < float(layer.conv_depthwise.weight.detach().std()) < 0.025
        assert not layer.conv_depthwise.bias.any()
        assert not layer.conv_grouped.bias.any()


def test_a_share_of_the_dims_is_rotated_with_the_frequencies_of_so_many_dims():
    layer, x = build(rotary_fraction=0.5), draw(5)
    whole, half = tables(5, HEAD_DIM // 2), tables(5, HEAD_DIM // 4)
    torch.testing.assert_close(layer(x, whole)[0], layer(x, half)[0])
    query, still = layer.project(x, whole)[0], build(rotary_fraction=0.0)
    still.load_state_dict(layer.state_dict())
    torch.testing.assert_close(query[..., 4:], still.project(x, None)[0][..., 4:])
    assert not torch.allclose(query[..., :4], still.project(x, None)[0][..., :4])


def test_the_specification_computes_its_output():
    from undivided.spec import interpret

    for options in ({}, {"qk_norm": False}, {"variant": "released"}):
        layer, x, cos_sin = build(**options), draw(7), tables(7)
        if layer.variant == "released":
            layer.temperature.data = torch.tensor([-1.3, 0.6], dtype=torch.float64)
        heads = interpret(layer.spec, layer.spec_inputs(x, cos_sin)).out
        expected = layer(x, cos_sin)[0]
        torch.testing.assert_close(layer.o_proj(heads.transpose(1, 2).flatten(2)), expected, **EXACT)


def test_it_trains_under_autocast():
    layer = build(dtype=torch.float32).train()
    x = draw(5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, tables(5, dtype=torch.float32))[0]
    assert (
        cosine_similarity(out.float().flatten(), layer(x, tables(5, dtype=torch.float32))[0].flatten(), dim=0)
        > 0.99
    )
    out.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_a_latent_narrower_than_the_model_is_an_option_of_the_host(tmp_path):
    entry = {"mechanism": "cca", "num_query_heads": 2, "num_key_value_heads": 1, "conv_kernels": [3, 2]}
    model = UndividedForCausalLM(UndividedConfig(base_config=tiny_config(), attention=[entry, None]))
    layer = model.attention_layers()[0]
    assert layer.qkv_proj.weight.shape == (4 * 8, 32)
    assert layer.o_proj.weight.shape == (32, 2 * 8)
    model.save_pretrained(tmp_path)
    loaded = UndividedForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(256, (1, 6))
    torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)
    assert loaded.attention_layers()[0].lookback == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(groups=3), "num_key_value_heads=3 does not divide the 4 query heads"),
        (dict(num_query_heads=3), "num_key_value_heads=2 does not divide the 3 query heads"),
        (dict(conv_kernels=(2, 2, 2)), r"conv_kernels=\[2, 2, 2\] must be at most two sizes of at least 1"),
        (dict(conv_kernels=(0, 2)), r"conv_kernels=\[0, 2\] must be at most two sizes"),
        (dict(rotary_fraction=0.4), "rotary_fraction=0.4 of head_dim=8 is 3 dims; it must be an even number"),
        (dict(rotary_fraction=1.5), "rotary_fraction=1.5 of head_dim=8 is 12 dims"),
        (dict(variant="old"), "variant='old' is not one of 'paper', 'released'"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        build(**options)


def test_an_odd_width_of_the_values_is_named():
    with pytest.raises(ValueError, match="num_key_value_heads=1 times head_dim=3 is odd; value_shift halves"):
        CCAttention(WIDTH, 2, 1, 3, rotary_fraction=0.0)


def test_tables_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="position_embeddings is None; give the tables of the base model"):
        build()(draw(3))
    with pytest.raises(
        ValueError, match="position_embeddings rotate 4 dims, of which no even share are the 8"
    ):
        build()(draw(3), tables(3, 2))


def test_weights_of_zaya_need_its_variant_and_sizes():
    state = official(zaya_config()).state_dict()
    with pytest.raises(ValueError, match="ZAYA1 needs variant=\"released\".*this layer has variant='paper'"):
        build().load_official(state)
    with pytest.raises(
        ValueError, match=r"conv_depthwise.weight has shape \[48, 1, 3\], but ZAYA1 has \[48, 1, 2\]"
    ):
        build(variant="released", conv_kernels=(3, 2)).load_official(state)
