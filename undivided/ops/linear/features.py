"""Meaning shared by the implementations of linear attention: features, rotations, weights of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from undivided.ops._rules import masked_softmax

FEATURE_MAPS = ("elu1", "softplus", "relu", "identity")


def feature(x: torch.Tensor, name: str) -> torch.Tensor:
    """Returns `phi(x)`."""
    if name == "elu1":
        # elu(x) + 1 as it stands is rounded to zero below -17 in float32, and a denominator with it; exp(x) is not.
        return torch.where(x >= 0, x + 1, x.clamp(max=0).exp())
    if name == "softplus":
        return F.softplus(x)
    return F.relu(x) if name == "relu" else x


def rotate(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:
    """Returns `x` `[..., tokens, dim]` with channels (2p, 2p + 1) of each token rotated by the angle of pair p."""
    if cos is None or sin is None:
        return x
    cos, sin = cos.to(x), sin.to(x)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def parts(query, key, value, feature_map, key_weight, scale, token_mask):
    """Returns `phi(q)`, `phi(k)`, v and the share of each key in the means, `[batch or 1, heads or 1, keys]`.

    All in float32 or wider; tokens outside of the mask have the share zero and finite features and values.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    if token_mask is None:
        count, counts = key.shape[2], 1.0
    else:
        hidden = ~token_mask[:, None, :, None]
        # Before the features: the gradient of a hidden NaN would be NaN after them.
        query, key, value = (x.masked_fill(hidden, 0.0) for x in (query, key, value))
        counts = token_mask[:, None].to(dtype)
        count = counts.sum(-1, keepdim=True).clamp(min=1.0)
    query, key = feature(query, feature_map), feature(key, feature_map)
    if isinstance(key_weight, str):
        share = context_share(query, key, scale, token_mask, count)
    elif key_weight is None:
        share = counts / count * key.new_ones(1, 1, key.shape[2])
    else:
        share = key_weight.to(dtype) / count
        if token_mask is not None:
            share = share.masked_fill(~token_mask[:, None], 0.0)
    return query, key, value, share


def context_share(query, key, scale, token_mask, count):
    """Returns `softmax_j(scale * mean_i q_i . k_j)` of features q and k over the tokens that count."""
    queries = query.shape[2]
    if token_mask is not None:
        query = query.masked_fill(~token_mask[:, None, :, None], 0.0)
        # With a mask there are as many queries as keys.
        queries = count[..., None]
    mean = query.sum(-2, keepdim=True) / queries
    logits = (scale * mean @ key.transpose(-2, -1)).squeeze(-2)
    if token_mask is None:
        return torch.softmax(logits, dim=-1)
    return masked_softmax(logits.masked_fill(~token_mask[:, None], float("-inf")))[0]


def finish(out, local, modulation, token_mask, dtype):
    """Returns `modulation * (out + local)` in `dtype`, zero outside of the mask."""
    if local is not None:
        out = out + local
    if modulation is not None:
        out = out * modulation
    if token_mask is not None:
        out = out.masked_fill(~token_mask[:, None, :, None], 0.0)
    return out.to(dtype)
