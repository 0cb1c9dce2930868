"""Linear attention over all pairs, as it is written. It defines what is correct."""

from __future__ import annotations

from undivided.ops.linear.features import finish, parts, rotate


def reasons(**arguments: object) -> list[str]:
    return []


def attend(
    query, key, value, feature_map, key_weight, scale, cos, sin, token_mask, local, modulation, normalize, eps
):
    given = query.dtype
    query, key, value, share = parts(query, key, value, feature_map, key_weight, scale, token_mask)
    weights = rotate(query, cos, sin) @ rotate(key, cos, sin).transpose(-2, -1) * share[:, :, None]
    if normalize:
        sums = (query @ key.transpose(-2, -1) * share[:, :, None]).sum(-1, keepdim=True)
        weights = weights / (sums + eps)
    return finish(weights @ value, local, modulation, token_mask, given)
