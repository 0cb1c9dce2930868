"""Decoding with DHSA: a step reads what the last row of a forward over all tokens reads, from sums in the cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.layers.test_dhsa import EXACT, HEAD_DIM, SMALL, WIDTH, build, hosted, tables
from undivided.layers._chunk_cache import ChunkCacheLayer
from undivided.layers._chunks import normalised
from undivided.layers.boundaries import BoundaryPredictor

# A step is a block of one query.
ONE = {"query_block": 1, "num_instruction": 0}


def inputs(length, batch=2):
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


def steps(layer, x, prompt, cache=None):
    """The outputs of all tokens, those behind the prompt one by one, and the cache."""
    cache = DynamicCache() if cache is None else cache
    pieces = [(0, prompt), *((n, n + 1) for n in range(prompt, x.shape[1]))]
    outs = [
        layer(x[:, a:b], tuple(t[:, a:b] for t in tables(x.shape[1])), past_key_values=cache)[0]
        for a, b in pieces
    ]
    return torch.cat(outs, dim=1), cache


@pytest.mark.parametrize("prompt", [3, 31, 50])
@torch.no_grad()
def test_steps_are_the_positions_of_a_whole_forward(prompt):
    layer, x = build(**ONE), inputs(60)
    whole = layer(x, tables(60))[0]
    out, cache = steps(layer, x, prompt)
    torch.testing.assert_close(out, whole, **EXACT)
    assert isinstance(cache.layers[0], ChunkCacheLayer)
    full = build(**ONE, decode="full")
    full.load_state_dict(layer.state_dict())
    assert not torch.allclose(steps(full, x, prompt)[0][:, 50:], whole[:, 50:])


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "topk"},
        {"mode": "topk", "variant": "released"},
        *({"mode": mode} for mode in ("a", "vs", "vsb")),
    ],
    ids=str,
)
@torch.no_grad()
def test_steps_of_blocks_are_last_rows_of_forwards(options):
    layer, x = build(**ONE, **options), inputs(45)
    out, _ = steps(layer, x, 22)
    # Forwards over all tokens know means of blocks whose last tokens are still to come: each prefix has its own.
    for length in range(23, 46):
        last = layer(x[:, :length], tables(length))[0][:, -1]
        torch.testing.assert_close(out[:, length - 1], last, **EXACT)


@torch.no_grad()
def test_behind_predicted_chunks_all_tokens_are_one_growing_chunk():
    torch.manual_seed(0)
    layer, x = build(boundaries="predicted", share="none", threshold=-0.5, **ONE), inputs(58, batch=1)
    predictor: BoundaryPredictor = layer.boundary_predictor
    predictor.double()
    out, cache = steps(layer, x, 40)
    query, key, value = layer.heads(x, tables(58))
    bounds = layer._boundaries(key[:, :, :40], {}, None)[0].tolist()
    assert len(bounds) > 4
    for place in range(40, 58):
        edges = bounds if place == 40 else [*bounds, place]
        mean = key[0].mean(0)
        scores = [
            float(query[0, :, place].mean(0) @ mean[a:b].sum(0)) / (b - a) ** 0.5
            for a, b in zip(edges, edges[1:], strict=False)
        ]
        chosen, left = {*range(4), *range(place - 7, place + 1)}, 24 - 4 - 8
        for chunk in sorted(range(len(scores)), key=scores.__getitem__, reverse=True):
            members = [j for j in range(edges[chunk], edges[chunk + 1]) if 4 <= j < place - 7]
            chosen |= set(members[:left])
            left -= len(members[:left])
        assert len(chosen) == 24
        seen = torch.zeros(1, 1, 1, place + 1, dtype=torch.bool)
        seen[..., sorted(chosen)] = True
        expected = super(type(layer), layer).attend(
            query[:, :, place : place + 1], key[:, :, : place + 1], value[:, :, : place + 1], seen
        )
        expected = layer.o_proj(expected.transpose(1, 2).flatten(2))
        torch.testing.assert_close(out[:, place : place + 1], expected, **EXACT)
    assert cache.layers[0].sums.shape == (1, len(bounds), HEAD_DIM)


@pytest.mark.parametrize("options", [{}, {"mode": "topk"}, {"mode": "a"}], ids=str)
@torch.no_grad()
def test_sums_of_the_cache_are_those_of_its_keys(options):
    layer, x = build(**ONE, **options), inputs(52)
    cache = steps(layer, x, 30)[1].layers[0]
    kept, bounds = cache.chunks(52)
    cache.sums, cache.summed = None, 0
    fresh, again = cache.chunks(52)
    torch.testing.assert_close(kept, fresh, **EXACT)
    assert torch.equal(bounds, again)
    mean = normalised(kept, bounds, "mean")[0, 1]
    size = int(bounds[0, 1])
    keys = cache.keys[0, :, size : 2 * size]
    expected = keys.mean(1).flatten() if "mode" in options else keys.mean((0, 1))
    torch.testing.assert_close(mean, expected, **EXACT)


@pytest.mark.parametrize(
    "options", [{}, {"mode": "topk"}, {"boundaries": "predicted", "share": "none"}], ids=str
)
@torch.no_grad()
def test_padded_texts_go_on_as_they_would_alone(options):
    torch.manual_seed(1)
    layer = build(threshold=-0.5, **ONE | options)
    layer.double()
    lengths, prompt, width = [50, 35, 12], 50, 58
    x = inputs(width, batch=3)
    padding = torch.tensor([prompt - length for length in lengths])
    column = torch.arange(width)
    mask = ((column <= column[:, None]) & (column >= padding[:, None, None]))[:, None]
    cos_sin = tuple(t[0][(column - padding[:, None]).clamp(min=0)] for t in tables(width))
    cache, outs = DynamicCache(), []
    for a, b in [(0, prompt), *((n, n + 1) for n in range(prompt, width))]:
        here = tuple(t[:, a:b] for t in cos_sin)
        outs.append(layer(x[:, a:b], here, attention_mask=mask[:, :, a:b, :b], past_key_values=cache)[0])
    found = torch.cat(outs, dim=1)
    for row, length in enumerate(lengths):
        alone, _ = steps(layer, x[row : row + 1, prompt - length :], length)
        torch.testing.assert_close(found[row, prompt:], alone[0, length:], **EXACT)


@torch.no_grad()
def test_caches_are_shortened_repeated_and_reordered():
    layer, x = build(**ONE), inputs(60)
    expected, _ = steps(layer, x, 40)
    _, cache = steps(layer, x[:, :55], 40)
    cache.crop(-9)
    angles = tables(60)
    for n in range(46, 60):
        out = layer(x[:, n : n + 1], tuple(t[:, n : n + 1] for t in angles), past_key_values=cache)[0]
        torch.testing.assert_close(out[:, 0], expected[:, n], **EXACT)
    _, cache = steps(layer, x[:, :59], 40)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    last = tuple(t[:, 59:] for t in angles)
    out = layer(x[[1, 0], 59:], last, past_key_values=cache)[0]
    torch.testing.assert_close(out[:, 0], expected[[1, 0], 59], **EXACT)
    cache.reset()
    torch.testing.assert_close(steps(layer, x, 40, cache)[0], expected, **EXACT)


@torch.no_grad()
def test_a_prompt_in_pieces_and_a_static_cache_are_read_in_full():
    layer, x = build(**ONE, decode="full"), inputs(60)
    sparse = build(**ONE)
    sparse.load_state_dict(layer.state_dict())
    expected = steps(layer, x, 40)[0]
    angles, cache = tables(60), DynamicCache()
    pieces = [
        sparse(x[:, a:b], tuple(t[:, a:b] for t in angles), past_key_values=cache)[0]
        for a, b in ((0, 40), (40, 60))
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **EXACT)
    # The sums know of what was read in one piece.
    kept, _ = cache.layers[0].chunks(60)
    torch.testing.assert_close(kept[:, 2], cache.layers[0].keys.mean(1)[:, 10:15].sum(1), **EXACT)
    static = StaticCache(hosted("none")[0].config, max_cache_len=64)
    torch.testing.assert_close(steps(sparse, x, 40, static)[0], expected, **EXACT)


@pytest.mark.parametrize("share", ["none", "boundaries", "selection"])
@torch.no_grad()
def test_a_model_decodes_as_its_layers_share(share):
    _, host = hosted(share, query_block=1, num_instruction=0)
    ids = torch.randint(1, 256, (1, 70))
    cache = host(ids[:, :50], use_cache=True).past_key_values
    assert all(isinstance(layer, ChunkCacheLayer) for layer in cache.layers)
    chosen = []
    for layer in host.attention_layers():
        own = layer._chosen
        layer._chosen = lambda *x, own=own: chosen.append(own(*x)) or chosen[-1]
    for n in range(50, 70):
        step = host(ids[:, n : n + 1], past_key_values=cache, use_cache=True).logits
    assert step.isfinite().all()
    assert len(chosen) == 20 * (1 if share == "selection" else 2)
    assert all(lists.shape == (1, 1, 1, SMALL["budget"]) for lists in chosen)
    # Short prompts have chunks too, once the text is longer than the budget.
    short = host(ids[:, :6], use_cache=True).past_key_values
    for n in range(6, 40):
        assert host(ids[:, n : n + 1], past_key_values=short, use_cache=True).logits.isfinite().all()
    assert len(chosen) == (20 + 40 - 24) * (1 if share == "selection" else 2)


def test_a_way_to_decode_that_is_none_is_refused():
    with pytest.raises(ValueError, match="decode='dense' is not one of 'sparse', 'full'."):
        build(decode="dense")
