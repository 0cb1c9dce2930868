"""Makes the model type "undivided" known to transformers' Auto classes, without importing transformers.

Registering needs the configuration class, whose import brings in torch, and the model class, whose import
brings in transformers.modeling_utils: seconds that `import undivided` and `undivided --help` must not pay. So
both wait:

- the configuration class is registered right after `transformers.models.auto.configuration_auto` has been
  imported, which every Auto class does first (`register`);
- the model class is registered when the first configuration object is made, which `from_pretrained` and
  `from_config` do before they look for a model class (`register_models`, called by the configuration class).

Only public interfaces are used: `sys.meta_path`, `AutoConfig.register`, `AutoModelForCausalLM.register`.
Written for transformers 5.17 to 5.23.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODEL_TYPE = "undivided"
_AUTO_CONFIG_MODULE = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register the configuration class: now if the Auto classes are loaded, else as soon as they are."""
    if _AUTO_CONFIG_MODULE in sys.modules:
        _register_config()
    elif not any(isinstance(finder, _AutoConfigFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoConfigFinder())


def register_models() -> None:
    """Register the model class with `AutoModelForCausalLM`; a second call changes nothing."""
    from transformers import AutoModelForCausalLM

    from undivided.models.causal_lm import UndividedForCausalLM
    from undivided.models.configuration import UndividedConfig

    AutoModelForCausalLM.register(UndividedConfig, UndividedForCausalLM, exist_ok=True)


def _register_config() -> None:
    from transformers import AutoConfig

    from undivided.models.configuration import UndividedConfig

    AutoConfig.register(MODEL_TYPE, UndividedConfig, exist_ok=True)


class _AutoConfigFinder(MetaPathFinder):
    """Finds one module, once, by asking the other finders, and has it registered after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO_CONFIG_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module shall look as if this class had never been there (inspect and linecache ask its loader).
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register_config()
