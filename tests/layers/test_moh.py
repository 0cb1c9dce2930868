from __future__ import annotations

import copy

import pytest
import torch

from tests.layers.latents import positions
from tests.tiny import VOCAB_SIZE, tiny_config
from undivided.layers.gqa import GQAttention
from undivided.layers.head_router import HeadRouter, balance_loss
from undivided.layers.moh import MoHAttention, MoHVisionAttention, real_tokens
from undivided.layers.rotary import apply_rotary, rotary_tables
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig
from undivided.testing import assert_as_accurate

EXACT = {"rtol": 1e-12, "atol": 1e-12}
WIDTH, LENGTH, HEADS, HEAD_DIM = 24, 9, 6, 4
LINEAR = {"shared_heads": 2, "top_k": 2}
NORM = {"shared_heads": 2, "top_k": 2, "router": "query_norm", "gate_mode": "binary"}


def draw(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(2 * torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return module.double()


def random_layer(heads=HEADS, key_value_heads=3, **options):
    return draw(MoHAttention(WIDTH, heads, key_value_heads, HEAD_DIM, **(LINEAR | options)))


def random_router(**options):
    return draw(HeadRouter(WIDTH, HEADS, **(LINEAR | options)))


def hidden_states(batch=2):
    return torch.randn(batch, LENGTH, WIDTH, dtype=torch.float64)


def queries():
    return torch.randn(2, HEADS, LENGTH, HEAD_DIM, dtype=torch.float64)


def plain(layer):
    """The same projections without a router: multi-head attention."""
    gqa = GQAttention(WIDTH, HEADS, 3, HEAD_DIM).double()
    gqa.load_state_dict({name: w for name, w in layer.state_dict().items() if "router" not in name})
    return gqa


def head_by_head(layer, x, tables):
    """The released form of the gates and equation 4 of the paper, one head at a time, from the rows of the weights."""
    router, width = layer.router, layer.head_dim
    rows = lambda linear, head: linear.weight[head * width : (head + 1) * width]  # noqa: E731
    turn = lambda y: apply_rotary(y[:, None], *rotary_tables(tables), interleaved=False)[:, 0]  # noqa: E731
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    shared = router.shared_heads * torch.softmax(x @ router.shared.weight.T, -1)
    p = torch.softmax(x @ router.routed.weight.T, -1)
    weights = 2 * torch.softmax(x @ router.kind.weight.T, -1)
    out = torch.zeros_like(x)
    for head in range(HEADS):
        key_head = head // (HEADS // layer.num_key_value_heads)
        scores = turn(x @ rows(layer.q_proj, head).T) @ turn(x @ rows(layer.k_proj, key_head).T).mT
        value = x @ rows(layer.v_proj, key_head).T
        result = torch.softmax((scores / width**0.5).masked_fill(~seen, float("-inf")), -1) @ value
        if head < router.shared_heads:
            gate = weights[..., 0] * shared[..., head]
        else:
            best = p.topk(router.top_k, -1)
            own = p[..., head - router.shared_heads]
            chosen = (own[..., None] >= best.values).any(-1)
            gate = weights[..., 1] * router.top_k * own / best.values.sum(-1) * chosen
        out = out + (gate[..., None] * result) @ layer.o_proj.weight[:, head * width : (head + 1) * width].T
    return out


def test_is_what_the_authors_code_says_head_by_head():
    layer, x, tables = random_layer(), hidden_states(), positions(LENGTH, HEAD_DIM // 2)
    torch.testing.assert_close(layer(x, tables)[0], head_by_head(layer, x, tables), **EXACT)


@pytest.mark.parametrize("shared_heads", [0, 1, 2])
@pytest.mark.parametrize("two_stage", [True, False])
def test_uniform_routers_that_choose_all_heads_are_plain_attention(shared_heads, two_stage):
    layer = random_layer(shared_heads=shared_heads, top_k=HEADS - shared_heads, two_stage=two_stage)
    for parameter in layer.router.parameters():
        parameter.data.zero_()
    x, tables = hidden_states(), positions(LENGTH, HEAD_DIM // 2)
    gates = layer.router(x, queries()).gates
    torch.testing.assert_close(gates, torch.ones_like(gates), **EXACT)
    torch.testing.assert_close(layer(x, tables)[0], plain(layer)(x, tables)[0], **EXACT)


def test_gates_of_each_kind_add_up_and_others_are_exactly_zero():
    router, x = random_router(), hidden_states()
    gates, selected, _ = router(x, queries())
    weights = 2 * torch.softmax(x @ router.kind.weight.T, -1)
    torch.testing.assert_close(gates[:, :2].sum(1), 2 * weights[..., 0], **EXACT)
    torch.testing.assert_close(gates[:, 2:].sum(1), 2 * weights[..., 1], **EXACT)
    torch.testing.assert_close(weights.sum(-1), torch.full((2, LENGTH), 2.0, dtype=torch.float64), **EXACT)
    assert (gates[~selected] == 0).all() and (gates[selected] > 0).all()
    assert selected[:, :2].all() and (selected[:, 2:].sum(1) == 2).all()


def test_the_paper_form_is_the_raw_scores():
    released, paper = random_router(), random_router(gate_mode="paper")
    paper.load_state_dict(released.state_dict())
    x = hidden_states()
    ours, theirs = released(x, queries()), paper(x, queries())
    assert torch.equal(ours.selected, theirs.selected)
    torch.testing.assert_close(ours.gates[:, :2], 4 * theirs.gates[:, :2], **EXACT)
    weight = torch.softmax(x @ paper.kind.weight.T, -1)[..., 1:]
    expected = weight * theirs.probabilities * theirs.selected.transpose(1, 2)[..., 2:]
    torch.testing.assert_close(theirs.gates[:, 2:], expected.transpose(1, 2), **EXACT)


def test_without_routed_heads_all_are_weighed_and_there_is_no_loss():
    layer = random_layer(shared_heads=HEADS, top_k=0)
    x, tables = hidden_states(), positions(LENGTH, HEAD_DIM // 2)
    gates, selected, probabilities = layer.router(x, queries())
    expected = HEADS * torch.softmax(x @ layer.router.shared.weight.T, -1)
    torch.testing.assert_close(gates, expected.transpose(1, 2), **EXACT)
    assert selected.all() and probabilities is None
    assert {name for name, _ in layer.router.named_parameters()} == {"shared.weight"}
    assert layer.train()(x, tables)[1] is None
    with pytest.raises(ValueError, match="without routed heads there is no load to balance"):
        balance_loss(layer.router(x, queries()))


def test_one_shared_head_needs_no_score():
    router, x = random_router(shared_heads=1, top_k=3), hidden_states()
    assert router.shared is None
    gates = router(x, queries()).gates
    torch.testing.assert_close(gates[:, 0], 2 * torch.softmax(x @ router.kind.weight.T, -1)[..., 0], **EXACT)


@pytest.mark.parametrize("options", [{}, {"gate_mode": "paper"}, {"two_stage": False}, {"shared_heads": 0}])
def test_uniform_routing_has_the_balance_loss_it_says(options):
    router = random_router(**options)
    for parameter in router.parameters():
        parameter.data.zero_()
    routing = router(hidden_states(), queries())
    torch.testing.assert_close(balance_loss(routing).item(), 2.0, **EXACT)
    heads = router.routed_heads
    assert balance_loss(routing).item() == pytest.approx(heads * balance_loss(routing, scaled=False).item())


def test_a_router_that_sends_all_tokens_to_the_same_heads_has_a_greater_loss():
    router = random_router()
    router.routed.weight.data.zero_()
    router.routed.weight.data[1:3, 0] = 5.0
    x = hidden_states()
    x[..., 0] = 1.0
    assert balance_loss(router(x, queries())).item() == pytest.approx(4.0, rel=0.05)


def test_the_gradient_of_the_balance_loss_goes_through_the_probabilities_alone():
    router, x = random_router(), hidden_states()
    routing = router(x, queries())
    (gradient,) = torch.autograd.grad(balance_loss(routing), router.routed.weight)
    load = routing.selected[:, 2:].double().mean(dim=(0, 2))
    p = torch.softmax(x @ router.routed.weight.T, -1)
    (expected,) = torch.autograd.grad(4 * (p.mean(dim=(0, 1)) * load).sum(), router.routed.weight)
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_padding_does_not_count_in_the_balance_loss():
    layer, x = random_layer().train(), hidden_states()
    tables = positions(LENGTH, HEAD_DIM // 2)
    keep = torch.ones(2, LENGTH, dtype=torch.bool)
    keep[0, :3] = False
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & keep[:, None, None, :]
    loss = layer(x, tables, attention_mask=mask)[1]["balance"]
    assert torch.equal(real_tokens(mask, LENGTH), keep)
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.equal(real_tokens(bias, LENGTH), keep)
    # A linear router does not look at queries.
    alone = layer.router(x[keep][None], queries())
    torch.testing.assert_close(loss, balance_loss(alone), **EXACT)
    assert not torch.allclose(loss, layer(x, tables)[1]["balance"])


@pytest.mark.parametrize("router", ["linear", "query_norm"])
def test_quantised_gates_are_ones_whose_gradient_is_that_of_the_probability(router):
    layer = random_router(router=router, gate_mode="binary")
    x, query = hidden_states().requires_grad_(), queries().requires_grad_()
    gates, selected, probabilities = layer(x, query)
    assert torch.equal(gates.detach(), selected.double())
    factors = torch.randn_like(gates)
    # The soft surrogate: the probability itself in the place of the gate.
    surrogate = (probabilities.transpose(1, 2) * selected[:, 2:] * factors[:, 2:]).sum()
    source = query if router == "query_norm" else x
    (ours,) = torch.autograd.grad((gates * factors).sum(), source, retain_graph=True)
    (expected,) = torch.autograd.grad(surrogate, source)
    torch.testing.assert_close(ours, expected, **EXACT)
    assert ours.abs().max() > 0


def test_the_surrogate_of_a_quantised_gate_passes_gradcheck():
    router = random_router(router="query_norm", gate_mode="binary")
    x = hidden_states(1)

    def score(query):
        routing = router(x, query)
        return (routing.probabilities * routing.selected[:, 2:].transpose(1, 2)).sum(dim=1)

    assert torch.autograd.gradcheck(score, queries()[:1].requires_grad_())


def test_norms_of_queries_route_without_parameters():
    router, query = random_router(**NORM), queries()
    assert list(router.parameters()) == []
    norms = query.norm(dim=-1)[:, 2:].transpose(1, 2)
    expected = torch.softmax(norms / norms.std(-1, keepdim=True), -1)
    routing = router(hidden_states(), query)
    torch.testing.assert_close(routing.probabilities, expected, **EXACT)
    best = norms.topk(2, -1).indices + 2
    for b in range(2):
        for n in range(LENGTH):
            assert set(routing.selected[b, :, n].nonzero().flatten().tolist()) == {0, 1, *best[b, n].tolist()}


def test_rotary_positions_keep_the_routing():
    router, query = random_router(**NORM), queries()
    tables = rotary_tables(positions(LENGTH, HEAD_DIM // 2))
    ours, turned = (
        router(hidden_states(), query),
        router(hidden_states(), apply_rotary(query, *tables, False)),
    )
    assert torch.equal(ours.selected, turned.selected)
    torch.testing.assert_close(ours.probabilities, turned.probabilities, **EXACT)


def test_equal_norms_are_equal_probabilities():
    routing = random_router(**NORM)(hidden_states(), torch.zeros(2, HEADS, LENGTH, HEAD_DIM))
    assert torch.equal(routing.probabilities, torch.full((2, LENGTH, 4), 0.25))


def test_weighed_norms_average_to_one():
    router = random_router(router="query_norm")
    gates, selected, _ = router(hidden_states(), queries())
    assert torch.equal(gates[:, :2], torch.ones(2, 2, LENGTH, dtype=torch.float64))
    torch.testing.assert_close(
        gates[:, 2:].sum(1), torch.full((2, LENGTH), 2.0, dtype=torch.float64), **EXACT
    )
    assert (selected[:, 2:].sum(1) == 2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_is_in_float32(dtype):
    router = random_router().to(dtype)
    x = hidden_states().to(dtype)
    gates, _, probabilities = router(x, queries().to(dtype))
    assert gates.dtype == probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, torch.softmax(router.routed(x).float(), -1), rtol=0, atol=0)


def test_the_loss_is_there_when_training_and_only_then():
    layer, x, tables = random_layer(), hidden_states(), positions(LENGTH, HEAD_DIM // 2)
    assert layer.eval()(x, tables)[1] is None
    losses = layer.train()(x, tables)[1]
    assert set(losses) == {"balance"} and losses["balance"].shape == ()
    assert layer.auxiliary_coefficients == {"balance": 0.01}


@pytest.mark.parametrize("options", [LINEAR, NORM, LINEAR | {"gate_mode": "paper"}])
def test_skipping_is_as_accurate_as_masking(options, device):
    layer = MoHAttention(32, 4, 2, 16, **options | {"shared_heads": 1}).to(device)
    x = torch.randn(2, 21, 32, device=device)

    def run(backend, layer, x):
        layer.backend = backend
        out, losses = layer(x, tuple(table.to(x) for table in positions(21, 8)))
        return out, *torch.autograd.grad(out.square().sum() + losses["balance"], list(layer.parameters()))

    exact = run("mask", copy.deepcopy(layer).double(), x.double())
    assert_as_accurate(run("routed", layer, x), run("mask", layer, x), exact)


def test_auto_masks_on_a_cpu_and_an_explicit_backend_says_why_it_cannot():
    layer, x = random_layer(backend="routed"), hidden_states()
    with pytest.raises(ValueError, match='backend "triton" cannot run this: query is float64'):
        layer(x, positions(LENGTH, HEAD_DIM // 2))
    layer.backend = "auto"
    assert layer(x, positions(LENGTH, HEAD_DIM // 2))[0].isfinite().all()


@pytest.mark.parametrize("options", [{}, {"gate_mode": "binary"}, {"softcap": 3.0, "scale": 0.7}])
def test_is_its_specification(options):
    from undivided.spec import interpret

    layer, x, tables = random_layer(**options), hidden_states(), positions(LENGTH, HEAD_DIM // 2)
    out = interpret(layer.spec, layer.spec_inputs(x, tables)).out
    torch.testing.assert_close(layer.o_proj(out.transpose(1, 2).flatten(2)), layer(x, tables)[0], **EXACT)


@pytest.mark.parametrize("base", ["llama", "qwen2", "mistral", "gemma2"])
@pytest.mark.parametrize("router", ["linear", "query_norm"])
def test_decoding_equals_prefill_in_any_base_model(base, router):
    entry = {"mechanism": "moh", "shared_heads": 1, "top_k": 1, "router": router, "gate_mode": "binary"}
    config = UndividedConfig(base_config=tiny_config(base), attention=[None, entry])
    model = UndividedForCausalLM(config).double().eval()
    ids = torch.randint(1, VOCAB_SIZE, (2, 13))
    expected = model(ids).logits
    first = model(ids[:, :7], use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for token in ids[:, 7:].split(1, dim=1):
        steps.append(model(token, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(shared_heads=7), "shared_heads=7 must be 0 to the 6 heads there are"),
        (dict(shared_heads=-1), "shared_heads=-1 must be 0 to the 6 heads"),
        (dict(top_k=5), "top_k=5 must be 0 to 4: of 6 heads 2 are shared"),
        (dict(top_k=-1), "top_k=-1 must be 0 to 4"),
        (dict(top_k=0), "top_k=0 leaves 4 of 6 heads that no token could use"),
        (dict(router="norm"), "router='norm' is not one of 'linear', 'query_norm'"),
        (dict(gate_mode="soft"), "gate_mode='soft' is not one of 'released', 'paper', 'binary'"),
        (
            dict(router="query_norm", shared_heads=5, top_k=1),
            'router="query_norm" compares routed heads, and shared_heads=5 leaves 1 of 6',
        ),
        (
            dict(router="query_norm", gate_mode="paper"),
            'gate_mode="paper" weighs shared heads by learned scores',
        ),
        (dict(balance_coeff=-0.1), "balance_coeff=-0.1 must be a number from 0 on"),
        (dict(backend="sdpa"), "backend='sdpa' is not one of 'auto', 'routed', 'mask'"),
        (dict(key_value_heads=4), "num_key_value_heads=4 does not divide num_attention_heads=6"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        random_layer(**options)


def vision_layer(**options):
    return draw(MoHVisionAttention(WIDTH, HEADS, **(LINEAR | options)))


def test_the_layer_of_an_image_sees_both_ways_and_is_the_same_mixture():
    layer, x = vision_layer(), hidden_states()
    out, losses = layer.eval()(x, (3, 3))
    assert losses is None
    query, key, value = layer.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(query @ key.mT / HEAD_DIM**0.5, -1)
    gates = layer.router(x, query).gates
    expected = layer.proj((gates[..., None] * (weights @ value)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, **EXACT)
    assert set(layer.train()(x)[1]) == {"balance"}


def test_weights_of_the_authors_are_loaded_by_name():
    layer, other = vision_layer(qkv_bias=True), vision_layer(qkv_bias=True)
    theirs = {"router.routed.weight": "wg.weight", "router.shared.weight": "wg_1.weight"}
    theirs["router.kind.weight"] = "wg_0.weight"
    other.load_official({theirs.get(name, name): weight for name, weight in layer.state_dict().items()})
    x = hidden_states()
    assert torch.equal(layer.eval()(x)[0], other.eval()(x)[0])
    with pytest.raises(RuntimeError, match="wg_2.weight"):
        other.load_official({"wg_2.weight": torch.zeros(1)})


def test_an_image_layer_whose_heads_do_not_divide_its_width_is_named():
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=24; give head_dim"):
        MoHVisionAttention(24, 5, shared_heads=2, top_k=1)
    assert MoHVisionAttention(24, 5, shared_heads=2, top_k=1, head_dim=8).qkv.out_features == 120
