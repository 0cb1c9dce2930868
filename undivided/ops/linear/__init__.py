"""Kernel-feature (linear) attention: the cost is linear in the number of tokens."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, interprets
from undivided.ops.linear import autograd, composed, reference
from undivided.ops.linear.features import FEATURE_MAPS

# Of the kernels, by the bytes of an element: a wider buffer does not fit in registers.
_MAX_WIDTH = {2: 128, 4: 64}


def _triton(**arguments):
    """Kernels in Triton, forward and backward, which read each tensor at most twice."""
    return autograd.attend(**arguments)


def _triton_reasons(
    query, key, value, feature_map, key_weight, scale, cos, sin, token_mask, local, modulation, normalize, eps
) -> list[str]:
    found = availability()
    if found:
        return found
    if isinstance(key_weight, torch.Tensor):
        found.append('key_weight is a tensor (the kernels know "context" and None)')
    if token_mask is not None:
        found.append("token_mask is given")
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return [*found, f"query is {str(query.dtype).removeprefix('torch.')}"]
    widest = _MAX_WIDTH[query.element_size()]
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[3] > widest:
            found.append(f"the last axis of {name} is {tensor.shape[3]} (at most {widest})")
    if query.shape[3] % 2:
        found.append(f"head_dim is {query.shape[3]} (the kernels need pairs of channels)")
    if query.numel() == 0 or value.numel() == 0:
        found.append("query or value is empty")
    if query.device.type != "cuda" and not interprets():
        found.append(f"query is on {query.device.type}")
    elif query.device.type != "cuda" and query.dtype == torch.bfloat16:
        found.append("query is bfloat16 (Triton's interpreter multiplies it wrongly)")
    return found


BACKENDS = (
    Backend("triton", _triton, _triton_reasons, availability, automatic=("cuda",)),
    Backend("composed", composed.attend, composed.reasons),
    Backend("reference", reference.attend, reference.reasons),
)


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    feature_map: str = "elu1",
    key_weight: torch.Tensor | str | None = None,
    scale: float | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    local: torch.Tensor | None = None,
    modulation: torch.Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention whose weights are products of features, through a buffer of `head_dim x value_dim` numbers.

    `out_i = g_i * (phi_R(q_i) S / (phi(q_i) . z + eps) + l_i)`, `S = mean_j w_j phi_R(k_j)^T v_j`,
    `z = mean_j w_j phi(k_j)`, where `phi_R` is phi rotated by the position. Every query sees every key, those before
    and after it.

    The product with g raises the rank of the output, which without it is at most `head_dim` a head. Token weights raise
    the effective rank of S if the tokens that they prefer differ from each other, and lower it if not. Rotations are in
    the numerator alone: there weights may be negative, while the denominator stays positive.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, heads, keys, head_dim]`.
        value: `[batch, heads, keys, value_dim]`.
        feature_map: phi: "elu1" (elu(x) + 1, positive), "softplus", "relu" or "identity". Where relu has no feature in
            common with any key, the output before l is zero.
        key_weight: w, `[batch, heads, keys]` or what broadcasts to it; "context" for
            `w_j = M softmax_j(scale * mean_i phi(q_i) . phi(k_j))` of M keys, whose mean is one; None for one.
        scale: of the logits of "context"; default `head_dim ** -0.5`.
        cos, sin: of the angles of the pairs of channels (0, 1), (2, 3), ..., `[tokens, head_dim // 2]`; as many queries
            as keys. Default no rotation.
        token_mask: boolean `[batch, tokens]`, as many queries as keys: True for the tokens that count, in the means
            over j and over i. The others may hold anything, and their output is zero.
        local: l, `[batch, heads, queries, value_dim]`; default none.
        modulation: g, `[batch, heads, queries, value_dim]`; default none.
        normalize: whether to divide.
        eps: beside the denominator, which is a mean over keys, not a sum.
        backend: "auto", "triton" (a GPU), "composed" (linear in the number of
            tokens) or "reference" (all pairs).

    Returns:
        `[batch, heads, queries, value_dim]` of the dtype of `query`. All sums are in float32, also under autocast
        (float64 for float64 inputs).

    Raises:
        ValueError: shapes or options do not fit, or the backend cannot run the inputs.
        TypeError: dtypes do not fit.

    Source: Transformers are RNNs (arXiv 2006.16236), section 3.2; weights, modulation and rotations: Breaking the
    Low-Rank Dilemma of Linear Attention (arXiv 2411.07635) and the authors' code.
    """
    arguments = {
        **_keys(query, key, value, feature_map, key_weight, scale, cos, sin, token_mask),
        "local": local,
        "modulation": modulation,
        "normalize": normalize,
        "eps": eps,
    }
    _rules.check_floating(query=query, local=local, modulation=modulation)
    wanted = [*query.shape[:3], value.shape[3]]
    for name, tensor in (("local", local), ("modulation", modulation)):
        if tensor is not None and list(tensor.shape) != wanted:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; it must be [batch, heads, queries, value_dim] = {wanted}."
            )
    if eps < 0:
        raise ValueError(f"eps={eps} must be 0 or more.")
    if normalize and feature_map == "identity":
        raise ValueError(
            'feature_map="identity" gives weights of both signs, whose sum may be zero; use normalize=False.'
        )
    chosen = select("linear_attention", BACKENDS, backend, query.device, arguments)
    # Autocast would take the products back to half precision.
    with torch.autocast(query.device.type, enabled=False):
        return chosen.run(**arguments)


def key_value_buffer(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    feature_map: str = "elu1",
    key_weight: torch.Tensor | str | None = None,
    scale: float | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns S of `linear_attention`, `[batch, heads, head_dim, value_dim]`, float32 or float64.

    Args and errors: as in `linear_attention`; `query` is read for `key_weight="context"` alone.
    """
    arguments = _keys(query, key, value, feature_map, key_weight, scale, cos, sin, token_mask)
    with torch.autocast(query.device.type, enabled=False):
        return composed.buffer(**arguments)


def _keys(query, key, value, feature_map, key_weight, scale, cos, sin, token_mask):
    """Checks what the buffer is made of, and returns it by name."""
    _rules.check_rank(4, "[batch, heads, length, head_dim]", query=query, key=key, value=value)
    _rules.check_floating(query=query, key=key, value=value)
    if not query.shape[:2] == key.shape[:2] == value.shape[:2] or key.shape[2] != value.shape[2]:
        raise ValueError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} must share "
            "[batch, heads], and key and value their length."
        )
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    if key.shape[3] != head_dim:
        raise ValueError(f"key has head_dim {key.shape[3]}, but query has {head_dim}; they must be equal.")
    if queries == 0 or keys == 0:
        raise ValueError(f"query has {queries} and key {keys} positions; both need at least one.")
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map={feature_map!r} is not one of {', '.join(FEATURE_MAPS)}.")
    if isinstance(key_weight, str):
        if key_weight != "context":
            raise ValueError(f'key_weight={key_weight!r} must be a tensor, "context" or None.')
    elif key_weight is not None:
        if not key_weight.is_floating_point():
            raise TypeError(f"key_weight has dtype {key_weight.dtype}; it needs a floating-point dtype.")
        shape = (1,) * (3 - key_weight.dim()) + tuple(key_weight.shape)
        target = (batch, heads, keys)
        if len(shape) != 3 or any(size not in (1, want) for size, want in zip(shape, target, strict=True)):
            raise ValueError(
                f"key_weight has shape {list(key_weight.shape)}; it must broadcast to {list(target)}."
            )
        key_weight = key_weight.expand(target)
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin belong together; give both or neither.")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and (table.shape != (keys, head_dim // 2) or head_dim % 2 or queries != keys):
            raise ValueError(
                f"{name} has shape {list(table.shape)}; with {queries} queries, {keys} keys and head_dim {head_dim} it "
                "needs [tokens, head_dim // 2], as many queries as keys and an even head_dim."
            )
    if token_mask is not None:
        if token_mask.dtype != torch.bool:
            raise TypeError(f"token_mask has dtype {token_mask.dtype}; use bool (True = counts).")
        if token_mask.shape != (batch, keys) or queries != keys:
            raise ValueError(
                f"token_mask has shape {list(token_mask.shape)}; it must be [batch, tokens] = {[batch, keys]}, with as "
                f"many queries ({queries}) as keys ({keys})."
            )
    return {
        "query": query,
        "key": key,
        "value": value,
        "feature_map": feature_map,
        "key_weight": key_weight,
        "scale": head_dim**-0.5 if scale is None else scale,
        "cos": cos,
        "sin": sin,
        "token_mask": token_mask,
    }


__all__ = ["BACKENDS", "FEATURE_MAPS", "key_value_buffer", "linear_attention"]
