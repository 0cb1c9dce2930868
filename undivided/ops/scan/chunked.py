"""The gated scan in matrix products: inside chunks by halving, between chunks by states.

A pair of tokens i > j weighs `q_i . (exp(g_(j+1) + ... + g_i) * k_j)`. Splitting that sum as `exp(b_i) * exp(-b_j)`
overflows. Here it is split where it is safe: a block of tokens is halved, and with m the middle,

    (g_m + ... + g_i) + (g_(j+1) + ... + g_(m-1))

are two sums of negative numbers, one of the query in the second half and one of the key in the first; so all pairs
across the middle are one product of matrices. The halves are treated the same way, down to single tokens. Going up,
both sums of a block are those of its halves plus the total of the other half: nothing is ever subtracted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from undivided.ops.scan._directions import in_both_directions

# A power of two. Longer chunks multiply more inside, shorter ones keep more states.
CHUNK = 32


def reasons(**arguments: object) -> list[str]:
    return []


def scan(query, key, value, log_gate, reverse_log_gate, scale, initial_state, return_state=False):
    return in_both_directions(_forwards, query, key, value, log_gate, reverse_log_gate, scale, initial_state)


def _forwards(query, key, value, log_gate, state):
    length = query.shape[2]
    if length == 0:
        return torch.zeros_like(value), state
    # No decay and a key of zero: padding leaves the last state as it is.
    padding = -length % CHUNK
    query, key, value, log_gate = (
        F.pad(tensor, (0, 0, 0, padding)).unflatten(2, (-1, CHUNK))
        for tensor in (query, key, value, log_gate)
    )
    inside, until, after = _inside(query, key, value, log_gate)
    updates = (key * after.exp()).transpose(-2, -1) @ value
    decays = until[..., -1, :, None].exp()
    states = []
    for decay, update in zip(decays.unbind(2), updates.unbind(2), strict=True):
        states.append(state)
        state = decay * state + update
    out = inside + (query * until.exp()) @ torch.stack(states, 2)
    return out.flatten(2, 3)[:, :, :length], state


def _inside(query, key, value, log_gate):
    """What tokens `[..., CHUNK, dim]` get from their own chunk, and sums of gates.

    Returns:
        the output; the sums of gates from the first token of the chunk to each, and behind each to the last.
    """
    out = (query * key).sum(-1, keepdim=True) * value
    until, after = log_gate, torch.zeros_like(log_gate)
    size = 1
    while size < CHUNK:
        (_, later_query), (earlier_key, _), (earlier_value, _) = (
            _halves(tensor, size) for tensor in (query * until.exp(), key * after.exp(), value)
        )
        earlier_out, later_out = _halves(out, size)
        later_out = later_out + (later_query @ earlier_key.transpose(-2, -1)) @ earlier_value
        out = _joined(earlier_out, later_out)
        earlier_until, later_until = _halves(until, size)
        earlier_after, later_after = _halves(after, size)
        earlier_total, later_total = earlier_until[..., -1:, :], later_until[..., -1:, :]
        until = _joined(earlier_until, later_until + earlier_total)
        after = _joined(earlier_after + later_total, later_after)
        size *= 2
    return out, until, after


def _halves(tensor: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second halves of all blocks of `2 * size` tokens, each `[..., blocks, size, dim]`."""
    first, second = tensor.unflatten(-2, (-1, 2, size)).unbind(-3)
    return first, second


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.stack((first, second), -3).flatten(-4, -2)
