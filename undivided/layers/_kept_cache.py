"""The cache of dynamic mask attention: of each key head the keys that a later query can still attend."""

from __future__ import annotations

from typing import Any

import torch
from transformers import cache_utils as kinds

from undivided.layers._own_cache import cache_layer
from undivided.ops.dynamic_mask._rank import key_order

_STATES = ("keys", "values", "bias", "positions")


class KeptCacheLayer(kinds.DynamicLayer):
    """The best `keep` keys of each key head with their values, biases and positions.

    The rank of a key within a prefix never rises as the prefix grows, so that a key that is not among the best w now
    never will be: dropping it changes no later output. Of keys of one bias the oldest is dropped.

    Args:
        keep: keys of a key head that are kept.
    """

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep
        self.cumulative_length = 0
        self.bias: Any = None
        self.positions: Any = None

    def extend(
        self, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, kept_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Appends new tokens and drops what no later query can attend.

        Args:
            keys, values: `[batch, key heads, length, .]`.
            bias: `[batch, key heads, length]`, as the queries at hand rank them.
            kept_bias: the same as later queries rank them: -inf for tokens that those must not see.

        Returns:
            Keys, values, bias and positions that the queries at hand need, in the order of positions if there is more
            than one query: those kept so far, and the new ones.
        """
        length = keys.shape[2]
        new = torch.arange(self.cumulative_length, self.cumulative_length + length, device=keys.device)
        states = (keys, values, bias, new.expand(bias.shape))
        kept = (keys, values, kept_bias, states[3])
        self.cumulative_length += length
        if self.keys is None:
            self.dtype, self.device = keys.dtype, keys.device
            self.is_initialized = True
            self._keep(kept)
            return states
        if length == 1 and self.keys.shape[2] == self.keep:
            self._replace(*kept)
            return self._states()
        before = self._states() if length == 1 else self._by_position()
        self._keep(tuple(torch.cat(pair, dim=2) for pair in zip(before, kept, strict=True)))
        return tuple(torch.cat(pair, dim=2) for pair in zip(before, states, strict=True))

    def _states(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in _STATES)

    def _by_position(self) -> tuple[torch.Tensor, ...]:
        return _taken(self._states(), self.positions.argsort(dim=-1))

    def _keep(self, states: tuple[torch.Tensor, ...]) -> None:
        if states[0].shape[2] > self.keep:
            # The order of positions makes the latest of equals the last, as the ranking takes them.
            states = _taken(states, states[3].argsort(dim=-1))
            states = _taken(states, key_order(states[2])[..., : self.keep].sort(dim=-1).values)
        self.keys, self.values, self.bias, self.positions = states

    def _replace(self, *new: torch.Tensor) -> None:
        """Puts one new token in the place of the worst, the oldest of equals, unless it is worse itself."""
        worst = self.bias.amin(dim=-1, keepdim=True)
        last = torch.iinfo(torch.int64).max
        place = self.positions.masked_fill(self.bias > worst, last).argmin(dim=-1, keepdim=True)
        enters = new[2] >= worst
        for name, token in zip(_STATES, new, strict=True):
            state = getattr(self, name)
            at, accepted = place, enters
            if state.dim() == 4:
                at, accepted = place[..., None].expand(token.shape), enters[..., None]
            setattr(self, name, state.scatter(2, at, torch.where(accepted, token, state.gather(2, at))))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError("a KeptCacheLayer needs the bias of its keys; only dynamic mask attention fills it.")

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; possible as long as no key has been dropped.

        Raises:
            ValueError: keys have been dropped that would have to come back.
        """
        if tokens_to_remove == 0 or self.keys is None:
            return
        if self.cumulative_length > self.keys.shape[2]:
            raise ValueError(
                "the cache of dynamic mask attention has dropped keys and cannot be rolled back; build the layers "
                "with keep_all=True."
            )
        length = self.cumulative_length - abs(tokens_to_remove)
        self.keys, self.values, self.bias, self.positions = (x[:, :, :length] for x in self._by_position())
        self.cumulative_length = length

    def reset(self) -> None:
        super().reset()
        self.bias = self.positions = None

    def offload(self) -> None:
        if self.is_initialized:
            self._apply(lambda state: state.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._apply(lambda state: state.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.is_initialized:
            self._apply(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._apply(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self._apply(lambda state: state[indices, ...])

    def _apply(self, change: Any) -> None:
        for name in _STATES:
            setattr(self, name, change(getattr(self, name)))


def _taken(states: tuple[torch.Tensor, ...], index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The entries `index [batch, key heads, count]` of each state."""
    return tuple(
        state.gather(2, index[..., None].expand(*index.shape, state.shape[3]) if state.dim() == 4 else index)
        for state in states
    )


def kept_layer(cache: Any, layer_idx: int, keep: int) -> KeptCacheLayer | None:
    """Returns the cache's layer if it keeps the best keys alone, exchanging an empty growing one; else None."""
    layer = cache_layer(cache, layer_idx)
    if type(layer) is kinds.DynamicLayer and not layer.is_initialized:
        layer = cache.layers[layer_idx] = KeptCacheLayer(keep)
    return layer if isinstance(layer, KeptCacheLayer) else None
