"""Every layer whose attention is specified, run beside the interpreter."""

from __future__ import annotations

import pytest
import torch

import undivided.layers.gda
import undivided.layers.gqa
from tests.layers.latents import HEADS, HIDDEN, SIZES, hidden_states, positions, random_layer
from undivided.layers.gda import GDAttention
from undivided.layers.gla import GLAttention
from undivided.layers.gqa import GQAttention
from undivided.layers.latent import split_latent
from undivided.layers.mla import MLAttention
from undivided.layers.tpla import TPLAttention
from undivided.spec import interpret
from undivided.spec.systems import gda, gla, gqa, mla, tpla

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def random_weights(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return layer.double()


def with_interpreter(monkeypatch, module, name, replacement, layer):
    """Output of the layer as it is, and with the interpreter in the place of its operator."""
    x, tables = hidden_states(), positions(9, layer.head_dim // 2)
    with torch.no_grad():
        own = layer(x, tables)[0]
        monkeypatch.setattr(module, name, replacement)
        return own, layer(x, tables)[0]


@pytest.mark.parametrize("options", [{}, {"scale": 0.9, "softcap": 1.5}])
def test_gqa_is_its_specification(monkeypatch, options):
    layer = random_weights(GQAttention(HIDDEN, 4, 2, 6, **options))

    def dense(query, key, value, *, attn_mask, is_causal, scale, softcap):
        assert attn_mask is None and is_causal
        return interpret(gqa(2, scale, softcap), {"query": query, "key": key, "value": value}).out

    own, other = with_interpreter(monkeypatch, undivided.layers.gqa, "dense_attention", dense, layer)
    torch.testing.assert_close(own, other, **EXACT)


@pytest.mark.parametrize(
    "options", [{}, {"key_ratio": 3}, {"variant": "released", "softcap": 2.0, "layer_idx": 2}]
)
def test_gda_is_its_specification(monkeypatch, options):
    layer = random_weights(GDAttention(HIDDEN, 8, 2, 6, num_noise_heads=2, **options))

    def differential(query, noise_query, key, noise_key, value, lam, **rest):
        assert rest["attn_mask"] is None and rest["is_causal"]
        x = {"query": query, "query_noise": noise_query, "key": key, "key_noise": noise_key, "value": value}
        x |= {"lambda": lam, "norm_weight": rest["norm_weight"]}
        return interpret(gda(layer.lam_init, layer.subln.eps, layer.scale, layer.softcap), x).out

    own, other = with_interpreter(
        monkeypatch, undivided.layers.gda, "differential_attention", differential, layer
    )
    torch.testing.assert_close(own, other, **EXACT)


class Recorder:
    """Keeps what a latent layer hands to its attention."""

    def __init__(self, layer):
        self.seen = None
        attend = layer.attend

        def recording(query_nope, query_rope, latent, rope_key, attention_mask, exact):
            self.seen = {
                "query": query_nope,
                "query_rope": query_rope,
                "latent": latent,
                "rope_key": rope_key,
            }
            return attend(query_nope, query_rope, latent, rope_key, attention_mask, exact)

        layer.attend = recording


def layer_tensors(layer, seen):
    key_up, value_up = layer.up_projections()
    x = {**seen, "key_up": key_up, "value_up": value_up.transpose(1, 2)}
    if isinstance(layer, GLAttention):
        x["latent"] = split_latent(seen["latent"], layer.num_latent_heads)
    if isinstance(layer, TPLAttention):
        latents = split_latent(x.pop("latent"), layer.num_shards)
        key_up, value_up = x.pop("key_up"), x.pop("value_up")
        width = latents.shape[-1]
        for j in range(layer.num_shards):
            part = slice(j * width, (j + 1) * width)
            x[f"latent_{j}"] = latents[:, j : j + 1]
            x[f"key_up_{j}"] = key_up[:, :, part] * layer.logit_scale[j][:, None, None]
            x[f"value_up_{j}"] = value_up[:, part]
    return x


@pytest.mark.parametrize(
    ("layer_class", "build", "options"),
    [
        (MLAttention, lambda **o: mla(1, **o), {}),
        (MLAttention, lambda **o: mla(1, **o), {"softcap": 2.0, "scale": 0.7}),
        (GLAttention, lambda **o: gla(2, **o), {"num_latent_heads": 2}),
        (TPLAttention, lambda **o: tpla(2, **o), {"num_shards": 2}),
        (TPLAttention, lambda **o: tpla(4, **o), {"num_shards": 4, "softcap": 3.0}),
    ],
)
def test_the_layer_is_its_specification(layer_class, build, options):
    layer = random_layer(layer_class, **options)
    if isinstance(layer, TPLAttention):
        layer.logit_scale.copy_(torch.rand(layer.logit_scale.shape) + 0.5)
    recorder = Recorder(layer)
    with torch.no_grad():
        out = layer(hidden_states(), positions(9))[0]
        spec = build(
            nope_dim=SIZES["nope_dim"],
            rope_dim=SIZES["rope_dim"],
            scale=layer.scale,
            softcap=options.get("softcap"),
        )
        x = layer_tensors(layer, recorder.seen)
        assert set(x) == set(spec.inputs)
        assert x["query"].shape[1] == HEADS
        torch.testing.assert_close(layer.project_output(interpret(spec, x).out), out, **EXACT)
