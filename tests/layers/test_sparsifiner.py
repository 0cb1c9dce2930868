from __future__ import annotations

import pytest
import torch

from undivided.layers.sparsifiner import (
    AliveTokens,
    ConnectivityPredictor,
    SparsifinerAttention,
    attention_cost,
    first_largest,
)

EXACT = {"rtol": 1e-6, "atol": 1e-6}
HEADS, TOKENS, DIM = 2, 13, 8


def predictor(**options):
    torch.manual_seed(1)
    made = ConnectivityPredictor(DIM, HEADS, TOKENS, **{"reduce_n": 2, "coef_topk": 3, **options}).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return made


def heads(batch=2, tokens=TOKENS):
    return torch.randn(3, batch, HEADS, tokens, DIM, dtype=torch.float64).unbind(0)


def layer(**options):
    made = SparsifinerAttention(
        HEADS * DIM, HEADS, TOKENS, **{"reduce_n": 2, "coef_topk": 3, **options}
    ).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return made


def tokens():
    return torch.randn(2, TOKENS, HEADS * DIM, dtype=torch.float64)


# -- predictor


def test_the_map_of_phase_one_is_the_product_of_the_factors():
    made = predictor()
    query, key, _ = heads()
    q = query @ made.q.weight.T + made.q.bias
    k = key @ made.k.weight.T + made.k.bias
    down = torch.einsum("bhnc,nr->bhcr", k, made.down)
    weights = (HEADS**-0.5 * torch.einsum("bhnc,bhcr->bhnr", q, down)).softmax(-1)
    want = torch.einsum("bhnr,mr->bhnm", weights, made.up)[:, :, 1:]
    torch.testing.assert_close(made(query, key, phase="reconstruct").approximation, want)


def test_the_sparse_basis_is_positive_and_has_no_small_entry():
    made = predictor(basis_threshold=0.2)
    basis = made.basis()
    assert ((basis == 0) | (basis > 0.2)).all()
    assert (basis == 0).any() and (basis > 0.2).any()
    assert torch.equal(basis[basis > 0], made.up.abs()[basis > 0])


def test_the_largest_coefficients_keep_their_values():
    made = predictor()
    with torch.no_grad():
        made.up.fill_(1.0)
    query, key, _ = heads()
    sums = made(query, key).approximation
    assert (sums < 1).all() and (sums > 3 / 6).all()


def test_every_row_has_so_many_keys_and_the_class_token_all():
    for keep in (0.05, 0.25, 0.6, 1.0):
        made = predictor(keep=keep)
        found = made(*heads()[:2])
        mask = found.mask()
        assert mask.shape == (2, HEADS, TOKENS, TOKENS) and mask[:, :, 0].all()
        assert (mask[:, :, 1:].sum(-1) == made.budget).all()
        assert (found.indices.diff(dim=-1) > 0).all()
        assert not mask.requires_grad


def test_the_keys_of_a_row_are_its_largest_and_of_equals_the_first():
    made = predictor(keep=0.3)
    found = made(*heads()[:2])
    chosen = torch.zeros_like(found.approximation, dtype=torch.bool).scatter_(-1, found.indices, True)
    least = found.approximation.masked_fill(~chosen, torch.inf).amin(-1)
    assert (least >= found.approximation.masked_fill(chosen, -torch.inf).amax(-1)).all()
    with torch.no_grad():
        made.up.zero_()
    assert torch.equal(made(*heads()[:2]).indices[0, 0, 0], torch.arange(4))


def test_the_first_of_equal_entries_are_taken_as_a_stable_sort_does(device):
    scores = (torch.randn(1, 2, 25, 30, device=device) * 2).round() / 2
    scores[:, :, ::3] = 0.0
    scores[:, :, ::6, ::2] = -0.0
    scores[..., 5] = float("-inf")
    want = scores.sort(dim=-1, descending=True, stable=True).indices[..., :11].sort(-1).values
    assert torch.equal(first_largest(scores, 11).long(), want)
    assert torch.equal(first_largest(scores.double(), 11), want)


def test_thresholds_may_choose_in_the_place_of_counts():
    made = predictor(coef_threshold=0.15, score_threshold=0.05)
    query, key, _ = heads()
    found = made(query, key)
    dense = predictor(basis_threshold=0.0)(query, key, phase="reconstruct")
    with torch.no_grad():
        q, k = query @ made.q.weight.T + made.q.bias, key @ made.k.weight.T + made.k.bias
        weights = (made.scale * q[:, :, 1:] @ (k.mT @ made.down)).softmax(-1)
        want = torch.where(weights > 0.15, weights, 0.0) @ made.basis().T
    torch.testing.assert_close(found.approximation.detach(), want)
    assert found.indices is None and dense.seen is None
    assert torch.equal(found.mask()[:, :, 1:], want > 0.05) and found.mask()[:, :, 0].all()
    alive = torch.arange(TOKENS - 1) < 6
    dead = made(query, key, alive.expand(2, -1)).mask()[:, :, 1:, 7:]
    assert not dead.any()


def test_queries_without_a_key_give_zeros():
    made = layer(score_threshold=1e9)
    query, key, value = heads()
    out = made.attend(query, key, value, made.predictor(query, key))
    assert (out[:, :, 1:] == 0).all() and (out[:, :, 0] != 0).any()


def test_with_an_identity_for_a_basis_the_map_is_that_of_softmax_attention():
    made = ConnectivityPredictor(
        DIM, HEADS, TOKENS, reduce_n=1, reduce_c=1, scale=DIM**-0.5, coef_topk=TOKENS
    )
    made = made.double()
    with torch.no_grad():
        for weight in (made.q.weight, made.k.weight, made.down, made.up):
            weight.copy_(torch.eye(len(weight)))
    query, key, _ = heads()
    want = (DIM**-0.5 * query @ key.transpose(-2, -1)).softmax(-1)[:, :, 1:]
    found = made(query, key, phase="reconstruct")
    torch.testing.assert_close(found.approximation, want)
    assert torch.equal(found.indices, want.topk(4, dim=-1).indices.sort(-1).values)


def test_a_shared_basis_is_one_parameter():
    made = predictor(share_basis=True)
    assert made.up is made.down
    assert sum(p.numel() for p in made.parameters()) == 2 * (DIM * 4 + 4) + TOKENS * 6


# -- attention


def test_all_keys_are_dense_attention():
    made = layer(keep=1.0)
    x = tokens()
    found = made(x)
    made.phase = "dense"
    torch.testing.assert_close(found, made(x), **EXACT)


def test_one_key_returns_its_value():
    made = layer(keep=0.01)
    query, key, value = heads()
    found = made.predictor(query, key)
    out = made.attend(query, key, value, found)
    want = value.gather(2, found.indices.expand(-1, -1, -1, DIM))
    torch.testing.assert_close(out[:, :, 1:], want)


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_gathered_keys_give_what_a_mask_gives(keep):
    masked, gathered = layer(keep=keep), layer(keep=keep, impl="gather")
    gathered.load_state_dict(masked.state_dict())
    x = tokens().requires_grad_()
    torch.testing.assert_close(gathered(x), masked(x), **EXACT)
    gradients = (torch.autograd.grad(made(x).square().sum(), x)[0] for made in (gathered, masked))
    torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.gpu
def test_tiles_give_what_a_mask_gives(device):
    # FlexAttention has no heads narrower than 16.
    masked, tiled = (
        SparsifinerAttention(32, 2, TOKENS, keep=0.2, impl=i).to(device) for i in ("masked", "block")
    )
    tiled.load_state_dict(masked.state_dict())
    x = torch.randn(2, TOKENS, 32, device=device)
    with torch.no_grad():
        torch.testing.assert_close(tiled(x), masked(x), rtol=1e-3, atol=1e-3)


def test_the_choice_has_no_gradient_but_reconstruction_has():
    made = layer()
    made(tokens()).square().sum().backward()
    assert all(p.grad is None for p in made.predictor.parameters())
    made.zero_grad()
    made.phase = "reconstruct"
    made(tokens())
    made.reconstruction_error.backward()
    assert all(p.grad is not None for p in made.predictor.parameters())
    assert made.qkv.weight.grad is None


def test_reconstruction_leaves_attention_as_it_is():
    made = layer()
    x = tokens()
    made.phase = "reconstruct"
    found = made(x)
    made.phase = "dense"
    torch.testing.assert_close(found, made(x), **EXACT)
    query, key, _ = made.heads(x)
    want = (made.scale * query @ key.transpose(-2, -1)).softmax(-1)[:, :, 1:]
    predicted = made.predictor(query, key, phase="reconstruct").approximation
    torch.testing.assert_close(made.reconstruction_error, (predicted - want).square().sum())


def test_tokens_that_are_dropped_are_no_keys():
    alive = AliveTokens()
    made = layer(keep=0.5, tokens=alive, tokens_kept=5)
    made(tokens())
    assert alive.mask.shape == (2, TOKENS - 1) and (alive.mask.sum(1) == 5).all()
    query, key, _ = heads()
    found = made.predictor(query, key, alive.mask)
    assert found.indices.shape[-1] == 5
    dead = ~torch.nn.functional.pad(alive.mask, (1, 0), value=True)
    assert not (found.mask()[:, :, 1:] & dead[:, None, None]).any()
    before = alive.mask
    made(tokens())
    assert not (alive.mask & ~before).any()


def test_multiply_adds_of_deit_small():
    assert attention_cost(197, 6, 64, 197).dense == 29_805_312
    assert attention_cost(197, 6, 64, 50).core == 7_564_800
    savings = [attention_cost(197, 6, 64, kept, density=0.25).saving for kept in (50, 20, 10)]
    assert [round(100 * saving, 1) for saving in savings] == [48.7, 63.9, 69.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce_c": 3}, "reduce_c=3 does not divide head_dim=8"),
        ({"reduce_n": 14}, "reduce_n=14 leaves no basis of num_tokens=13; use 1 to 13"),
        ({"reduce_n": 0}, "reduce_n=0 leaves no basis"),
        ({"keep": 0.0}, "keep=0.0 must be above 0 and at most 1"),
        ({"keep": 1.5}, "keep=1.5 must be above 0 and at most 1"),
        ({"coef_topk": 0}, "coef_topk=0 must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConnectivityPredictor(DIM, HEADS, TOKENS, **options)


def test_other_wrong_input_is_refused():
    with pytest.raises(ValueError, match="query has 12 tokens, but the predictor is of 13"):
        predictor()(*heads(tokens=12)[:2])
    with pytest.raises(
        ValueError, match="phase='train' is not one of 'dense', 'reconstruct', 'sparse', 'joint'"
    ):
        predictor()(*heads()[:2], phase="train")
    with pytest.raises(ValueError, match="impl='csr' is not one of 'masked', 'gather', 'block'"):
        SparsifinerAttention(16, 2, 13, impl="csr")
    with pytest.raises(
        ValueError, match='impl="gather" reads lists of one length, which score_threshold=0.1 does'
    ):
        SparsifinerAttention(16, 2, 13, impl="gather", score_threshold=0.1)
    with pytest.raises(ValueError, match="is_causal=True was given, but SparsifinerAttention takes no mask"):
        layer()(tokens(), is_causal=True)
