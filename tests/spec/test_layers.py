"""Every layer whose attention is specified, run beside the interpreter of its specification."""

from __future__ import annotations

import pytest
import torch

from tests.layers.latents import positions
from tests.layers.test_contract import OPTIONS
from tests.tiny import tiny_config
from undivided.layers import CAUSAL_MECHANISMS, causal_attention
from undivided.layers._base import CausalAttention
from undivided.layers.convit import GPSA
from undivided.layers.gna import NeighborhoodAttention
from undivided.layers.kdgqa import KeyDrivenGQA
from undivided.layers.pgqa import PerturbedGQA
from undivided.layers.rala import ModulatedSoftmaxAttention, RankAugmentedLinearAttention
from undivided.layers.vision_gqa import VisionGQA
from undivided.spec import AttentionSpec, interpret, lower

EXACT = {"rtol": 1e-10, "atol": 1e-10}

# Beside the options of the contract tests: those that change what is specified.
MORE = {
    "gqa": [{"scale": 0.9, "softcap": 1.5}],
    "gda": [
        {"num_noise_heads": 1, "num_signal_heads": 3, "key_ratio": 3},
        {"num_noise_heads": 2, "variant": "released", "softcap": 2.0},
    ],
    "gda_v2": [{"num_noise_heads": 2, "num_signal_heads": 6, "softcap": 2.0}],
    "gdla": [
        {"num_signal_heads": 6, "num_key_value_heads": 1, "softcap": 2.0, "output_gate": False},
        {"rope_dim": 0, "rope_stride": 1},
        {"nope_dim": 0, "rope_dim": 8, "rope_stride": 1},
    ],
    "kdgqa": [{"head_map": [0, 0, 0, 1]}, {"head_map": [1, 1, 0, 1], "softcap": 1.5}],
    "sqa": [
        {"preset": "xsqa", "num_query_heads": None},
        {"num_query_heads": 2, "num_key_value_heads": 4, "reverse": True},
        {"window": 3},
    ],
    "mla": [
        {"softcap": 2.0, "scale": 0.7},
        {"rope_dim": 0, "rope_stride": 1},
        {"nope_dim": 0, "rope_dim": 8, "rope_stride": 1},
        {"latent_norm": False, "query_latent_dim": 12},
    ],
    "gla": [{"num_latent_heads": 4, "softcap": 2.0}],
    "tpla": [
        {"num_shards": 4, "softcap": 3.0},
        {"num_shards": 1},
        {"norm": "exact"},
        {"softmax": "exact"},
        {"prefill": "exact"},
        {"nope_dim": 0, "rope_dim": 8, "rope_stride": 1},
    ],
}
# Mechanisms that the language does not express; a reason each.
NOT_SPECIFIED = {"nsa": "branches of one token that gates add up, one of them over compressed keys"}
# Mechanisms of which it expresses a part, and the options that leave the rest out.
IN_PART = {"gate_swa": {"gate": None, "sinks": 0}, "rcmha": {"variant": "mdha"}}
SPECIFIED = [
    (mechanism, OPTIONS.get(mechanism, {}) | IN_PART.get(mechanism, {}) | options)
    for mechanism in sorted(CAUSAL_MECHANISMS)
    if mechanism not in NOT_SPECIFIED
    for options in ({}, *MORE.get(mechanism, []))
]


def build(mechanism, options):
    """One layer of a small Llama in float64 whose logits are far from flat."""
    own = {name: value for name, value in options.items() if name != "softcap"}
    config = tiny_config("llama")
    # A cap is the base model's to have, not an option of the mechanism.
    config.attn_logit_softcapping = options.get("softcap")
    layer = causal_attention(mechanism).from_config(config, 1, **own).double().eval()
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, dtype=torch.float64)
                tensor.copy_(
                    2 * tensor.shape[-1] ** -0.5 * noise if "proj" in name else tensor + 0.2 * noise.abs()
                )
    return layer


def hidden_states(length=9):
    return torch.randn(2, length, 32, dtype=torch.float64), positions(length, 4)


@pytest.mark.parametrize(("mechanism", "options"), SPECIFIED)
@torch.no_grad()
def test_a_layer_is_its_specification_between_its_projections(mechanism, options):
    layer = build(mechanism, options)
    x, tables = hidden_states()
    inputs = layer.spec_inputs(x, tables)
    assert set(inputs) == set(layer.spec.inputs)
    heads = interpret(layer.spec, inputs).out
    torch.testing.assert_close(layer.o_proj(heads.transpose(1, 2).flatten(2)), layer(x, tables)[0], **EXACT)


@pytest.mark.parametrize(("mechanism", "options"), SPECIFIED)
@torch.no_grad()
def test_what_its_specification_is_lowered_to_computes_it(mechanism, options):
    layer = build(mechanism, options)
    lowered = lower(layer.spec)
    assert lowered.target.name != "interpreter"
    assert lowered.verify(layer.spec_inputs(*hidden_states())) < 1e-10
    assert AttentionSpec.from_json(layer.spec.to_json()) == layer.spec


VISION = {
    "gqa": lambda: VisionGQA(32, 4, 2, qk_norm=True),
    "gqa, three key heads of four": lambda: VisionGQA(32, 4, 3),
    "kdgqa": lambda: KeyDrivenGQA(32, 8, 4),
    "convit": lambda: GPSA(32, 4),
    "pgqa": lambda: PerturbedGQA(32, 4, 2, generator=torch.Generator().manual_seed(0)),
    "rala": lambda: RankAugmentedLinearAttention(32, 4),
    "rala, its softmax twin": lambda: ModulatedSoftmaxAttention(32, 4),
    "gna": lambda: NeighborhoodAttention(32, 4, kernel_size=2),
}


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_a_layer_of_images_is_its_specification_too(name):
    layer = VISION[name]().double().eval()
    for parameter in layer.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    x = hidden_states()[0]
    noisy = getattr(layer, "generator", None)
    state = None if noisy is None else noisy.get_state()
    out = layer(x)
    if noisy is not None:
        # The same draw: what is noise to the layer is an input to its specification.
        noisy.set_state(state)
    inputs = layer.spec_inputs(x)
    assert set(inputs) == set(layer.spec.inputs)
    heads = interpret(layer.spec, inputs).out
    torch.testing.assert_close(layer.proj(heads.transpose(1, 2).flatten(2)), out, **EXACT)
    assert lower(layer.spec).verify(inputs) < 1e-10


def test_more_than_twenty_systems_are_layers_that_carry_their_specification():
    """Each of these layers is run beside the interpreter above."""
    found = {mechanism for mechanism, _ in SPECIFIED} | {name.partition(",")[0] for name in VISION}
    assert found >= {
        "cca", "convit", "core_context", "dha", "dhsa", "dma", "gaam", "gate_swa", "gda", "gda_v2", "gdla", "gla",
        "gna", "gqa", "kdgqa", "mla", "moh", "neighborhood", "pgqa", "rala", "rcmha", "sqa", "tpla",
    }  # fmt: skip
    assert len(found) >= 23


def test_a_wrong_specification_is_noticed():
    """The comparison can fail: one factor of the scores is another."""
    layer = build("gqa", {})
    x, tables = hidden_states()
    inputs = layer.spec_inputs(x, tables)
    layer.scale *= 1.01
    other = layer.o_proj(interpret(layer.spec, inputs).out.transpose(1, 2).flatten(2))
    layer.scale /= 1.01
    assert not torch.allclose(other, layer(x, tables)[0], **EXACT)


def test_a_mechanism_that_is_not_written_in_the_language_says_so():
    class Other(CausalAttention):
        mechanism = "other"

    message = 'mechanism "other" is not written in the specification language'
    with pytest.raises(NotImplementedError, match=message):
        Other().spec  # noqa: B018
    with pytest.raises(NotImplementedError, match=message):
        Other().spec_inputs(torch.zeros(1, 2, 4), None)
    assert set(NOT_SPECIFIED) <= set(CAUSAL_MECHANISMS)
