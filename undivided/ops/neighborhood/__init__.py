"""Softmax attention to the nearest keys along one to three axes, with stride, dilation and causal axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, interprets
from undivided.ops.dense import dense_attention
from undivided.ops.merge import merge_attention
from undivided.ops.neighborhood import autograd, composed, flex, reference
from undivided.ops.neighborhood._tables import (
    Axis,
    AxisTables,
    Neighborhood,
    check_bias,
    per_axis,
    window_bias,
)
from undivided.ops.neighborhood.permute import permute_tokens, unpermute_tokens


def _triton_reasons(query, key, value, neighborhood, scale, return_lse, relative_bias) -> list[str]:
    found = _unfused_reasons(query, key, value, neighborhood, scale, return_lse, relative_bias)
    if scale <= 0:
        found.append(f"scale is {scale} (the kernels need a positive one)")
    if relative_bias is not None:
        found.append('relative_bias is given ("gemm" and "naive", which keep the weights in memory, add it)')
    return found


def _unfused_reasons(query, key, value, neighborhood, scale, return_lse, relative_bias) -> list[str]:
    found = availability()
    if found:
        return found
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"query is {str(query.dtype).removeprefix('torch.')}")
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[-1] > 256:
            found.append(f"the last axis of {name} is {tensor.shape[-1]} (at most 256)")
    if query.device.type != "cuda" and not interprets():
        found.append(f"query is on {query.device.type}")
    elif query.device.type != "cuda" and query.dtype == torch.bfloat16:
        found.append("query is bfloat16 (Triton's interpreter multiplies it wrongly)")
    return found


def _unfused(as_gemm: bool) -> Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]:
    def attend(query, key, value, neighborhood, scale, return_lse, relative_bias):
        from undivided.ops.neighborhood import unfused

        bias = None if relative_bias is None else window_bias(relative_bias, neighborhood).to(query.dtype)
        return unfused.attend(query, key, value, neighborhood, scale, return_lse, as_gemm, bias)

    return attend


BACKENDS = (
    Backend("triton", autograd.attend, _triton_reasons, availability, automatic=("cuda",)),
    Backend("flex", flex.attend, flex.reasons, automatic=("cuda",)),
    Backend("gemm", _unfused(True), _unfused_reasons, availability, automatic=("cuda",)),
    Backend("composed", composed.attend, composed.reasons),
    Backend("reference", reference.attend, reference.reasons),
    Backend("naive", _unfused(False), _unfused_reasons, availability, automatic=()),
)


def neighborhood_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    relative_bias: torch.Tensor | None = None,
    additional_key: torch.Tensor | None = None,
    additional_value: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in which a query sees the `kernel_size` keys nearest to it along each axis.

    `out_i = sum_{j in N(i)} softmax_j(scale * q_i . k_j) v_j`, with j in N(i) if it is in the window of i on every
    axis. Windows are shifted inwards at the borders, not cut: on an axis of L positions with window w and stride s
    that of query i starts at `min(max(c - w // 2, 0), L - w)` with the leader `c = min(i // s * s + s // 2, L - 1)`
    of i's group of s queries, which share the window. On a causal axis it runs from `max(c - w + 1, 0)` to i, with
    `c = min(i // s * s + s - 1, L - 1)`. With dilation d the positions of equal remainder modulo d are an axis of
    their own. Even windows reach one further to the left.

    `stride = 1` is neighborhood attention, `stride = kernel_size` blocked attention where that divides the axis,
    and a window of the whole axis is no restriction. A window of 1 keeps an axis apart.

    Args:
        query: `[batch, heads, *size, head_dim]`, 1 to 3 axes in `size`.
        key: `[batch, key_heads, *size, head_dim]`; `key_heads` divides `heads` (grouped-query attention).
        value: `[batch, key_heads, *size, value_dim]`; `value_dim` may differ from `head_dim`.
        kernel_size: keys of a window, for all axes or one number each; at most the positions of the axis.
        stride: queries that share a window, 1 to `kernel_size`.
        dilation: distance between two keys of a window; times `kernel_size` at most the positions of the axis.
        is_causal: whether a query sees no key after it on the axis, for all axes or one truth value each.
        scale: factor of the logits; default `head_dim ** -0.5`.
        relative_bias: `[heads, 2 w_1 - 1, ..., 2 w_n - 1]`, added to the logits: along each axis entry `w - 1 + j - i`
            for the key at j and the query at i of a class. Fused kernels do not take it.
        additional_key: `[batch, key_heads, others, head_dim]`: keys beside the grid, such as text, that all queries
            see. They are a second attention, and the two are merged by their log-sum-exps.
        additional_value: `[batch, key_heads, others, value_dim]`.
        return_lse: also return the log-sum-exp of the logits in the window, for `merge_attention` with others.
        backend: "auto", "triton" (fused; chosen on CUDA), "flex", "composed", "reference", or the two that keep the
            weights of all windows in memory, "gemm" and "naive".

    Returns:
        `out` `[batch, heads, *size, value_dim]` of the dtype of `query`; with `return_lse` also `lse`
        `[batch, heads, *size]`, natural logarithm, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit; a window, stride or dilation does not fit its axis (names the axis and the
            numbers); or the backend cannot run the inputs.
        TypeError: dtypes do not fit, or a window, stride, dilation or truth value is something else.

    Source: GNA (arXiv 2504.16922); with `stride = 1` Faster Neighborhood Attention (arXiv 2403.04690).
    """
    rank = query.dim()
    if not 4 <= rank <= 6:
        raise ValueError(
            f"query has shape {list(query.shape)}; it needs [batch, heads, *size, head_dim] with 1 to 3 axes in size."
        )
    layout = f"[batch, heads, {rank - 3} axes of the grid, head_dim]"
    _rules.check_rank(rank, layout, query=query, key=key, value=value)
    _rules.check_floating(query=query, key=key, value=value)
    batch, heads, *size, head_dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if list(tensor.shape[2:-1]) != size:
            raise ValueError(
                f"{name} lies on a grid of {list(tensor.shape[2:-1])}, but query on {size}; windows need one grid."
            )
    if key.shape[0] != batch or value.shape[0] != batch or value.shape[1] != key.shape[1]:
        raise ValueError(
            f"key {list(key.shape)} and value {list(value.shape)} must share [batch, key_heads] and the batch of "
            f"query {list(query.shape)}."
        )
    if key.shape[-1] != head_dim:
        raise ValueError(f"key has head_dim {key.shape[-1]}, but query has {head_dim}; they must be equal.")
    if heads % key.shape[1]:
        raise ValueError(f"key has {key.shape[1]} heads, which does not divide the {heads} heads of query.")
    if (additional_key is None) != (additional_value is None):
        missing = "additional_value" if additional_value is None else "additional_key"
        raise ValueError(f"{missing} is None, but the other is given; give both.")
    neighborhood = Neighborhood.of(size, kernel_size, stride, dilation, is_causal)
    if relative_bias is not None:
        check_bias(relative_bias, heads, neighborhood, query)
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "neighborhood": neighborhood,
        "scale": head_dim**-0.5 if scale is None else scale,
        "return_lse": return_lse or additional_key is not None,
        "relative_bias": relative_bias,
    }
    found = select("neighborhood_attention", BACKENDS, backend, query.device, arguments).run(**arguments)
    if additional_key is None or additional_value is None:
        return found
    others = dense_attention(
        query.flatten(2, -2), additional_key, additional_value, scale=arguments["scale"], return_lse=True
    )
    (out, lse), (other, other_lse) = cast(tuple, found), others
    out, lse = merge_attention([out.flatten(2, -2), other], [lse.flatten(2), other_lse])
    out, lse = out.unflatten(2, size), lse.unflatten(2, size)
    return (out, lse) if return_lse else out


__all__ = [
    "BACKENDS",
    "Axis",
    "AxisTables",
    "Neighborhood",
    "neighborhood_attention",
    "per_axis",
    "permute_tokens",
    "unpermute_tokens",
]
