"""Caches of transformers for layers that keep, beside keys and values, the last rows of a sequence."""

from __future__ import annotations

from typing import Any

import torch


def streaming_layer(cache: Any, layer_idx: int) -> Any:
    """Returns the cache's layer with a place for a state of convolutions, exchanging an empty one that has none.

    A cache is built from the config of the base model, which knows nothing of convolutions. Before the first token its
    layer is exchanged for the kind that transformers has for hybrid models: the same keys and values, and a state.

    Raises:
        ValueError: the layer has keys but no state, or is of a kind that has none (quantised, static with a window).
    """
    from transformers import cache_utils as kinds

    from undivided.layers._own_cache import cache_layer

    layer = cache_layer(cache, layer_idx)
    if isinstance(layer, kinds.LinearAttentionCacheLayerMixin):
        return layer
    if getattr(layer, "is_initialized", False):
        raise ValueError(
            f"layer {layer_idx} of the cache holds keys but no state of convolutions; let this model fill the cache "
            "from the first token."
        )
    if type(layer) is kinds.DynamicLayer:
        layer = kinds.LinearAttentionAndFullAttentionLayer()
    elif type(layer) is kinds.DynamicSlidingWindowLayer:
        layer = kinds.LinearAttentionAndSlidingWindowAttentionLayer(layer.sliding_window)
    elif type(layer) is kinds.StaticLayer:
        layer = kinds.LinearAttentionAndStaticFullAttentionLayer(layer.max_cache_len)
    else:
        raise ValueError(
            f"layer {layer_idx} of the cache is a {type(layer).__name__}, which has no place for a state of "
            "convolutions; use a dynamic cache, or a static one without a window."
        )
    cache.layers[layer_idx] = layer
    return layer


def stream(layer: Any, rows: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, int]:
    """Returns the rows at hand behind those before them, and how many those are; keeps the last rows of all.

    Args:
        layer: of `streaming_layer`.
        rows: `[batch, length, channels]`, of the tokens at hand.
        num_rows: rows to keep.

    Returns:
        `[batch, prefix + length, channels]` and `prefix`, at most `num_rows`; 0 before the first token.
    """
    if not layer.has_previous_state[0]:
        # A cache that may be rolled back needs every row; it cuts them itself.
        kept = rows if layer.record_past else rows[:, -num_rows:]
        layer.update_conv_state(kept.mT, conv_kernel_size=num_rows)
        return rows, 0
    prefix = min(layer.conv_states[0].shape[-1], num_rows)
    every = layer.update_conv_state(rows.mT, conv_kernel_size=num_rows)
    return every.mT[:, -(prefix + rows.shape[1]) :], prefix


def rows_before(mask: torch.Tensor, first: torch.Tensor | int, length: int, most: int) -> torch.Tensor:
    """Returns how many tokens right before each token belong to its sequence, as its mask tells, `[batch, length]`.

    Fewer than there are where padding or another document stands before it.

    Args:
        mask: `[batch, 1, length, keys]`, boolean or additive.
        first: the key that the first token at hand is.
        length: tokens at hand.
        most: count at most so many.
    """
    key = torch.arange(length, device=mask.device) + first
    together = torch.ones((mask.shape[0], length), dtype=torch.bool, device=mask.device)
    count = torch.zeros((mask.shape[0], length), dtype=torch.long, device=mask.device)
    for back in range(1, most + 1):
        place = (key - back).clamp(min=0)[None, :, None].expand(mask.shape[0], -1, 1)
        seen = mask[:, 0].gather(-1, place).squeeze(-1)
        if seen.dtype != torch.bool:
            seen = seen > torch.finfo(seen.dtype).min / 2
        together = together & seen & (key >= back)
        count = count + together
    return count
