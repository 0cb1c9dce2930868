"""Windows with an output gate: against the definition, as copies of the source, and what the cache keeps."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import VOCAB_SIZE, tiny_model
from undivided.layers.gate_swa import GateSWAttention
from undivided.layers.gqa import GQAttention
from undivided.models.causal_lm import UndividedForCausalLM

SIZES = {"hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def tables(length, width=6):
    angle = torch.rand(1, length, width // 2, dtype=torch.float64)
    return tuple(f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))


def defined(layer, x, position_embeddings):
    """The definition, one query at a time."""
    query, key, value = layer.heads(x, position_embeddings)
    key, value = (t.repeat_interleave(2, dim=1) for t in (key, value))
    rows = []
    for n in range(x.shape[1]):
        seen = [m for m in range(n + 1) if m > n - layer.window or m < layer.sinks]
        weights = (layer.scale * query[:, :, n, None] @ key[:, :, seen].mT).softmax(-1)
        rows.append((weights @ value[:, :, seen])[:, :, 0])
    heads = torch.stack(rows, dim=2)
    if layer.gate is not None:
        gate = 2 * torch.sigmoid(x @ layer.g_proj.weight.T)
        heads = heads * gate.unflatten(-1, (4, -1)).transpose(1, 2)
    return layer.o_proj(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("gate", ["elementwise", "head", None])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (3, 0), (3, 2), (20, 0), (20, 1)])
def test_is_what_is_defined(gate, window, sinks):
    layer = GateSWAttention(**SIZES, window=window, gate=gate, sinks=sinks).double()
    if gate is not None:
        torch.nn.init.normal_(layer.g_proj.weight)
    x, positions = torch.randn(2, 9, 12, dtype=torch.float64), tables(9)
    torch.testing.assert_close(layer(x, positions)[0], defined(layer, x, positions), **EXACT)


@pytest.mark.parametrize("base", ["llama", "qwen2"])
def test_new_gates_are_one_and_a_wide_window_is_the_source(base):
    model = tiny_model(base, dtype=torch.float64)
    host = UndividedForCausalLM.from_native(tiny_model(base, dtype=torch.float64)).eval()
    for index, source in enumerate(host.attention_layers()):
        layer = GateSWAttention.from_config(model.config, index, window=64)
        missing = layer.load_state_dict(source.state_dict(), strict=False)
        assert missing.missing_keys == ["g_proj.weight"]
        host.set_attention(index, layer, window=64)
    ids = torch.randint(1, VOCAB_SIZE, (2, 13))
    torch.testing.assert_close(host(ids).logits, model(ids).logits, **EXACT)


@pytest.mark.parametrize("sinks", [0, 2])
def test_the_cache_keeps_a_window_and_decoding_is_the_whole(sinks):
    model = tiny_model(dtype=torch.float64)
    host = UndividedForCausalLM.from_native(model).eval()
    layer = GateSWAttention.from_config(model.config, 0, window=4, sinks=sinks)
    layer.load_state_dict(host.attention_layers()[0].state_dict(), strict=False)
    torch.nn.init.normal_(layer.g_proj.weight)
    host.set_attention(0, layer, window=4, sinks=sinks)
    ids = torch.randint(1, VOCAB_SIZE, (2, 17))
    expected = host(ids).logits
    output = host(ids[:, :9], use_cache=True)
    parts = [output.logits]
    for piece in ids[:, 9:].split([1, 3, 1, 3], dim=1):
        output = host(piece, past_key_values=output.past_key_values, use_cache=True)
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **EXACT)
    kept = [x.keys.shape[2] for x in output.past_key_values.layers]
    assert kept == [3 + sinks, 17]
    with pytest.raises(ValueError, match="a window of 4 tokens cannot be shortened after 17"):
        output.past_key_values.layers[0].crop(-1)


def test_padding_does_not_count():
    model = tiny_model(dtype=torch.float64)
    host = UndividedForCausalLM.from_native(model).eval()
    for index in range(2):
        layer = GateSWAttention.from_config(model.config, index, window=3)
        layer.load_state_dict(host.attention_layers()[index].state_dict(), strict=False)
        host.set_attention(index, layer, window=3)
    ids = torch.randint(1, VOCAB_SIZE, (1, 8))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(11) >= 3)[None].long()
    position = (torch.arange(11) - 3).clamp(min=0)[None]
    found = host(padded, attention_mask=mask, position_ids=position).logits[:, 3:]
    torch.testing.assert_close(found, host(ids).logits, **EXACT)


def test_the_gate_has_the_gradient_of_its_definition():
    layer = GateSWAttention(**SIZES, window=3, gate="head").double()
    x, positions = torch.randn(1, 5, 12, dtype=torch.float64), tables(5)
    found = torch.autograd.grad(layer(x, positions)[0].square().sum(), layer.g_proj.weight)[0]
    expected = torch.autograd.grad(defined(layer, x, positions).square().sum(), layer.g_proj.weight)[0]
    torch.testing.assert_close(found, expected, **EXACT)


def test_without_a_gate_and_sinks_it_is_a_specification():
    assert isinstance(GateSWAttention(**SIZES, window=3, gate=None), GQAttention)
    assert GateSWAttention(**SIZES, window=3, gate=None).spec.carrier.masks
    with pytest.raises(NotImplementedError, match="with a gate or sinks"):
        GateSWAttention(**SIZES, window=3).spec  # noqa: B018


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"window": 2, "sinks": -1}, "sinks=-1 at least 0"),
        ({"window": 2, "gate": "row"}, "gate='row' is not one of 'elementwise', 'head' or None"),
    ],
)
def test_what_does_not_fit_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        GateSWAttention(**SIZES, **options)
