"""DHA: groups are found again, budgets are exact, fusion starts at the model and ends at fewer heads."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import VOCAB_SIZE, tiny_model
from undivided.convert.dha import (
    KINDS,
    allocate_heads,
    convert_dha,
    group_heads,
    head_similarity,
    multi_head,
    share_heads,
)
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.training.fusion import FusedHeads, FusionRecipe, LagrangianConstraint, fuse

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def ids(batch=2, length=13):
    return torch.randint(1, VOCAB_SIZE, (batch, length))


def planted(partition, noise=0.0, width=40):
    """Heads that are equal within the groups of a partition."""
    weight = torch.randn(1 + max(partition), 8, width)[torch.tensor(partition)]
    return weight + noise * torch.randn_like(weight)


@pytest.mark.parametrize("partition", [[0, 1, 2, 0, 1, 2], [1, 1, 0, 0, 2, 2], [0, 1, 1, 0, 0, 1]])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_groups_are_found_again(partition, noise):
    found = group_heads(head_similarity(planted(partition, noise)), 1 + max(partition))
    groups = {tuple(row) for row in found.tolist()}
    assert groups == {tuple(h for h, g in enumerate(partition) if g == own) for own in set(partition)}


def test_groups_do_not_depend_on_the_order_of_heads():
    weight, order = planted([i % 8 for i in range(32)], noise=0.5), torch.randperm(32)
    plain = {frozenset(row) for row in group_heads(head_similarity(weight), 8).tolist()}
    moved = group_heads(head_similarity(weight[order]), 8)
    assert {frozenset(order[row].tolist()) for row in moved} == plain


def test_annealing_is_at_least_as_good_as_the_nearest_heads():
    similarity = head_similarity(torch.randn(16, 4, 6))

    def within(groups):
        return sum(similarity[row][:, row].sum().item() for row in groups)

    assert within(group_heads(similarity, 4)) >= within(group_heads(similarity, 4, steps=0)) - 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_budgets_are_exact_and_follow_the_losses(seed):
    losses = torch.rand(6, 2, generator=torch.Generator().manual_seed(seed))
    for total in (12, 24, 36, 60):
        counts = allocate_heads(losses, total, [1, 2, 4, 8])
        assert counts.sum() == total
        order = losses.flatten().argsort()
        assert (counts.flatten()[order].diff() >= 0).all()
    with pytest.raises(ValueError, match="heads to 12 layers and kinds has 97 in all; 96 would do"):
        allocate_heads(losses, 97, [1, 2, 4, 8])


@pytest.mark.parametrize("base", ["llama", "qwen2"])
def test_one_head_a_query_head_is_the_model(base):
    model, tokens = tiny_model(base, dtype=torch.float64), ids()
    torch.testing.assert_close(multi_head(model)(tokens).logits, model(tokens).logits, **EXACT)


@pytest.mark.parametrize("base", ["llama", "qwen2"])
def test_heads_that_a_model_shares_are_found_and_fused_without_loss(base):
    model, tokens = tiny_model(base, dtype=torch.float64), ids()
    host, report = convert_dha(model, None, head_budget=0.5, adaptive=False, fusion_steps=0)
    torch.testing.assert_close(host(tokens).logits, model(tokens).logits, **EXACT)
    for entry in host.config.attention:
        assert entry == {"mechanism": "dha", "key_head_map": [0, 0, 1, 1], "value_head_map": [0, 0, 1, 1]}
    # Two layers of 2 + 2 heads of 8 in float64.
    assert report.cache_bytes_per_token_per_rank == 2 * 4 * 8 * 8


def test_operators_start_as_the_identity():
    model, tokens = tiny_model(dtype=torch.float64), ids()
    host = multi_head(model)
    groups = torch.tensor([[0, 2], [1, 3]])
    for layer in host.attention_layers():
        layer.k_proj, layer.v_proj = FusedHeads(layer.k_proj, groups), FusedHeads(layer.v_proj, groups)
    torch.testing.assert_close(host(tokens).logits, model(tokens).logits, **EXACT)


@pytest.mark.parametrize("kind", ["operator", "weight"])
def test_the_fusion_loss_is_zero_for_equal_heads_alone_and_has_its_gradient(kind):
    linear = torch.nn.Linear(5, 12, bias=True).double()
    fused = FusedHeads(linear, torch.tensor([[2, 0], [3, 1]]))
    assert fused.loss(kind) > 0.1
    if kind == "operator":
        first, second = fused.operator[0]
        torch.testing.assert_close(fused.loss(kind), (first - second).square().sum())
    operator = torch.randn_like(fused.operator)
    assert torch.autograd.gradcheck(
        lambda o: torch.func.functional_call(_Loss(fused, kind), {"fused.operator": o}, ()),
        operator.requires_grad_(),
    )
    with torch.no_grad():
        fused.operator.fill_(0.5)
    assert fused.loss(kind) < 1e-20
    weight = fused.projection()[0].unflatten(0, (4, 3))
    torch.testing.assert_close(weight[0], weight[2])
    torch.testing.assert_close(weight[1], (linear.weight[3:6] + linear.weight[9:]) / 2)


class _Loss(torch.nn.Module):
    def __init__(self, fused, kind):
        super().__init__()
        self.fused, self.kind = fused, kind

    def forward(self):
        return self.fused.loss(self.kind)


def test_multipliers_climb_while_the_loss_is_above_its_target():
    constraint, loss = LagrangianConstraint(), torch.tensor(3.0, requires_grad=True)
    optimizer = torch.optim.SGD(constraint.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        constraint(loss, 1.0).backward()
        optimizer.step()
    torch.testing.assert_close(constraint.multipliers.detach(), torch.tensor([4.0, 8.0]))
    # The second time the multipliers were 2 and 4, and pull the loss down: 2 + 2 * 4 * 2.
    torch.testing.assert_close(loss.grad, torch.tensor(18.0))
    torch.testing.assert_close(constraint(loss, 3.0).detach(), torch.tensor(0.0))


def test_fusion_makes_heads_equal_while_the_model_stays_a_language_model():
    torch.manual_seed(0)
    model, texts = tiny_model(num_key_value_heads=4), torch.arange(12).repeat(24, 3)[:, :32]
    host = multi_head(model)
    groups = [dict.fromkeys(KINDS, torch.tensor([[0, 1], [2, 3]]))] * 2
    recipe = FusionRecipe(steps=160, learning_rate=3e-3, operator_rate=0.1)
    left = fuse(host, groups, texts, recipe)
    assert left.shape == (2, 2)
    assert (left < 0.2).all()
    fused = host(texts[:2], labels=texts[:2]).loss.item()
    share_heads(host, groups)
    assert host.attention_layers()[0].k_proj.out_features == 16
    shared = host(texts[:2], labels=texts[:2]).loss.item()
    assert shared < fused + 0.6
    assert shared < 0.1 * model(texts[:2], labels=texts[:2]).loss.item()


def test_converting_searches_and_saves_uneven_heads(tmp_path):
    torch.manual_seed(0)
    model, texts = tiny_model(num_key_value_heads=4), ids(16, 24)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    host, report = convert_dha(model, texts, head_budget=7 / 16, search_steps=3, fusion_steps=3, batch_size=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    counts = torch.tensor(report.options["heads"])
    assert counts.sum() == 7
    assert len(set(counts.flatten().tolist())) > 1
    host.save_pretrained(tmp_path)
    again = UndividedForCausalLM.from_pretrained(tmp_path).eval()
    tokens = ids()
    torch.testing.assert_close(again(tokens).logits, host.eval()(tokens).logits)
    first = again(tokens[:, :6], use_cache=True)
    for index, name in enumerate(("keys", "values")):
        widths = [getattr(layer, name).shape[1:] for layer in first.past_key_values.layers]
        assert widths == [(1, 6, 8 * count) for count in counts[:, index].tolist()]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"head_budget": 0.0}, "head_budget=0.0 must be above 0"),
        ({"head_budget": 0.4, "adaptive": False, "fusion_steps": 0}, "is 1.5 heads a layer and kind"),
        ({"fusion_loss": "norm"}, "fusion_loss='norm' is neither 'operator' nor 'weight'"),
        ({"search_steps": -1}, "search_steps=-1 must be 0 or more"),
        ({}, "calibration is missing, and search_steps=30 needs text to train on"),
    ],
)
def test_what_does_not_fit_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        convert_dha(tiny_model(), None, **options)


def test_heads_that_are_zero_are_refused():
    weight = planted([0, 1])
    weight[1] = 0
    with pytest.raises(ValueError, match="head 1 is zero"):
        head_similarity(weight)
