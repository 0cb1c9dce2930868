"""Choose, convert, run and inspect the attention of models.

`import undivided` is light: it imports neither torch nor transformers. Sub-packages load when they are first
named (`undivided.ops`, `undivided.convert`, ...), and the model type "undivided" is made known to
transformers' Auto classes as soon as those are imported, so that
`AutoModelForCausalLM.from_pretrained(folder)` opens a converted checkpoint.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from undivided.models.registration import register as _register

__version__ = "0.1.0"

# Functions of the first step, which are found here too.
_FUNCTIONS = {"attach": "undivided.convert._attach"}


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    module = f"{__name__}.{name}"
    if not name.startswith("_"):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    public = {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
    return sorted(public | set(globals()) | set(_FUNCTIONS))


_register()
