"""How a family's models become known to timm."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from undivided.models.vision._backbone import VisionBackbone
from undivided.models.vision._official import renamed

# timm has models of the same names ("gcvit_tiny"), and a second registration would replace them.
PREFIX = "undivided_"
_REGISTERED: dict[str, type[VisionBackbone]] = {}


def register_family(
    module: str,
    model_class: type[VisionBackbone],
    models: Mapping[str, Mapping[str, Any]],
    *,
    config: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Registers the models of one family with timm.

    Args:
        module: `__name__` of the calling module; timm lists its models under the last part.
        model_class: their class.
        models: name without the prefix -> arguments of the constructor.
        config: what all of them have in `pretrained_cfg`, beside ImageNet's normalisation: `first_conv`,
            `input_size`, ...
        configs: name without the prefix -> what is different in one model.
    """
    names = {PREFIX + name: name for name in models}
    configs = configs or {}
    entries = {
        name: _pretrained_config({**config, **configs.get(short, {})}) for name, short in names.items()
    }
    # `register_model` looks for the configs in the module that the function says it is from, and lists its name there.
    namespace = sys.modules[module]
    existing = getattr(namespace, "default_cfgs", {})
    namespace.default_cfgs = {**existing, **generate_default_cfgs(entries)}  # type: ignore[attr-defined]
    for name, short in names.items():
        register_model(_entry_point(name, module, model_class, models[short]))
        _REGISTERED[name] = model_class


def registered_models() -> dict[str, type[VisionBackbone]]:
    """Returns the models that this library has registered: full name -> class."""
    return dict(_REGISTERED)


def _pretrained_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head.fc",
        **config,
    }


def _entry_point(
    name: str, module: str, model_class: type[VisionBackbone], options: Mapping[str, Any]
) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            model_class,
            name,
            pretrained,
            pretrained_filter_fn=renamed,
            feature_cfg={"out_indices": model_class.feature_indices, "feature_cls": "getter"},
            **{**options, **kwargs},
        )

    create.__name__ = create.__qualname__ = name
    create.__module__ = module
    create.__doc__ = f"Returns {name}: {model_class.__name__} with the published sizes."
    return create
