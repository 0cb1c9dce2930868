"""Where the rows of all running sequences lie, and what a model sees of them in a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from undivided.engine.scheduler import Request
from undivided.layers.latent import LatentAttention
from undivided.layers.paged import PagedRows


class EngineCache:
    """The caches of all layers for the places of a batch, in memory that never moves.

    A latent layer has a pool of pages `[num_pages, page_size, latent_dim + rope_dim]`; the table of a place says which
    pages its sequence has. Any other layer has one static tensor of keys and one of values, `[max_batch, heads,
    max_tokens, dim]`, made when the first prompt shows their sizes.

    Args:
        layers: the attention modules, in the order of the model.
        max_batch: places.
        max_tokens: longest sequence.
        num_pages: pages of each latent layer's pool.
        page_size: rows of a page.
    """

    def __init__(
        self, layers: Sequence[nn.Module], max_batch: int, max_tokens: int, num_pages: int, page_size: int
    ) -> None:
        weight = next(layers[0].parameters())
        self.device = weight.device
        self.max_batch = max_batch
        self.max_tokens = max_tokens
        self.page_size = page_size
        places: dict[str, Any] = {"dtype": torch.int32, "device": self.device}
        self.lengths = torch.zeros(max_batch, **places)
        self.counts = torch.zeros(max_batch, **places)
        self.block_table = torch.zeros(max_batch, -(-max_tokens // page_size), **places)
        self.pools = [
            weight.new_empty(num_pages, page_size, layer.latent_dim + layer.rope_dim)
            if isinstance(layer, LatentAttention)
            else None
            for layer in layers
        ]
        self.static: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def has_static(self) -> bool:
        """Whether a layer has static keys and values, which need a mask."""
        return any(pool is None for pool in self.pools)

    def clear(self) -> None:
        """Makes every place idle."""
        self.lengths.zero_()
        self.counts.zero_()

    def place(self, requests: Sequence[Request]) -> None:
        """Says which sequences are in the batch: their places, their pages, and how many rows they have."""
        lengths, counts = [0] * self.max_batch, [0] * self.max_batch
        table = torch.zeros(self.block_table.shape, dtype=torch.int32)
        for request in requests:
            lengths[request.place] = request.num_cached
            counts[request.place] = 1
            table[request.place, : len(request.pages)] = torch.tensor(request.pages, dtype=torch.int32)
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        self.counts.copy_(torch.tensor(counts, dtype=torch.int32))
        self.block_table.copy_(table)

    def store(self, requests: Sequence[Request], prompts: Any) -> None:
        """Copies what a prefill has cached into the requests' pages and places.

        Args:
            requests: one a row of the prefill's batch; rows behind a prompt's length are padding.
            prompts: a `DynamicCache` of transformers.
        """
        longest = max(len(request.prompt) for request in requests)
        source, target = [], []
        for row, request in enumerate(requests):
            position = torch.arange(len(request.prompt))
            pages = torch.tensor(request.pages)[position // self.page_size]
            source.append(row * longest + position)
            target.append(pages * self.page_size + position % self.page_size)
        read, write = (torch.cat(indices).to(self.device) for indices in (source, target))
        for layer_idx, (pool, layer) in enumerate(zip(self.pools, prompts.layers, strict=True)):
            if pool is not None:
                rows = torch.cat([layer.keys[:, 0], layer.values[:, 0]], dim=-1).flatten(0, 1)
                pool.flatten(0, 1).index_copy_(0, write, rows.index_select(0, read))
                continue
            for static, new in zip(self._static(layer_idx, layer), (layer.keys, layer.values), strict=True):
                for row, request in enumerate(requests):
                    length = len(request.prompt)
                    static[request.place, :, :length] = new[row, :, :length]

    def _static(self, layer_idx: int, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx not in self.static:
            # Zeros: a place that the mask hides is still multiplied, by a weight of zero.
            keys, values = (
                x.new_zeros(self.max_batch, x.shape[1], self.max_tokens, x.shape[3])
                for x in (layer.keys, layer.values)
            )
            self.static[layer_idx] = (keys, values)
        return self.static[layer_idx]


class StepCache:
    """The `past_key_values` of one decoding step: the first places of an `EngineCache`.

    Latent layers ask for `paged_rows`; the others call `update`, as with any cache of transformers, and get all static
    keys and values, of which `mask` shows the filled ones.

    Args:
        cache: of the engine.
        places: how many of its places take part.
        backend: of the latent attention.
    """

    def __init__(self, cache: EngineCache, places: int, backend: str = "auto") -> None:
        self.cache = cache
        self.places = places
        self.backend = backend
        self.lengths = cache.lengths[:places]
        self.counts = cache.counts[:places]
        self.block_table = cache.block_table[:places]
        self.filled = self.lengths + self.counts
        # Only `update` needs them, and an index made once needs no kernel a layer.
        self._place = torch.arange(places, device=cache.device) if cache.has_static else None

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the additive mask `[places, 1, 1, max_tokens]` of the static layers, or an empty one.

        Transformers (5.17 to 5.24) hands a 4-D mask on as it is. An idle place sees the row that it writes, so that
        its softmax is not empty.
        """
        if not self.cache.has_static:
            return torch.zeros(1, 1, 1, 1, dtype=dtype, device=self.cache.device)
        position = torch.arange(self.cache.max_tokens, device=self.cache.device)
        hidden = position > self.lengths[:, None]
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=self.cache.device)
        return zeros.masked_fill(hidden, torch.finfo(dtype).min)[:, None, None]

    def paged_rows(self, layer_idx: int) -> PagedRows | None:
        """Returns a latent layer's rows, None for another layer's."""
        pool = self.cache.pools[layer_idx]
        if pool is None:
            return None
        return PagedRows(pool, self.block_table, self.lengths, self.counts, self.filled, self.backend)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one row a place into a layer's static keys and values, and returns all of them.

        Since 5.24 transformers' layers also hand on `kwargs`, the other keywords they got; nothing here needs them.
        """
        for static, new in zip(self.cache.static[layer_idx], (key, value), strict=True):
            static[self._place, :, self.lengths.long()] = new[:, :, 0]
        keys, values = self.cache.static[layer_idx]
        return keys[: self.places], values[: self.places]
