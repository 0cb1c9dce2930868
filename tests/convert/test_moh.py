from __future__ import annotations

import pytest
import torch

from tests.tiny import VOCAB_SIZE, tiny_model
from undivided.convert.moh import convert_moh
from undivided.layers.gqa import GQAttention
from undivided.models.causal_lm import UndividedForCausalLM

ROUNDING = {"rtol": 1e-9, "atol": 1e-9}


def ids():
    return torch.randint(1, VOCAB_SIZE, (2, 13))


@pytest.mark.parametrize("base", ["llama", "qwen2", "mistral"])
def test_with_all_heads_selected_the_function_stays(base):
    model, tokens = tiny_model(base, dtype=torch.float64), ids()
    host, report = convert_moh(model, shared_heads=1, top_k=3)
    torch.testing.assert_close(host(tokens).logits, model(tokens).logits, **ROUNDING)
    assert report.approximations == []
    assert [entry["mechanism"] for entry in host.config.attention] == ["moh", "moh"]


@pytest.mark.parametrize("base", ["llama", "gemma2"])
def test_it_is_the_identity_exactly(base):
    model, tokens = tiny_model(base), ids()
    plain = UndividedForCausalLM.from_native(tiny_model(base)).eval()
    for layer_idx, layer in enumerate(plain.attention_layers()):
        gqa = GQAttention.from_config(model.config, layer_idx)
        gqa.load_state_dict(layer.state_dict())
        plain.set_attention(layer_idx, gqa)
    converted, _ = convert_moh(model, shared_heads=2, top_k=2)
    assert torch.equal(converted(tokens).logits, plain(tokens).logits)


def test_weights_are_shared_and_the_model_stays_as_it_is():
    model, tokens = tiny_model(), ids()
    before = model(tokens).logits
    host, _ = convert_moh(model, shared_heads=1, top_k=1)
    assert torch.equal(model(tokens).logits, before)
    assert not torch.allclose(host(tokens).logits, before)
    for old, new in zip(model.model.layers, host.attention_layers(), strict=True):
        for name, weight in old.self_attn.named_parameters():
            assert new.get_parameter(name) is weight, name


def test_the_first_heads_and_those_of_the_largest_queries_stay():
    host, _ = convert_moh(tiny_model(), shared_heads=1, top_k=1)
    layer, x = host.attention_layers()[0], torch.randn(2, 5, 32)
    query = layer.q_proj(x).unflatten(-1, (4, 8)).transpose(1, 2)
    selected = layer.router(x, query).selected
    assert selected[:, 0].all()
    assert torch.equal(selected[:, 1:].int().argmax(1), query.norm(dim=-1)[:, 1:].argmax(1))
    assert (selected.sum(1) == 2).all()


def test_a_converted_model_trains():
    host, _ = convert_moh(tiny_model(), shared_heads=1, top_k=2)
    tokens = ids()
    output = host.train()(tokens, labels=tokens)
    assert output.aux_losses["balance"] > 0
    output.loss.backward()
    for name, parameter in host.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_the_report_says_what_was_given_up():
    scores = iter([10.0, 12.5])
    host, report = convert_moh(
        tiny_model(),
        shared_heads=1,
        top_k=2,
        router="linear",
        gate_mode="released",
        evaluate=lambda _: next(scores),
    )
    assert report.perplexity == {"original": 10.0, "routed": 12.5}
    assert report.approximations == [
        "each token uses 75% of the heads: perplexity 10 -> 12.5",
        "the outputs of heads are weighed, with a mean of one over the routed ones in use: perplexity 10 -> 12.5",
    ]
    # Two layers with two heads of keys and values, eight wide, float32.
    assert report.cache_bytes_per_token_per_rank == 2 * 2 * 2 * 8 * 4
    assert report.options["router"] == "linear" and report.method == "moh"
    assert host.attention_layers()[0].router.routed.weight.shape == (3, 32)


def test_new_weights_follow_the_seed():
    options = {"shared_heads": 2, "top_k": 1, "router": "linear", "gate_mode": "released"}
    one, two, other = (convert_moh(tiny_model(), seed=seed, **options)[0] for seed in (0, 0, 1))
    states = [host.attention_layers()[1].router.state_dict() for host in (one, two, other)]
    assert states[0].keys() == {"routed.weight", "shared.weight", "kind.weight"}
    for name, weight in states[0].items():
        assert torch.equal(weight, states[1][name]) and not torch.equal(weight, states[2][name])


def test_a_converted_model_is_saved_and_loaded(tmp_path):
    host, _ = convert_moh(tiny_model(dtype=torch.float64), shared_heads=1, top_k=2, router="linear")
    host.save_pretrained(tmp_path)
    loaded, tokens = UndividedForCausalLM.from_pretrained(tmp_path, dtype=torch.float64), ids()
    torch.testing.assert_close(loaded(tokens).logits, host(tokens).logits, **ROUNDING)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(shared_heads=3, top_k=1), 'router="query_norm" compares routed heads'),
        (dict(shared_heads=1, top_k=4), "top_k=4 must be 0 to 3: of 4 heads 1 are shared"),
        (dict(shared_heads=1, top_k=1, gate_mode="soft"), "gate_mode='soft' is not one of"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        convert_moh(tiny_model(), **options)


def test_models_it_cannot_convert_are_named():
    with pytest.raises(ValueError, match='model_type "deepseek_v3" has latent attention already'):
        convert_moh(tiny_model("deepseek_v3"), shared_heads=1, top_k=1)
    host, _ = convert_moh(tiny_model(), shared_heads=1, top_k=1)
    with pytest.raises(ValueError, match='layer 0 has the mechanism "moh" already'):
        convert_moh(host, shared_heads=1, top_k=1)
