"""Differential attention composed of dense attention: two maps through torch's kernels, then the mix.

`sdpa` makes four calls where values are twice as wide as keys, because the fused kernels behind
scaled_dot_product_attention want equal widths: every score is then computed twice, 8 instead of 6 multiply-adds a
pair, head and channel of the key. `flex` makes two.
"""

from __future__ import annotations

import torch

from undivided.ops.dense import dense_attention, flex, sdpa
from undivided.ops.differential._combine import combine


def _arguments(attn_mask, is_causal, window, scale, softcap) -> dict:
    return {
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
    }


def _reasons(backend, query, key, value, attn_mask, is_causal, window, scale, softcap, **others) -> list[str]:
    shared = _arguments(attn_mask, is_causal, window, scale, softcap)
    return backend.reasons(query=query, key=key, value=value, return_lse=False, **shared)


def sdpa_reasons(**arguments) -> list[str]:
    return _reasons(sdpa, **arguments)


def flex_reasons(**arguments) -> list[str]:
    return _reasons(flex, **arguments)


def attend_sdpa(
    query, noise_query, key, noise_key, value, lam, norm_weight, norm_eps, out_scale, attn_mask, is_causal, window,
    scale, softcap,
):  # fmt: skip
    shared = _arguments(attn_mask, is_causal, window, scale, softcap)
    width = query.shape[3]
    parts = value.split(width, dim=-1) if value.shape[3] == 2 * width else (value,)

    def apply_map(query, key):
        outs = [_attend(query, key, part, "sdpa", shared) for part in parts]
        return torch.cat(outs, dim=-1)

    return combine(
        apply_map(query, key), apply_map(noise_query, noise_key), lam, norm_weight, norm_eps, out_scale
    )


def attend_flex(
    query, noise_query, key, noise_key, value, lam, norm_weight, norm_eps, out_scale, attn_mask, is_causal, window,
    scale, softcap,
):  # fmt: skip
    shared = _arguments(attn_mask, is_causal, window, scale, softcap)
    signal = _attend(query, key, value, "flex", shared)
    noise = _attend(noise_query, noise_key, value, "flex", shared)
    return combine(signal, noise, lam, norm_weight, norm_eps, out_scale)


def _attend(query, key, value, backend, shared):
    # Dense attention has one head map for keys and values.
    value = value.repeat_interleave(key.shape[1] // value.shape[1], dim=1)
    return dense_attention(query, key, value, backend=backend, **shared)
