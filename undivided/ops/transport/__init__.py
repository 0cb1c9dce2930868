"""Attention with weights normalised over queries, or over both sides: column and plan (Sinkhorn) anchors."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, interprets
from undivided.ops.transport import reference


def _column_triton(**arguments):
    """Streaming kernels in Triton, forward and backward, without an N x M buffer."""
    from undivided.ops.transport import autograd

    return autograd.column(**arguments)


def _sinkhorn_triton(**arguments):
    """Streaming kernels in Triton: the sweeps too, forward and backward, without an N x M buffer."""
    from undivided.ops.transport import autograd

    return autograd.sinkhorn(**arguments)


def _triton_reasons(query, key, value, attn_mask, **arguments) -> list[str]:
    found = availability()
    if found:
        return found
    if attn_mask is not None:
        found.append("attn_mask is given (the kernels know is_causal only)")
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"query is {str(query.dtype).removeprefix('torch.')}")
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[-1] > 256:
            found.append(f"the last axis of {name} is {tensor.shape[-1]} (at most 256)")
    for name in ("row_marginal", "column_marginal"):
        if arguments.get(name) is not None and arguments[name].requires_grad:
            found.append(f"{name} needs a gradient")
    if query.device.type != "cuda" and not interprets():
        found.append(f"query is on {query.device.type}")
    return found


COLUMN_BACKENDS = (
    Backend("triton", _column_triton, _triton_reasons, availability, automatic=("cuda",)),
    Backend("reference", reference.column, reference.reasons),
)
SINKHORN_BACKENDS = (
    Backend("triton", _sinkhorn_triton, _triton_reasons, availability, automatic=("cuda",)),
    Backend("reference", reference.sinkhorn, reference.reasons),
)


def column_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention with softmax over the queries: every key spends a total weight of one.

    `out_n = sum_m P_nm v_m`, `P_nm = exp(s_nm) / sum_n' exp(s_n'm)`, `s_nm = scale * q_n . k_m`. Rows do not
    sum to one. With a causal mask an output still depends on later queries, through the sums: not for
    decoding.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key_heads, keys, head_dim]`; `key_heads` divides `heads`.
        value: `[batch, key_heads, keys, value_dim]`.
        attn_mask: boolean (True = seen), broadcasts to `[batch, heads, queries, keys]`; a key without a query
            counts for nothing.
        is_causal: query n of N meets key m of M only if `m <= n + M - N`; needs `N <= M`.
        scale: factor of the logits; default `head_dim ** -0.5`.
        backend: "auto", "triton" (no N x M buffer; CUDA, or Triton's interpreter) or "reference".

    Returns:
        `out` `[batch, heads, queries, value_dim]` of the dtype of `query`.

    Raises:
        ValueError: shapes do not fit, or the backend cannot run the inputs.
        TypeError: dtypes do not fit.

    Source: Geometric Attention (arXiv 2601.11618 v1), abstract (anchors); softmax over queries:
    Object-Centric Learning with Slot Attention (arXiv 2006.15055), section 2.1, there followed by a row
    normalisation.
    """
    _check(query, key, value, attn_mask, is_causal)
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
    }
    return select("column_attention", COLUMN_BACKENDS, backend, query.device, arguments).run(**arguments)


def sinkhorn_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    row_marginal: torch.Tensor | None = None,
    column_marginal: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    num_iterations: int = 5,
    relaxation: float = 1.0,
    return_potentials: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention by an entropic transport plan: weights with given row sums a and column sums b.

    `out_n = sum_m P_nm v_m`, `P = exp(s_nm + f_n + g_m)`, `s_nm = scale * q_n . k_m`; from `g = 0` each sweep
    sets `f_n = log a_n - LSE_m(s_nm + g_m)`, `g_m = relaxation * (log b_m - LSE_n(s_nm + f_n))`; a last f
    closes, so that rows sum to a exactly and columns to b in the limit. No sweep is softmax attention. The
    gradient is that of the sweeps as computed, not of their limit. Adding a constant to a row or a column of
    s changes nothing in the limit.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key_heads, keys, head_dim]`; `key_heads` divides `heads`.
        value: `[batch, key_heads, keys, value_dim]`.
        row_marginal: a, broadcasts to `[batch, heads, queries]`, positive; default 1.
        column_marginal: b, broadcasts to `[batch, heads, keys]`, positive, of the same sum as a if
            `relaxation` is 1; default the column sums of uniform attention, `queries / keys` or, with
            `is_causal`, `sum_n 1 / (number of keys of query n)` over the queries that see the key. (Equal
            column sums on a causal square would leave the identity as the only plan.)
        attn_mask: boolean (True = admissible), broadcasts to `[batch, heads, queries, keys]`; needs a
            `column_marginal` that a plan on it can have.
        is_causal: query n of N meets key m of M only if `m <= n + M - N`; needs `N <= M`. An output still
            depends on later queries, through g: not for decoding.
        scale: factor of the logits; default `head_dim ** -0.5`.
        num_iterations: sweeps, 0 or more.
        relaxation: `rho / (rho + tau)` of unbalanced transport, in (0, 1]; 1 is balanced.
        return_potentials: also return f and g, detached.
        backend: "auto", "triton" (no N x M buffer; CUDA, or Triton's interpreter) or "reference".

    Returns:
        `out` `[batch, heads, queries, value_dim]` of the dtype of `query`; with `return_potentials` also f
        `[batch, heads, queries]` and g `[batch, heads, keys]`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, marginals or options do not fit, or the backend cannot run the inputs.
        TypeError: dtypes do not fit.

    Source: Sinkhorn Distances (arXiv 1306.0895), section 4; in attention: Sinkformers (arXiv 2110.11773),
    section 3; relaxation: arXiv 1607.05816, section 4; as an anchor: Geometric Attention (arXiv 2601.11618
    v1), abstract.
    """
    _check(query, key, value, attn_mask, is_causal)
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    if num_iterations < 0:
        raise ValueError(f"num_iterations={num_iterations} must be 0 or more; 0 is softmax attention.")
    if not 0 < relaxation <= 1:
        raise ValueError(f"relaxation={relaxation} must lie in (0, 1]; 1 is balanced transport.")
    if attn_mask is not None and column_marginal is None:
        raise ValueError(
            "attn_mask needs a column_marginal: the default is made for all pairs or for is_causal."
        )
    if attn_mask is not None and not (attn_mask.any(-1).all() and attn_mask.any(-2).all()):
        raise ValueError(
            "attn_mask leaves a query without a key or a key without a query; no plan gives it mass."
        )
    default = _default_marginals(num_queries, num_keys, is_causal, query)
    rows = _marginal("row_marginal", row_marginal, default[0], (batch, heads, num_queries), query)
    columns = _marginal("column_marginal", column_marginal, default[1], (batch, heads, num_keys), query)
    if (row_marginal is not None or column_marginal is not None) and not torch.compiler.is_compiling():
        _check_sums(rows, columns, relaxation == 1)
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "row_marginal": rows,
        "column_marginal": columns,
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "scale": head_dim**-0.5 if scale is None else scale,
        "num_iterations": num_iterations,
        "relaxation": relaxation,
    }
    chosen = select("sinkhorn_attention", SINKHORN_BACKENDS, backend, query.device, arguments)
    out, row_potential, column_potential = chosen.run(**arguments)
    return (out, row_potential, column_potential) if return_potentials else out


def _check(query, key, value, attn_mask, is_causal) -> None:
    _rules.check_rank(4, "[batch, heads, length, head_dim]", query=query, key=key, value=value)
    _rules.check_floating(query=query, key=key, value=value)
    batch, heads, num_queries, head_dim = query.shape
    if key.shape[0] != batch or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"key {list(key.shape)} and value {list(value.shape)} must share [batch, key_heads, keys] "
            f"and the batch of query {list(query.shape)}."
        )
    if key.shape[3] != head_dim:
        raise ValueError(f"key has head_dim {key.shape[3]}, but query has {head_dim}; they must be equal.")
    if heads % key.shape[1]:
        raise ValueError(f"key has {key.shape[1]} heads, which does not divide the {heads} heads of query.")
    if num_queries == 0 or key.shape[2] == 0:
        raise ValueError(f"query has {num_queries} and key {key.shape[2]} positions; both need at least one.")
    _rules.check_mask(attn_mask, batch, heads, num_queries, key.shape[2])
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        raise TypeError(f"attn_mask has dtype {attn_mask.dtype}; use bool (True = seen).")
    if is_causal and num_queries > key.shape[2]:
        raise ValueError(
            f"is_causal with {num_queries} queries and {key.shape[2]} keys leaves the first "
            f"{num_queries - key.shape[2]} queries without a key."
        )


def _default_marginals(num_queries: int, num_keys: int, is_causal: bool, like: torch.Tensor):
    dtype = torch.promote_types(like.dtype, torch.float32)
    rows = torch.ones(num_queries, dtype=dtype, device=like.device)
    if not is_causal:
        return rows, torch.full((num_keys,), num_queries / num_keys, dtype=dtype, device=like.device)
    # Query n sees `offset + n + 1` keys. Key m is seen by the queries from m - offset on, hence the reversed
    # sum; in float64, because the sum of many reciprocals is compared with the rows' mass.
    offset = num_keys - num_queries
    shares = 1 / torch.arange(offset + 1, num_keys + 1, dtype=torch.float64, device=like.device)
    tail = shares.flip(0).cumsum(0).flip(0)
    return rows, torch.cat([tail[:1].expand(offset), tail]).to(dtype)


def _marginal(name, given, default, shape, like):
    if given is None:
        return default.expand(shape)
    if not given.is_floating_point():
        raise TypeError(f"{name} has dtype {given.dtype}; it needs a floating-point dtype.")
    padded = (1,) * (3 - given.dim()) + tuple(given.shape)
    if len(padded) != 3 or any(size not in (1, want) for size, want in zip(padded, shape, strict=True)):
        raise ValueError(f"{name} has shape {list(given.shape)}; it must broadcast to {list(shape)}.")
    return given.to(like.device, default.dtype).expand(shape)


def _check_sums(rows: torch.Tensor, columns: torch.Tensor, balanced: bool) -> None:
    for name, marginal in (("row_marginal", rows), ("column_marginal", columns)):
        smallest = marginal.min().item()
        if not smallest > 0:
            raise ValueError(f"{name} has {smallest:g}; it must be positive everywhere.")
    if balanced:
        masses = torch.stack([rows.double().sum(-1), columns.double().sum(-1)])
        # Half precision of the caller's sums: what the marginals were rounded to, times their number.
        slack = 8 * torch.finfo(rows.dtype).eps * max(rows.shape[-1], columns.shape[-1])
        if ((masses[0] - masses[1]).abs() > slack * masses[0]).any():
            given = masses.flatten(1)[:, 0].tolist()
            raise ValueError(
                f"row_marginal adds up to {given[0]:g}, but column_marginal to {given[1]:g}; give both the "
                "same mass, or relaxation < 1."
            )
