"""The convolved heads by products of PyTorch, in the dtype of the inputs: both convolutions merged into one."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from undivided.ops.conv._parts import finish, rows_before, split_values


def reasons(**arguments: object) -> list[str]:
    return []


def run(
    latents, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias, temperature, cos, sin, history, prefix,
    num_heads, num_key_value_heads, qk_mean, qk_norm, value_shift,
):  # fmt: skip
    heads = num_heads + num_key_value_heads
    latents, value = split_values(latents, num_key_value_heads, heads, value_shift, prefix, history)
    if grouped_weight is not None:
        matrices, bias = merged(depthwise_weight, depthwise_bias, grouped_weight, grouped_bias, heads)
        read = [
            rows_before(latents, delay, prefix, history).unflatten(-1, (heads, -1))
            for delay in range(len(matrices))
        ]
        # All delays in one product: their rows side by side, their matrices one below another.
        mixed = (
            torch.einsum("bnhi,hoi->bnho", torch.cat(read, -1), torch.cat(list(matrices), -1)).flatten(2)
            + bias
        )
    elif depthwise_weight is not None:
        taps = depthwise_weight.squeeze(1).unbind(-1)
        mixed = sum(
            (rows_before(latents, delay, prefix, history) * tap for delay, tap in enumerate(reversed(taps))),
            depthwise_bias,
        )
    else:
        mixed = latents[:, prefix:]
    query, key = finish(
        mixed, latents[:, prefix:], temperature, cos, sin, num_heads, num_key_value_heads, qk_mean, qk_norm,
        torch.finfo(latents.dtype).eps, latents.dtype,
    )  # fmt: skip
    return query, key, value


def merged(depthwise_weight, depthwise_bias, grouped_weight, grouped_bias, heads):
    """Returns `M_d = sum over d0 + d1 = d of W1_d1 diag(w0_d0)`, `[delays, heads, D, D]`, and the bias of both."""
    second = grouped_weight.unflatten(0, (heads, -1)).flip(-1).movedim(-1, 0)
    if depthwise_weight is None:
        return second, grouped_bias
    first = depthwise_weight.squeeze(1).unflatten(0, (heads, 1, -1)).flip(-1)
    later = first.shape[-1] - 1
    matrices = sum(
        F.pad(second * tap, (0, 0, 0, 0, 0, 0, delay, later - delay))
        for delay, tap in enumerate(first.unbind(-1))
    )
    bias = torch.einsum("dhoi,hi->ho", second, depthwise_bias.unflatten(0, (heads, -1))).flatten()
    return matrices, bias + grouped_bias
