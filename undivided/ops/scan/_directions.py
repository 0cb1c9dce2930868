"""What two directions mean, and in which precision scans are."""

from __future__ import annotations

from collections.abc import Callable

import torch

Scan = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def in_both_directions(
    forwards: Scan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_gate: torch.Tensor,
    reverse_log_gate: torch.Tensor | None,
    scale: float,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output and the last state of `forwards(query, key, value, log_gate, state)`, in float32 or wider.

    With `reverse_log_gate` the reversed sequence is scanned beside it, and the output is the mean of both.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    out_dtype = query.dtype
    # Autocast would round the sums over tokens.
    with torch.autocast(query.device.type, enabled=False):
        query, key, value, log_gate = (
            tensor.to(dtype) for tensor in (scale * query.to(dtype), key, value, log_gate)
        )
        if reverse_log_gate is not None:
            query, key, value = (torch.cat((tensor, tensor.flip(2))) for tensor in (query, key, value))
            log_gate = torch.cat((log_gate, reverse_log_gate.to(dtype).flip(2)))
        if initial_state is None:
            state = query.new_zeros(*query.shape[:2], query.shape[3], value.shape[3])
        else:
            state = initial_state.to(dtype)
        out, last = forwards(query, key, value, log_gate, state)
        if reverse_log_gate is not None:
            from_start, from_end = out.chunk(2)
            out = (from_start + from_end.flip(2)) / 2
    return out.to(out_dtype), last
