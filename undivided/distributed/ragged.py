"""Prompts of different lengths in one batch, padded for a forward and packed for the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class RaggedBatch:
    """Where the tokens of prompts of different lengths stand in a batch that is padded on the left.

    Args:
        lengths: tokens of each prompt, at least 1.
        device: of the batch.

    Attributes:
        mask: `[batch, longest]`, int64, 1 at tokens, 0 at padding.
        positions: `[batch, longest]`, int64, each token's place in its prompt.
        lengths: `[batch]`, int64.
        num_tokens: of all prompts together.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        counted = torch.tensor(lengths)
        longest = int(counted.max())
        mask = torch.arange(longest) >= longest - counted[:, None]
        self.mask = mask.long().to(device)
        self.positions = (mask.cumsum(dim=-1) - 1).clamp(min=0).to(device)
        self.lengths = counted.to(device)
        self.num_tokens = int(counted.sum())
        # Found once and on the host: a boolean index would wait for the device in every layer.
        self._places = mask.flatten().nonzero().squeeze(-1).to(device)

    def pack(self, *cached: torch.Tensor) -> torch.Tensor:
        """Returns the tokens' rows `[num_tokens, sum of widths]` of tensors `[batch, 1, longest, width]`."""
        return torch.cat([part.flatten(0, 2).index_select(0, self._places) for part in cached], dim=-1)

    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns `[batch, 1, longest, width]` from rows `[num_tokens, width]`; the padding is zero."""
        padded = rows.new_zeros(self.mask.numel(), rows.shape[-1])
        padded[self._places] = rows
        return padded.unflatten(0, self.mask.shape)[:, None]
