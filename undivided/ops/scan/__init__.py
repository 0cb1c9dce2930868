"""Linear attention whose memory forgets by gates of every token and channel: a scan over a sequence."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, interprets
from undivided.ops.scan import autograd, chunked, reference

# Of the kernels: wider states do not fit in registers.
_MAX_WIDTH = 64


def _triton(query, key, value, log_gate, reverse_log_gate, scale, initial_state, return_state):
    """Kernels in Triton, forward and backward, of both directions in one launch."""
    return autograd.scan(query, key, value, log_gate, reverse_log_gate, scale), None


def _triton_reasons(
    query, key, value, log_gate, reverse_log_gate, scale, initial_state, return_state
) -> list[str]:
    found = availability()
    if found:
        return found
    for name, given in (("initial_state", initial_state is not None), ("return_state", return_state)):
        if given:
            found.append(f"{name} is given (the kernels start from zeros and keep no state)")
    if query.numel() == 0 or value.numel() == 0:
        found.append("query or value is empty")
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"query is {str(query.dtype).removeprefix('torch.')}")
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[3] > _MAX_WIDTH:
            found.append(f"the last axis of {name} is {tensor.shape[3]} (at most {_MAX_WIDTH})")
    for name, tensor in (("log_gate", log_gate), ("reverse_log_gate", reverse_log_gate)):
        if tensor is not None and tensor.dtype == torch.float64:
            found.append(f"{name} is float64")
    if query.device.type != "cuda" and not interprets():
        found.append(f"query is on {query.device.type}")
    elif query.device.type != "cuda" and query.dtype == torch.bfloat16:
        found.append("query is bfloat16 (Triton's interpreter multiplies it wrongly)")
    return found


BACKENDS = (
    Backend("triton", _triton, _triton_reasons, availability, automatic=("cuda",)),
    Backend("chunked", chunked.scan, chunked.reasons),
    Backend("reference", reference.scan, reference.reasons),
)


def gated_scan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_gate: torch.Tensor,
    *,
    reverse_log_gate: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Gated linear attention, in one direction or in both.

    `S_t = diag(exp(g_t)) S_(t-1) + k_t^T v_t`, `out_t = scale * q_t S_t`: a state decays before the token is added, so
    that a token sees itself undecayed. With `reverse_log_gate` r there is a second state from the end,
    `R_t = diag(exp(r_t)) R_(t+1) + k_t^T v_t`, and `out_t = scale * q_t (S_t + R_t) / 2`: tokens see the whole
    sequence, and themselves from both sides.

    Cost and memory grow linearly with the sequence, but for "reference", which is the recurrence itself, token by
    token. States, and all sums over tokens, are in float32 or wider. No exponent is positive, however strong the
    gates: a gate of -inf forgets everything.

    A sequence may be given in pieces: the state after one is the `initial_state` of the next.

    Args:
        query, key: `[batch, heads, length, head_dim]`.
        value: `[batch, heads, length, value_dim]`.
        log_gate: g, logarithms of the decays, zero or negative; `[batch, heads, length, head_dim]`, of any floating
            dtype, best float32. What is positive is refused on the CPU, where looking costs no wait.
        reverse_log_gate: r, of the scan from the end; None for the scan from the start alone.
        scale: factor of the products; default `head_dim ** -0.5`.
        initial_state: state before the first token, `[batch, heads, head_dim, value_dim]`; default zeros.
        return_state: also return the state after the last token.
        backend: "auto", "triton" (a GPU; widths to 64, no states), "chunked" (matrix products) or "reference".

    Returns:
        `[batch, heads, length, value_dim]` of the dtype of `query`; with `return_state` also the state, float32 or
        wider.

    Raises:
        ValueError: shapes do not fit, a gate is positive, or a state goes with two directions.
        TypeError: dtypes do not fit.

    Source: Gated Linear Attention (arXiv 2312.06635), section 4; in both directions: ViG (arXiv 2405.18425).
    """
    layout = "[batch, heads, length, head_dim]"
    _rules.check_rank(
        4, layout, query=query, key=key, value=value, log_gate=log_gate, reverse_log_gate=reverse_log_gate
    )
    _rules.check_floating(query=query, key=key, value=value)
    if value.shape[:3] != query.shape[:3]:
        raise ValueError(
            f"value {list(value.shape)} must share [batch, heads, length] with query {list(query.shape)}."
        )
    for name, tensor in (("key", key), ("log_gate", log_gate), ("reverse_log_gate", reverse_log_gate)):
        if tensor is not None and tensor.shape != query.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; it must be that of query, {list(query.shape)}."
            )
    for name, gate in (("log_gate", log_gate), ("reverse_log_gate", reverse_log_gate)):
        if gate is not None:
            _check_gate(name, gate, query)
    if reverse_log_gate is not None and (initial_state is not None or return_state):
        raise ValueError(
            f"{'return_state=True' if initial_state is None else 'initial_state'} goes with one direction; with "
            "reverse_log_gate a sequence cannot be continued."
        )
    if initial_state is not None:
        shape = (*query.shape[:2], query.shape[3], value.shape[3])
        if tuple(initial_state.shape) != shape:
            raise ValueError(
                f"initial_state has shape {list(initial_state.shape)}; it must be [batch, heads, head_dim, value_dim] "
                f"= {list(shape)}."
            )
        if not initial_state.is_floating_point():
            raise TypeError(
                f"initial_state has dtype {initial_state.dtype}; it needs a floating-point dtype."
            )
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "log_gate": log_gate,
        "reverse_log_gate": reverse_log_gate,
        "scale": query.shape[3] ** -0.5 if scale is None else scale,
        "initial_state": initial_state,
        "return_state": return_state,
    }
    out, state = select("gated_scan", BACKENDS, backend, query.device, arguments).run(**arguments)
    return (out, state) if return_state else out


def _check_gate(name: str, gate: torch.Tensor, query: torch.Tensor) -> None:
    if not gate.is_floating_point():
        raise TypeError(f"{name} has dtype {gate.dtype}; it needs a floating-point dtype.")
    if gate.device != query.device:
        raise ValueError(f"{name} is on {gate.device}, but query is on {query.device}; use one device.")
    # A fake tensor has no values to look at, nor has a graph that is being recorded.
    readable = (
        gate.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(gate, FakeTensor)
    )
    if readable and gate.numel() and (largest := gate.detach().max().item()) > 0:
        raise ValueError(
            f"{name} has {largest:g}; logarithms of decays must be zero or negative, such as logsigmoid gives."
        )
