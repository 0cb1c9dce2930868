"""Exact rewritings of a latent layer in place: another basis for its latent, and fewer axes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from undivided.layers.latent import LatentAttention, LatentNorm


@torch.no_grad()
def fold_norm_weight(layer: LatentAttention) -> None:
    """Moves the weight of the latent's normalisation up: `kv_b <- kv_b diag(w)`, `w <- 1`.

    Exact. Afterwards the normalisation commutes with every orthogonal change of basis. A layer without a
    normalisation is left as it is.
    """
    norm = layer.kv_a_layernorm
    if isinstance(norm, LatentNorm):
        up = layer.kv_b_proj.weight
        up.copy_(up.double() * norm.weight.double())
        norm.weight.fill_(1.0)


@torch.no_grad()
def rotate_latent(layer: LatentAttention, rotation: torch.Tensor) -> None:
    """Writes the latent in another orthonormal basis: `kv_a <- U^T kv_a`, `kv_b <- kv_b U`.

    Exact for an orthogonal U: the latent becomes `U^T c`, its length and all products with it stay. The rows
    of the rotary key are untouched. Computed in float64, stored in the dtype of the weights.

    Args:
        layer: the layer to change.
        rotation: `[latent_dim, latent_dim]`, orthogonal; its columns are the new axes.

    Raises:
        ValueError: `rotation` is not square of size `latent_dim`, or the normalisation has a weight that is
            not 1 (call `fold_norm_weight` before).
    """
    size = layer.latent_dim
    if rotation.shape != (size, size):
        raise ValueError(
            f"rotation is {list(rotation.shape)}, but latent_dim is {size}; give [{size}, {size}]."
        )
    norm = layer.kv_a_layernorm
    if isinstance(norm, LatentNorm) and not torch.all(norm.weight == 1):
        raise ValueError("the weight of the latent's normalisation is not 1; call fold_norm_weight before.")
    down, up = layer.kv_a_proj_with_mqa, layer.kv_b_proj.weight
    rotation = rotation.to(up.device, torch.float64)
    for rows in (down.weight[:size],) if down.bias is None else (down.weight[:size], down.bias[:size]):
        rows.copy_(rotation.T @ rows.double())
    up.copy_(up.double() @ rotation)


@torch.no_grad()
def truncate_latent(layer: LatentAttention, latent_dim: int) -> None:
    """Keeps the first `latent_dim` axes of the latent.

    Exact only where the others are zero; after `rotate_latent` by the principal axes it is the best
    truncation in the mean square of the latent.

    Args:
        layer: the layer to change; without a normalisation of the latent, whose mean square would change.
        latent_dim: axes to keep, 1 to the layer's `latent_dim`.

    Raises:
        ValueError: `latent_dim` is out of range, or the layer normalises its latent.
    """
    if not 1 <= latent_dim <= layer.latent_dim:
        raise ValueError(f"latent_dim={latent_dim} is not in 1 to {layer.latent_dim}, the latent's width.")
    if isinstance(layer.kv_a_layernorm, LatentNorm):
        raise ValueError("the layer normalises its latent; a truncated one has another mean square.")
    down, up = layer.kv_a_proj_with_mqa, layer.kv_b_proj
    keep = torch.ones(down.out_features, dtype=torch.bool, device=down.weight.device)
    keep[latent_dim : layer.latent_dim] = False
    down.weight = nn.Parameter(down.weight[keep])
    if down.bias is not None:
        down.bias = nn.Parameter(down.bias[keep])
    up.weight = nn.Parameter(up.weight[:, :latent_dim].contiguous())
    down.out_features, up.in_features = latent_dim + layer.rope_dim, latent_dim
    layer.latent_dim = latent_dim


def latent_options(layer: LatentAttention) -> dict[str, Any]:
    """Returns the options that rebuild a latent layer from a config, as they are after rewriting it.

    The scale, the soft cap and the layout of the rotary pairs are left to the mechanism's defaults.
    """
    options: dict[str, Any] = {
        "latent_dim": layer.latent_dim,
        "rope_dim": layer.rope_dim,
        "nope_dim": layer.nope_dim,
        "value_dim": layer.value_dim,
        "query_latent_dim": None,
        "latent_norm": isinstance(layer.kv_a_layernorm, LatentNorm),
        "query_latent_norm": False,
        "key_value_bias": layer.kv_a_proj_with_mqa.bias is not None,
        "output_bias": layer.o_proj.bias is not None,
        "rope_stride": layer.rope_stride,
        "rope_repeats": layer.rope_repeats,
    }
    norms = [layer.kv_a_layernorm]
    if hasattr(layer, "q_proj"):
        options["query_bias"] = layer.q_proj.bias is not None
    else:
        norms.append(layer.q_a_layernorm)
        options["query_bias"] = layer.q_a_proj.bias is not None
        options["query_latent_dim"] = layer.q_a_proj.out_features
        options["query_latent_norm"] = isinstance(layer.q_a_layernorm, LatentNorm)
    for norm in norms:
        if isinstance(norm, LatentNorm):
            options["norm_eps"] = norm.eps
    return options
