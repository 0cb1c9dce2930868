"""The registry of conversions, and what every report can do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest

import undivided.convert as convert
from undivided.convert import CONVERTERS, Report, converter
from undivided.convert._report import ConversionLog


@pytest.mark.parametrize("target", CONVERTERS)
def test_every_converter_loads(target: str) -> None:
    function = converter(target)
    assert function.__name__ == CONVERTERS[target].split(":")[1]
    assert getattr(convert, function.__name__) is function


def test_names_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"target='rope' is not one of .*'mla', 'tpla'\."):
        converter("rope")
    with pytest.raises(AttributeError, match="no attribute 'convert_all'"):
        convert.convert_all  # noqa: B018
    assert {"CONVERTERS", "Report", "convert_transmla", "convert_tpla"} <= set(dir(convert))


def test_importing_conversions_is_light(run_python: Callable[..., object]) -> None:
    run_python(
        "import sys, undivided.convert\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'{heavy} came in' if heavy else 0)"
    )


def test_log_notes_the_cost_of_the_last_stage() -> None:
    scores = iter([4.0, 5.0])
    log = ConversionLog(evaluate=lambda model: next(scores))
    log.evaluate("original", None)
    log.approximate("nothing to compare with")
    log.evaluate("cut", None)
    log.evaluate("cut", None)
    log.approximate("something was cut")
    report = log.report("method", {"width": 3}, 64)
    assert report.approximations == ["nothing to compare with", "something was cut: perplexity 4 -> 5"]
    assert report.perplexity == {"original": 4.0, "cut": 5.0}
    assert json.loads(json.dumps(asdict(report))) == asdict(report)
    assert isinstance(report, Report)


def test_log_keeps_where_there_is_a_place() -> None:
    class Work:
        def stage(self, name: str, key: dict, compute: Callable[[], dict]) -> dict:
            return {"name": name, "key": key, **compute()}

    assert ConversionLog().keep("moments", {"a": 1}, lambda: {"b": 2}) == {"b": 2}
    kept = ConversionLog(work=Work()).keep("moments", {"a": 1}, lambda: {"b": 2})
    assert kept == {"name": "moments", "key": {"a": 1}, "b": 2}
