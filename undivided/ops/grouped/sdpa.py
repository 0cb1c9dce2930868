"""Attention inside groups through torch's scaled_dot_product_attention, whose tensors have four axes."""

from __future__ import annotations

import torch.nn.functional as F


def reasons(**arguments: object) -> list[str]:
    return []


def attend(query, key, value, groups, shared_query, bias, scale):
    if bias is not None:
        bias = bias.to(query.dtype)
    if shared_query and groups.num_groups > 1:
        return _shared(query, key, value, groups, bias, scale)
    batch = key.shape[0]
    key, value = (groups.gather(x).flatten(0, 1) for x in (key, value))
    if not shared_query:
        query = groups.gather(query).flatten(0, 1)
    bias = None if bias is None else bias[None]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return groups.scatter(out.unflatten(0, (batch, groups.num_groups)))


def _shared(query, key, value, groups, bias, scale):
    """One entry a head of an image, and the groups where heads stand: there the query has a stride of zero."""
    batch, heads, length, _ = query.shape
    query = query.flatten(0, 1)[:, None].expand(-1, groups.num_groups, -1, -1)
    key, value = (groups.gather(x, group_axis=2).flatten(0, 1) for x in (key, value))
    if bias is not None:
        bias = bias.expand(batch, heads, length, -1).flatten(0, 1)[:, None]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return groups.scatter(out.unflatten(0, (batch, heads)), group_axis=2)
