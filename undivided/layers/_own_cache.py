"""Layers of a cache that a mechanism brings itself, in the place of those that the base model's config asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers.cache_utils import DynamicLayer

Layer = TypeVar("Layer")


def cache_layer(cache: Any, layer_idx: int) -> Any:
    """Returns a layer of a cache, which a growing cache may not have yet."""
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[layer_idx]


def own_cache_layer(cache: Any, layer_idx: int, kind: type[Layer], make: Callable[[], Layer]) -> Layer:
    """Returns the cache's layer of a kind, exchanging an empty one of another kind, a static one too.

    Args:
        cache: of transformers.
        layer_idx: which layer.
        kind: class of the layer that is wanted.
        make: makes a new one.

    Raises:
        ValueError: the layer has keys of another attention.
    """
    layer = cache_layer(cache, layer_idx)
    if isinstance(layer, kind):
        return layer
    if getattr(layer, "is_initialized", False) and int(layer.get_seq_length()):
        raise ValueError(
            f"layer {layer_idx} of the cache holds keys of another attention; let this model fill the cache from the "
            "first token."
        )
    cache.layers[layer_idx] = made = make()
    return made


class WindowCacheLayer(DynamicLayer):
    """The keys and values of the first `sinks` tokens and of the last `window - 1`.

    Masks are those of a cache that keeps every token: `columns` says which of theirs the keys at hand are. With
    `keeps_all`, set before the first token, nothing is dropped.
    """

    def __init__(self, window: int, sinks: int) -> None:
        super().__init__()
        self.window, self.sinks, self.keeps_all = window, sinks, False
        self.cumulative_length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what is kept, with the new tokens behind it, and keeps what the next tokens see of all that."""
        key, value = super().update(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        more = key.shape[2] - self.sinks - (self.window - 1)
        if more > 0 and not self.keeps_all:
            # Copies: a view would keep the memory of what is dropped.
            first, last = self.sinks, self.sinks + more
            self.keys, self.values = (
                torch.cat([x[:, :, :first], x[:, :, last:]], dim=2) for x in (key, value)
            )
        return key, value

    def columns(self, num_keys: int) -> torch.Tensor:
        """Returns the places `[num_keys]` in the sequence of the keys that the last update returned."""
        first = min(self.sinks, num_keys)
        places = torch.arange(self.cumulative_length - num_keys, self.cumulative_length, device=self.device)
        places[:first] = torch.arange(first, device=self.device)
        return places

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last tokens, as long as no window has passed over any.

        Raises:
            ValueError: keys that would be seen again are gone.
        """
        gone = self.cumulative_length - (self.keys.shape[2] if self.is_initialized else 0)
        if tokens_to_remove and gone:
            raise ValueError(
                f"a cache of a window of {self.window} tokens cannot be shortened after {self.cumulative_length}: keys "
                "that would be seen again are gone; start it anew."
            )
        super().crop(tokens_to_remove)
        self.cumulative_length = self.keys.shape[2] if self.is_initialized else 0
