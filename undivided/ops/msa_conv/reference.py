"""MSA-Conv, one tap of the kernel after the other."""

from __future__ import annotations

import torch

from undivided.ops.msa_conv._border import inside, offsets


def reasons(**arguments: object) -> list[str]:
    return []


def attend(query, key, value, kernel_size, dilation, border, scale, return_lse):
    size = query.shape[2:4]
    logits, values = [], []
    for offset in offsets(kernel_size, dilation):
        back = (-offset[0], -offset[1])
        # The key and the value that each query finds at this tap; a roll takes those beyond the map from across it.
        k, v = (torch.roll(x, back, dims=(2, 3)) for x in (key, value))
        logit = scale * (query * k).sum(-1)
        if border != "circular":
            on_map = inside(size, offset, query.device)
            logit = logit.masked_fill(~on_map, 0.0 if border == "zero" else float("-inf"))
            v = v.masked_fill(~on_map[..., None], 0.0)
        logits.append(logit)
        values.append(v)
    stacked = torch.stack(logits, dim=-1)
    weights = stacked.softmax(-1)
    out = sum(weights[..., tap, None] * v for tap, v in enumerate(values))
    if not return_lse:
        return out
    return out, stacked.to(torch.promote_types(stacked.dtype, torch.float32)).logsumexp(-1)
