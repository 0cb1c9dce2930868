"""Gaussian gates: each feature is weighed by a density of its own normalised value."""

from __future__ import annotations

import torch

from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, interprets
from undivided.ops.gaussian import autograd, composed, reference

EPS = 1e-8


def _triton_reasons(x, offset, width, eps) -> list[str]:
    found = availability()
    if found:
        return found
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"x is {str(x.dtype).removeprefix('torch.')}")
    if x.numel() == 0:
        found.append("x is empty")
    if x.device.type != "cuda" and not interprets():
        found.append(f"x is on {x.device.type}")
    return found


BACKENDS = (
    Backend("triton", autograd.gate, _triton_reasons, availability, automatic=("cuda",)),
    Backend("composed", composed.gate, lambda **arguments: []),
    Backend("reference", reference.gate, lambda **arguments: []),
)


def gaussian_gate(
    x: torch.Tensor,
    offset: torch.Tensor,
    width: torch.Tensor,
    *,
    eps: float = EPS,
    backend: str = "auto",
) -> torch.Tensor:
    """Weighs values by a product of Gaussian densities of themselves, normalised along an axis.

    With the mean and the unbiased variance of x along the axis, `s = var + eps`, and
    `t_ji = (x_i - mean - offset_j) / sqrt(s)`: `m = softmax_i(-sum_j t_ji^2 / (2 width_j^2))`, `out_i = x_i m_i`. The
    product over j is one Gaussian, so the number of densities costs nothing:
    `m = softmax_i(-(a y_i^2 - 2 b y_i) / (2 s))` with `y = x - mean`, `a = sum_j width_j^-2`,
    `b = sum_j offset_j width_j^-2`.

    Args:
        x: `[outer, heads, length, inner]`; the axis is `length`, at least 2.
        offset: `[heads, gaussians]`, added to the mean, in the units of x.
        width: `[heads, gaussians]`, not zero; only its square counts.
        eps: added to the variance.
        backend: "auto", "triton", "composed" or "reference".

    Returns:
        Of the shape and dtype of x.

    Raises:
        ValueError: shapes do not fit, or the backend cannot run the inputs.
        TypeError: a dtype is not floating.

    Source: Gaussian Adaptive Attention (arXiv 2401.11143), section 3; the authors' layer takes the densities' product
    and divides by its sum, which this is, without its underflow.
    """
    for name, tensor in (("x", x), ("offset", offset), ("width", width)):
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be floating.")
    if x.dim() != 4:
        raise ValueError(f"x {list(x.shape)} must be [outer, heads, length, inner].")
    if x.shape[2] < 2:
        raise ValueError(
            f"x {list(x.shape)} has length {x.shape[2]}; the variance of one value is not defined."
        )
    if (
        offset.dim() != 2
        or offset.shape != width.shape
        or offset.shape[0] != x.shape[1]
        or not offset.shape[1]
    ):
        raise ValueError(
            f"offset {list(offset.shape)} and width {list(width.shape)} must both be [{x.shape[1]}, gaussians], at "
            "least one."
        )
    arguments = {"x": x, "offset": offset, "width": width, "eps": eps}
    return select("gaussian_gate", BACKENDS, backend, x.device, arguments).run(**arguments)


def gaussian_weights(
    x: torch.Tensor, offset: torch.Tensor, width: torch.Tensor, *, eps: float = EPS
) -> torch.Tensor:
    """Returns the weights m of `gaussian_gate`, of the shape of x, which sum to 1 along its axis; float32 at least."""
    return reference.weights(x.to(torch.promote_types(x.dtype, torch.float32)), offset, width, eps)
