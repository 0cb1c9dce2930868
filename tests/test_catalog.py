"""The catalog: complete, consistent, and true about what works."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from undivided import catalog, claims
from undivided.catalog import FIDELITIES, KINDS, STATES, SYSTEMS

ROOT = Path(__file__).resolve().parents[1]
WORKING = [row for row in SYSTEMS if row.state == "works"]


def test_numbers_run_from_1_to_54_in_order():
    assert [row.number for row in SYSTEMS] == list(range(1, 55))


@pytest.mark.parametrize("field", ["slug", "name", "title", "arxiv", "summary"])
def test_no_two_systems_share(field):
    values = [getattr(row, field) for row in SYSTEMS]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("row", SYSTEMS, ids=lambda row: row.slug)
def test_fields_come_from_closed_sets_and_have_the_right_form(row):
    assert row.kind in KINDS
    assert row.state in STATES
    assert row.fidelity is None or row.fidelity in FIDELITIES
    assert (row.fidelity is None) == (row.state == "planned")
    assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", row.slug)
    assert re.fullmatch(r"\d{4}\.\d{5}", row.arxiv)
    assert row.link == f"https://arxiv.org/abs/{row.arxiv}"
    # The first two digits of an arXiv number are the year of the first version.
    assert row.year == 2000 + int(row.arxiv[:2])
    assert row.summary.endswith(".") and len(row.summary) < 100 and row.summary.count(". ") == 0


@pytest.mark.parametrize("row", SYSTEMS, ids=lambda row: row.slug)
def test_code_names_modules_of_the_house(row):
    rooms = {"apps", "convert", "cost", "data", "decoding", "distributed", "engine", "inspect", "layers"}
    rooms |= {"models", "ops", "spec", "training"}
    assert row.code and len(set(row.code)) == len(row.code)
    for module in row.code:
        package, room, *_ = module.split(".")
        assert package == "undivided" and room in rooms
        assert all(part.isidentifier() for part in module.split("."))


def test_every_kind_is_used():
    assert {row.kind for row in SYSTEMS} == set(KINDS)


@pytest.mark.parametrize("row", [row for row in SYSTEMS if row.state != "planned"], ids=lambda row: row.slug)
def test_what_can_be_used_is_importable(row):
    assert any(_importable(module) for module in row.code), f"none of {row.code} can be imported"


@pytest.mark.parametrize("row", WORKING, ids=lambda row: row.slug)
def test_a_system_that_works_has_modules_tests_claim_and_results(row):
    assert all(_importable(module) for module in row.code)
    assert list((ROOT / "tests").rglob(f"test_{row.slug}.py")), f"no tests/**/test_{row.slug}.py"
    assert claims.load(row.slug).slug == row.slug
    assert (ROOT / "results" / f"{row.slug}.jsonl").stat().st_size > 0


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A missing dependency of the module is another matter, and must not read as "not written yet".
        if error.name is None or not module.startswith(error.name):
            raise
        return False
    return True


def test_get_returns_the_row():
    assert catalog.get("tpla").number == 1
    assert catalog.get("rala").number == 54


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("tlpa", 'no system is called "tlpa"; near matches: tpla, tcpa.'),
        ("X-EcoMLA", 'no system is called "X-EcoMLA"; near matches: x_ecomla.'),
        ("core-context", 'no system is called "core-context"; near matches: core_context.'),
        ("qqqq", 'no system is called "qqqq"; `undivided systems` lists all.'),
    ],
)
def test_get_names_what_is_near(asked, message):
    with pytest.raises(ValueError) as raised:
        catalog.get(asked)
    assert str(raised.value) == message


def test_reading_the_catalog_imports_nothing_heavy(run_python):
    heavy = "torch", "transformers", "triton", "timm", "numpy", "rich"
    done = run_python(f"import sys, undivided.catalog; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]"
