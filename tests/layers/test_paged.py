"""A decoding step over a cache in pages is the ordinary forward over an ordinary cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.layers.latents import EXACT, hidden_states, positions, random_layer
from undivided.layers.gdla import GDLAttention
from undivided.layers.gla import GLAttention
from undivided.layers.latent import grouped_latent_attention
from undivided.layers.mla import MLAttention
from undivided.layers.paged import PagedRows, paged_rows
from undivided.layers.tpla import TPLAttention
from undivided.testing import poison_buffer

PAGE_SIZE = 4
CASES = {
    "mla": (MLAttention, {}),
    "mla, converted": (MLAttention, {"latent_norm": False, "rope_interleaved": False}),
    "mla, no rope": (MLAttention, {"rope_dim": 0}),
    "mla, all keys rotary": (MLAttention, {"nope_dim": 0, "rope_dim": 8, "rope_repeats": 2}),
    "mla, capped": (MLAttention, {"softcap": 3.0, "query_latent_dim": 12}),
    "gla": (GLAttention, {}),
    "gdla": (GDLAttention, {"num_noise_heads": 1, "query_latent_dim": 12, "output_gate": True}),
    "tpla": (TPLAttention, {"num_shards": 4}),
    "tpla, exact norm": (TPLAttention, {"norm": "exact"}),
    "tpla, exact softmax": (TPLAttention, {"softmax": "exact"}),
}


class Pages:
    """A cache of one layer in shuffled pages, NaN wherever no row has been written."""

    def __init__(self, layer, lengths, counts=None, backend="auto"):
        batch, width = len(lengths), layer.latent_dim + layer.rope_dim
        self.cache = poison_buffer(3 * batch + 2, PAGE_SIZE, width, dtype=torch.float64)
        table = torch.randperm(3 * batch + 2)[: 3 * batch].view(batch, 3).int()
        lengths = torch.tensor(lengths, dtype=torch.int32)
        counts = torch.ones_like(lengths) if counts is None else torch.tensor(counts, dtype=torch.int32)
        self.rows = PagedRows(self.cache, table, lengths, counts, lengths + counts, backend)

    def fill(self, sequence, latent, rope_key):
        rows = torch.cat([latent, rope_key], dim=-1)[0, 0]
        for position, row in enumerate(rows):
            page = self.rows.block_table[sequence, position // PAGE_SIZE]
            self.cache[page, position % PAGE_SIZE] = row

    def paged_rows(self, layer_idx):
        return self.rows


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_the_forward(case, backend, gradients) -> None:
    layer_class, options = CASES[case]
    if backend == "sdpa" and "softcap" in options:
        pytest.skip("torch's attention has no cap")
    layer = random_layer(layer_class, **options)
    lengths, x = (7, 1, 4), hidden_states(batch=3, length=8)
    pages = Pages(layer, lengths, backend=backend)
    expected, at = [], []
    for sequence, length in enumerate(lengths):
        cache = DynamicCache()
        layer(x[sequence : sequence + 1, :length], positions(length), None, cache)
        pages.fill(sequence, cache.layers[0].keys, cache.layers[0].values)
        new = x[sequence : sequence + 1, length : length + 1]
        at.append(positions(1, start=length))
        expected.append(layer(new, at[-1], None, cache)[0])
    new = torch.stack([x[sequence, length : length + 1] for sequence, length in enumerate(lengths)])
    tables = tuple(torch.cat(tables) for tables in zip(*at, strict=True))
    # Without gradients the queries are rotated where they are.
    with torch.set_grad_enabled(gradients):
        out, _ = layer(new, tables, None, pages)
    torch.testing.assert_close(out, torch.cat(expected), **EXACT)


def test_an_idle_place_writes_nothing() -> None:
    layer = random_layer(MLAttention)
    pages = Pages(layer, (0, 0), counts=(0, 1))
    layer(hidden_states(batch=2, length=1), positions(1), None, pages)
    written = pages.cache.isfinite().any(dim=-1)
    assert written.sum() == 1
    assert written[pages.rows.block_table[1, 0], 0]


def test_caches_of_transformers_have_no_pages() -> None:
    assert paged_rows(None, 0) is None
    assert paged_rows(DynamicCache(), 0) is None


def test_a_cache_in_pages_is_not_expanded() -> None:
    layer = random_layer(MLAttention)
    rows = Pages(layer, (1,)).rows
    query = torch.randn(1, layer.num_heads, 1, 10, dtype=torch.float64).split([6, 4], dim=-1)
    with pytest.raises(ValueError, match='form="expanded" does not attend over a cache in pages'):
        grouped_latent_attention(
            *query,
            *rows.parts(layer.latent_dim),
            *layer.up_projections(),
            scale=1.0,
            rows=rows,
            form="expanded",
        )
