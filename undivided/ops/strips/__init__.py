"""Attention by the rows and the columns of a map: gates of strip means, with convolution and norm."""

from __future__ import annotations

import torch

from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, interprets
from undivided.ops.strips import autograd, composed, reference


def _triton(**arguments):
    """Kernels in Triton, forward and backward: the map is read twice and written once."""
    return autograd.attend(**arguments)


def _triton_reasons(x, weights, **options: object) -> list[str]:
    found = availability()
    if found:
        return found
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"x is {str(x.dtype).removeprefix('torch.')}")
    if x.numel() == 0:
        return [*found, "x is empty"]
    if x[0].numel() >= 2**31:
        found.append(f"one image has {x[0].numel()} elements (at most 2**31 - 1)")
    if x.shape[3] > 1024:
        found.append(f"the map is {x.shape[3]} wide (at most 1024)")
    if x.device.type != "cuda" and not interprets():
        found.append(f"x is on {x.device.type}")
    return found


BACKENDS = (
    Backend("triton", _triton, _triton_reasons, availability, automatic=("cuda",)),
    Backend("composed", composed.attend, composed.reasons),
    Backend("reference", reference.attend, reference.reasons),
)


def strip_attention(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    column_weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    *,
    conv_groups: int,
    norm_groups: int,
    eps: float = 1e-5,
    is_circular: bool = False,
    residual: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Gates a map by its rows and columns: `out = x * y_h * y_w` with `y = sigmoid(GroupNorm(conv(z)))`.

    z are the means of the rows, `[batch, channels, height]`, and of the columns, `[batch, channels, width]`; the
    convolution runs along a strip, which keeps its length. Strips, convolution and norm are computed in float32 at
    least, the products in the type of x. "reference" computes all in the type of x.

    Args:
        x: map `[batch, channels, height, width]`, in any memory format.
        weights: of the rows: convolution `[channels, channels / conv_groups, taps]` with odd taps, weight and bias of
            the norm, both `[channels]`.
        column_weights: of the columns; default those of the rows.
        conv_groups, norm_groups: groups of the convolution and of the norm; both divide the channels.
        eps: of the norm.
        is_circular: the convolution goes round, in place of zeros beyond the ends.
        residual: `x + x * y_h * y_w`.
        backend: "auto", "triton", "composed" or "reference".

    Returns:
        A map like x, in its memory format.

    Raises:
        ValueError: shapes or groups do not fit, or the backend cannot run the inputs.
        TypeError: a tensor is not floating.

    Source: ELA (arXiv 2403.01123), section 3.
    """
    if x.dim() != 4:
        raise ValueError(f"x has shape {list(x.shape)}; it needs 4 axes, [batch, channels, height, width].")
    channels = x.shape[1]
    for name, groups in (("conv_groups", conv_groups), ("norm_groups", norm_groups)):
        if groups < 1 or channels % groups:
            raise ValueError(f"{name}={groups} does not divide the {channels} channels of x.")
    column_weights = weights if column_weights is None else column_weights
    for whose, given in (("weights", weights), ("column_weights", column_weights)):
        if len(given) != 3:
            raise ValueError(
                f"{whose} has {len(given)} tensors; it needs 3: convolution, norm, bias of the norm."
            )
        for tensor in (x, *given):
            if not tensor.is_floating_point():
                raise TypeError(f"a tensor of x and {whose} is of {tensor.dtype}; all must be floating.")
        conv, *norm = given
        if conv.dim() != 3 or conv.shape[:2] != (channels, channels // conv_groups) or conv.shape[2] % 2 == 0:
            raise ValueError(
                f"{whose}[0] has shape {list(conv.shape)}; it must be [{channels}, {channels // conv_groups}, taps] "
                "with odd taps."
            )
        for place, tensor in enumerate(norm, start=1):
            if tensor.shape != (channels,):
                raise ValueError(f"{whose}[{place}] has shape {list(tensor.shape)}; it must be [{channels}].")
        if is_circular and min(x.shape[2:]) < conv.shape[2] // 2:
            raise ValueError(
                f"a strip has {min(x.shape[2:])} positions; with is_circular it needs {conv.shape[2] // 2}, half "
                "of the taps."
            )
    arguments = {
        "x": x,
        "weights": (*weights, *column_weights),
        "conv_groups": conv_groups,
        "norm_groups": norm_groups,
        "eps": eps,
        "is_circular": is_circular,
        "residual": residual,
    }
    return select("strip_attention", BACKENDS, backend, x.device, arguments).run(**arguments)


__all__ = ["BACKENDS", "strip_attention"]
