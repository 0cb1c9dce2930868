"""Attention with distances, score by score."""

from __future__ import annotations

import torch

from undivided.ops._rules import masked_softmax


def attend(query, key, value, content_bias, distance_vectors, distance_bias, attn_mask, scale, return_lse):
    first = key.shape[2] - query.shape[2]
    out, lse = attend_from(
        query, key, value, content_bias, distance_vectors, distance_bias, attn_mask, scale, first
    )
    return (out, lse) if return_lse else out


def attend_from(query, key, value, content_bias, distance_vectors, distance_bias, attn_mask, scale, first):
    """Output and log-sums of queries of which the first stands at key `first`; keys behind the last may be left out."""
    heads, num_queries, num_keys = query.shape[1], query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    place = torch.arange(num_queries, device=query.device) + first
    distance = place[:, None] - torch.arange(num_keys, device=query.device)
    vectors, biases = distance_vectors[:num_keys].to(query.dtype), distance_bias[:num_keys].to(query.dtype)
    position = torch.einsum("bhqd,phd->bhqp", query, vectors) + biases.mT[:, None]
    index = distance.clamp(min=0).expand(*query.shape[:2], -1, -1)
    scores = (query + content_bias[:, None].to(query.dtype)) @ key.mT + position.gather(-1, index)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (scale * scores.to(wide)).masked_fill(distance < 0, float("-inf"))
    if attn_mask is not None:
        is_bias = attn_mask.dtype != torch.bool
        scores = scores + attn_mask if is_bias else scores.masked_fill(~attn_mask, float("-inf"))
    weights, lse = masked_softmax(scores)
    return weights.to(query.dtype) @ value, lse
