from __future__ import annotations

import pytest
import torch

from undivided.layers.sla import SparseLinearAttention
from undivided.ops import sparse_linear_attention

BLOCKS = {"query_block_size": 8, "block_size": 8}


def heads(length=45, dtype=torch.float64):
    return [torch.randn(2, 3, length, 4, dtype=dtype) for _ in range(3)]


def layer(**options):
    return SparseLinearAttention(4, **{"topk": 0.3, **BLOCKS, **options})


def test_starts_as_sparse_attention_and_keeps_its_projection_in_float32():
    query, key, value = heads()
    own = layer()
    sparse, _ = sparse_linear_attention(query, key, value, topk=0.3, **BLOCKS)
    assert torch.equal(own(query, key, value), sparse)
    assert (
        own.proj.weight.dtype == torch.float32 and own(*heads(dtype=torch.bfloat16)).dtype == torch.bfloat16
    )


def test_an_initial_factor_adds_the_linear_part():
    query, key, value = heads()
    sparse, linear = sparse_linear_attention(query, key, value, topk=0.3, **BLOCKS)
    torch.testing.assert_close(layer(proj_init=0.5)(query, key, value), sparse + 0.5 * linear)


def test_variants_differ_in_what_the_linear_branch_sees():
    query, key, value = heads()
    for variant, bottomk, scope in (("paper", 0.1, "marginal"), ("released", 0.0, "noncritical")):
        own = layer(variant=variant, proj_init=1.0)
        assert (own.bottomk, own.linear_scope) == (bottomk, scope)
        sparse, linear = sparse_linear_attention(
            query, key, value, topk=0.3, bottomk=bottomk, linear_scope=scope, **BLOCKS
        )
        torch.testing.assert_close(own(query, key, value), sparse + linear)
    assert layer(variant="released", linear_scope="all").linear_scope == "all"


def test_a_projection_is_enough_to_learn_what_sparse_attention_leaves_out():
    query, key, value = heads(80, torch.float32)
    target = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    own = layer(topk=0.1, bottomk=0.0)
    optimiser = torch.optim.Adam(own.parameters(), 0.1)
    losses = []
    for _ in range(30):
        loss = (own(query, key, value) - target).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]


def test_the_authors_projection_loads():
    own = layer()
    given = {"proj_l.weight": torch.randn(4, 4), "proj_l.bias": torch.randn(4)}
    own.load_official(given)
    assert torch.equal(own.proj.weight, given["proj_l.weight"]) and torch.equal(
        own.proj.bias, given["proj_l.bias"]
    )
    with pytest.raises(
        ValueError, match=r"state_dict has \['weight'\]; it needs \['proj_l.bias', 'proj_l.weight'\]"
    ):
        own.load_official({"weight": torch.zeros(4, 4)})
    with pytest.raises(ValueError, match=r"proj_l.weight has shape \[3, 3\]; this layer has \[4, 4\]"):
        own.load_official({"proj_l.weight": torch.zeros(3, 3), "proj_l.bias": torch.zeros(3)})


def test_bad_options_are_named():
    for change, message in (
        ({"variant": "main"}, "variant='main' is not one of paper, released"),
        ({"topk": 0.0}, "topk=0.0 must be in"),
        ({"topk": 0.5, "bottomk": 0.6}, "bottomk=0.6 with topk=0.5"),
        ({"feature_map": "hedgehog"}, "feature_map='hedgehog' is not one of softmax, elu1, relu"),
        ({"linear_scope": "some"}, "linear_scope='some' is not one of marginal, noncritical, all"),
        ({"proj_init": "one"}, "proj_init='one' must be \"zero\" or a factor"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(**change)
    with pytest.raises(ValueError, match="head_dim=0 must be at least 1"):
        SparseLinearAttention(0)
    with pytest.raises(ValueError, match="query has head_dim 5; this layer was built for 4"):
        layer()(*(torch.randn(1, 1, 8, 5) for _ in range(3)))
