"""Causal attention with learned vectors and biases of distances (Transformer-XL's scores)."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, interprets
from undivided.ops.relative import autograd, blocked, reference


def _triton(**arguments):
    """Fused kernels in Triton, forward and backward: products with distances are shifted tile by tile."""
    return autograd.attend(**arguments)


def _triton_reasons(
    query, key, value, content_bias, distance_vectors, distance_bias, attn_mask, scale, return_lse
) -> list[str]:
    found = availability()
    if found:
        return found
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"query is {str(query.dtype).removeprefix('torch.')}")
    if query.shape[3] > 128:
        found.append(f"head_dim is {query.shape[3]} (at most 128)")
    if attn_mask is not None:
        found.append("attn_mask is given (the kernels know causality only)")
    if scale <= 0:
        found.append(f"scale is {scale} (the kernels need a positive one)")
    if query.device.type != "cuda" and not interprets():
        found.append(f"query is on {query.device.type}")
    elif query.device.type != "cuda" and query.dtype == torch.bfloat16:
        found.append("query is bfloat16 (Triton's interpreter multiplies it wrongly)")
    return found


BACKENDS = (
    Backend("triton", _triton, _triton_reasons, availability, automatic=("cuda",)),
    Backend("blocked", blocked.attend, blocked.reasons),
    Backend("reference", reference.attend, lambda **arguments: []),
)


def relative_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    content_bias: torch.Tensor,
    distance_vectors: torch.Tensor,
    distance_bias: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal softmax attention whose scores know how far a key lies back.

    `s_ij = scale * ((q_i + u) . k_j + q_i . r_d + b_d)` with `d = i + M - N - j`, the distance of key j from query i of
    N queries behind M - N earlier keys; keys with d < 0 are not seen.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, key_heads, keys, head_dim]`, at least as many keys as queries; key_heads divides heads.
        content_bias: u, `[heads, head_dim]`.
        distance_vectors: r by distance, `[distances, heads, head_dim]`, at least one a key.
        distance_bias: b by distance, `[distances, heads]`.
        attn_mask: broadcasts to `[batch, heads, queries, keys]`, boolean or additive, besides causality.
        scale: default `head_dim ** -0.5`.
        return_lse: also return the log-sum-exp of the scores.
        backend: "auto", "triton", "blocked" (a block of queries at a time, computed again for gradients) or
            "reference".

    Returns:
        `[batch, heads, queries, head_dim]` of the dtype of `query`. A query that sees no key gets zero. With
        `return_lse` also `[batch, heads, queries]`, natural logarithm, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit; a key lies further back than there are distances.
        TypeError: dtypes do not fit.

    Source: Transformer-XL (arXiv 1901.02860), section 3.3, with tables in place of sinusoids; RCMHA (arXiv 2308.03429).
    """
    _rules.check_rank(4, "[batch, heads, length, head_dim]", query=query, key=key, value=value)
    _rules.check_floating(query=query, key=key, value=value)
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    if key.shape[0] != batch or key.shape[3] != head_dim or value.shape != key.shape or heads % key.shape[1]:
        raise ValueError(
            f"key {list(key.shape)} and value {list(value.shape)} must be [{batch}, a divisor of {heads}, keys, "
            f"{head_dim}]."
        )
    if num_queries > num_keys:
        raise ValueError(
            f"there are {num_queries} queries and {num_keys} keys; the last keys are the queries' own."
        )
    distances = distance_vectors.shape[0]
    expected = {
        "content_bias": (content_bias, (heads, head_dim)),
        "distance_vectors": (distance_vectors, (distances, heads, head_dim)),
        "distance_bias": (distance_bias, (distances, heads)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; it must be {list(shape)}.")
    if num_keys > distances:
        raise ValueError(
            f"a key lies {num_keys - 1} back, and there are vectors for distances up to {distances - 1}; make the "
            "table longer or the memory shorter."
        )
    _rules.check_mask(attn_mask, batch, heads, num_queries, num_keys)
    arguments = {
        "query": query, "key": key, "value": value, "content_bias": content_bias,
        "distance_vectors": distance_vectors, "distance_bias": distance_bias, "attn_mask": attn_mask,
        "scale": head_dim**-0.5 if scale is None else scale, "return_lse": return_lse,
    }  # fmt: skip
    return select("relative_attention", BACKENDS, backend, query.device, arguments).run(**arguments)
