"""Claims of conversions with training: their gates, what a study measures, and that all arms start from one source."""

from __future__ import annotations

import pytest
import torch

from undivided import claims
from undivided.claims import _conversion_study, _moh_tuning, dha, x_ecomla
from undivided.claims._conversion_study import ConversionStudy, Scale

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 8,
}


def scale(key_heads):
    return Scale(SIZES | {"num_key_value_heads": key_heads}, 2, 32, 4)


@pytest.fixture
def small(monkeypatch):
    for module in (_conversion_study, _moh_tuning, dha, x_ecomla):
        if hasattr(module, "scale_of"):
            monkeypatch.setattr(module, "scale_of", lambda device, key_heads: scale(key_heads))


@pytest.fixture(scope="module")
def study():
    return ConversionStudy(scale(2), 0, "cpu")


@pytest.mark.parametrize("slug", ["x_ecomla", "dha"])
def test_gates_pass(slug):
    claims.load(slug).gate("cpu")


def test_a_gate_notices_a_conversion_that_changes_the_function(monkeypatch):
    convert = x_ecomla.convert_x_ecomla
    monkeypatch.setattr(
        x_ecomla, "convert_x_ecomla", lambda model, **o: convert(model, **(o | {"latent_energy": 0.5}))
    )
    with pytest.raises(ValueError, match="logits differ from the source's"):
        x_ecomla.gate("cpu")
    monkeypatch.setattr(dha, "group_heads", lambda *a: torch.arange(32).view(4, 8))
    with pytest.raises(ValueError, match="does not find planted groups"):
        dha.gate("cpu")


def test_a_source_does_not_diverge_from_itself_and_stays_what_it_is(study):
    assert study.divergence(study.source) < 1e-9
    before = {name: tensor.clone() for name, tensor in study.source.state_dict().items()}
    copy = study.convert(lambda model: (model, None))
    study.tune(copy, 2)
    assert study.divergence(copy) > 1e-9
    assert all(torch.equal(tensor, before[name]) for name, tensor in study.source.state_dict().items())


@pytest.mark.parametrize("layers", [0, 2])
def test_teaching_brings_a_conversion_nearer_to_its_source(study, layers):
    def build():
        return study.convert(x_ecomla.convert_x_ecomla, latent_dim=8, init="random", latent_norm=True)

    assert study.divergence(study.teach(build(), 8, layers=layers)) < study.divergence(build())


def test_rows_name_their_rivals_and_bars(small, monkeypatch):
    monkeypatch.setitem(x_ecomla._STEPS, "cpu", 5)
    rows = list(x_ecomla.quality("cpu", quick=True))
    assert [row.required for row in rows].count(2.0) == [row.required for row in rows].count(5.0) == 1
    assert len({(row.what, row.shape) for row in rows}) == len(rows) == 8
    rows = list(_moh_tuning.tuning_rows("cpu", quick=True))
    assert sum(row.required is not None for row in rows) == 1
    assert {row.baseline_name for row in rows} == {"the source", "the source, trained as long", "the bar"}
    monkeypatch.setattr(dha, "_SEARCH", 1)
    monkeypatch.setattr(dha, "_FUSION", 2)
    monkeypatch.setattr(dha, "_TUNING", 1)
    rows = list(dha.quality("cpu", quick=True))
    assert rows[-1].required == 5.0 and rows[-1].ours in dha._MULTIPLES
    assert len({(row.what, row.shape) for row in rows}) == len(rows)
