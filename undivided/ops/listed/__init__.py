"""Softmax attention of each query to its own list of single keys."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, interprets
from undivided.ops.listed import fused, reference


def _triton_reasons(query, key, value, indices, scale) -> list[str]:
    found = availability()
    if found:
        return found
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"query is {str(query.dtype).removeprefix('torch.')}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        found.append("a gradient is needed (the kernel has no backward)")
    if query.device.type != "cuda" and not interprets():
        found.append(f"query is on {query.device.type}")
    return found


BACKENDS = (
    Backend("triton", fused.attend, _triton_reasons, availability, automatic=("cuda",)),
    Backend("reference", reference.attend, reference.reasons),
)


def listed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: torch.Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of each query to the keys of its own list.

    `out_n = sum_t softmax_t(scale * q_n . k_i(n,t)) v_i(n,t)`. It reads as many rows of keys and of values as the lists
    have entries and computes nothing else; lists of neighbouring queries share no work. Where keys come in blocks,
    `selected_attention` is the faster operator.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, heads, keys, head_dim]`.
        value: `[batch, heads, keys, value_dim]`.
        indices: keys of each query, int32 or int64 `[batch, heads, queries, entries]`, at least one entry, none twice;
            they are checked on a CPU only.
        scale: factor of the products; default `head_dim ** -0.5`.
        backend: "auto", "triton" (without gradients) or "reference".

    Returns:
        `[batch, heads, queries, value_dim]`, of the dtype of `query`.

    Raises:
        ValueError: shapes do not fit, a list is empty, on a CPU also if an index is no key; or the backend cannot run
            the inputs.
        TypeError: dtypes do not fit.

    Source: Sparsifiner (arXiv 2303.13755), section 3.3.
    """
    _rules.check_rank(4, "[batch, heads, length, head_dim]", query=query, key=key, value=value)
    _rules.check_floating(query=query, key=key, value=value)
    if key.shape[:2] != query.shape[:2] or key.shape[3] != query.shape[3] or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"key {list(key.shape)} and value {list(value.shape)} must share [batch, heads, keys], and key [batch, "
            f"heads] and head_dim with query {list(query.shape)}."
        )
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices has dtype {indices.dtype}; use int32 or int64.")
    if indices.dim() != 4 or indices.shape[:3] != query.shape[:3] or indices.shape[3] < 1:
        raise ValueError(
            f"indices has shape {list(indices.shape)}; it must be [batch, heads, queries, entries], of query "
            f"{list(query.shape)}, with at least one entry."
        )
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= key.shape[2]:
            raise ValueError(f"indices has {low if low < 0 else high}, but there are {key.shape[2]} keys.")
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "indices": indices,
        "scale": query.shape[3] ** -0.5 if scale is None else float(scale),
    }
    return select("listed_attention", BACKENDS, backend, query.device, arguments).run(**arguments)


__all__ = ["BACKENDS", "listed_attention"]
