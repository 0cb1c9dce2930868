"""Core tokens and the attention to them, as they are written."""

from __future__ import annotations

import torch

from undivided.ops._rules import masked_softmax
from undivided.ops.core_context._groups import group_weights, visible, weighted


def reasons(**arguments: object) -> list[str]:
    return []


def pool(query, key, value, group_size, pooling, scale):
    """Core tokens as they are written: a softmax over the keys of each group."""
    num_groups = query.shape[2] if query is not None else key.shape[2] // group_size
    key, value = (
        x[:, :, : num_groups * group_size].unflatten(2, (num_groups, group_size)) for x in (key, value)
    )
    if pooling == "mean":
        return key.mean(dim=3), value.mean(dim=3)
    if pooling == "max":
        return key.amax(dim=3), value.amax(dim=3)
    weights = group_weights(query, key, scale)
    return weighted(weights, key), weighted(weights, value)


def attend(
    query, key, value, core_key, core_value, num_tokens, group_size, window, scale, softcap, core_logit_bias
):
    """Core context attention as it is written: core tokens and keys side by side, and a mask."""
    heads = query.shape[1]
    logits = torch.cat(
        [query @ x.repeat_interleave(heads // x.shape[1], dim=1).transpose(2, 3) for x in (core_key, key)],
        dim=-1,
    )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    num_cores = core_key.shape[2]
    logits[..., :num_cores] += core_logit_bias
    seen = visible(query.shape[2], key.shape[2], num_cores, num_tokens, group_size, window, query.device)
    weights, lse = masked_softmax(logits.masked_fill(~seen, float("-inf")))
    values = torch.cat([x.repeat_interleave(heads // x.shape[1], dim=1) for x in (core_value, value)], dim=2)
    return weights.to(values.dtype) @ values, lse
