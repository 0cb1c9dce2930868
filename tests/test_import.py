"""`import undivided` is light, needs nothing optional, and stays out of the way."""

from __future__ import annotations

import pytest

import undivided

IMPORT_TIME = """
import sys, time
begin = time.perf_counter()
__import__(sys.argv[1])
print(time.perf_counter() - begin)
"""

LOADED = """
import sys, undivided
print(*(name for name in sys.argv[1:] if name in sys.modules))
"""

WITHOUT = """
import sys
for name in sys.argv[1:]:
    sys.modules[name] = None
import undivided
import undivided.ops, undivided.layers, undivided.catalog, undivided.testing
from undivided.models.causal_lm import UndividedForCausalLM
"""


def test_import_takes_less_time_than_that_of_transformers(run_python):
    ours = min(float(run_python(IMPORT_TIME, "undivided").stdout) for _ in range(2))
    theirs = min(float(run_python(IMPORT_TIME, "transformers").stdout) for _ in range(2))
    assert ours < theirs


def test_import_loads_no_heavy_package(run_python):
    assert run_python(LOADED, "torch", "transformers", "timm", "triton", "matplotlib", "scipy").stdout == "\n"


def test_ops_layers_and_host_work_without_optional_packages(run_python):
    run_python(WITHOUT, "timm", "torchvision", "triton", "matplotlib", "peft")


def test_subpackages_load_when_named():
    assert undivided.testing.__name__ == "undivided.testing"
    assert "ops" in dir(undivided)
    assert "testing" in dir(undivided)


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'undivided' has no attribute 'opps'"):
        undivided.opps  # noqa: B018


def test_version_is_that_of_the_project():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert undivided.__version__ == project["version"]
