"""Critical blocks of keys exactly, marginal ones by linear attention, negligible ones not at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability
from undivided.ops.block_map import check_block_size
from undivided.ops.dense import dense_attention
from undivided.ops.merge import merge_attention
from undivided.ops.sparse_linear import autograd, reference
from undivided.ops.sparse_linear.classes import (
    FEATURE_MAPS,
    LINEAR_SCOPES,
    block_classes,
    check_pair,
    check_ratios,
    class_counts,
    lists_of,
    map_shape,
)

BACKENDS: tuple[Backend, ...] = (
    Backend("triton", autograd.attend, autograd.reasons, availability, automatic=("cuda",)),
    Backend("reference", reference.attend, reference.reasons),
)


def sparse_linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    classes: torch.Tensor | None = None,
    topk: float = 0.05,
    bottomk: float = 0.10,
    feature_map: str = "softmax",
    query_block_size: int = 64,
    block_size: int = 64,
    linear_scope: str = "marginal",
    scale: float | None = None,
    additional_key: torch.Tensor | None = None,
    additional_value: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Sparse softmax attention of a few blocks plus projected linear attention of the others, without a causal order.

    `out = O^s + O^l W^T + b`. `O^s = softmax(scale * Q K^T) V` over the tokens of critical blocks alone.
    `O^l_i = phi(Q_i) H_i / (phi(Q_i) Z_i)` of a block of queries i, with `H_i = sum_j phi(K_j)^T V_j` and
    `Z_i = sum_j phi(K_j)` over the blocks of `linear_scope`. The linear branch compensates after training; it is no
    estimate of the mass left out.

    Args:
        query: `[batch, heads, length, head_dim]`, after norm and rotation.
        key: of the same shape.
        value: `[batch, heads, length, value_dim]`.
        weight: the projection W, `[value_dim, value_dim]`; None returns the two parts.
        bias: b, `[value_dim]`, with `weight` only.
        classes: int8 `[batch, heads, query_blocks, key_blocks]`, 1 critical, 0 marginal, -1 negligible; default
            `block_classes`. A row without critical blocks has a zero O^s, one without linear blocks a zero O^l.
        topk: share of critical blocks, at least one block; read without `classes` only.
        bottomk: share of negligible blocks.
        feature_map: phi: "softmax" (over the channels of a token), "elu1" or "relu".
        query_block_size: queries of a block.
        block_size: keys of a block.
        linear_scope: "marginal" (the paper), "noncritical" (the first release) or "all".
        scale: factor of the logits; default `head_dim ** -0.5`.
        additional_key: `[batch, heads, others, head_dim]`: keys beside those of the map, such as text, that are
            critical to all queries. They are a second attention, and O^s is of both, by their log-sum-exps.
        additional_value: `[batch, heads, others, value_dim]`.
        return_lse: also return the log-sum-exp over critical keys.
        backend: "auto", "triton" or "reference".

    Returns:
        out, or without `weight` the pair O^s, O^l; `[batch, heads, length, value_dim]`, of the dtype of `query`. With
        `return_lse` then lse `[batch, heads, length]`, natural logarithm, float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape or an option does not fit, or the backend cannot run the inputs.
        TypeError: dtypes do not fit.

    Source: SLA (arXiv 2509.24006), section 4 and algorithms 1 and 2.
    """
    check_pair(query, key)
    check_ratios(topk, bottomk)
    check_block_size("query_block_size", query_block_size)
    check_block_size("block_size", block_size)
    _rules.check_rank(4, "[batch, heads, length, value_dim]", value=value)
    _rules.check_floating(query=query, value=value)
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value {list(value.shape)} must have the tokens of key {list(key.shape)}.")
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map={feature_map!r} is not one of {', '.join(FEATURE_MAPS)}.")
    if linear_scope not in LINEAR_SCOPES:
        raise ValueError(f"linear_scope={linear_scope!r} is not one of {', '.join(LINEAR_SCOPES)}.")
    width = value.shape[3]
    if weight is None and bias is not None:
        raise ValueError("bias is given without weight; give both, or neither for the two parts.")
    for name, tensor, wanted in (("weight", weight, (width, width)), ("bias", bias, (width,))):
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; value_dim={width} needs {list(wanted)}."
            )
    if classes is not None:
        blocks = map_shape(query, query_block_size, block_size)
        if classes.dtype != torch.int8:
            raise TypeError(f"classes has dtype {classes.dtype}; use int8 with 1, 0 and -1.")
        if list(classes.shape) != blocks:
            raise ValueError(f"classes has shape {list(classes.shape)}; blocks of these sizes need {blocks}.")
    if (additional_key is None) != (additional_value is None):
        missing = "additional_value" if additional_value is None else "additional_key"
        raise ValueError(f"{missing} is None, but the other is given; give both.")
    has_others = additional_key is not None and additional_value is not None
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "weight": None if has_others else weight,
        "bias": None if has_others else bias,
        "classes": classes,
        "topk": topk,
        "bottomk": bottomk,
        "feature_map": feature_map,
        "query_block_size": query_block_size,
        "block_size": block_size,
        "linear_scope": linear_scope,
        "scale": query.shape[3] ** -0.5 if scale is None else float(scale),
    }
    chosen = select("sparse_linear_attention", BACKENDS, backend, query.device, arguments)
    with torch.autocast(query.device.type, enabled=False):
        out, linear, lse = chosen.run(**arguments)
        if additional_key is not None and additional_value is not None:
            others = dense_attention(
                query, additional_key, additional_value, scale=arguments["scale"], return_lse=True
            )
            out, lse = merge_attention([out, others[0]], [lse, others[1]])
            if weight is not None:
                # The projection is kept in float32 in training; products are of the type of the queries.
                out = out + F.linear(
                    linear, weight.to(out.dtype), None if bias is None else bias.to(out.dtype)
                )
    found = (out,) if weight is not None else (out, linear)
    found = (*found, lse) if return_lse else found
    return found[0] if len(found) == 1 else found


__all__ = [
    "BACKENDS",
    "FEATURE_MAPS",
    "LINEAR_SCOPES",
    "block_classes",
    "class_counts",
    "lists_of",
    "sparse_linear_attention",
]
