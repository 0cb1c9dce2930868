"""Multi-head self-attention as a convolution: each query attends to the taps of a kernel around it."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, interprets
from undivided.ops.msa_conv import autograd, reference
from undivided.ops.msa_conv._border import BORDERS


def _triton_reasons(query, key, value, kernel_size, dilation, border, scale, return_lse) -> list[str]:
    found = availability()
    if found:
        return found
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"query is {str(query.dtype).removeprefix('torch.')}")
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[-1] > 256:
            found.append(f"the last axis of {name} is {tensor.shape[-1]} (at most 256)")
    if scale <= 0:
        found.append(f"scale is {scale} (the kernels need a positive one)")
    if query.device.type != "cuda" and not interprets():
        found.append(f"query is on {query.device.type}")
    elif query.device.type != "cuda" and query.dtype == torch.bfloat16:
        found.append("query is bfloat16 (Triton's interpreter multiplies it wrongly)")
    return found


BACKENDS = (
    Backend("triton", autograd.attend, _triton_reasons, availability, automatic=("cuda",)),
    Backend("reference", reference.attend, reference.reasons),
)


def msa_conv_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    border: str = "zero",
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of each place of a map to the taps of a kernel around it.

    `out_i = sum_a softmax_a(scale * q_i . k_(i + dilation * (a - centre))) v_(i + dilation * (a - centre))`, with the
    taps a of the kernel. With `border="zero"` the keys and values beyond the map are vectors of zeros and stay in the
    softmax: outputs near the border are smaller. With "mask" taps beyond the map are left out, with "circular" they
    are on the other side.

    Args:
        query: `[batch, heads, height, width, head_dim]`.
        key: like query.
        value: `[batch, heads, height, width, value_dim]`.
        kernel_size: taps along both axes, or of each; odd. A kernel may be larger than the map.
        dilation: places from tap to tap, along both axes or along each.
        border: "zero" (the authors'), "mask" or "circular".
        scale: factor of the products; default `head_dim ** -0.5`.
        return_lse: return the log-sum of the exponentials too, that of zeros beyond the map included.
        backend: "auto", "triton" or "reference".

    Returns:
        `out` `[batch, heads, height, width, value_dim]` of the dtype of `query`; with `return_lse` also `lse`
        `[batch, heads, height, width]`, natural logarithm, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit, a kernel is even, a dilation is below 1, the border is unknown, or the backend
            cannot run the inputs.
        TypeError: dtypes do not fit.

    Source: TiC (arXiv 2310.04134) and the authors' operator, which has one head and `border="zero"`.
    """
    _rules.check_rank(5, "[batch, heads, height, width, head_dim]", query=query, key=key, value=value)
    _rules.check_floating(query=query, key=key, value=value)
    if key.shape != query.shape:
        raise ValueError(
            f"key has shape {list(key.shape)}, but query has {list(query.shape)}; they must be equal."
        )
    if value.shape[:-1] != query.shape[:-1]:
        raise ValueError(
            f"value has shape {list(value.shape)}; all but its last axis must be as in query {list(query.shape)}."
        )
    kernel_size, dilation = checked_kernel(kernel_size, dilation, border)
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "kernel_size": kernel_size,
        "dilation": dilation,
        "border": border,
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "return_lse": return_lse,
    }
    return select("msa_conv_attention", BACKENDS, backend, query.device, arguments).run(**arguments)


def checked_kernel(
    kernel_size: int | tuple[int, int], dilation: int | tuple[int, int], border: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns kernel and dilation along each axis.

    Raises:
        ValueError: a kernel is even or below 1, a dilation below 1, or the border unknown.
    """
    pairs = []
    for name, given in (("kernel_size", kernel_size), ("dilation", dilation)):
        pair = (given, given) if isinstance(given, int) else tuple(given)
        if len(pair) != 2 or not all(isinstance(one, int) and one >= 1 for one in pair):
            raise ValueError(
                f"{name}={given} must be a number of at least 1, or two: of rows and of columns."
            )
        pairs.append(pair)
    if any(one % 2 == 0 for one in pairs[0]):
        raise ValueError(f"kernel_size={kernel_size} must be odd: an even kernel has no centre.")
    if border not in BORDERS:
        raise ValueError(f"border={border!r} is not one of {', '.join(map(repr, BORDERS))}.")
    return (pairs[0][0], pairs[0][1]), (pairs[1][0], pairs[1][1])


__all__ = ["BACKENDS", "BORDERS", "checked_kernel", "msa_conv_attention"]
