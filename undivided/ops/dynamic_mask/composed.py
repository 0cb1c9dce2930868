"""Dynamic mask attention with the mask written out: what the paper measures its kernels against.

The mask is a bias of `[batch, heads, queries, keys]` in the precision of the queries, so that the bias of a key is
rounded to it, and its memory grows with the square of the length.
"""

from __future__ import annotations

from undivided.ops.dense import dense_attention, sdpa
from undivided.ops.dynamic_mask.reference import kept_keys


def reasons(
    query, key, value, key_bias, keep_window_size, attn_mask, is_causal, scale, selection, block_smooth
) -> list[str]:  # fmt: skip
    # SDPA gives NaN, or what its kernel happens to do, where a query sees no key.
    return sdpa.reasons(
        query=query, key=key, value=value, attn_mask=attn_mask, is_causal=is_causal, window=None, scale=scale,
        softcap=None, return_lse=False,
    )  # fmt: skip


def attend(
    query, key, value, key_bias, keep_window_size, attn_mask, is_causal, scale, selection, block_smooth
):  # fmt: skip
    kept = kept_keys(
        key_bias, query.shape[2], keep_window_size, attn_mask, is_causal, selection, block_smooth
    )
    bias = key_bias.to(query.dtype)[:, :, None].masked_fill(~kept, float("-inf"))
    bias = bias.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return dense_attention(query, key, value, attn_mask=bias, scale=scale, backend="sdpa")
