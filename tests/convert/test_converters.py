"""The registry of conversions, and what every report can do."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict

import pytest

import undivided.convert as convert
from undivided.convert import CONVERTERS, Report, converter
from undivided.convert._report import ConversionLog
from undivided.convert.targets import TARGETS, check_options


@pytest.mark.parametrize("target", CONVERTERS)
def test_every_converter_loads(target: str) -> None:
    function = converter(target)
    assert function.__name__ == CONVERTERS[target].split(":")[1]
    assert getattr(convert, function.__name__) is function


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_of_the_command_line_is_a_converter_with_these_options(target: str) -> None:
    row = TARGETS[target]
    parameters = inspect.signature(converter(target)).parameters
    assert set(row.options) <= set(parameters)
    assert row.calibrates == ("calibration" in parameters)
    assert row.required == tuple(
        name for name in row.options if parameters[name].default is inspect.Parameter.empty
    )
    for name, option in row.options.items():
        shared = [other.options[name] for other in TARGETS.values() if name in other.options]
        assert shared == [option] * len(shared), f"{name} means different things"


def test_options_belong_to_the_target_or_the_one_before_it() -> None:
    check_options("tpla", {"latent_dim": 16, "num_shards": 2})
    check_options("mla", {"latent_dim": 16})
    with pytest.raises(ValueError, match='to="gda-grow" takes no rope_dim; rope_dim is an option of "mla"'):
        check_options("gda-grow", {"signal_factor": 2, "rope_dim": 4})
    with pytest.raises(ValueError, match="wheels is unknown; it has latent_dim, rope_dim"):
        check_options("mla", {"wheels": 4})
    with pytest.raises(ValueError, match='to="gqa" needs num_key_value_heads'):
        check_options("gqa", {"pool": "mean"})
    for options in ({}, {"num_query_heads": 2, "keep_heads": [0, 1]}):
        with pytest.raises(ValueError, match='to="sqa" needs num_query_heads or keep_heads'):
            check_options("sqa", options)
    with pytest.raises(ValueError, match="num_shards=3 does not divide latent_dim=16"):
        check_options("tpla", {"latent_dim": 16, "num_shards": 3})


def test_names_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"target='rope' is not one of .*'mla', .*'tpla'"):
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
