from __future__ import annotations

import torch

from undivided.claims import load
from undivided.claims._tiny_lm import tiny_lm
from undivided.claims.gda import _FourCalls, duplicate_groups, four_calls, gate
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
