from __future__ import annotations

import pytest
import torch

from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_model
from undivided.models.bases import cache_argument, cache_of
from undivided.spec import score_shares
from undivided.spec.heads import (
    changed_loss,
    cut_to,
    head_scores,
    score_figure,
    score_probe,
    text_loss,
    without,
)


def tokens(length=24):
    return torch.randint(VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def probed():
    model = tiny_llama()
    with torch.no_grad(), score_probe(model, ranks=(0, 2, 8)) as probe:
        for start in (0, 12):
            model(input_ids=tokens()[:, start : start + 12])
    return model, probe


def test_shares_of_every_head_add_up_to_one(probed):
    _, probe = probed
    assert sorted(probe.layers) == [0, 1] and len(probe.layers[0]) == 2
    total = probe.mean("row") + probe.mean("column") + probe.mean("interaction")
    assert total.shape == (2, 4)
    torch.testing.assert_close(total, torch.ones(2, 4, dtype=torch.float64))


def test_scores_are_those_the_model_attends_with():
    model = tiny_llama()
    ids, seen = tokens(10), []
    layer = model.model.layers[1].self_attn
    layer.register_forward_hook(lambda module, args, kwargs, out: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad(), score_probe(model) as probe:
        model(input_ids=ids)
        hidden, (cos, sin) = seen[0]["hidden_states"], seen[0]["position_embeddings"]
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query = layer.q_proj(hidden).unflatten(-1, (4, 8)).transpose(1, 2)
    key = layer.k_proj(hidden).unflatten(-1, (2, 8)).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    scores = (query @ key.repeat_interleave(2, 1).mT / 8**0.5).double()
    shares = score_shares(scores, torch.ones(10, 10, dtype=torch.bool).tril())
    torch.testing.assert_close(probe.layers[1][0].interaction, shares.interaction, rtol=1e-5, atol=1e-7)


def test_the_model_computes_what_it_did_and_gets_its_attention_back():
    model = tiny_llama()
    before, ids = model.config._attn_implementation, tokens()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with score_probe(model):
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == before


def test_truncation_costs_nothing_at_full_rank_and_less_with_every_component(probed):
    _, probe = probed
    costs = [probe.mean_divergence(rank).mean().item() for rank in (0, 2, 8)]
    assert costs[0] > costs[1] > costs[2] >= 0
    scores = torch.randn(1, 1, 9, 9, dtype=torch.float64)
    assert head_scores(scores, (9,)).divergence[9].abs().max() < 1e-12


def test_rank_of_the_interaction_leaves_out_what_the_fields_hide():
    query, key = torch.randn(1, 1, 12, 2, dtype=torch.float64), torch.randn(1, 1, 12, 2, dtype=torch.float64)
    fields = 20 * torch.randn(1, 1, 12, 1).double() + 20 * torch.randn(1, 1, 1, 12).double()
    plain, hidden = head_scores(query @ key.mT), head_scores(query @ key.mT + fields)
    torch.testing.assert_close(hidden.interaction_rank, plain.interaction_rank)
    assert hidden.interaction < 0.1 < plain.interaction


def test_loss_at_full_rank_is_the_loss():
    model, ids = tiny_llama(), tokens(12)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert text_loss(model, ids) == pytest.approx(expected, rel=1e-6)
    assert changed_loss(model, ids, cut_to(12)) == pytest.approx(expected, rel=1e-4)
    assert changed_loss(model, ids, cut_to(0)) != pytest.approx(expected, rel=1e-4)


def test_softmax_does_not_see_the_row_field_but_the_other_parts():
    model, ids = tiny_llama(), tokens(12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    expected = text_loss(model, ids)
    assert changed_loss(model, ids, without("row")) == pytest.approx(expected, rel=1e-5)
    assert changed_loss(model, ids, without("column")) != pytest.approx(expected, rel=1e-4)
    assert changed_loss(model, ids, without("interaction")) == pytest.approx(
        changed_loss(model, ids, cut_to(0)), rel=1e-5
    )
    with pytest.raises(ValueError, match='part=\'rows\' is not one of "row", "column", "interaction"'):
        without("rows")


def test_figure_is_written(probed, tmp_path):
    path = score_figure(probed[1], tmp_path / "heads.png", head_dim=8, title="tiny")
    assert path.stat().st_size > 10_000
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_what_the_probe_does_not_compute_is_refused():
    capped = tiny_model("gemma2")
    with (
        torch.no_grad(),
        score_probe(capped),
        pytest.raises(ValueError, match="the model asks for softcap=50.0"),
    ):
        capped(input_ids=tokens())
    model = tiny_llama()
    with torch.no_grad(), score_probe(model), pytest.raises(ValueError, match="needs whole texts, not steps"):
        cache = cache_of(model(input_ids=tokens(5), use_cache=True))
        model(input_ids=tokens(1), **{cache_argument(): cache})
