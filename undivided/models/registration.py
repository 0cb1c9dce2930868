"""Makes the model type "undivided" known to transformers' Auto classes, without importing transformers.

Registering needs the configuration class, whose import brings in torch, and the model class, whose import
brings in transformers.modeling_utils: seconds that `import undivided` and `undivided --help` must not pay. So
both wait:

- The configuration class is registered as soon as transformers' Auto configurations have been imported, which
  every Auto class does first. `register` watches for that import.
- The model class is registered when a configuration is made, which `from_pretrained` and `from_config` do
  before they look for a model class; the configuration class calls `register_models`. Earlier would not do:
  transformers imports its Auto models in the middle of its modeling files, which the model class needs
  complete.

Only public interfaces are used: `sys.meta_path`, `AutoConfig.register`, `AutoModelForCausalLM.register`.
Written for transformers 5.17 to 5.24.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODEL_TYPE = "undivided"
_THEIRS = "transformers.models.auto.configuration_auto"
_OURS = "undivided.models.configuration"


def register() -> None:
    """Register the configuration class: now if the Auto classes are loaded, else as soon as they are."""
    if _OURS in sys.modules or any(isinstance(finder, _Watch) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Watch())
    if _THEIRS in sys.modules:
        importlib.import_module(_OURS)


def register_models() -> None:
    """Register the model class with `AutoModelForCausalLM`; a second call changes nothing."""
    from transformers import AutoModelForCausalLM

    from undivided.models.causal_lm import UndividedForCausalLM
    from undivided.models.configuration import UndividedConfig

    AutoModelForCausalLM.register(UndividedConfig, UndividedForCausalLM, exist_ok=True)


class _Watch(MetaPathFinder):
    """Acts after two modules have run: theirs brings in ours, and ours, which needs theirs, is registered.

    Two, because a program may import our configuration first: theirs then runs in the middle of ours, too
    early to register it.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (_THEIRS, _OURS):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _LoaderWithSequel(spec.loader, self)
                return spec
        return None

    def has_run(self, module: ModuleType) -> None:
        if module.__name__ == _THEIRS:
            importlib.import_module(_OURS)
            return
        from transformers import AutoConfig

        AutoConfig.register(MODEL_TYPE, module.UndividedConfig, exist_ok=True)
        sys.meta_path.remove(self)


class _LoaderWithSequel(Loader):
    def __init__(self, loader: Loader, watch: _Watch) -> None:
        self.loader = loader
        self.watch = watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module shall look as if this class had never been there (inspect and linecache ask its loader).
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.watch.has_run(module)
