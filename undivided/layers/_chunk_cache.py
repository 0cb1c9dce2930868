"""The cache of dynamic hierarchical sparse attention: all keys, and of their chunks the sums that scores need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from undivided.layers._chunks import chunk_representations
from undivided.layers._own_cache import cache_layer

_STATES = ("keys", "values", "sums", "told", "padding")


class ChunkCacheLayer(DynamicLayer):
    """Keys and values of every token, and of each chunk of keys the sum over its tokens, formed when it is asked for.

    Args:
        size: tokens of a chunk; None for the chunks that `begin` is told, behind which all later tokens are one more.
        by_head: whether sums are of each key head; else of the mean over heads.
    """

    def __init__(self, size: int | None, by_head: bool) -> None:
        super().__init__()
        self.size, self.by_head = size, by_head
        self._forget()

    def _forget(self) -> None:
        self.sums: torch.Tensor | None = None
        self.told: torch.Tensor | None = None
        self.padding: torch.Tensor | None = None
        self.summed = 0

    def begin(self, padding: torch.Tensor | None, boundaries: torch.Tensor | None) -> None:
        """Says where texts begin, int64 `[batch]`, and, without a size, where chunks do, `[batch, chunks + 1]`."""
        self.padding, self.told = padding, boundaries

    def boundaries(self, length: int) -> torch.Tensor:
        """Returns where the chunks of the first tokens begin, and where the last ends, int64 `[batch, chunks + 1]`."""
        if self.size is None:
            told: Any = self.told
            return torch.nn.functional.pad(told.clamp(max=length), (0, 1), value=length)
        places = torch.arange(0, length + self.size, self.size, device=self.keys.device)
        start = torch.zeros_like(places[:1]) if self.padding is None else self.padding
        return (places + start[:, None]).clamp(max=length).expand(self.keys.shape[0], -1)

    def chunks(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the sums of the chunks of the first tokens, `[batch, chunks, width]`, and their boundaries.

        With `by_head` the width is that of all key heads, side by side. Tokens that came since the last call are added
        to the chunks they belong to.
        """
        bounds = self.boundaries(length)
        new = self.keys[:, :, self.summed : length]
        dtype = torch.promote_types(new.dtype, torch.float32)
        rows = new.transpose(1, 2).flatten(2).to(dtype) if self.by_head else new.mean(dim=1, dtype=dtype)
        if self.sums is None:
            # What comes before a text is a chunk that is left out.
            self.sums = chunk_representations(rows, torch.nn.functional.pad(bounds, (1, 0)), "sum")[:, 1:]
        elif rows.shape[1]:
            if missing := bounds.shape[1] - 1 - self.sums.shape[1]:
                self.sums = torch.nn.functional.pad(self.sums, (0, 0, 0, missing))
            column = torch.arange(self.summed, length, device=rows.device).expand(rows.shape[0], -1)
            chunk = torch.searchsorted(bounds[:, 1:].contiguous(), column.contiguous(), right=True)
            self.sums.scatter_add_(1, chunk[..., None].expand_as(rows), rows)
        self.summed = length
        return self.sums, bounds

    def reset(self) -> None:
        super().reset()
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.summed > self.get_seq_length():
            # Formed anew from the keys, which are all there.
            self.sums, self.summed = None, 0
        if self.told is not None:
            self.told = self.told.clamp(max=self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._each(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._each(lambda state: state[indices, ...])

    def offload(self) -> None:
        self._each(lambda state: state.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._each(lambda state: state.to(self.device, non_blocking=True))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            for name in _STATES:
                if getattr(self, name) is not None:
                    setattr(self, name, change(getattr(self, name)))


def chunk_layer(cache: Any, layer_idx: int, size: int | None, by_head: bool) -> ChunkCacheLayer | None:
    """Returns the cache's layer if it knows chunks, exchanging an empty growing one; else None."""
    layer = cache_layer(cache, layer_idx)
    if type(layer) is DynamicLayer and not layer.is_initialized:
        layer = cache.layers[layer_idx] = ChunkCacheLayer(size, by_head)
    return layer if isinstance(layer, ChunkCacheLayer) else None
