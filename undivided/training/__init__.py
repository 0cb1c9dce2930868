"""Training after a conversion: distillation from the model it came from, on `transformers.Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from undivided.training.healing import Recipe, heal
    from undivided.training.losses import distillation_loss, feature_loss
    from undivided.training.preference import PreferencePair, PreferenceRecipe, dpo_loss, prefer
    from undivided.training.trainers import DistillationTrainer, LayerwiseTrainer

_HOME = {
    "DistillationTrainer": "trainers",
    "LayerwiseTrainer": "trainers",
    "PreferencePair": "preference",
    "PreferenceRecipe": "preference",
    "Recipe": "healing",
    "distillation_loss": "losses",
    "dpo_loss": "preference",
    "feature_loss": "losses",
    "heal": "healing",
    "prefer": "preference",
}

__all__ = [
    "DistillationTrainer",
    "LayerwiseTrainer",
    "PreferencePair",
    "PreferenceRecipe",
    "Recipe",
    "distillation_loss",
    "dpo_loss",
    "feature_loss",
    "heal",
    "prefer",
]


def __getattr__(name: str) -> object:
    """Imports on first use: transformers' Trainer takes seconds to load."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
