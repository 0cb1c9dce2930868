from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from undivided.spec import (
    COMMITMENTS,
    ColumnSum,
    RowSum,
    Sinkhorn,
    Trace,
    anchor,
    check_commitments,
    link_law,
)

WIDTH, RECEIVERS, SOURCES = 4, 12, 14
GRID = torch.linspace(-3, 3, 25, dtype=torch.float64)


def sampler(generator):
    return tuple(torch.randn(n, WIDTH, generator=generator).double() for n in (RECEIVERS, SOURCES))


@dataclasses.dataclass(frozen=True)
class Operator:
    """Standard attention with exchangeable parts: the witnesses differ from it in one of them."""

    mask: object = lambda x, y, s: torch.ones_like(s).tril(2).bool()
    scores: object = lambda x, y: x @ MATRIX @ y.T / 2
    link: object = torch.exp
    weights: object = lambda w, mask: anchor(w, RowSum(), mask=mask)
    payload: object = lambda x, y: y @ VALUES
    aggregate: object = lambda alpha, v: alpha @ v

    def __call__(self, x, y):
        scores = self.scores(x, y)
        mask = self.mask(x, y, scores)
        log_prior = -0.1 * torch.arange(SOURCES).double().expand_as(scores)
        evidence = (log_prior.exp() * self.link(scores)).masked_fill(~mask, 0.0)
        alpha, payload = self.weights(evidence, mask), self.payload(x, y)
        return Trace(mask, scores, log_prior, evidence, alpha, payload, self.aggregate(alpha, payload))


MATRIX = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5)).double()
VALUES = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(6)).double()
everything = lambda x, y, s: torch.ones_like(s).bool()  # noqa: E731


def recurrent(alpha, v):
    rows = [alpha[0] @ v]
    for row in alpha[1:]:
        rows.append(torch.tanh(rows[-1]) + row @ v)
    return torch.stack(rows)


def chosen_by_scores(x, y, s):
    kept = s.topk(5, dim=-1).indices
    return torch.zeros_like(s).bool().scatter(-1, kept, True)


def pair_payload(x, y):
    return torch.tanh(x[:, None, :3] + y[None, :, :3])


def normalised_over_sources(x, y):
    scores = x @ MATRIX @ y.T
    return scores / scores.norm(dim=-1, keepdim=True)


WITNESSES = {
    "fixed carrier": Operator(mask=chosen_by_scores),
    "pairwise score": Operator(scores=normalised_over_sources, mask=everything),
    "separable score": Operator(scores=lambda x, y: (x @ y.T / 4).exp()),
    "positive weights": Operator(
        weights=lambda w, mask: anchor(w, RowSum(), mask=mask) - 0.5 * anchor(w.sqrt(), RowSum(), mask=mask)
    ),
    "exponential link": Operator(link=F.softplus),
    "row anchor": Operator(mask=everything, weights=lambda w, mask: anchor(w, Sinkhorn(50))),
    "source payload": Operator(payload=pair_payload, aggregate=lambda a, v: torch.einsum("nm,nmd->nd", a, v)),
    "additive aggregation": Operator(aggregate=recurrent),
}


def test_every_commitment_has_a_witness():
    assert list(WITNESSES) == list(COMMITMENTS)


def test_standard_attention_keeps_all():
    report = check_commitments(Operator(), sampler)
    assert report.violated == []
    assert {finding.verdict for finding in report.findings} == {"kept"}
    assert str(report).splitlines()[0].startswith("fixed carrier         kept")


@pytest.mark.parametrize("commitment", WITNESSES)
def test_checker_reports_exactly_the_violated_commitment(commitment):
    report = check_commitments(WITNESSES[commitment], sampler)
    assert report.violated == [commitment]


def test_what_presupposes_positive_weights_is_undefined_without_them():
    report = check_commitments(WITNESSES["positive weights"], sampler)
    undefined = [finding.commitment for finding in report.findings if finding.verdict == "undefined"]
    assert undefined == ["exponential link", "row anchor"]


def test_column_anchor_is_no_row_anchor():
    operator = Operator(weights=lambda w, mask: anchor(w, ColumnSum(), mask=mask))
    assert check_commitments(operator, sampler).violated == ["row anchor"]


def test_exponential_of_one_product_is_not_separable_at_any_rank():
    def one(generator):
        return tuple(torch.randn(n, 1, generator=generator).double() for n in (RECEIVERS, SOURCES))

    operator = Operator(scores=lambda x, y: (x @ y.T).exp(), payload=lambda x, y: y)
    for rank in (1, 3):
        assert check_commitments(operator, one, rank=rank).violated == ["separable score"]


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_the_exponential_passes_the_link_law_and_tau_is_recovered(tau):
    law = link_law(lambda s: 1.7 * (s / tau).exp(), GRID)
    assert law.residual < 1e-13
    assert law.temperature == pytest.approx(tau, rel=1e-12)


@pytest.mark.parametrize("link", [F.softplus, lambda s: F.elu(s) + 1, F.relu, lambda s: s])
def test_other_links_fail_the_law_by_a_wide_margin(link):
    assert link_law(link, GRID).residual > 0.1


def test_a_link_that_is_not_positive_has_no_temperature():
    assert math.isnan(link_law(F.relu, GRID).temperature)
