from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_model
from undivided.convert import convert_dhsa
from undivided.convert.dhsa import average_precision, boundary_examples, train_boundary_predictor
from undivided.layers.boundaries import boundary_labels
from undivided.layers.rotary import apply_rotary, rotary_tables


def texts(samples=3, length=48):
    return torch.randint(1, 256, (samples, length))


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@torch.no_grad()
def test_examples_are_the_models_own_keys_and_attention(model_type):
    model = tiny_model(model_type, sliding_window=64) if model_type == "gemma2" else tiny_model(model_type)
    implementation = model.config._attn_implementation
    ids = texts(1)
    examples = list(boundary_examples(model, ids))
    assert len(examples) == 2
    assert model.config._attn_implementation == implementation
    model.set_attn_implementation("eager")
    output = model(ids, output_attentions=True)
    layer = model.get_decoder().layers[0]
    embedded = model.get_input_embeddings()(ids)
    if model_type == "gemma2":
        embedded = embedded * torch.tensor(model.config.hidden_size**0.5)
    states = layer.input_layernorm(embedded)
    key = layer.self_attn.k_proj(states).unflatten(-1, (2, -1)).transpose(1, 2)
    cos, sin = rotary_tables(model.get_decoder().rotary_emb(states, torch.arange(48)[None]))
    torch.testing.assert_close(examples[0][0], apply_rotary(key, cos, sin, interleaved=False))
    for (_, target), attention in zip(examples, output.attentions, strict=True):
        labels = boundary_labels(attention.mean(1))
        assert torch.equal(target, (labels >= 0.5).float())


def test_training_lowers_the_loss_and_touches_nothing_else():
    model, ids, losses = tiny_model("llama"), texts(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    predictor = train_boundary_predictor(
        model, ids, epochs=12, learning_rate=3e-3, hidden=16, record=losses.append
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(losses) == 12 * 3 * 2
    assert sum(losses[-6:]) < sum(losses[:6])
    assert not predictor.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_predictor_is_the_same_for_the_same_seed():
    model, ids = tiny_model("llama"), texts()
    first, second, other = (
        train_boundary_predictor(model, ids, epochs=1, hidden=8, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["mlp.0.weight"], other["mlp.0.weight"])


def test_average_precision_is_one_for_the_right_order_and_chance_for_none():
    labels = torch.tensor([1, 0, 1, 0, 0])
    assert average_precision(torch.tensor([5.0, 1, 4, 2, 3]), labels) == 1.0
    assert average_precision(torch.tensor([1.0, 5, 2, 4, 3]), labels) == pytest.approx((1 / 4 + 2 / 5) / 2)


@torch.no_grad()
def test_a_converted_model_reads_short_prompts_as_before_and_says_what_it_does():
    model = tiny_model("llama")
    host, report = convert_dhsa(model, texts(), budget=256, epochs=1, evaluate=lambda m: 2.0)
    ids = texts(2, 60)
    assert torch.equal(host(ids).logits, model(ids).logits)
    assert report.method == "dhsa"
    assert report.perplexity == {"original": 2.0, "dhsa": 2.0}
    assert report.approximations == [
        "a block of 128 queries of a longer prompt attends to 256 keys: perplexity 2 -> 2",
        "so does a generated token behind a longer cache: perplexity 2 -> 2",
    ]
    assert report.cache_bytes_per_token_per_rank == 2 * 2 * 2 * 8 * 4
    fixed, _ = convert_dhsa(model, boundaries="fixed", budget=256)
    blocks, report = convert_dhsa(model, mode="a", decode="full")
    assert report.approximations == [
        "a block of 128 queries of a longer prompt attends to 12.5% of the blocks of keys"
    ]
    assert all(
        layer.boundary_predictor is None for layer in (*fixed.attention_layers(), *blocks.attention_layers())
    )


def test_errors_name_what_is_missing():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match='boundaries="predicted" needs a calibration'):
        convert_dhsa(model)
    with pytest.raises(
        ValueError, match=r"input_ids has 15 tokens a text; gaps are told apart from 16 on \(window=4\)."
    ):
        train_boundary_predictor(model, texts(1, 15))
