"""The convolved heads as they are written, one tap after another. It defines what is correct."""

from __future__ import annotations

import torch

from undivided.ops.conv._parts import finish, rows_before, split_values


def reasons(**arguments: object) -> list[str]:
    return []


def run(
    latents, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias, temperature, cos, sin, history, prefix,
    num_heads, num_key_value_heads, qk_mean, qk_norm, value_shift,
):  # fmt: skip
    dtype = torch.promote_types(latents.dtype, torch.float32)
    heads = num_heads + num_key_value_heads
    latents, value = split_values(latents, num_key_value_heads, heads, value_shift, prefix, history)
    x = latents.to(dtype)

    def depthwise(delay: int) -> torch.Tensor:
        """The first convolution `delay` tokens back, with the rows that this token may read."""
        if depthwise_weight is None:
            return rows_before(x, delay, prefix, history)
        taps = depthwise_weight.to(dtype).squeeze(1).unbind(-1)
        read = [
            rows_before(x, delay + back, prefix, history) * tap for back, tap in enumerate(reversed(taps))
        ]
        return sum(read, depthwise_bias.to(dtype))

    if grouped_weight is None:
        mixed = depthwise(0)
    else:
        taps = grouped_weight.to(dtype).unflatten(0, (heads, -1)).unbind(-1)
        mixed = grouped_bias.to(dtype) + sum(
            torch.einsum("bnhi,hoi->bnho", depthwise(back).unflatten(-1, (heads, -1)), tap).flatten(2)
            for back, tap in enumerate(reversed(taps))
        )
    query, key = finish(
        mixed, x[:, prefix:], temperature, cos, sin, num_heads, num_key_value_heads, qk_mean, qk_norm,
        torch.finfo(latents.dtype).eps, latents.dtype,
    )  # fmt: skip
    return query, key, value
