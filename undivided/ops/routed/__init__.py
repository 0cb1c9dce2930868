"""Softmax attention in which each token uses only the heads it selected."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, interprets
from undivided.ops.routed import autograd, composed, reference


def _triton(**arguments):
    """Kernels in Triton, forward and backward, over the lists of queries that selected a head."""
    return autograd.attend(**arguments)


def _triton_reasons(query, key, value, selected, gates, attn_mask, is_causal, scale, softcap) -> list[str]:
    found = availability()
    if found:
        return found
    for name, given in (("attn_mask", attn_mask), ("softcap", softcap)):
        if given is not None:
            found.append(f"{name} is given (the kernels know is_causal only)")
    if scale <= 0:
        found.append(f"scale is {scale} (the kernels need a positive one)")
    for name, tensor in (("query", query), ("key", key)):
        if tensor.shape[2] == 0:
            found.append(f"{name} has no positions")
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"query is {str(query.dtype).removeprefix('torch.')}")
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[3] > 256:
            found.append(f"the last axis of {name} is {tensor.shape[3]} (at most 256)")
    if query.device.type != "cuda" and not interprets():
        found.append(f"query is on {query.device.type}")
    elif query.device.type != "cuda" and query.dtype == torch.bfloat16:
        found.append("query is bfloat16 (Triton's interpreter multiplies it wrongly)")
    return found


BACKENDS = (
    Backend("triton", _triton, _triton_reasons, availability, automatic=("cuda",)),
    Backend("sdpa", composed.attend_sdpa, composed.sdpa_reasons),
    Backend("flex", composed.attend_flex, composed.flex_reasons, automatic=("cuda",)),
    Backend("reference", reference.attend, reference.reasons),
)


def routed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selected: torch.Tensor,
    gates: torch.Tensor | None = None,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Softmax attention of the (token, head) pairs that are selected; all others give zeros.

    `out_hn = g_hn * sum_m softmax_m(scale * q_hn . k_m) v_m` where head h is selected for token n, else 0. Keys and
    values stay those of all tokens: what a token did not select, a later token may. Only "triton" saves the work of
    the pairs that are not selected; "sdpa" and "flex" compute all of them and mask.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key_heads, keys, head_dim]`; `key_heads` divides `heads` (head h uses key head
            `h // (heads // key_heads)`).
        value: `[batch, key_heads, keys, value_dim]`.
        selected: boolean, broadcasts to `[batch, heads, queries]`; True where the head is computed for the token.
        gates: factors g, broadcast to `[batch, heads, queries]`; None for ones. Their gradient is
            `dout_hn . out_hn / g_hn` where selected, and zero elsewhere, in every backend.
        attn_mask: broadcasts to `[batch, heads, queries, keys]`; boolean (True = seen) or an additive bias.
        is_causal: query n of N sees key m of M only if `m <= n + M - N`, whatever else is selected.
        scale: factor of the logits; default `head_dim ** -0.5`.
        softcap: bound of the logits, before the mask; default none.
        backend: "auto", "triton", "sdpa", "flex" or "reference".

    Returns:
        `[batch, heads, queries, value_dim]`, of the dtype of `query`.

    Raises:
        ValueError: shapes or options do not fit; or the backend cannot run the inputs.
        TypeError: dtypes do not fit, or `selected` is not boolean.

    Source: MoH (arXiv 2410.11842), equations 3 and 4.
    """
    _rules.check_rank(4, "[batch, heads, length, head_dim]", query=query, key=key, value=value)
    _rules.check_floating(query=query, key=key, value=value)
    batch, heads, num_queries, head_dim = query.shape
    key_heads, num_keys = key.shape[1], key.shape[2]
    if key.shape[0] != batch or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"key {list(key.shape)} and value {list(value.shape)} must share [batch, key_heads, keys] "
            f"and the batch of query {list(query.shape)}."
        )
    if key.shape[3] != head_dim:
        raise ValueError(f"key has head_dim {key.shape[3]}, but query has {head_dim}; they must be equal.")
    if heads % key_heads:
        raise ValueError(f"key has {key_heads} heads, which does not divide the {heads} heads of query.")
    _rules.check_mask(attn_mask, batch, heads, num_queries, num_keys)
    if selected.dtype != torch.bool:
        raise TypeError(f"selected has dtype {selected.dtype}; it must be torch.bool.")
    if gates is not None:
        if not gates.is_floating_point():
            raise TypeError(f"gates has dtype {gates.dtype}; it must be a floating-point dtype.")
        gates = _broadcast("gates", gates, query).to(torch.promote_types(query.dtype, torch.float32))
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive; leave it None for no cap.")
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "selected": _broadcast("selected", selected, query),
        "gates": gates,
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "scale": head_dim**-0.5 if scale is None else scale,
        "softcap": softcap,
    }
    return select("routed_attention", BACKENDS, backend, query.device, arguments).run(**arguments)


def _broadcast(name: str, tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The tensor as `[batch, heads, queries]` without a copy."""
    shape = query.shape[:3]
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device}, but query is on {query.device}; use one device.")
    if tensor.dim() > 3 or any(
        size not in (1, want) for size, want in zip(tensor.shape[::-1], shape[::-1], strict=False)
    ):
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}; it must broadcast to [batch, heads, queries] = {list(shape)}."
        )
    return tensor.expand(shape)
