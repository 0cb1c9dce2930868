"""X-EcoMLA: exact at full rank without positions, the right rows, ranks by energy, any layers."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import VOCAB_SIZE, tiny_model
from undivided.convert.x_ecomla import convert_x_ecomla, energy_rank
from undivided.models.causal_lm import UndividedForCausalLM


def ids():
    return torch.randint(1, VOCAB_SIZE, (2, 13))


def source_weights(model, layer=0):
    attention = model.model.layers[layer].self_attn
    return tuple(getattr(attention, name).weight.double() for name in ("q_proj", "k_proj", "v_proj"))


@pytest.mark.parametrize("base", ["llama", "qwen2"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_at_full_rank_without_positions_the_function_stays(base, variant):
    model, tokens = tiny_model(base, dtype=torch.float64), ids()
    host, _ = convert_x_ecomla(model, latent_energy=1.0, query_energy=1.0, rope_dim=0, variant=variant)
    nowhere = torch.zeros_like(tokens)
    expected = model(tokens, position_ids=nowhere, attention_mask=torch.ones_like(tokens)).logits
    found = host(tokens, position_ids=nowhere, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_heads_keep_their_first_dimensions_and_the_positions_go_to_the_last():
    model = tiny_model(dtype=torch.float64)
    query, key, value = source_weights(model)
    host, _ = convert_x_ecomla(model, latent_energy=1.0, query_energy=1.0, rope_dim=4)
    layer = host.attention_layers()[0]
    assert (layer.nope_dim, layer.rope_dim, layer.value_dim) == (4, 4, 8)
    made = (layer.q_b_proj.weight @ layer.q_a_proj.weight).unflatten(0, (4, 8))
    torch.testing.assert_close(made, query.unflatten(0, (4, 8)))
    down = layer.kv_a_proj_with_mqa.weight
    up = layer.kv_b_proj.weight.unflatten(0, (4, 12)) @ down[: layer.latent_dim]
    own = [x.unflatten(0, (2, 8)).repeat_interleave(2, 0) for x in (key, value)]
    torch.testing.assert_close(up, torch.cat([own[0][:, :4], own[1]], dim=1))
    torch.testing.assert_close(down[layer.latent_dim :], key.unflatten(0, (2, 8)).mean(0)[4:])


def test_what_is_cut_is_the_square_of_the_dropped_singular_values():
    model = tiny_model(dtype=torch.float64)
    _, key, value = source_weights(model)
    stacked = torch.cat([x.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for x in (key, value)])
    dropped = torch.linalg.svdvals(stacked)[10:]
    host, _ = convert_x_ecomla(model, latent_dim=10, rope_dim=2)
    layer = host.attention_layers()[0]
    up = layer.kv_b_proj.weight.unflatten(0, (4, 14)) @ layer.kv_a_proj_with_mqa.weight[:10]
    keys, values = stacked.unflatten(0, (2, 4, 8))
    kept = (up - torch.cat([keys[:, :6], values], dim=1)).square().sum()
    # The layer leaves out the keys' last two dimensions, whose share of the error is not in it.
    left, size, right = torch.linalg.svd(stacked, full_matrices=False)
    rest = (left[:, 10:] * size[10:] @ right[10:]).unflatten(0, (2, 4, 8))[0][:, 6:].square().sum()
    torch.testing.assert_close(kept + rest, dropped.square().sum())


@pytest.mark.parametrize(("share", "paper", "released"), [(0.8, 8, 8), (0.5, 8, 8), (1.0, 20, 20)])
def test_ranks_are_multiples_of_eight_up_to_the_whole(share, paper, released):
    values = torch.ones(20)
    assert energy_rank(values[:10], 0.8) == 8
    assert energy_rank(torch.cat([torch.full((8,), 10.0), torch.ones(12)]), share) == paper
    assert energy_rank(torch.cat([torch.full((8,), 10.0), torch.ones(12)]), share, "released") == released


def test_the_paper_reaches_the_share_and_the_release_may_stop_one_short():
    # Eight values hold 8/16 of the energy: half of it needs eight, a little more needs nine.
    values = torch.ones(16)
    assert energy_rank(values, 0.5) == energy_rank(values, 0.5, "released") == 8
    assert energy_rank(values, 0.53) == 16
    assert energy_rank(values, 0.53, "released") == 8


def test_weights_are_as_many_as_before_unless_the_latent_says_otherwise():
    model = tiny_model()
    host, report = convert_x_ecomla(model, latent_dim=8, rope_dim=4)
    before = sum(w.numel() for w in source_weights(model))
    layer = host.attention_layers()[0]
    now = sum(p.numel() for n, p in layer.named_parameters() if not n.startswith("o_proj"))
    assert before - (32 + 32) < now <= before
    assert report.options["ranks"]["query_latent_dim"] == [layer.q_a_proj.out_features] * 2
    assert report.cache_bytes_per_token_per_rank == 2 * 4 * (8 + 4)


def test_ranks_of_layers_survive_saving(tmp_path):
    model = tiny_model()
    host, report = convert_x_ecomla(model, latent_energy=0.7)
    with torch.no_grad():
        host.attention_layers()[0].kv_b_proj.weight.mul_(1.5)
    host.save_pretrained(tmp_path)
    again, tokens = UndividedForCausalLM.from_pretrained(tmp_path).eval(), ids()
    assert [x.latent_dim for x in again.attention_layers()] == report.options["ranks"]["latent_dim"]
    assert torch.equal(again(tokens).logits, host.eval()(tokens).logits)


def test_decoding_equals_reading_the_whole():
    host, _ = convert_x_ecomla(tiny_model(dtype=torch.float64), latent_dim=12, layers=[1])
    host, tokens = host.eval(), ids()
    whole = host(tokens).logits
    first = host(tokens[:, :7], use_cache=True)
    rest = host(tokens[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 7:], rtol=1e-9, atol=1e-9)


def test_other_layers_stay_the_same_modules():
    model = tiny_model()
    host, _ = convert_x_ecomla(model, latent_dim=8, layers=[1])
    assert [entry and entry["mechanism"] for entry in host.config.attention] == [None, "mla"]
    for name, weight in model.model.layers[0].self_attn.named_parameters():
        assert host.attention_layers()[0].get_parameter(name) is weight, name
    assert host.attention_layers()[1].o_proj.weight is model.model.layers[1].self_attn.o_proj.weight


def test_random_weights_differ_by_seed_and_keep_the_output_projection():
    model = tiny_model()
    made = [
        convert_x_ecomla(model, latent_dim=8, init="random", latent_norm=True, seed=s)[0] for s in (0, 0, 1)
    ]
    weights = [x.attention_layers()[0].kv_b_proj.weight for x in made]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    layer = made[0].attention_layers()[0]
    assert layer.o_proj.weight is model.model.layers[0].self_attn.o_proj.weight
    assert torch.all(layer.kv_a_layernorm.weight == 1)
    assert made[0](ids()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "give latent_dim or latent_energy, and one of the two alone"),
        ({"latent_dim": 8, "latent_energy": 0.9}, "give latent_dim or latent_energy, and one of the two"),
        ({"latent_dim": 33}, "latent_dim=33 is not in 1 to 32, the rank of the weights"),
        ({"latent_dim": 8, "query_latent_dim": 0}, "query_latent_dim=0 is not in 1 to 32"),
        ({"latent_dim": 8, "query_latent_dim": 4, "query_energy": 0.5}, "or neither, but not both"),
        ({"latent_energy": 1.5}, "latent_energy=1.5 must be above 0 and at most 1"),
        ({"latent_dim": 8, "rope_dim": 3}, r"rope_dim=3 is not an even divisor of head_dim=8; .*\[2, 4, 8\]"),
        ({"latent_dim": 8, "layers": [2]}, r"layers=\[2\] must name layers of 0 to 1"),
        ({"latent_dim": 8, "init": "pca"}, "init='pca' is not one of 'svd', 'random'"),
        ({"latent_dim": 8, "variant": "code"}, "variant='code' is not one of 'paper', 'released'"),
        ({"latent_dim": 8, "latent_norm": True}, "a norm of weight 1 rescales the latent"),
    ],
)
def test_what_does_not_fit_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        convert_x_ecomla(tiny_model(), **options)
