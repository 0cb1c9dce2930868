"""Which rows of a latent cache a query may see, for the backends that work on whole tensors."""

from __future__ import annotations

import torch


def gather_pages(pages: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """Returns `[batch, heads, max_pages * page_size, dim]` from `[pages, heads, page_size, dim]`."""
    rows = pages[block_table.long()]
    return rows.transpose(1, 2).flatten(2, 3)


def visible(
    num_queries: int, num_keys: int, is_causal: bool, cache_seqlens: torch.Tensor | None, device: torch.device
):
    """Returns the boolean mask `[batch or 1, 1, queries, keys]` of filled and past rows, or None if all are seen."""
    if cache_seqlens is None and (not is_causal or num_queries == 1):
        return None
    key = torch.arange(num_keys, device=device)
    length = torch.full((1,), num_keys, device=device) if cache_seqlens is None else cache_seqlens.to(device)
    limit = length[:, None, None, None].expand(-1, 1, num_queries, 1)
    if is_causal:
        limit = limit - (num_queries - 1) + torch.arange(num_queries, device=device)[:, None]
    return key < limit


def cache_rows(latent, rope_key, cache_seqlens, block_table, latent_scale, dtype):
    """Returns contiguous-length latent and rope key in `dtype`, with the unfilled rows zeroed, never read."""
    if block_table is not None:
        if latent_scale is not None:
            latent_scale = gather_pages(latent_scale[:, None, :, None], block_table)[:, 0, :, 0]
        latent = gather_pages(latent, block_table)
        rope_key = None if rope_key is None else gather_pages(rope_key, block_table)
    rows = [None if x is None else x.to(dtype) for x in (latent, rope_key)]
    if latent_scale is not None:
        factor = latent_scale[:, None, :, None].to(dtype)
        rows = [None if x is None else x * factor for x in rows]
    if cache_seqlens is not None:
        # A weight of zero does not silence a NaN in the cache's tail; the row itself must go.
        keys = torch.arange(rows[0].shape[2], device=latent.device)
        tail = (keys >= cache_seqlens.to(latent.device)[:, None])[:, None, :, None]
        rows = [None if x is None else x.masked_fill(tail, 0.0) for x in rows]
    return rows
