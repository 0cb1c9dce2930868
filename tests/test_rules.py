"""Project rules that a machine can check; also a pre-commit hook."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "undivided").rglob("*.py"))
MOST_LINES = 600


def asserts(source: str) -> list[str]:
    """An assert vanishes under -O and says nothing about the argument."""
    nodes = ast.walk(ast.parse(source))
    return [f"line {node.lineno}: assert" for node in nodes if isinstance(node, ast.Assert)]


def environment_reads(source: str) -> list[str]:
    """Arguments are the interface; an environment variable acts at a distance."""
    names = {"environ", "environb", "getenv", "getenvb"}
    found = []
    for node in ast.walk(ast.parse(source)):
        imported = isinstance(node, ast.ImportFrom) and node.module == "os"
        used = {alias.name for alias in node.names} if imported else set()
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            used = {node.attr}
        found += [f"line {node.lineno}: os.{name}" for name in sorted(used & names)]
    return found


def pickles(source: str) -> list[str]:
    """A pickle runs code when it is opened; models are safetensors."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        found += [f"line {node.lineno}: {name}" for name in modules if name in ("pickle", "dill", "joblib")]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save"):
            found.append(f"line {node.lineno}: {ast.unparse(node.func)}")
    return found


def too_long(source: str) -> list[str]:
    """A file answers one question."""
    lines = source.count("\n")
    return [f"{lines} lines, at most {MOST_LINES}"] if lines > MOST_LINES else []


def violations(rule: Callable[[str], list[str]], files: list[Path]) -> list[str]:
    return [f"{path.relative_to(ROOT)} {found}" for path in files for found in rule(path.read_text())]


@pytest.mark.parametrize("rule", [asserts, environment_reads, pickles, too_long])
def test_package_keeps_the_rule(rule):
    assert violations(rule, PACKAGE) == []


def test_test_files_are_not_too_long():
    assert violations(too_long, sorted((ROOT / "tests").rglob("*.py"))) == []


@pytest.mark.parametrize(
    ("rule", "source", "found"),
    [
        (asserts, "def f(x):\n    assert x > 0\n", ["line 2: assert"]),
        (asserts, "tl.static_assert(x)\nraise AssertionError('assert')\n", []),
        (
            environment_reads,
            "import os\nos.environ['A']\nos.getenv('B')\n",
            ["line 2: os.environ", "line 3: os.getenv"],
        ),
        (environment_reads, "from os import environ, path\n", ["line 1: os.environ"]),
        (environment_reads, "import os\nos.replace(a, b)\n", []),
        (pickles, "import pickle\ntorch.load(f)\n", ["line 1: pickle", "line 2: torch.load"]),
        (pickles, "from safetensors.torch import load_file\n", []),
        (too_long, "x\n" * 601, ["601 lines, at most 600"]),
        (too_long, "x\n" * 600, []),
    ],
)
def test_rules_can_fail(rule, source, found):
    assert rule(source) == found
