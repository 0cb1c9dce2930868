"""The gated mix as it is written, over all pairs of tokens. It defines what is correct."""

from __future__ import annotations

import torch


def reasons(**arguments: object) -> list[str]:
    return []


def offsets(size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Returns r `[tokens, tokens, 3]`, the key's position minus the query's: (dx, dy, dx^2 + dy^2)."""
    y, x = (torch.arange(length, device=device) for length in size)
    y, x = y.repeat_interleave(size[1]), x.repeat(size[0])
    dy, dx = (place[None, :] - place[:, None] for place in (y, x))
    return torch.stack((dx, dy, dx**2 + dy**2), dim=-1)


def attend(query, key, value, position_weight, gate, size, scale):
    given = query.dtype
    kept = torch.promote_types(given, torch.float32)
    query, key, value, position_weight, gate = (
        x.to(kept) for x in (query, key, value, position_weight, gate)
    )
    content = torch.softmax(scale * (query @ key.transpose(-2, -1)), dim=-1)
    r = offsets(size, query.device).to(kept)
    position = torch.softmax(torch.einsum("hc,ijc->hij", position_weight, r), dim=-1)
    gate = gate[:, None, None]
    return (((1 - gate) * content + gate * position) @ value).to(given)
