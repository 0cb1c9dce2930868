"""Dynamic mask attention as it is written: rank the keys a query sees, keep the best, add their bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from undivided.ops._rules import combined_mask, masked_softmax
from undivided.ops.dynamic_mask._rank import key_order


def reasons(**arguments: object) -> list[str]:
    return []


def attend(
    query, key, value, key_bias, keep_window_size, attn_mask, is_causal, scale, selection, block_smooth
):  # fmt: skip
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    to_heads = lambda x: x.to(dtype).repeat_interleave(group, dim=1)  # noqa: E731
    kept = kept_keys(
        key_bias, query.shape[2], keep_window_size, attn_mask, is_causal, selection, block_smooth
    )
    bias = key_bias.to(dtype)[:, :, None].masked_fill(~kept, float("-inf"))
    logits = scale * (query.to(dtype) @ to_heads(key).transpose(-2, -1)) + to_heads(bias)
    return (masked_softmax(logits)[0] @ to_heads(value)).to(query.dtype)


def kept_keys(
    key_bias: torch.Tensor,
    num_queries: int,
    keep_window_size: int,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    selection: str,
    block_smooth: int | None = None,
) -> torch.Tensor:
    """Returns which keys each query attends, boolean `[batch, key heads, queries, keys]`; of equals the latest."""
    batch, heads, num_keys = key_bias.shape
    visible = combined_mask(attn_mask, is_causal, None, num_queries, num_keys, key_bias.device)
    shape = (batch, heads, num_queries, num_keys)
    bias = key_bias.detach()[:, :, None]
    visible = bias > float("-inf") if visible is None else visible & (bias > float("-inf"))
    visible = visible.expand(shape)
    if selection == "relu":
        kept = visible & (bias > 0)
    elif num_keys <= keep_window_size:
        kept = visible
    else:
        ranked_for = visible if selection == "per_row" else visible.any(dim=2, keepdim=True)
        ranked = bias.masked_fill(~ranked_for, float("-inf"))
        best = key_order(ranked)[..., :keep_window_size]
        kept = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, best, True) & visible
    return kept if block_smooth is None else _whole_blocks(kept, visible, block_smooth)


def _whole_blocks(kept: torch.Tensor, visible: torch.Tensor, block_size: int) -> torch.Tensor:
    """Returns the visible keys of the blocks of which more than half is kept."""
    num_keys = kept.shape[-1]
    votes = F.pad(2 * kept.int() - visible.int(), (0, -num_keys % block_size))
    stays = votes.unflatten(-1, (-1, block_size)).sum(-1) > 0
    return stays.repeat_interleave(block_size, dim=-1)[..., :num_keys] & visible
