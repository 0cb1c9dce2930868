"""What both plain backends do after the two maps: subtract, normalise each head, scale."""

from __future__ import annotations

import torch


def combine(
    signal: torch.Tensor,
    noise: torch.Tensor,
    lam: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    out_scale: float,
) -> torch.Tensor:
    """Returns `out_scale * norm(signal - lam * noise)`, computed in float32 (or float64) and cast once.

    Args:
        signal: `[batch, signal heads, queries, value_dim]`.
        noise: `[batch, noise heads, queries, value_dim]`; noise head j serves the signal heads `j g .. j g + g - 1`.
        lam: `[batch, signal heads, queries]`.
        norm_weight: `[value_dim]`, or None for no normalisation.
        norm_eps: added to the mean square.
        out_scale: constant factor of the result.
    """
    dtype = torch.promote_types(signal.dtype, torch.float32)
    noise = noise.to(dtype).repeat_interleave(signal.shape[1] // noise.shape[1], dim=1)
    # The two are close where lam is near one: in half precision their difference would be rounding error.
    mixed = signal.to(dtype) - lam.to(dtype)[..., None] * noise
    if norm_weight is not None:
        mixed = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + norm_eps) * norm_weight.to(dtype)
    return (out_scale * mixed).to(signal.dtype)
