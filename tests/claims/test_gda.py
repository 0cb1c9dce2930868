from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
from torch import nn

from undivided.claims import _gda_quality, load
from undivided.claims._gda_quality import duplicate_groups, recall, recalled, train_on_recall
from undivided.claims._tiny_lm import tiny_lm
from undivided.claims.gda import _FourCalls, four_calls, gate
from undivided.data.recall import recall_texts, recall_vocabulary
from undivided.layers.gda import GDAttention
from undivided.ops import differential_attention


def heads(*, noise_heads=2, queries=9, keys=9):
    draw = lambda count, length, width: torch.randn(1, count, length, width, dtype=torch.float64)  # noqa: E731
    return {
        "query": draw(8, queries, 16),
        "noise_query": draw(noise_heads, queries, 16),
        "key": draw(2, keys, 16),
        "noise_key": draw(2, keys, 16),
        "value": draw(2, keys, 32),
        "lam": torch.tensor(0.3, dtype=torch.float64),
        "norm_weight": torch.rand(32, dtype=torch.float64),
    }


def test_the_rival_computes_the_same():
    x = heads()
    expected = differential_attention(**x, is_causal=True, out_scale=0.8, backend="reference")
    torch.testing.assert_close(four_calls(**x), expected)
    step = heads(queries=1)
    expected = differential_attention(**step, out_scale=0.8, backend="reference")
    torch.testing.assert_close(four_calls(**step, is_causal=False), expected)


def test_the_layer_of_four_calls_is_the_layer():
    layer = GDAttention(24, 10, 4, 8, num_noise_heads=2).double()
    rival = _FourCalls(24, 10, 4, 8, num_noise_heads=2).double()
    rival.load_state_dict(layer.state_dict())
    x, angles = torch.randn(2, 7, 24, dtype=torch.float64), torch.randn(1, 7, 8, dtype=torch.float64)
    tables = (angles.cos(), angles.sin())
    torch.testing.assert_close(rival(x, tables)[0], layer(x, tables)[0])


def test_growth_that_tells_no_heads_apart_keeps_the_function_too():
    model = tiny_lm({"mechanism": "gda", "num_signal_heads": 4, "num_noise_heads": 2}).double()
    ids = torch.randint(256, (2, 11))
    grown = duplicate_groups(model)
    torch.testing.assert_close(grown(ids).logits, model(ids).logits)
    layer = grown.attention_layers()[0]
    assert (layer.num_signal_heads, layer.num_noise_heads) == (8, 4)
    assert grown.config.attention[0] == {"mechanism": "gda", "num_signal_heads": 8, "num_noise_heads": 4}
    assert model.attention_layers()[0].num_noise_heads == 2


def test_the_gate_passes_and_can_fail(monkeypatch):
    gate("cpu")
    wrong = lambda *x, **options: 1.01 * differential_attention(*x, **options)  # noqa: E731
    monkeypatch.setattr(
        "undivided.claims.gda.differential_attention",
        lambda *x, backend, **options: (wrong if backend == "sdpa" else differential_attention)(
            *x, backend=backend, **options
        ),
    )
    try:
        gate("cpu")
    except AssertionError as error:
        assert "error above 2 x eager" in str(error)
    else:
        raise AssertionError("the gate let a wrong kernel pass")


def test_the_claim_is_the_one_of_its_slug():
    assert load("gda").slug == "gda"


class Oracle(nn.Module):
    """Answers a question with what stands behind the same key in the text, or always with one token."""

    def __init__(self, vocabulary, always=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.vocabulary, self.always = vocabulary, always

    def forward(self, input_ids, use_cache):
        following = torch.zeros_like(input_ids)
        for row, text in enumerate(input_ids.tolist()):
            behind = {}
            for place, token in enumerate(text[:-1]):
                behind.setdefault(token, text[place + 1])
                following[row, place] = behind[token] if self.always is None else self.always
        return SimpleNamespace(logits=nn.functional.one_hot(following, self.vocabulary.size).float())


def test_recall_counts_right_answers():
    vocabulary = recall_vocabulary(8, 4)
    texts = recall_texts(70, vocabulary, num_pairs=6, num_queries=3)
    assert recalled(Oracle(vocabulary), texts) == 1
    value = vocabulary.values[1]
    share = (texts.answers == value).float().mean().item()
    assert abs(recalled(Oracle(vocabulary, value), texts) - share) < 1e-6
    assert 0.1 < share < 0.5


def test_a_model_learns_to_answer_with_a_value_of_the_text():
    vocabulary = recall_vocabulary(4, 8)
    model = tiny_lm(
        {"mechanism": "gda", "num_noise_heads": 1, "num_key_value_heads": 2},
        vocab_size=vocabulary.size,
        num_hidden_layers=1,
    )
    train, test = (recall_texts(512, vocabulary, num_pairs=1, num_queries=1, seed=seed) for seed in range(2))
    before = recalled(model, test)
    losses = train_on_recall(model, train, steps=60, batch_size=32, learning_rate=1e-2, seed=0)
    assert before < 0.5 < 0.9 < recalled(model, test)
    assert losses[-1] < losses[0] / 3


def test_recall_has_a_row_for_every_ratio_of_heads(monkeypatch):
    few = dataclasses.replace(_gda_quality._FEW_PAIRS, pairs=(2, 4), quick_steps=1, batch_size=4)
    monkeypatch.setattr(_gda_quality, "_FEW_PAIRS", few)
    monkeypatch.setattr(_gda_quality, "_SEEDS", (0, 1))
    rows = list(recall("cpu", True))
    assert [row.what.split(", ")[1] for row in rows] == list(_gda_quality._ARMS)
    for row in rows:
        assert 0 <= row.ours < 0.6 and row.unit == "share"
        assert row.shape.startswith(
            "4 pairs, half of them asked for, 16 values (any one of the text would be right for 0.250)"
        )
