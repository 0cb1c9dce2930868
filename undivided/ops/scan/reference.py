"""The gated scan as it is written: one state, token by token."""

from __future__ import annotations

import torch

from undivided.ops.scan._directions import in_both_directions


def reasons(**arguments: object) -> list[str]:
    return []


def scan(query, key, value, log_gate, reverse_log_gate, scale, initial_state, return_state=False):
    return in_both_directions(_forwards, query, key, value, log_gate, reverse_log_gate, scale, initial_state)


def _forwards(query, key, value, log_gate, state):
    outputs = []
    for t in range(query.shape[2]):
        state = log_gate[:, :, t, :, None].exp() * state + key[:, :, t, :, None] * value[:, :, t, None, :]
        outputs.append((query[:, :, t, :, None] * state).sum(-2))
    return torch.stack(outputs, 2) if outputs else torch.zeros_like(value), state
