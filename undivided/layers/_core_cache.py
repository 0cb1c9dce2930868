"""The cache of core context attention: core tokens of the far past, keys and values of the near past."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin


class CoreContextCacheLayer(CacheLayerMixin):
    """What one layer keeps of the tokens before.

    Of texts without padding `keys` and `values` are those of the last tokens, from the last core token's group on;
    `core_keys` and `core_values` stand for all tokens before. `weights` are of the groups that are complete and not
    pooled yet. Of padded texts, whose groups end at different columns, `keys` and `values` hold every column, and
    `queries` too.
    """

    is_sliding = False
    _STATES = ("keys", "values", "core_keys", "core_values", "weights", "cos", "sin", "queries")

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0
        self.core_keys: torch.Tensor | None = None
        self.core_values: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None
        self.cos: torch.Tensor | None = None
        self.sin: torch.Tensor | None = None
        self.queries: torch.Tensor | None = None

    def _forget(self) -> None:
        for name in self._STATES:
            setattr(self, name, None)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values and returns those that are kept, which the layer then shortens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self.joined("keys", key_states), self.joined("values", value_states)
        self.tokens += key_states.shape[2]
        return self.keys, self.values

    def joined(self, name: str, new: torch.Tensor, dim: int = 2) -> torch.Tensor:
        """Returns a state with new rows behind it; it is not kept."""
        old = getattr(self, name)
        return new if old is None else torch.cat([old, new], dim=dim)

    def joined_tables(
        self, tables: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns the tables of positions of the keys that are kept, where they are needed."""
        if tables is None:
            return None
        return self.joined("cos", tables[0], 1), self.joined("sin", tables[1], 1)

    def waiting(self, groups: int) -> torch.Tensor:
        """Returns the weights of the first complete groups that are not pooled yet."""
        if self.weights is None or self.weights.shape[2] < groups:
            raise ValueError(f"the cache has no weights of {groups} complete groups; start it anew.")
        return self.weights[:, :, :groups]

    def add_cores(self, core_keys: torch.Tensor, core_values: torch.Tensor) -> None:
        """Appends core tokens."""
        self.core_keys = self.joined("core_keys", core_keys)
        self.core_values = self.joined("core_values", core_values)

    def keep_weights(self, pooled: int, fresh: torch.Tensor | None) -> None:
        """Drops the weights of the groups that have been pooled, and appends those of groups complete by now."""
        kept = None if self.weights is None else self.weights[:, :, pooled:]
        parts = [part for part in (kept, fresh) if part is not None and part.shape[2]]
        self.weights = torch.cat(parts, dim=2) if parts else None

    def drop(self, rows: int, tables: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Drops the first keys and values, and keeps the tables of the others."""
        if rows:
            # Copies: a view would keep the memory of what is dropped.
            self.keys, self.values = (x[:, :, rows:].clone() for x in (self.keys, self.values))
        if tables is not None:
            self.cos, self.sin = (table[:, rows:].clone() for table in tables)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.tokens, self.is_initialized = 0, False
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._each(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        self._each(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch."""
        self._each(lambda state: state[indices])

    def offload(self) -> None:
        self._each(lambda state: state.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._each(lambda state: state.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses: the keys that core tokens stand for are gone."""
        if tokens_to_remove:
            raise ValueError(
                "a cache of core tokens cannot be shortened: the keys they stand for are gone; start it anew."
            )

    def _each(self, change: Any) -> None:
        for name in self._STATES:
            state = getattr(self, name)
            # Tables of positions may have one row for the whole batch.
            if state is not None and not (name in ("cos", "sin") and state.shape[0] == 1):
                setattr(self, name, change(state))
