"""Linear attention by products of PyTorch: keys and values into one buffer, queries through it."""

from __future__ import annotations

from undivided.ops.linear.features import finish, parts, rotate


def reasons(**arguments: object) -> list[str]:
    return []


def attend(
    query, key, value, feature_map, key_weight, scale, cos, sin, token_mask, local, modulation, normalize, eps
):
    given = query.dtype
    query, key, value, share = parts(query, key, value, feature_map, key_weight, scale, token_mask)
    key = key * share[..., None]
    out = rotate(query, cos, sin) @ (rotate(key, cos, sin).transpose(-2, -1) @ value)
    if normalize:
        out = out / (query @ key.sum(-2)[..., None] + eps)
    return finish(out, local, modulation, token_mask, given)


def buffer(query, key, value, feature_map, key_weight, scale, cos, sin, token_mask):
    _, key, value, share = parts(query, key, value, feature_map, key_weight, scale, token_mask)
    return rotate(key * share[..., None], cos, sin).transpose(-2, -1) @ value
