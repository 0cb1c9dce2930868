"""Compiled training: what it computes is what the layers compute, and one compilation serves all of them."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from tests.tiny import tiny_llama
from undivided.convert.x_ecomla import convert_x_ecomla
from undivided.models.bases import attention_layers, cache_argument, cache_of
from undivided.training import Recipe, healing
from undivided.training.compiling import compiled_layers


def converted():
    return convert_x_ecomla(tiny_llama(), latent_dim=8, rope_dim=4)[0].requires_grad_(True).train()


def gradients(model):
    model.zero_grad()
    ids = torch.arange(20).view(2, 10)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def counting(calls):
    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    return backend


def test_gradients_stay_what_they_are_and_layers_share_their_code():
    model, calls = converted(), []
    before = gradients(model)
    with compiled_layers(model, backend=counting(calls)):
        inside = gradients(model)
    assert len(attention_layers(model)) > 1
    # Attention, MLP and norm, each once.
    assert len(calls) == 3
    for name, gradient in before.items():
        torch.testing.assert_close(inside[name], gradient)
    assert [layer.layer_idx for layer in attention_layers(model)] == list(range(len(attention_layers(model))))
    assert all(
        "forward" not in vars(part) for layer in model.get_decoder().layers for part in layer.children()
    )


def test_a_cache_finds_its_layers_inside_too():
    model = converted().eval()
    ids = torch.arange(10)[None]

    def last():
        with torch.no_grad():
            cache = cache_of(model(ids[:, :6], use_cache=True))
            return model(ids[:, 6:], use_cache=True, **{cache_argument(): cache}).logits

    expected = last()
    with compiled_layers(model, backend="eager"):
        torch.testing.assert_close(last(), expected)


def test_only_the_parts_named_are_compiled():
    model, calls = converted(), []
    with compiled_layers(model, parts=("mlp",), backend=counting(calls)):
        gradients(model)
    assert len(calls) == 1
    sentence = "name no child of a decoder layer; self_attn, mlp and norm do"
    with pytest.raises(ValueError, match=sentence), compiled_layers(model, parts=("experts",)):
        pass


def test_an_error_inside_leaves_the_layers_as_they_were():
    model = converted()
    with pytest.raises(RuntimeError, match="inside"), compiled_layers(model, backend="eager"):
        raise RuntimeError("inside")
    assert [layer.layer_idx for layer in attention_layers(model)] == list(range(len(attention_layers(model))))


def test_compiled_healing_takes_the_same_steps(tmp_path, monkeypatch):
    calls, texts = [], torch.randint(256, (16, 12), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(tokens=480, batch_size=4, learning_rate=1e-3, evaluations=2, checkpoints=0)
    compile_with = functools.partial(torch.compile, backend=counting(calls))
    found = []
    for compile in (False, True):
        monkeypatch.setattr(
            healing, "compiled_layers", functools.partial(compiled_layers, backend=counting(calls))
        )
        if compile:
            monkeypatch.setattr("undivided.training.trainers.torch.compile", compile_with)
        model = converted()
        healing.heal(
            model, tiny_llama(), texts, tmp_path / str(compile), replace(recipe, compile=compile),
            evaluate=lambda m: {"norm": sum(p.norm().item() for p in m.parameters())},
        )  # fmt: skip
        found.append(
            [
                row.get("norm", row.get("loss"))
                for row in healing.read_log(tmp_path / str(compile) / "log.jsonl")
            ]
        )
        assert bool(calls) is compile
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_logits_are_not_compared_with_labels_where_nothing_weighs_them(tmp_path, monkeypatch):
    seen = []

    def keep(self, *args, labels=None, **kwargs):
        seen.append(labels)
        return forward(self, *args, labels=labels, **kwargs)

    model = converted()
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", keep)
    texts = torch.randint(256, (4, 12))
    for weight in (0.0, 0.5):
        recipe = Recipe(tokens=24, batch_size=2, cross_entropy=weight, evaluations=1, checkpoints=0)
        healing.heal(model, tiny_llama(), texts, tmp_path / str(weight), recipe)
    assert [labels is None for labels in seen] == [True, False]
