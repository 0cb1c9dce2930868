"""Attention to listed keys in PyTorch: the keys of a few blocks of queries are gathered, then attended to at once.

Differentiable, on any device; memory grows with the length of the lists, not with the number of keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from undivided.ops._rules import masked_softmax

# Scores formed at once: 64 MB in float32.
_SCORES = 2**24


def reasons(**arguments: object) -> list[str]:
    return []


def attend(query, key, value, indices, block_size, is_causal, window, scale, softcap, return_lse):
    batch, heads, num_queries, _ = query.shape
    first = key.shape[2] - num_queries
    together = max(_SCORES // max(batch * heads * block_size * indices.shape[3], 1), 1)
    outs, lses = [], []
    for start in range(0, indices.shape[2], together):
        listed = indices[:, :, start : start + together]
        rows = query[:, :, start * block_size : (start + together) * block_size]
        missing = listed.shape[2] * block_size - rows.shape[2]
        # Places of the last block behind the last query are attended and cut off.
        padded = F.pad(rows, (0, 0, 0, missing)).unflatten(2, (-1, block_size))
        position = (
            first + start * block_size + torch.arange(listed.shape[2] * block_size, device=query.device)
        )
        place = listed[..., None, :]
        seen = place >= 0
        if is_causal:
            position = position.unflatten(0, (-1, block_size))[..., None]
            seen = seen & (place <= position)
            if window is not None:
                seen = seen & (place > position - window)
        keys, values = (_gathered(x, listed, heads // key.shape[1]) for x in (key, value))
        if softcap is None and not return_lse:
            out = _fused(padded, keys, values, seen, scale)
        else:
            out, lse = _written_out(padded, keys, values, seen, scale, softcap)
            lses.append(lse.flatten(2, 3)[:, :, : rows.shape[2]])
        outs.append(out.flatten(2, 3)[:, :, : rows.shape[2]])
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2) if lses else None


def _fused(query, key, value, seen, scale):
    """Through scaled_dot_product_attention, blocks as samples."""
    # A query that sees nothing is shown something, and its output is cleared.
    empty = ~seen.any(dim=-1, keepdim=True)
    query, key, value, shown = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value, seen | empty))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=shown, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    blocks = seen.shape[2]
    return out.unflatten(0, (-1, blocks)).transpose(1, 2).masked_fill(empty, 0.0)


def _written_out(query, key, value, seen, scale, softcap):
    copies = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    logits = query @ key.transpose(-1, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights, lse = masked_softmax(logits.masked_fill(~seen, float("-inf")))
    return weights.to(value.dtype) @ value, lse


def _gathered(rows: torch.Tensor, indices: torch.Tensor, copies: int) -> torch.Tensor:
    """Returns `[batch, heads, blocks, places, width]`; a place that lists nothing has the first row.

    Of all key heads where lists are shared, else of all query heads.
    """
    if indices.shape[1] > 1:
        rows = rows.repeat_interleave(copies, dim=1)
    places = indices.clamp(min=0).long().expand(-1, rows.shape[1], -1, -1).flatten(2)
    found = rows.gather(2, places[..., None].expand(-1, -1, -1, rows.shape[3]))
    return found.unflatten(2, indices.shape[2:])
