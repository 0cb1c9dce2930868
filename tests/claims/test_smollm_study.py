"""The table of initial values on a tiny model: the batches, the stages, the rows and their bars."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_llama
from undivided.claims import _smollm_study as study_of
from undivided.claims._smollm_study import (
    COLD,
    COLD_STAGED,
    DYNAMIC,
    FIXED,
    TRANSMLA,
    TRANSMLA_STAGED,
    Plan,
    Scores,
    SmolStudy,
)
from undivided.claims._smollm_table import Table
from undivided.models.bases import attention_layers
from undivided.models.evaluation import compare

PLAN = Plan(batch_size=4, length=16, attention_rate=3e-3, layers_tokens=640, warm_up=128, peak=640)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(study_of, "ROPE_DIM", 4)
    monkeypatch.setattr(study_of, "_FOLD", 2)


@pytest.fixture
def study():
    generator = torch.Generator().manual_seed(0)
    return SmolStudy(
        tiny_llama(), torch.randint(256, (500,), generator=generator), torch.arange(96).view(6, 16), PLAN
    )


def test_scores_are_those_of_a_comparison(study):
    from tests.tiny import tiny_tokenizer

    model = study.build(FIXED, 8)
    found = study.scores(model)
    text = tiny_tokenizer().decode(range(65, 97))
    ids = tiny_tokenizer()(text, return_tensors="pt", add_special_tokens=False).input_ids
    one = SmolStudy(tiny_llama(), torch.arange(100), ids, PLAN).scores(model)
    expected = compare(model, tiny_llama(), tiny_tokenizer(), text, block=ids.shape[1])
    assert one.perplexity == pytest.approx(expected.model.perplexity, rel=1e-5)
    assert 0 < found.divergence < 10 and 0 <= found.agreement <= 1
    own = study.scores(study.source)
    assert own.divergence == pytest.approx(0, abs=1e-9) and own.agreement == 1
    assert model.training


def test_arms_see_the_same_batches_and_come_nearer(study, monkeypatch):
    seen = {}
    step = study_of.Learner.__call__

    def keep(self, ids, taught):
        seen.setdefault(id(self.model), []).append(ids)
        return step(self, ids, taught)

    monkeypatch.setattr(study_of.Learner, "__call__", keep)
    models = {name: study.build(name, 8) for name in (COLD, FIXED, COLD_STAGED)}
    found = {
        (name, count): scores
        for name, count, scores in study.run(models, (1280, 2560), (COLD_STAGED,), {FIXED: 1280})
    }
    assert set(found) == {(n, c) for n in models for c in (0, 1280)} | {(COLD, 2560), (COLD_STAGED, 2560)}
    assert all(found[name, 1280].divergence < found[name, 0].divergence for name in models)
    batches = [seen[id(model)] for model in models.values()]
    assert [len(each) for each in batches] == [40, 20, 40]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*batches, strict=False))


def test_the_first_stage_changes_attention_alone_and_the_second_all(study):
    model = study.build(COLD_STAGED, 8)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}

    def changed():
        return {name for name, tensor in model.named_parameters() if not tensor.equal(before[name])}

    own = {id(p) for layer in attention_layers(model) for p in layer.parameters()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in own}
    list(study.run({"arm": model}, (320,), ("arm",)))
    assert changed() == names
    list(study.run({"arm": model}, (1280,), ("arm",)))
    assert changed() == set(before)


def test_rates_rise_then_fall_with_the_root_of_the_tokens():
    factors = [PLAN.factor(step) for step in range(40)]
    assert factors[0] == 0.5 and factors[1:10] == [1.0] * 9
    assert factors[39] == pytest.approx(0.5)
    assert PLAN.layers_factor(0) == 0.5 and PLAN.layers_factor(10) == 0.0
    assert PLAN.steps(650) == 10


def test_dynamic_ranks_have_the_mean_of_the_fixed_one():
    source = tiny_llama(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4)
    study = SmolStudy(source, torch.arange(100), torch.arange(32).view(2, 16), PLAN)
    ranks = [layer.latent_dim for layer in attention_layers(study.build(DYNAMIC, 32))]
    assert abs(sum(ranks) / 4 - 32) <= 8
    with pytest.raises(ValueError, match="name='cold' is not one of 'random'"):
        study.build("cold", 8)


def test_the_table_has_every_arm_at_every_count_and_its_bars(study, tmp_path):
    table = Table(study, 8, counts=(640, 1280), long=(2560,))
    rows = list(table.rows())
    assert len({(row.what, row.shape) for row in rows}) == len(rows) == 6 * 3 * 2 + 6 + 2
    assert all(row.required is None for row in rows)
    bars = [*table.early_rows(), *table.stage_rows()]
    assert [row.required for row in bars] == [2.0, 5.0, 1.0, pytest.approx(1 / 1.1)]
    assert bars[0].baseline_name.startswith("random, 0.00256M")
    assert bars[0].ours == table.found[FIXED, 1280].divergence
    assert bars[0].baseline == table.found[COLD, 2560].divergence
    table.figure.save(tmp_path / "recovery.png")
    assert (tmp_path / "recovery.png").read_bytes().startswith(b"\x89PNG")


def test_a_bar_needs_both_of_its_arms(study):
    table = Table(study, 8, names=(TRANSMLA,), counts=(640,))
    table.found = {(TRANSMLA, 640): Scores(1.0, 2.0, 0.5), (TRANSMLA_STAGED, 0): Scores(3.0, 2.0, 0.5)}
    assert [*table.early_rows(), *table.stage_rows()] == []


def test_compiled_arms_take_the_same_steps(study, monkeypatch):
    import functools

    monkeypatch.setattr(
        study_of, "compiled_layers", functools.partial(study_of.compiled_layers, backend="aot_eager")
    )
    monkeypatch.setattr(study_of.torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = []
    for study.compiled in (False, True):
        rows = list(study.run({"arm": study.build(COLD_STAGED, 8)}, (1280,), ("arm",)))
        found.append(rows[-1][2])
    assert found[1].divergence == pytest.approx(found[0].divergence, rel=1e-3)


def test_routers_are_judged_by_what_they_give_back():
    from undivided.claims import _moh_tuning

    source = tiny_llama(num_attention_heads=8, num_key_value_heads=2, hidden_size=64)
    tokens = torch.arange(256).repeat(4)
    study = SmolStudy(source, tokens, torch.arange(64).view(4, 16), PLAN)
    rows = list(_moh_tuning.routed_rows(study, (640,), "tiny", shared_heads=4, top_k=2))
    assert [row.what for row in rows].count("perplexity, heads routed by norms of queries") == 2
    assert sum(row.required == 1.0 for row in rows) <= 1
    assert all(row.baseline == study.own.perplexity for row in rows if row.unit == "perplexity")
    assert list(_moh_tuning.smollm_rows("cpu", True)) == []
