"""The cache of native sparse attention: keys and values of all tokens, and the compressed blocks so far."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.cache_utils import DynamicLayer

_STATES = ("compressed_keys", "compressed_values", "raw_keys", "cos", "sin")


class NSACacheLayer(DynamicLayer):
    """Keys and values of all tokens, compressed blocks, and what the next block still needs.

    `raw_keys` are keys before their positions, with the tables of positions `cos` and `sin`: of texts without padding
    those from the first token of the next block on, fewer than `kernel_size + kernel_stride`. Blocks of padded texts
    begin at different columns; then all raw keys are kept, and blocks are compressed anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_padded = False
        self.compressed_keys: torch.Tensor | None = None
        self.compressed_values: torch.Tensor | None = None
        self.raw_keys: torch.Tensor | None = None
        self.cos: torch.Tensor | None = None
        self.sin: torch.Tensor | None = None

    def extend(
        self, raw_keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Appends raw keys `[batch, key_heads, length, head_dim]` and their tables; returns all that are kept."""
        for name, new, dim in (("raw_keys", raw_keys, 2), ("cos", cos, 1), ("sin", sin, 1)):
            old = getattr(self, name)
            setattr(self, name, new if old is None else torch.cat([old, new], dim=dim))
        return self.raw_keys, self.cos, self.sin

    def compress(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        """Appends compressed blocks and drops the raw keys of so many tokens, which no later block has."""
        for name, new in (("compressed_keys", keys), ("compressed_values", values)):
            old = getattr(self, name)
            setattr(self, name, new if old is None else torch.cat([old, new], dim=2))
        if tokens and self.raw_keys is not None and self.cos is not None and self.sin is not None:
            # Copies: a view would keep the memory of what is dropped.
            self.raw_keys = self.raw_keys[:, :, tokens:].clone()
            self.cos, self.sin = self.cos[:, tokens:].clone(), self.sin[:, tokens:].clone()

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses: the raw keys of compressed blocks are gone.

        Raises:
            ValueError: tokens are to be removed.
        """
        if tokens_to_remove:
            raise ValueError(
                "a cache of compressed blocks cannot be shortened: the keys they stand for are gone; start it anew."
            )

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None
        self.is_initialized = self.is_padded = False
        for name in _STATES:
            setattr(self, name, None)

    def offload(self) -> None:
        super().offload()
        self._each(lambda state: state.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        self._each(lambda state: state.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._each(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._each(lambda state: state[indices])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in _STATES:
            state = getattr(self, name)
            # Tables of positions may have one row for the whole batch.
            if state is not None and not (name in ("cos", "sin") and state.shape[0] == 1):
                setattr(self, name, change(state))
