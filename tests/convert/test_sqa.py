from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from tests.convert.sources import EXACT, SOURCES, logits, source_model, tokens
from tests.tiny import tiny_model
from undivided.convert._host import host_sharing_weights
from undivided.convert.sqa import best_heads, convert_sqa, head_scores, output_moments
from undivided.layers.gqa import GQAttention
from undivided.models.checkpoint import WorkFolder


def with_zeros(source, kept):
    """A copy of the source whose output projections have zeros for all heads but the kept ones, one list a layer."""
    zeroed = host_sharing_weights(source).native
    heads = source.config.num_attention_heads
    for layer, chosen in zip(zeroed.get_decoder().layers, kept, strict=True):
        weight = layer.self_attn.o_proj.weight.detach().clone().unflatten(1, (heads, -1))
        dropped = [head for head in range(heads) if head not in chosen]
        weight[:, dropped] = 0
        layer.self_attn.o_proj.weight = torch.nn.Parameter(weight.flatten(1))
    return zeroed


def attention_outputs(model, ids):
    """Outputs of the attention modules of all layers, and what enters their output projections."""
    seen = {"out": [], "heads": []}

    def keep(module, inputs, output):
        seen["heads"].append(inputs[0])
        seen["out"].append(output)

    hooks = [layer.self_attn.o_proj.register_forward_hook(keep) for layer in model.get_decoder().layers]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kept", [[1, 3], [2, 3]])
@pytest.mark.parametrize("name", SOURCES)
def test_the_kept_heads_alone_are_the_model_with_zeros_for_the_others(name, kept):
    source = source_model(name)
    host, _ = convert_sqa(source, keep_heads=kept)
    ids = tokens(2)
    torch.testing.assert_close(host(ids).logits, logits(with_zeros(source, [kept] * 2), ids), **EXACT)
    layer = host.attention_layers()[0]
    assert layer.num_query_heads == len(kept)
    assert layer.q_proj.out_features == layer.o_proj.in_features == len(kept) * layer.head_dim


def test_layers_may_keep_different_heads_and_numbers_of_them():
    source = source_model("llama, one head a key")
    kept = [[3, 0], [1]]
    host, report = convert_sqa(source, keep_heads=kept)
    ids = tokens(2)
    torch.testing.assert_close(host(ids).logits, with_zeros(source, kept)(ids).logits, **EXACT)
    assert report.options["keep_heads"] == [[0, 3], [1]]
    assert host.config.attention == [
        {"mechanism": "sqa", "num_query_heads": 2, "num_key_value_heads": 2},
        {"mechanism": "sqa", "num_query_heads": 1, "num_key_value_heads": 1},
    ]
    # Keys and values of 3 heads of 8, float64.
    assert report.cache_bytes_per_token_per_rank == 2 * 3 * 8 * 8


def test_with_all_heads_it_is_the_model_and_shares_its_weights():
    source = source_model("qwen2")
    host, report = convert_sqa(source, num_query_heads=4)
    ids = tokens(2)
    torch.testing.assert_close(host(ids).logits, source(ids).logits, **EXACT)
    assert report.approximations == []
    for native, layer in zip(source.get_decoder().layers, host.attention_layers(), strict=True):
        assert layer.q_proj.weight is native.self_attn.q_proj.weight
        assert layer.k_proj.weight is native.self_attn.k_proj.weight


def test_the_model_given_stays_what_it_is_and_keys_that_stay_are_shared():
    source = source_model()
    ids = tokens(2)
    before = source(ids).logits
    host, _ = convert_sqa(source, num_query_heads=2)
    assert torch.equal(source(ids).logits, before)
    assert host.attention_layers()[1].v_proj.weight is source.get_decoder().layers[1].self_attn.v_proj.weight


def test_the_score_is_the_mean_square_of_what_a_head_adds_to_the_output():
    source = source_model()
    ids = tokens()
    seen = attention_outputs(source, ids)
    moments, blocks = output_moments(source, ids), output_moments(source, ids, 8)
    for index, layer in enumerate(source.get_decoder().layers):
        weight = layer.self_attn.o_proj.weight.unflatten(1, (4, 8))
        parts = torch.einsum("bnhd,chd->bnhc", seen["heads"][index].unflatten(-1, (4, 8)), weight)
        expected = parts.pow(2).sum(-1).mean((0, 1))
        for moment in (moments[str(index)], blocks[str(index)]):
            torch.testing.assert_close(head_scores(layer.self_attn, 4, 2, moment), expected, **EXACT)


def test_without_calibration_the_score_is_the_norm_of_the_weights_from_value_to_output():
    attention = source_model().get_decoder().layers[0].self_attn
    out, value = attention.o_proj.weight.unflatten(1, (4, 8)), attention.v_proj.weight.unflatten(0, (2, 8))
    expected = torch.stack([(out[:, head] @ value[head // 2]).pow(2).sum() for head in range(4)])
    torch.testing.assert_close(head_scores(attention, 4, 2), expected, **EXACT)


@pytest.mark.parametrize(
    ("counts", "kept"),
    [
        ((4, 4), [1, 2, 5, 6]),
        ((2, 2), [1, 5]),
        ((4, 2), [0, 1, 4, 5]),
        ((1, 1), [5]),
        ((8, 4), list(range(8))),
    ],
)
def test_the_best_heads_of_the_best_groups_are_kept(counts, kept):
    scores = torch.tensor([5.0, 6.0, 2.0, 1.0, 7.0, 8.0, 1.0, 0.5])
    assert best_heads(scores, *counts, 4) == kept


@pytest.mark.parametrize("calibrated", [False, True])
def test_chooses_by_score(calibrated):
    source = source_model("llama")
    ids = tokens()
    with torch.no_grad():
        # Heads 1 and 2 put out next to nothing.
        for layer in source.get_decoder().layers:
            layer.self_attn.o_proj.weight[:, 8:24] *= 1e-3
    _, report = convert_sqa(source, ids if calibrated else None, num_query_heads=2)
    assert report.options == {"keep_heads": [[0, 3], [0, 3]], "refit": False, "calibrated": calibrated}
    assert report.approximations == ["4 of 8 query heads are dropped"]


def test_refitting_restores_heads_that_others_can_stand_for():
    source = source_model("llama, one key head")
    ids = tokens()
    with torch.no_grad():
        # Heads 1 and 3 compute what heads 0 and 2 compute; only their columns of the output projection differ.
        for layer in source.get_decoder().layers:
            rows = layer.self_attn.q_proj.weight.unflatten(0, (4, 8))
            rows[1], rows[3] = rows[0], rows[2]
    host, report = convert_sqa(source, ids, keep_heads=[0, 2], refit=True)
    expected = source(ids).logits
    # The damping of the fit is 1e-6.
    torch.testing.assert_close(host(ids).logits, expected, rtol=1e-3, atol=1e-3)
    plain, _ = convert_sqa(source, ids, keep_heads=[0, 2])
    assert (plain(ids).logits - expected).abs().mean() > 100 * (host(ids).logits - expected).abs().mean()
    assert report.approximations == [
        "4 of 8 query heads are dropped; the output projections are fitted to all heads"
    ]


def test_refitting_brings_the_first_layer_nearer_on_the_calibration():
    source = source_model("llama")
    ids = tokens()
    expected = attention_outputs(source, ids)["out"][0]
    errors = []
    for refit in (False, True):
        host, _ = convert_sqa(source, ids, keep_heads=[0, 3], refit=refit)
        own = attention_outputs(host, ids)["out"][0]
        errors.append((own - expected).pow(2).sum())
    assert errors[1] < errors[0]


def test_the_result_is_saved_loaded_and_evaluated(tmp_path):
    scores = iter([10.0, 12.0])
    host, report = convert_sqa(
        source_model("qwen2"), tokens(), num_query_heads=2, evaluate=lambda model: next(scores)
    )
    assert report.perplexity == {"original": 10.0, "sqa": 12.0}
    assert report.approximations == ["4 of 8 query heads are dropped: perplexity 10 -> 12"]
    assert json.loads(json.dumps(asdict(report))) == asdict(report)
    ids = tokens(1)
    expected = host(ids).logits
    host.save_pretrained(tmp_path)
    loaded = type(host).from_pretrained(tmp_path, dtype=torch.float64)
    for name, weight in host.state_dict().items():
        if "norm" not in name:
            assert torch.equal(loaded.state_dict()[name], weight), name
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_killed_conversion_resumes(tmp_path):
    def killed(model):
        if hasattr(model, "native"):
            raise KeyboardInterrupt
        return 1.0

    source, ids = source_model(), tokens()
    options = {"num_query_heads": 2, "refit": True}
    with pytest.raises(KeyboardInterrupt), WorkFolder(tmp_path / "out") as work:
        convert_sqa(source, ids, evaluate=killed, work=work, **options)
    with WorkFolder(tmp_path / "out") as work:
        host, _ = convert_sqa(source, ids, work=work, **options)
        assert work.resumed == ["sqa-outputs"]
    assert torch.equal(host(ids).logits, convert_sqa(source, ids, **options)[0](ids).logits)


@pytest.mark.parametrize("refit", [False, True])
def test_computes_where_the_model_is(device, refit, tmp_path):
    source = source_model().to(device)
    with WorkFolder(tmp_path / "out") as work:
        host, _ = convert_sqa(source, tokens(), num_query_heads=2, refit=refit, work=work)
    assert {parameter.device.type for parameter in host.parameters()} == {device.type}
    assert host(tokens().to(device)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "num_query_heads=None and keep_heads=None: give one of the two."),
        ({"num_query_heads": 2, "keep_heads": [0]}, r"num_query_heads=2 and keep_heads=\[0\]: give one of"),
        ({"keep_heads": [0], "num_key_value_heads": 1}, "num_key_value_heads=1 is decided by keep_heads"),
        ({"num_query_heads": 2, "refit": True}, "refit=True needs a calibration"),
        ({"num_query_heads": 0}, "num_query_heads=0 is not in 1 to 4, the query heads"),
        ({"num_query_heads": 5}, "num_query_heads=5 is not in 1 to 4, the query heads"),
        ({"num_query_heads": 2, "num_key_value_heads": 3}, "num_key_value_heads=3 is not in 1 to 2"),
        (
            {"num_query_heads": 3},
            "num_query_heads=3 on 2 key/value heads, of groups of 2, cannot be kept: each group keeps equally many; "
            "2, 4 can.",
        ),
        (
            {"num_query_heads": 4, "num_key_value_heads": 1},
            "num_query_heads=4 on 1 key/value heads, of groups of 2, cannot be kept: .* 1, 2 can.",
        ),
        ({"keep_heads": [0, 0]}, r"keep_heads of layer 0 is \[0, 0\]; give different query heads of 0 to 3"),
        ({"keep_heads": [[0], []]}, r"keep_heads of layer 1 is \[\]; give different query heads of 0 to 3"),
        ({"keep_heads": [4]}, r"keep_heads of layer 0 is \[4\]; give different query heads of 0 to 3"),
        ({"keep_heads": [[0]]}, "keep_heads has 1 lists, but the model has 2 layers"),
        (
            {"keep_heads": [0, 1, 3]},
            "keeps 2, 1 query heads of key heads 0, 1; keep equally many of each, or",
        ),
    ],
)
def test_heads_that_cannot_be_kept_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        convert_sqa(source_model(), **options)


def test_refuses_latent_and_exchanged_attention():
    with pytest.raises(ValueError, match='model_type "deepseek_v3" has latent attention already'):
        convert_sqa(tiny_model("deepseek_v3"), num_query_heads=2)
    host = host_sharing_weights(source_model())
    host.set_attention(1, GQAttention.from_config(host.config.base_config, 1))
    with pytest.raises(ValueError, match='layer 1 has the mechanism "gqa" already'):
        convert_sqa(host, num_query_heads=2)
