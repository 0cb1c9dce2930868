from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from undivided.ops import dense_attention
from undivided.spec import (
    Additive,
    Alibi,
    AttentionSpec,
    Blocks,
    Carrier,
    Causal,
    Chart,
    Column,
    ColumnSum,
    Cosine,
    DefaultPayload,
    Dot,
    EmptyRow,
    Evidence,
    Exp,
    GivenMask,
    HeadMap,
    KeyBias,
    Merge,
    NullSource,
    Plan,
    Prior,
    Relative,
    RmsNorm,
    Scale,
    Sinkhorn,
    Softplus,
    Sparsemax,
    Term,
    Window,
    ZeroIncrement,
    attend,
    interpret,
    lower,
    standard,
)
from undivided.spec.systems import gda, gla, gqa, mla, sqa


def inputs(rows=5, columns=7):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    mask = torch.rand(2, 1, rows, columns) > 0.3
    mask[..., 0] = True
    return {
        "query": draw(2, 4, rows, 8), "key": draw(2, 2, columns, 8), "value": draw(2, 2, columns, 6),
        "q2": draw(2, 4, rows, 4), "k2": draw(2, 1, columns, 4), "noise": draw(2, 2, rows, 8),
        "key_bias": draw(2, 2, columns), "log_prior": draw(4, rows, columns), "mask": mask,
        "alibi_slopes": draw(4).abs(), "relative_table": draw(1, 15), "sink": draw(4), "t": draw(2).abs(),
        "head_map": torch.tensor([1, 1, 0, 1]), "lam": torch.tensor(0.3).double(),
        "assignment": torch.tensor([0, 0, 1, 2, 2, 2, 3])[:columns],
        "column_sums": torch.full((columns,), rows / columns).double(),
    }  # fmt: skip


DENSE = {
    "standard": standard(),
    "causal": standard(is_causal=True),
    "window": AttentionSpec(Carrier((Window(2), Causal()))),
    "two-sided window": AttentionSpec(Carrier((Window(2, 1),))),
    "blocks": AttentionSpec(Carrier((Blocks(4),))),
    "given mask": AttentionSpec(Carrier((GivenMask(), Causal()), empty_row=ZeroIncrement())),
    "two dots": AttentionSpec(evidence=Evidence(Chart((Dot(), Dot("q2", "k2", 0.4))))),
    "cosine": AttentionSpec(evidence=Evidence(Chart((Cosine(temperature="t"),)))),
    "temperature under a cap": AttentionSpec(evidence=Evidence(Chart((Dot(),), 2.0), link=Exp(1.7))),
    "key bias": AttentionSpec(evidence=Evidence(Chart((Dot(), KeyBias())), link=Exp(0.6))),
    "prior": AttentionSpec(Carrier((Causal(),)), Evidence(baseline=(Prior(), Alibi(), Relative()))),
    "prior and mask": AttentionSpec(Carrier((GivenMask(),)), Evidence(baseline=(Prior(),))),
    "head map": AttentionSpec(Carrier(heads=HeadMap(assignment="head_map"))),
    "value map": AttentionSpec(Carrier(heads=HeadMap(value_assignment="head_map"))),
    "null source": AttentionSpec(Carrier((Causal(),), empty_row=NullSource("sink"))),
    "null and empty": AttentionSpec(Carrier((GivenMask(), Window(1)), empty_row=NullSource(0.5))),
    "merged": AttentionSpec(Carrier(source_map=Merge())),
    "merged without counts": AttentionSpec(Carrier(source_map=Merge(log_counts=False))),
    "signed mix": AttentionSpec(mix=(Term(), Term(-0.5, "lam", (("query", "noise"),)))),
}


@pytest.mark.parametrize("name", DENSE)
def test_row_anchored_exponentials_go_to_dense_attention(name):
    lowered = lower(DENSE[name])
    assert lowered.target.name == "dense"
    assert lowered.verify(inputs()) < 1e-12


@pytest.mark.parametrize(
    ("spec", "target"),
    [
        (AttentionSpec(probe=Column(), anchor=ColumnSum()), "column"),
        (AttentionSpec(Carrier((Causal(),)), probe=Column(), anchor=ColumnSum()), "column"),
        (AttentionSpec(probe=Plan(), anchor=Sinkhorn(4)), "sinkhorn"),
        (
            AttentionSpec(probe=Plan(column_sums="column_sums"), anchor=Sinkhorn(4, relaxation=0.5)),
            "sinkhorn",
        ),
        (
            AttentionSpec(
                Carrier((Causal(),), HeadMap(assignment="head_map")), probe=Plan(), anchor=Sinkhorn(3)
            ),
            "sinkhorn",
        ),
        (
            AttentionSpec(
                evidence=Evidence(Chart((Dot(), Dot("q2", "k2")))), probe=Plan(), anchor=Sinkhorn(0)
            ),
            "sinkhorn",
        ),
        (AttentionSpec(anchor=Sparsemax()), "interpreter"),
        (AttentionSpec(evidence=Evidence(link=Softplus())), "interpreter"),
        (AttentionSpec(probe=Plan(), anchor=Sinkhorn(50, tolerance=1e-2)), "interpreter"),
        (AttentionSpec(Carrier((GivenMask(),), empty_row=DefaultPayload("default"))), "interpreter"),
    ],
)
def test_the_target_is_the_fastest_that_computes_it(spec, target):
    lowered = lower(spec)
    assert lowered.target.name == target
    assert lowered.verify({**inputs(), "default": torch.randn(4, 6).double()}) < 1e-12


@pytest.mark.parametrize(
    "spec",
    [
        gda(),
        gda(0.3, 1e-6, scale=0.2, softcap=1.5),
        AttentionSpec(Carrier((Window(2),)), mix=gda().mix, update=(RmsNorm(None), Scale(2.0))),
        AttentionSpec(mix=gda().mix, evidence=Evidence(link=Exp(1.5))),
    ],
)
def test_one_map_minus_another_goes_to_differential_attention(spec):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    x = {"query": draw(2, 4, 5, 8), "query_noise": draw(2, 2, 5, 8), "key": draw(2, 2, 7, 8)}
    x |= {
        "key_noise": draw(2, 2, 7, 8),
        "value": draw(2, 2, 7, 6),
        "lambda": draw(1)[0],
        "norm_weight": draw(6),
    }
    lowered = lower(spec)
    assert lowered.target.name == "differential"
    assert lowered.verify(x) < 1e-12
    assert lower(spec, "dense").verify(x) < 1e-12


@pytest.mark.parametrize(
    "build", [lambda: mla(1, 8, 4), lambda: gla(2, 8, 4), lambda: mla(1, 8, 0, softcap=2.0)]
)
def test_latent_target_reads_the_latent_as_key_and_value(build):
    spec = build()
    groups = spec.carrier.heads.key_heads
    x = {
        "query": torch.randn(2, 4, 5, 8),
        "query_rope": torch.randn(2, 4, 5, 4),
        "rope_key": torch.randn(2, 1, 7, 4),
    }
    x |= {
        "latent": torch.randn(2, groups, 7, 9),
        "key_up": torch.randn(4, 8, 9),
        "value_up": torch.randn(4, 9, 6),
    }
    assert lower(spec).target.name == "dense"
    assert lower(spec, "latent").verify({name: x[name].double() for name in spec.inputs}) < 1e-12


def test_additive_and_boolean_masks_at_call_time():
    x = inputs()
    bias = torch.randn(2, 1, 5, 7).double().masked_fill(~x["mask"], float("-inf"))
    for mask in (x["mask"], bias):
        assert lower(standard()).verify(x, mask) < 1e-12
        assert lower(DENSE["prior"]).verify(x, mask if mask is bias else None) < 1e-12


def test_low_precision_stays_in_its_dtype():
    x = {name: tensor.half() for name, tensor in inputs().items() if name in ("query", "key", "value")}
    out = attend(standard(is_causal=True), **x)
    assert out.dtype == torch.float16
    expected = interpret(standard(is_causal=True), x).out
    assert (out - expected).abs().max() < 16 * torch.finfo(torch.float16).eps * expected.abs().max()
    assert attend(AttentionSpec(anchor=Sparsemax()), **x).dtype == torch.float16


class Calls(TorchDispatchMode):
    """Names of the kernels that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", [gqa(2), sqa(4, 2)], ids=["gqa", "sqa"])
def test_a_lowered_softmax_calls_nothing_beside_its_operator(spec):
    x = {name: inputs(7, 7)[name] for name in ("query", "key", "value")}
    with Calls() as lowered:
        lower(spec)(x)
    with Calls() as alone:
        dense_attention(**x, is_causal=True)
    assert lowered.names == alone.names


def test_empty_rows_are_refused_by_the_fast_path_too():
    x = inputs()
    x["mask"][0, 0, 2] = False
    with pytest.raises(EmptyRow, match=r"receiver 2 \(batch 0, head 0\)"):
        lower(AttentionSpec(Carrier((GivenMask(),))))(x)
    with pytest.raises(EmptyRow, match="receiver 0"):
        lower(standard(is_causal=True))(inputs(rows=7, columns=5))


def test_gradients_flow_through_a_lowered_specification():
    x = {name: tensor.requires_grad_() for name, tensor in inputs().items() if tensor.is_floating_point()}
    lower(DENSE["signed mix"])(x).sum().backward()
    fast = {name: x[name].grad.clone() for name in ("query", "key", "value", "noise", "lam")}
    for tensor in x.values():
        tensor.grad = None
    interpret(DENSE["signed mix"], x).out.sum().backward()
    for name, gradient in fast.items():
        torch.testing.assert_close(gradient, x[name].grad, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("spec", "target", "message"),
    [
        (
            AttentionSpec(evidence=Evidence(link=Softplus())),
            "dense",
            'target "dense" cannot compute this: the link is softplus, not exp. Able: "interpreter".',
        ),
        (
            AttentionSpec(evidence=Evidence(Chart((Additive(),)))),
            "dense",
            "the chart has the term vector . tanh",
        ),
        (standard(), "latent", "the chart is not a mapped latent"),
        (standard(), "sinkhorn", 'the anchor is rows sum to 1. Able: "dense", "interpreter".'),
        (standard(), "flash", 'target=\'flash\' is not one of "auto", "latent", "differential", "dense"'),
    ],
)
def test_an_explicit_target_refuses_with_reasons(spec, target, message):
    with pytest.raises(ValueError) as caught:
        lower(spec, target)
    assert message in str(caught.value)


def test_missing_inputs_are_named():
    with pytest.raises(ValueError, match="reads a tensor 'value' that is not given"):
        lower(standard())({"query": torch.randn(1, 1, 2, 4), "key": torch.randn(1, 1, 2, 4)})


@pytest.mark.parametrize("target", ["dense", "differential"])
def test_a_coefficient_may_differ_from_head_to_head_and_row_to_row(target):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    x = {"query": draw(2, 4, 5, 8), "query_noise": draw(2, 2, 5, 8), "key": draw(2, 2, 7, 8)}
    x |= {"key_noise": draw(2, 2, 7, 8), "value": draw(2, 2, 7, 6), "norm_weight": draw(6)}
    for factor in (draw(4), draw(2, 4, 5)):
        assert lower(gda(), target).verify({**x, "lambda": factor}) < 1e-12


@pytest.mark.parametrize("target", ["latent", "dense"])
def test_latent_paths_refuse_empty_rows(target):
    x = {
        "query": torch.randn(2, 4, 5, 8),
        "query_rope": torch.randn(2, 4, 5, 4),
        "rope_key": torch.randn(2, 1, 7, 4),
    }
    x |= {"latent": torch.randn(2, 1, 7, 9), "key_up": torch.randn(4, 8, 9), "value_up": torch.randn(4, 9, 6)}
    mask = torch.ones(2, 1, 5, 7).bool()
    mask[1, 0, 3, :6] = False
    mask[1, 0, 3, 6] = False
    for given in (mask, torch.zeros(2, 1, 5, 7).masked_fill(~mask, float("-inf"))):
        with pytest.raises(EmptyRow, match=r"receiver 3 \(batch 1, head 0\)"):
            lower(mla(1, 8, 4), target)(x, given)
