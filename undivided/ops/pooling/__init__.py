"""The generalised mean of tokens, with an exponent for each channel."""

from __future__ import annotations

import torch

from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, interprets
from undivided.ops.pooling import autograd, composed, reference


def _triton(**arguments):
    """Kernels in Triton, forward and backward: tokens are read once in each."""
    return autograd.pool(**arguments)


def _triton_reasons(x, power, eps, mask) -> list[str]:
    found = availability()
    if found:
        return found
    if mask is not None:
        found.append("mask is given")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"x is {str(x.dtype).removeprefix('torch.')}")
    if power.dtype == torch.float64:
        found.append("power is float64")
    if x.device.type != "cuda" and not interprets():
        found.append(f"x is on {x.device.type}")
    return found


BACKENDS = (
    Backend("triton", _triton, _triton_reasons, availability, automatic=("cuda",)),
    Backend("composed", composed.pool, composed.reasons),
    Backend("reference", reference.pool, reference.reasons),
)


def generalised_mean(
    x: torch.Tensor,
    power: torch.Tensor,
    *,
    eps: float = 1e-6,
    mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The generalised mean of tokens, `f_c = (1/N sum_i max(x_ic, eps)^p_c)^(1/p_c)`.

    Computed in float32 at least and relative to the largest token of a channel, so that no exponent overflows or
    vanishes; "reference" is the formula as it stands, in the type given.

    Args:
        x: tokens `[batch, tokens, channels]`, of a floating type.
        power: p, positive, `[channels]`.
        eps: least value of an entry; what is not above has no gradient.
        mask: boolean `[batch, tokens]`, True for tokens that count; a row without any gives eps.
        backend: "auto", "triton", "composed" or "reference".

    Returns:
        `[batch, channels]`, of the type of x.

    Raises:
        ValueError: shapes do not fit, there are no tokens, or the backend cannot run the inputs.
        TypeError: x or power is not floating, or mask not boolean.

    Source: GeM (arXiv 1711.02512), section 3.2; GGeM (arXiv 2212.04114).
    """
    for name, tensor in (("x", x), ("power", power)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is of {tensor.dtype}; it must be of a floating type.")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}; use one device.")
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}; it needs 3 axes, [batch, tokens, channels].")
    if x.shape[1] == 0:
        raise ValueError("x has no tokens; a mean needs one at least.")
    if power.shape != x.shape[2:]:
        raise ValueError(f"power has shape {list(power.shape)}; it must be [channels] = [{x.shape[2]}].")
    if eps <= 0:
        raise ValueError(f"eps={eps} must be positive.")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask is of {mask.dtype}; it must be boolean, True for tokens that count.")
        if mask.shape != x.shape[:2]:
            raise ValueError(
                f"mask has shape {list(mask.shape)}; it must be {list(x.shape[:2])}, as x has it."
            )
    arguments = {"x": x, "power": power, "eps": eps, "mask": mask}
    return select("generalised_mean", BACKENDS, backend, x.device, arguments).run(**arguments)


__all__ = ["BACKENDS", "generalised_mean"]
