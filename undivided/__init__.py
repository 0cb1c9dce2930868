"""Choose, convert, run and inspect the attention of models.

`import undivided` is light: it imports neither torch nor transformers. Sub-packages load on first use
(`undivided.ops`, `undivided.convert`, ...), and the model type "undivided" is made known to transformers'
Auto classes as soon as those are imported, so that `AutoModelForCausalLM.from_pretrained(folder)` opens a
converted checkpoint.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from undivided.models.registration import register as _register

__version__ = "0.1.0"

_SUBPACKAGES = (
    "apps",
    "catalog",
    "claims",
    "convert",
    "cost",
    "data",
    "decoding",
    "distributed",
    "engine",
    "inspect",
    "layers",
    "models",
    "ops",
    "spec",
    "testing",
    "training",
)

__all__ = ["__version__", *_SUBPACKAGES]


def __getattr__(name: str) -> ModuleType:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES})


_register()
