"""What the implementations in PyTorch share: which rows a token reads, and what follows the convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rows_before(x: torch.Tensor, delay: int, prefix: int, history: torch.Tensor | None) -> torch.Tensor:
    """Returns the row `delay` before each token, zero where there is none or the token may not read it."""
    length = x.shape[1] - prefix
    rows = x[:, max(prefix - delay, 0) : max(x.shape[1] - delay, 0)]
    rows = F.pad(rows, (0, 0, length - rows.shape[1], 0))
    return rows if history is None or delay == 0 else rows.masked_fill((history < delay)[..., None], 0.0)


def split_values(
    latents: torch.Tensor, num_key_value_heads: int, heads: int, value_shift: bool, prefix: int,
    history: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns the latents of queries and keys, and the value `[batch, heads, length, head_dim]`, of no head without."""
    if not value_shift:
        return latents, latents.new_empty(
            latents.shape[0], 0, latents.shape[1] - prefix, latents.shape[2] // heads
        )
    head_dim = latents.shape[2] // (heads + num_key_value_heads)
    latents, values = latents.split([heads * head_dim, num_key_value_heads * head_dim], dim=-1)
    now, before = values.chunk(2, dim=-1)
    value = torch.cat([now[:, prefix:], rows_before(before, 1, prefix, history)], dim=-1)
    return latents, value.unflatten(-1, (num_key_value_heads, head_dim)).transpose(1, 2)


def finish(
    mixed, latents, temperature, cos, sin, num_heads, num_key_value_heads, qk_mean, qk_norm, eps, dtype
):  # fmt: skip
    """Mean, norm, temperature and rotation of what was convolved, in the dtype of `mixed`."""
    split = lambda x: x.unflatten(-1, (num_heads + num_key_value_heads, -1)).split(  # noqa: E731
        [num_heads, num_key_value_heads], dim=2
    )
    query, key = split(mixed)
    if qk_mean:
        plain_query, plain_key = split(latents)
        group = num_heads // num_key_value_heads
        mean = (plain_query + plain_key.repeat_interleave(group, dim=2)) / 2
        query = query + mean
        key = key + mean.unflatten(2, (num_key_value_heads, group)).mean(3)
    if qk_norm:
        query, key = (
            x * (x.shape[-1] ** 0.5 / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps))
            for x in (query, key)
        )
    if temperature is not None:
        key = key * temperature.to(key.dtype)[:, None]
    return tuple(_rotate(x, cos, sin).to(dtype).transpose(1, 2) for x in (query, key))


def _rotate(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:
    if cos is None or sin is None:
        return x
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    pairs = cos.shape[-1]
    a, b, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
