"""Attention with distances, score by score."""

from __future__ import annotations

import torch


def attend(query, key, value, content_bias, distance_vectors, distance_bias, attn_mask, scale):
    first = key.shape[2] - query.shape[2]
    return attend_from(
        query, key, value, content_bias, distance_vectors, distance_bias, attn_mask, scale, first
    )  # fmt: skip


def attend_from(query, key, value, content_bias, distance_vectors, distance_bias, attn_mask, scale, first):
    """As `attend` for queries of which the first stands at key `first`; keys behind the last query may be left out."""
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
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    return weights.to(query.dtype) @ value
