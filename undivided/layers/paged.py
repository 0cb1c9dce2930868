"""What a layer sees of a latent cache that is cut into pages: the seam between the layers and the decode engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PagedRows:
    """One layer's latent rows `[latent, rope key]` of a batch of sequences, in pages of a pool.

    All tensors stay where they are from step to step, so that a CUDA graph may read them.

    Args:
        cache: the layer's pool `[pages, page_size, latent_dim + rope_dim]`; a step writes its rows into it.
        block_table: `[batch, max_pages]`, int32: which page holds positions `p * page_size ...` of a sequence.
        lengths: `[batch]`, int32: rows of each sequence filled before the step.
        counts: `[batch]`, int32: rows that the step adds, 0 where the place is idle.
        filled: `[batch]`, int32: `lengths + counts`.
        backend: of the attention; "reference" appends by the reference too.
    """

    cache: torch.Tensor
    block_table: torch.Tensor
    lengths: torch.Tensor
    counts: torch.Tensor
    filled: torch.Tensor
    backend: str = "auto"

    def parts(self, latent_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the latents and the rope keys, `[pages, 1, page_size, .]`, as views."""
        latent, rope_key = self.cache[:, None].tensor_split([latent_dim], dim=-1)
        return latent, rope_key


def paged_rows(past_key_values: Any | None, layer_idx: int) -> PagedRows | None:
    """Returns a layer's rows if the cache is the decode engine's, in pages; None for the caches of transformers."""
    rows = getattr(past_key_values, "paged_rows", None)
    return None if rows is None else rows(layer_idx)
