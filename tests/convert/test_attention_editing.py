"""Attention Editing: what is put in place, that it can be taught layer by layer, and that gates start at one."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import VOCAB_SIZE, tiny_model
from undivided.convert.attention_editing import convert_edit_gate_swa, convert_edit_mla
from undivided.models.bases import attention_layers
from undivided.training.losses import feature_loss
from undivided.training.trainers import recorded_calls

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def ids(length=13):
    return torch.randint(1, VOCAB_SIZE, (2, length))


def stage_one(student, teacher, tokens):
    """The loss of every layer, on what the teacher's layer reads and writes."""
    with torch.no_grad(), recorded_calls(attention_layers(teacher)) as calls:
        teacher(tokens, use_cache=False)
    return [
        feature_loss(layer(**call)[0], expected)
        for layer, (call, expected) in zip(attention_layers(student), calls, strict=True)
    ]


@pytest.mark.parametrize("base", ["llama", "qwen2", "mistral"])
def test_windows_start_as_the_model_on_short_texts(base):
    model, tokens = tiny_model(base, dtype=torch.float64), ids()
    host, report = convert_edit_gate_swa(model, window=13, full_every=2)
    torch.testing.assert_close(host(tokens).logits, model(tokens).logits, **EXACT)
    assert [e and e["mechanism"] for e in host.config.attention] == ["gate_swa", None]
    assert all(loss < 1e-20 for loss in stage_one(host, model, tokens))
    longer = ids(20)
    assert not torch.allclose(host(longer).logits, model(longer).logits)
    # What grows without end is the one full layer: keys and values of 2 heads of 8 in float64.
    assert report.cache_bytes_per_token_per_rank == 2 * 2 * 8 * 8


def test_weights_are_shared_and_other_layers_the_same():
    model = tiny_model()
    host, _ = convert_edit_gate_swa(model, window=4, full_every=2, gate="head", sinks=1)
    for old, new in zip(attention_layers(model), attention_layers(host), strict=True):
        for name, weight in old.named_parameters():
            assert new.get_parameter(name) is weight, name


def test_layers_are_taught_apart_and_their_order_does_not_matter():
    model, tokens = tiny_model(dtype=torch.float64), ids()
    host, _ = convert_edit_mla(model, latent_dim=8)
    losses = stage_one(host, model, tokens)
    losses[0].backward(retain_graph=True)
    layers = attention_layers(host)
    assert layers[0].kv_b_proj.weight.grad.abs().max() > 0
    assert layers[1].kv_b_proj.weight.grad is None
    assert all(parameter.grad is None for parameter in attention_layers(model)[1].parameters())
    alone = layers[0].kv_b_proj.weight.grad.clone()
    layers[0].zero_grad()
    (losses[1] + losses[0]).backward()
    torch.testing.assert_close(layers[0].kv_b_proj.weight.grad, alone)


def test_a_teacher_of_another_size_leaves_the_loss_as_it_is():
    rows, target = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(feature_loss(10 * rows, 10 * target), feature_loss(rows, target))


def test_gates_learn_in_the_first_stage_and_nothing_else_moves():
    model = tiny_model(dtype=torch.float64)
    host, _ = convert_edit_gate_swa(model, window=2, full_every=0, gate="elementwise")
    tokens = ids(24)
    before = [loss.item() for loss in stage_one(host, model, tokens)]
    parameters = [p for layer in attention_layers(host) for p in layer.parameters()]
    copies = {p: p.detach().clone() for p in parameters}
    optimiser = torch.optim.Adam([layer.g_proj.weight for layer in attention_layers(host)], lr=0.1)
    for _ in range(40):
        optimiser.zero_grad()
        sum(stage_one(host, model, tokens)).backward()
        optimiser.step()
    after = [loss.item() for loss in stage_one(host, model, tokens)]
    assert all(late < 0.9 * early for early, late in zip(before, after, strict=True)), (before, after)
    gates = {id(layer.g_proj.weight) for layer in attention_layers(host)}
    assert all(torch.equal(p, copies[p]) for p in parameters if id(p) not in gates)


def test_mixed_caches_generate_as_without_one():
    model = tiny_model(dtype=torch.float64)
    host, _ = convert_edit_gate_swa(model, window=4, full_every=2)
    host, tokens = host.eval(), ids(9)
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = host.generate(tokens, **arguments)
    assert torch.equal(cached, host.generate(tokens, use_cache=False, **arguments))


def test_new_latents_are_normalised_and_reported():
    scores = iter([3.0, 9.0])
    host, report = convert_edit_mla(tiny_model(), latent_dim=8, evaluate=lambda model: next(scores))
    assert report.method == "edit-mla"
    assert report.perplexity == {"original": 3.0, "edit_mla": 9.0}
    assert torch.all(attention_layers(host)[0].kv_a_layernorm.weight == 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"window": 4, "full_every": 1}, "full_every=1 must be 0, for no full layer, or at least 2"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"window": 4, "gate": "row"}, "gate='row' is not one of"),
    ],
)
def test_what_does_not_fit_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        convert_edit_gate_swa(tiny_model(), **options)
