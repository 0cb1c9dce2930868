from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
    Distance,
    Dot,
    Elu1,
    EmptyRow,
    Entmax,
    Evidence,
    Exp,
    Gelu,
    GivenMask,
    GivenScores,
    Global,
    GlobalSum,
    HeadMap,
    Identity,
    KeyBias,
    LogCounts,
    Merge,
    NoAnchor,
    NotPositive,
    NullSource,
    Pair,
    Plan,
    Prior,
    Raw,
    Relative,
    Relu,
    Residual,
    Silu,
    Sinkhorn,
    Softplus,
    Sparsemax,
    StatefulBaseline,
    Support,
    TopK,
    Values,
    Window,
    ZeroIncrement,
    coarse_grain,
    coarse_log_weights,
    divergence,
    double_carrier,
    effective_potential,
    entropy,
    free_energy,
    interpret,
    push_forward,
    standard,
)
from undivided.spec.anchors import anchor_log

TIGHT = {"rtol": 1e-12, "atol": 1e-13}


def tensors(batch=2, heads=4, key_heads=2, rows=5, columns=7, head_dim=6, value_dim=3):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return {
        "query": draw(batch, heads, rows, head_dim),
        "key": draw(batch, key_heads, columns, head_dim),
        "value": draw(batch, key_heads, columns, value_dim),
    }


def sdpa(x, mask=None):
    return F.scaled_dot_product_attention(x["query"], x["key"], x["value"], attn_mask=mask, enable_gqa=True)


def test_standard_is_torch_attention_with_mask_and_bias():
    x = tensors()
    triangle = torch.ones(5, 7, dtype=torch.bool).tril(2)
    torch.testing.assert_close(interpret(standard(), x).out, sdpa(x), **TIGHT)
    torch.testing.assert_close(interpret(standard(is_causal=True), x).out, sdpa(x, triangle), **TIGHT)
    bias = torch.randn(4, 5, 7, dtype=torch.float64)
    spec = AttentionSpec(Carrier((Causal(),)), Evidence(baseline=(Prior("bias"),)))
    masked = bias.masked_fill(~triangle, float("-inf"))
    torch.testing.assert_close(interpret(spec, {**x, "bias": bias}).out, sdpa(x, masked), **TIGHT)
    torch.testing.assert_close(interpret(standard(), x, attention_mask=masked).out, sdpa(x, masked), **TIGHT)


def test_result_is_float64_and_differentiable():
    x = {name: tensor.float().requires_grad_() for name, tensor in tensors().items()}
    out = interpret(standard(is_causal=True), x).out
    assert out.dtype == torch.float64
    out.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in x.values())


@pytest.mark.parametrize(
    ("mask", "sees"),
    [
        (Causal(), lambda n, m: m <= n + 2),
        (Window(1), lambda n, m: n + 1 <= m <= n + 2),
        (Window(1, 1), lambda n, m: n + 1 <= m <= n + 3),
        (Blocks(3), lambda n, m: (n + 2) // 3 == m // 3),
    ],
)
def test_masks_count_positions_from_the_end(mask, sees):
    trace = interpret(AttentionSpec(Carrier((mask,))), tensors()).terms[0]
    expected = [[sees(n, m) for m in range(7)] for n in range(5)]
    assert trace.mask[0, 0].tolist() == expected
    assert (trace.weights[0, 0][~trace.mask[0, 0]] == 0).all()


def test_masks_hold_together():
    x = tensors()
    given = torch.rand(2, 1, 5, 7) > 0.3
    given[..., 0:3] = True
    spec = AttentionSpec(Carrier((Causal(), GivenMask("given"))))
    both = given & torch.ones(5, 7, dtype=torch.bool).tril(2)
    torch.testing.assert_close(interpret(spec, {**x, "given": given}).out, sdpa(x, both), **TIGHT)


@pytest.mark.parametrize(
    ("chart", "score"),
    [
        (Dot(scale=0.3), lambda q, k: 0.3 * q @ k),
        (Dot(scale=1.0, feature="elu1"), lambda q, k: (F.elu(q) + 1) @ (F.elu(k) + 1)),
        (Cosine(), lambda q, k: math.sqrt(6) * F.cosine_similarity(q, k, dim=0)),
        (Cosine(scale=2.0, temperature="t"), lambda q, k: 2 * 0.7 * F.cosine_similarity(q, k, dim=0)),
        (Distance(scale=1.0), lambda q, k: -0.5 * (q - k).square().sum()),
        (Additive(), lambda q, k: torch.tanh(q + k).sum()),
    ],
)
def test_charts_are_the_formulas(chart, score):
    x = tensors(heads=2, key_heads=2)
    x |= {"vector": torch.ones(2, 6).double(), "t": torch.full((2,), 0.7, dtype=torch.float64)}
    scores = interpret(AttentionSpec(evidence=Evidence(Chart((chart,)))), x).terms[0].scores
    torch.testing.assert_close(scores[1, 1, 2, 4], score(x["query"][1, 1, 2], x["key"][1, 1, 4]), **TIGHT)


def test_terms_of_a_chart_add_up_under_the_cap():
    x = {**tensors(), "key_bias": torch.randn(2, 2, 7).double(), "scores": torch.randn(2, 4, 5, 7).double()}
    spec = AttentionSpec(evidence=Evidence(Chart((Dot(), KeyBias(), GivenScores()), softcap=1.5)))
    dot = x["query"] @ x["key"].repeat_interleave(2, 1).transpose(-2, -1) / math.sqrt(6)
    expected = 1.5 * torch.tanh((dot + x["key_bias"].repeat_interleave(2, 1)[:, :, None] + x["scores"]) / 1.5)
    torch.testing.assert_close(interpret(spec, x).terms[0].scores, expected, **TIGHT)


def test_latent_chart_is_the_expanded_dot_product():
    x = tensors(key_heads=1)
    x |= {"latent": torch.randn(2, 1, 7, 9).double(), "up": torch.randn(4, 6, 9).double()}
    spec = AttentionSpec(evidence=Evidence(Chart((Dot(key="latent", key_map="up"),))))
    expanded = torch.einsum("hdr,bmr->bhmd", x["up"], x["latent"][:, 0])
    expected = sdpa({**x, "key": expanded, "value": x["value"].expand(-1, 4, -1, -1)})
    torch.testing.assert_close(interpret(spec, x).out, expected, **TIGHT)


def test_baselines_are_log_priors():
    x = {
        **tensors(),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0]).double(),
        "relative_table": torch.randn(4, 13).double(),
        "log_counts": torch.rand(1, 7).double(),
    }
    distance = torch.arange(7)[None, :] - torch.arange(2, 7)[:, None]
    for factor, expected in (
        (Alibi(), -x["alibi_slopes"][:, None, None] * distance.abs()),
        (Relative(), x["relative_table"][:, distance + 6]),
        (LogCounts(), x["log_counts"].expand(4, 5, 7)),
    ):
        out = interpret(AttentionSpec(evidence=Evidence(baseline=(factor,))), x).out
        torch.testing.assert_close(out, sdpa(x, expected.contiguous()), **TIGHT)


def test_temperature_divides_the_score_and_not_the_prior():
    x = {**tensors(), "log_prior": torch.randn(5, 7).double()}
    spec = AttentionSpec(evidence=Evidence(baseline=(Prior(),), link=Exp(2.5)))
    scaled = {**x, "query": x["query"] / 2.5}
    torch.testing.assert_close(interpret(spec, x).out, sdpa(scaled, x["log_prior"]), **TIGHT)


def test_head_maps_choose_keys_and_values_apart():
    x = tensors(heads=4, key_heads=3)
    spec = AttentionSpec(Carrier(heads=HeadMap(4, 3, (0, 0, 2, 1), (1, 1, 1, 0))))
    expected = sdpa({**x, "key": x["key"][:, [0, 0, 2, 1]], "value": x["value"][:, [1, 1, 1, 0]]})
    torch.testing.assert_close(interpret(spec, x).out, expected, **TIGHT)
    named = AttentionSpec(Carrier(heads=HeadMap(assignment="map")))
    x["map"] = torch.tensor([0, 0, 2, 1])
    expected = sdpa({**x, "key": x["key"][:, x["map"]], "value": x["value"][:, x["map"]]})
    torch.testing.assert_close(interpret(named, x).out, expected, **TIGHT)


REGIMES = {
    "row": AttentionSpec(),
    "column": AttentionSpec(probe=Column(), anchor=ColumnSum()),
    "plan": AttentionSpec(probe=Plan(), anchor=Sinkhorn(5)),
    "global": AttentionSpec(probe=Global(), anchor=GlobalSum()),
    "raw": AttentionSpec(evidence=Evidence(link=Identity()), probe=Raw(), anchor=NoAnchor()),
    "support": AttentionSpec(probe=Support(), anchor=TopK(3)),
    "sparsemax": AttentionSpec(anchor=Sparsemax()),
    "entmax": AttentionSpec(anchor=Entmax(1.5)),
    "values": AttentionSpec(probe=Values(), anchor=NoAnchor()),
    "softplus": AttentionSpec(evidence=Evidence(link=Softplus())),
    "elu1": AttentionSpec(evidence=Evidence(link=Elu1())),
    "relu": AttentionSpec(evidence=Evidence(link=Relu())),
}


@pytest.mark.parametrize("name", REGIMES)
def test_every_regime_runs_on_one_input_with_finite_gradients(name):
    torch.manual_seed(1)
    x = {key: tensor.requires_grad_() for key, tensor in tensors().items()}
    result = interpret(REGIMES[name], x)
    assert result.out.shape == (2, 4, 5, 3)
    result.out.square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in x.values())
    sums = {
        "row": -1,
        "sparsemax": -1,
        "entmax": -1,
        "support": -1,
        "softplus": -1,
        "elu1": -1,
        "relu": -1,
        "plan": -1,
    }
    if name in sums:
        torch.testing.assert_close(result.weights.sum(-1), torch.ones(2, 4, 5).double(), **TIGHT)
    if name == "column":
        torch.testing.assert_close(result.weights.sum(-2), torch.ones(2, 4, 7).double(), **TIGHT)


def empty_row_inputs():
    x = {key: tensor.requires_grad_() for key, tensor in tensors().items()}
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[3] = False
    return {**x, "mask": mask, "default_value": torch.randn(4, 3).double(), "sink": torch.randn(4).double()}


def test_an_empty_row_is_refused_unless_a_fallback_is_declared():
    with pytest.raises(
        EmptyRow, match=r"receiver 3 \(batch 0, head 0\) has no admissible source; declare carrier"
    ):
        interpret(AttentionSpec(Carrier((GivenMask(),))), empty_row_inputs())
    assert issubclass(EmptyRow, ValueError)


@pytest.mark.parametrize("fallback", [ZeroIncrement(), NullSource(), NullSource("sink"), DefaultPayload()])
@pytest.mark.parametrize("link", [Exp(), Softplus()])
def test_every_fallback_is_finite_in_value_and_gradient(fallback, link):
    x = empty_row_inputs()
    out = interpret(AttentionSpec(Carrier((GivenMask(),), empty_row=fallback), Evidence(link=link)), x).out
    out.sum().backward()
    assert out.isfinite().all()
    assert all(x[name].grad.isfinite().all() for name in ("query", "key", "value"))
    wanted = x["default_value"] if isinstance(fallback, DefaultPayload) else torch.zeros(4, 3).double()
    torch.testing.assert_close(out[:, :, 3], wanted.expand(2, 4, 3), **TIGHT)


def test_a_null_source_is_one_more_key_with_a_value_of_zero():
    x = {**tensors(key_heads=4), "sink": torch.randn(4).double()}
    spec = AttentionSpec(Carrier(empty_row=NullSource("sink")))
    bias = torch.cat(
        [torch.zeros(2, 4, 5, 7).double(), x["sink"][None, :, None, None].expand(2, 4, 5, 1)], -1
    )
    padded = {name: F.pad(x[name], (0, 0, 0, 1)) for name in ("key", "value")}
    torch.testing.assert_close(interpret(spec, x).out, sdpa({**x, **padded}, bias), **TIGHT)


def test_coarse_graining_commutes_with_the_row_anchor():
    logs = torch.randn(3, 5, 7).double()
    assignment = torch.tensor([0, 1, 0, 2, 2, 2, 1])
    fine = push_forward(anchor_log(logs, AttentionSpec().anchor), assignment)
    coarse = anchor_log(coarse_log_weights(logs, assignment), AttentionSpec().anchor)
    torch.testing.assert_close(fine, coarse, **TIGHT)


def test_n_equal_keys_are_one_key_with_baseline_log_n():
    x = tensors(columns=4)
    assignment = torch.tensor([0, 1, 1, 1, 2, 3, 3])
    many = {**x, "key": x["key"][:, :, assignment], "value": x["value"][:, :, assignment]}
    counts = torch.tensor([1.0, 3.0, 1.0, 2.0]).double().log()
    torch.testing.assert_close(sdpa(many), sdpa(x, counts.expand(5, 4)), **TIGHT)
    merged = AttentionSpec(Carrier(source_map=Merge()))
    torch.testing.assert_close(interpret(merged, {**many, "assignment": assignment}).out, sdpa(many), **TIGHT)
    uncounted = AttentionSpec(Carrier(source_map=Merge(log_counts=False)))
    without = interpret(uncounted, {**many, "assignment": assignment}).out
    torch.testing.assert_close(without, sdpa(x), **TIGHT)
    assert (without - sdpa(many)).abs().max() > 1e-2


def test_merging_averages_each_class():
    x = tensors()
    merged = coarse_grain(x["key"], x["value"], torch.tensor([[0, 0, 1, 1, 1, 2, 2]]), 3)
    torch.testing.assert_close(merged.key[:, :, 1], x["key"][:, :, 2:5].mean(2), **TIGHT)
    torch.testing.assert_close(merged.log_count.exp(), torch.tensor([[2.0, 3.0, 2.0]]).double(), **TIGHT)
    with pytest.raises(ValueError, match="class 1 of 3 has no source; every class needs one"):
        coarse_grain(x["key"], x["value"], torch.tensor([0, 0, 0, 2, 2, 2, 2]), 3)
    with pytest.raises(ValueError, match=r"assignment has shape \[1, 3\]; it needs \[7\] or \[2, 7\]"):
        coarse_grain(x["key"], x["value"], torch.tensor([0, 1, 2]))


def onto_simplex(x):
    """Euclidean projection of rows, by sorting."""
    ordered = x.sort(-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1)
    thresholds = (ordered.cumsum(-1) - 1) / count
    return (x - thresholds.gather(-1, (ordered > thresholds).sum(-1, keepdim=True) - 1)).clamp(min=0)


def test_free_energy_identity_and_minimiser():
    scores, tau = torch.randn(4, 5).double() / 2, 0.7
    log_prior = (torch.randn(4, 5).double() / 2).log_softmax(-1)
    alpha = (scores / tau + log_prior).softmax(-1)
    log_z = torch.logsumexp(scores / tau + log_prior, -1)
    p = torch.rand(4, 5).double().softmax(-1)
    left = free_energy(p, scores, log_prior, tau) + tau * log_z
    torch.testing.assert_close(left, tau * divergence(p, alpha.log()), **TIGHT)
    # Projected gradient descent from the uniform row.
    x = torch.full((4, 5), 0.2).double()
    for _ in range(2000):
        x = onto_simplex(x - 0.02 * (tau * (x.clamp(min=1e-9).log() - log_prior + 1) - scores))
    torch.testing.assert_close(x, alpha, rtol=1e-7, atol=1e-9)


def test_softmax_of_the_effective_potential_is_the_weights():
    x = {**tensors(), "log_prior": torch.randn(5, 7).double()}
    spec = AttentionSpec(Carrier((Causal(),)), Evidence(baseline=(Prior(),), link=Exp(1.7)))
    potential = effective_potential(spec, x)
    torch.testing.assert_close((-potential / 1.7).softmax(-1), interpret(spec, x).weights, **TIGHT)


def test_no_potential_no_entropy_outside_the_gibbs_regime():
    with pytest.raises(NotPositive, match="a potential exists only for one positive row-anchored kernel"):
        effective_potential(AttentionSpec(evidence=Evidence(link=Softplus())), tensors())
    with pytest.raises(NotPositive, match="the smallest weight is -0.5"):
        entropy(torch.tensor([1.5, -0.5]))


def test_ffn_is_a_unary_specification():
    linear = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3)).double()
    x = torch.randn(2, 5, 6).double()
    spec = AttentionSpec(
        evidence=Evidence(Chart((Dot(scale=1.0), KeyBias())), link=Gelu()),
        probe=Raw(), anchor=NoAnchor(), update=(Residual("out_bias"),),
    )  # fmt: skip
    units = {
        "query": x[:, None],
        "key": linear[0].weight[None, None].expand(2, -1, -1, -1),
        "key_bias": linear[0].bias[None, None].expand(2, -1, -1),
        "value": linear[2].weight.T[None, None].expand(2, -1, -1, -1),
        "out_bias": linear[2].bias,
    }
    torch.testing.assert_close(interpret(spec, units).out[:, 0], linear(x), **TIGHT)


def test_gated_ffn_is_a_unary_specification_with_a_factor():
    gate, up, down = nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False), nn.Linear(10, 3, bias=False)
    for module in (gate, up, down):
        module.double()
    x = torch.randn(2, 5, 6).double()
    spec = AttentionSpec(
        evidence=Evidence(Chart((Dot(scale=1.0),)), link=Silu(), factor=Chart((Dot(key="up", scale=1.0),))),
        probe=Raw(), anchor=NoAnchor(),
    )  # fmt: skip
    units = {"query": x[:, None]}
    for name, weight in (("key", gate.weight), ("up", up.weight), ("value", down.weight.T)):
        units[name] = weight[None, None].expand(2, -1, -1, -1)
    expected = down(F.silu(gate(x)) * up(x))
    torch.testing.assert_close(interpret(spec, units).out[:, 0], expected, **TIGHT)


def test_carrier_doubling_makes_signed_weights_a_positive_row_kernel():
    weights, payload = torch.randn(2, 5, 7).double(), torch.randn(2, 7, 3).double()
    weights[0, 2] = 0.0
    doubled = double_carrier(weights, payload)
    assert (doubled.weights >= 0).all()
    rows = doubled.weights.sum(-1)
    torch.testing.assert_close(rows[1], torch.ones(5).double(), **TIGHT)
    assert rows[0, 2] == 0
    torch.testing.assert_close(
        doubled.amplitude * (doubled.weights @ doubled.payload), weights @ payload, **TIGHT
    )


def test_pair_payload_is_aggregated_per_pair():
    x = {**tensors(), "pair_value": torch.randn(2, 4, 5, 7, 3).double()}
    result = interpret(AttentionSpec(payload=Pair()), x)
    expected = sum(result.weights[..., m, None] * x["pair_value"][..., m, :] for m in range(7))
    torch.testing.assert_close(result.out, expected, **TIGHT)


@pytest.mark.parametrize(
    ("spec", "change", "error", "message"),
    [
        (
            standard(),
            {"value": None},
            ValueError,
            "reads a tensor 'value' that is not given; it needs query, key, value",
        ),
        (
            AttentionSpec(evidence=Evidence(baseline=(Prior(),))),
            {"log_prior": torch.zeros(2, 1, 5, 7)},
            StatefulBaseline,
            r"log_prior has shape \[2, 1, 5, 7\]; a baseline has no batch axis",
        ),
        (
            AttentionSpec(evidence=Evidence(baseline=(Relative(),))),
            {"relative_table": torch.zeros(4, 9)},
            ValueError,
            "relative_table has 9 entries; 5 receivers on 7 sources need an odd number, 13 or more",
        ),
        (AttentionSpec(Carrier(heads=HeadMap(8))), {}, ValueError, "query has 4 heads; the head map says 8"),
        (
            AttentionSpec(Carrier(heads=HeadMap(4, 4))),
            {},
            ValueError,
            r"has 2 heads; the head map says 4 \(or 1",
        ),
        (
            AttentionSpec(Carrier(heads=HeadMap(assignment=(0, 1)))),
            {},
            ValueError,
            "assigns 2 heads; query has 4",
        ),
        (
            AttentionSpec(Carrier((GivenMask(),))),
            {"mask": torch.ones(5, 7)},
            ValueError,
            "mask has dtype torch.float64; a mask is boolean",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_a_sentence(spec, change, error, message):
    x = {name: tensor for name, tensor in {**tensors(), **change}.items() if tensor is not None}
    with pytest.raises(error, match=message):
        interpret(spec, x)
