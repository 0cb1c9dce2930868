"""A converted checkpoint opens through the Auto classes, whatever was imported first."""

from __future__ import annotations

import pytest

from tests import tiny

OPEN = """
import sys
{imports}
from transformers import AutoConfig, AutoModelForCausalLM
print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
print(type(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))).__name__)
"""

ORDERS = {
    "ours first": "import undivided",
    "Auto classes first": "from transformers import AutoModelForCausalLM; import undivided",
    "a model class last": "import undivided; from transformers import LlamaForCausalLM",
    "our model first": "from undivided.models.causal_lm import UndividedForCausalLM",
    "our config first": "from undivided.models.configuration import UndividedConfig",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from undivided.models.causal_lm import UndividedForCausalLM

    path = tmp_path_factory.mktemp("converted")
    UndividedForCausalLM.from_native(tiny.tiny_llama()).save_pretrained(path)
    return path


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
def test_auto_classes_open_a_checkpoint(imports, folder, run_python):
    printed = run_python(OPEN.format(imports=imports), str(folder)).stdout.split()
    assert printed == ["UndividedConfig", "UndividedForCausalLM", "UndividedForCausalLM"]


def test_auto_config_module_keeps_its_own_loader(run_python):
    code = """
import sys, undivided
from transformers.models.auto import configuration_auto
finders = [type(finder).__module__ for finder in sys.meta_path if not isinstance(finder, type)]
print(type(configuration_auto.__spec__.loader).__name__, type(configuration_auto.__loader__).__name__)
print(any(name.startswith("undivided") for name in finders))
"""
    assert run_python(code).stdout.split() == ["SourceFileLoader", "SourceFileLoader", "False"]


def test_other_imports_are_left_alone(run_python):
    code = """
import sys, undivided
from undivided.models.registration import register
register()
print(sum(type(finder).__module__ == "undivided.models.registration" for finder in sys.meta_path))
import json.tool, transformers
print("undivided.models.configuration" in sys.modules)
"""
    assert run_python(code).stdout.split() == ["1", "False"]
