"""The hand-over of a latent cache from separated prefill to the ranks that decode."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from undivided.layers.tpla import check_shards

if TYPE_CHECKING:
    from transformers import Cache


def shard_cache(cache: Cache, shard: int, num_shards: int) -> Cache:
    """Returns one shard's part of the cache of a model with latent attention in every layer.

    A layer caches its latents as keys `[batch, 1, length, latent_dim]` and its rotary keys as values. Shard j
    keeps columns `j * latent_dim / num_shards ...` of the latents, in memory of its own, and all of the
    rotary keys, which are shared with the given cache. So a prompt that MLA has read exactly goes on in TPLA,
    shard by shard.

    Args:
        cache: filled by a forward pass; it is not changed.
        shard: index of the shard, 0 to `num_shards - 1`.
        num_shards: shards of the latent, a divisor of `latent_dim`.

    Returns:
        A cache of the same kind.

    Raises:
        ValueError: `shard` is out of range, `num_shards` does not divide the latent, or a layer of the cache
            is empty or does not hold one latent a token.
        TypeError: a layer holds its rows in another form than as two tensors (a quantised cache).

    Source: TPLA (arXiv 2508.15881).
    """
    if not 0 <= shard < num_shards:
        raise ValueError(
            f"shard={shard} is not in 0 to {num_shards - 1}, the shards of num_shards={num_shards}."
        )
    sharded = copy.copy(cache)
    sharded.layers = [
        _shard_layer(layer, index, shard, num_shards) for index, layer in enumerate(cache.layers)
    ]
    return sharded


def _shard_layer(layer, index: int, shard: int, num_shards: int):
    latent = getattr(layer, "keys", None)
    if latent is None:
        raise ValueError(f"layer {index} of the cache is empty; hand it over after the prompt has been read.")
    if not isinstance(latent, torch.Tensor) or hasattr(layer, "_quantized_keys"):
        raise TypeError(
            f"layer {index} of the cache is a {type(layer).__name__}; rows as plain tensors can be cut."
        )
    if latent.dim() != 4 or latent.shape[1] != 1:
        raise ValueError(
            f"layer {index} of the cache holds keys of shape {list(latent.shape)}; a latent is "
            "[batch, 1, length, latent_dim]. Every layer must have latent attention."
        )
    check_shards(num_shards, latent.shape[-1])
    part = copy.copy(layer)
    part.keys = latent.chunk(num_shards, dim=-1)[shard].clone(memory_format=torch.contiguous_format)
    return part
