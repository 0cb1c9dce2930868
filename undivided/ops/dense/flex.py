"""Dense attention through torch's FlexAttention: soft caps and the log-sum-exp in a fused kernel."""

from __future__ import annotations

from functools import cache

import torch


def reasons(query, key, value, attn_mask, is_causal, window, scale, softcap, return_lse) -> list[str]:
    found = []
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.device.type == "cpu" and needs_grad:
        found.append("query is on cpu and needs a gradient (FlexAttention has no backward there)")
    if query.device.type == "cpu" and return_lse:
        found.append("query is on cpu and return_lse is True (FlexAttention returns none there)")
    if query.device.type not in ("cpu", "cuda"):
        found.append(f"query is on {query.device.type}")
    if query.dtype == torch.float64:
        found.append("query is float64")
    if attn_mask is not None and attn_mask.requires_grad:
        found.append("attn_mask needs a gradient")
    if key.shape[2] == 0:
        found.append("key has no positions")
    return found


@cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend(query, key, value, attn_mask, is_causal, window, scale, softcap, return_lse):
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    offset = num_keys - num_queries
    bias = None if attn_mask is None else attn_mask.expand(batch, heads, num_queries, num_keys)
    is_bias = bias is not None and bias.dtype != torch.bool

    def seen(b, h, n, m):
        allowed = m >= 0
        if is_causal:
            allowed = allowed & (m <= n + offset)
        if window is not None:
            allowed = allowed & (m > n + offset - window)
        if bias is not None and not is_bias:
            allowed = allowed & bias[b, h, n, m]
        return allowed

    def score(logit, b, h, n, m):
        if softcap is not None:
            logit = softcap * torch.tanh(logit / softcap)
        return logit + bias[b, h, n, m] if is_bias else logit

    mask = None
    if is_causal or (bias is not None and not is_bias):
        per_head = bias is not None and not is_bias
        mask = create_block_mask(
            seen,
            batch if per_head else None,
            heads if per_head else None,
            num_queries,
            num_keys,
            query.device,
        )
    out = _compiled()(
        query,
        key,
        value,
        score_mod=score if softcap is not None or is_bias else None,
        block_mask=mask,
        scale=scale,
        enable_gqa=heads != key.shape[1],
        return_aux=AuxRequest(lse=True) if return_lse else None,
    )
    return (out[0], out[1].lse) if return_lse else out
