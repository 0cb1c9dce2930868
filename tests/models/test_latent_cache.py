from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.layers.latents import EXACT
from tests.tiny import VOCAB_SIZE, tiny_model
from undivided.convert.tpla import convert_tpla
from undivided.models.latent_cache import shard_cache


def prompt() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (2, 9))


def test_a_shard_is_its_columns_and_all_rotary_keys() -> None:
    cache = tiny_model("deepseek_v3")(prompt(), use_cache=True).past_key_values
    before = [layer.keys.clone() for layer in cache.layers]
    for shard in range(4):
        part = shard_cache(cache, shard, 4)
        assert part.get_seq_length() == 9
        for mine, whole in zip(part.layers, cache.layers, strict=True):
            assert torch.equal(mine.keys, whole.keys[..., 4 * shard : 4 * shard + 4])
            assert mine.keys.is_contiguous()
            assert mine.values is whole.values
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


def test_what_a_shard_caches_later_is_its_own() -> None:
    cache = tiny_model("deepseek_v3")(prompt(), use_cache=True).past_key_values
    first, second = shard_cache(cache, 0, 2), shard_cache(cache, 1, 2)
    first.update(torch.ones(2, 1, 1, 8), torch.ones(2, 1, 1, 4), 0)
    assert first.layers[0].keys.shape[2] == 10
    assert second.layers[0].keys.shape[2] == cache.layers[0].keys.shape[2] == 9


def test_shards_of_an_exact_prompt_decode_as_the_whole_does() -> None:
    model, ids = tiny_model("deepseek_v3", dtype=torch.float64), prompt()
    tpla, _ = convert_tpla(model, calibration=ids, prefill="exact")
    cache = tpla(ids, use_cache=True).past_key_values
    shards = [shard_cache(cache, shard, 2) for shard in range(2)]
    joined = DynamicCache()
    for index in range(2):
        latent = torch.cat([part.layers[index].keys for part in shards], dim=-1)
        joined.update(latent, shards[0].layers[index].values, index)
    token = ids[:, :1]
    expected = tpla(token, past_key_values=cache).logits
    torch.testing.assert_close(tpla(token, past_key_values=joined).logits, expected, **EXACT)


def test_what_cannot_be_cut_is_named() -> None:
    ids = prompt()
    cache = tiny_model("deepseek_v3")(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="shard=2 is not in 0 to 1, the shards of num_shards=2"):
        shard_cache(cache, 2, 2)
    with pytest.raises(ValueError, match="num_shards=3 does not divide latent_dim=16"):
        shard_cache(cache, 0, 3)
    with pytest.raises(ValueError, match="layer 0 of the cache is empty"):
        shard_cache(DynamicCache(config=tiny_model("deepseek_v3").config), 0, 2)
    keys = tiny_model("llama")(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"layer 0 .* keys of shape \[2, 2, 9, 8\]; a latent is \[batch, 1,"):
        shard_cache(keys, 0, 2)
