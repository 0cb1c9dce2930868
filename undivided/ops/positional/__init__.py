"""Attention by content mixed with attention by position, whose weights no input decides."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, interprets
from undivided.ops.positional import autograd, reference, separable
from undivided.ops.positional.separable import axis_weights


def _triton(**arguments):
    """Kernels in Triton, forward and backward, which mix both kinds of weights before they meet the values."""
    return autograd.attend(**arguments)


def _triton_reasons(query, key, value, position_weight, gate, size, scale) -> list[str]:
    found = availability()
    if found:
        return found
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"query is {str(query.dtype).removeprefix('torch.')}")
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[3] > 128:
            found.append(f"the last axis of {name} is {tensor.shape[3]} (at most 128)")
    for name, length in zip(("height", "width"), size, strict=True):
        if not 1 <= length <= 128:
            found.append(f"the {name} of the map is {length} (from 1 to 128)")
    if query.device.type != "cuda" and not interprets():
        found.append(f"query is on {query.device.type}")
    elif query.device.type != "cuda" and query.dtype == torch.bfloat16:
        found.append("query is bfloat16 (Triton's interpreter multiplies it wrongly)")
    return found


BACKENDS = (
    Backend("triton", _triton, _triton_reasons, availability, automatic=("cuda",)),
    Backend("sdpa", separable.attend, separable.reasons),
    Backend("reference", reference.attend, reference.reasons),
)


def gated_positional_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_weight: torch.Tensor,
    gate: torch.Tensor,
    size: tuple[int, int],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Softmax attention by content and softmax attention by position, mixed by a gate of each head.

    `out_i = (1 - g) sum_j softmax_j(scale * q_i . k_j) v_j + g sum_j softmax_j(w . r_ij) v_j` in each head, with
    `r_ij = (dx, dy, dx^2 + dy^2)` and `(dx, dy) = position(j) - position(i)`, in tokens of a map.

    The weights by position are a Kronecker product of one matrix over rows and one over columns, since `w . r_ij` is a
    sum of a term of each axis, and no tensor of all pairs of tokens is made. "sdpa" applies these two to the values,
    one after the other, beside torch's fused attention; "triton" mixes them with the weights by content inside of one
    kernel, so that queries, keys and values are read once.

    Args:
        query, key: `[batch, heads, height * width, head_dim]`, tokens in row-major order.
        value: `[batch, heads, height * width, value_dim]`.
        position_weight: w, `[heads, 3]`; component 0 belongs to the columns (x), 1 to the rows (y).
        gate: g, the part that positions have, `[heads]`, from 0 to 1.
        size: `(height, width)` of the map.
        scale: factor of the products; default `head_dim ** -0.5`.
        backend: "auto" ("triton" on a GPU for up to 256 tokens, else "sdpa"), "triton", "sdpa" or "reference".

    Returns:
        `[batch, heads, height * width, value_dim]`, of the dtype of `query`.

    Raises:
        ValueError: shapes do not fit each other or the map.
        TypeError: dtypes do not fit.

    Source: ConViT (arXiv 2103.10697), section 3; the product of rows and columns is this library's.
    """
    _rules.check_rank(4, "[batch, heads, length, head_dim]", query=query, key=key, value=value)
    _rules.check_floating(query=query, key=key, value=value)
    batch, heads, tokens, head_dim = query.shape
    if size[0] * size[1] != tokens:
        raise ValueError(f"size={tuple(size)} has {size[0] * size[1]} tokens, but query has {tokens}.")
    if key.shape != query.shape:
        raise ValueError(
            f"key has shape {list(key.shape)}, but query {list(query.shape)}; they must be equal."
        )
    if value.shape[:3] != query.shape[:3]:
        raise ValueError(
            f"value has shape {list(value.shape)}; it must share [batch, heads, tokens] = "
            f"{[batch, heads, tokens]} with query."
        )
    for name, tensor, shape in (("position_weight", position_weight, (heads, 3)), ("gate", gate, (heads,))):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; use a floating-point dtype.")
        if tensor.shape != shape:
            wanted = ", ".join(["heads", "3"][: len(shape)])
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be [{wanted}] = {list(shape)}.")
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "position_weight": position_weight,
        "gate": gate,
        "size": (size[0], size[1]),
        "scale": head_dim**-0.5 if scale is None else scale,
    }
    # Of many tokens "sdpa" is the first that is able.
    backends = BACKENDS if tokens <= separable.FEW_TOKENS else BACKENDS[1:] + BACKENDS[:1]
    chosen = select("gated_positional_attention", backends, backend, query.device, arguments)
    return chosen.run(**arguments)


__all__ = ["BACKENDS", "axis_weights", "gated_positional_attention"]
