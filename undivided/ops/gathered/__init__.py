"""Softmax attention of blocks of queries, each to its own list of keys."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability
from undivided.ops.gathered import blocks, fused, reference

BACKENDS: tuple[Backend, ...] = (
    Backend("triton", fused.attend, fused.reasons, availability, automatic=("cuda",)),
    Backend("blocks", blocks.attend, blocks.reasons),
    Backend("reference", reference.attend, reference.reasons),
)


def gathered_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: torch.Tensor,
    *,
    block_size: int,
    is_causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in which the queries of a block share a list of the keys they may see.

    `out_n = sum_{m in I(n // block_size), m seen by n} softmax_m(cap(scale * q_n . k_m)) v_m`, with
    `cap(s) = softcap * tanh(s / softcap)` when `softcap` is given. A query that sees no key gets a zero output and
    `lse = -inf`.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key_heads, keys, head_dim]`; `key_heads` divides `heads`.
        value: `[batch, key_heads, keys, value_dim]`.
        indices: positions of keys, int32 or int64 `[batch, 1 or heads, blocks, places]`, with `blocks =
            ceil(queries / block_size)`; -1 lists nothing. A key must not be listed twice. Indices are not checked on a
            GPU, where that would wait for the device.
        block_size: queries of a block.
        is_causal: query n of N sees key m of M only if `m <= n + M - N`, token by token.
        window: with `is_causal`, a query sees no key further back than the `window - 1` before it.
        scale: factor of the logits; default `head_dim ** -0.5`.
        softcap: bound of the logits; default none.
        return_lse: also return the log-sum-exp of the logits.
        backend: "auto", "triton" (without gradients), "blocks" or "reference".

    Returns:
        `out` `[batch, heads, queries, value_dim]`; with `return_lse` also `lse` `[batch, heads, queries]`, natural
        logarithm, float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape or a number does not fit; on a CPU also if an index is no key; or the backend cannot run
            the inputs.
        TypeError: dtypes do not fit.

    Source: Dynamic Hierarchical Sparse Attention (arXiv 2510.24606), sparse attention.
    """
    _rules.check_rank(4, "[batch, heads, length, head_dim]", query=query, key=key, value=value)
    _rules.check_rank(4, "[batch, 1 or heads, blocks, places]", indices=indices)
    _rules.check_floating(query=query, key=key, value=value)
    batch, heads, num_queries, head_dim = query.shape
    if (
        key.shape[:3] != value.shape[:3]
        or key.shape[0] != batch
        or key.shape[3] != head_dim
        or heads % key.shape[1]
    ):
        raise ValueError(
            f"key {list(key.shape)} and value {list(value.shape)} must share [batch, key_heads, keys], with the batch "
            f"and head_dim of query {list(query.shape)} and a number of heads that divides its."
        )
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1.")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices has dtype {indices.dtype}; use int32 or int64.")
    blocks_needed = -(-num_queries // block_size)
    if indices.shape[0] != batch or indices.shape[1] not in (1, heads) or indices.shape[2] != blocks_needed:
        raise ValueError(
            f"indices has shape {list(indices.shape)}; {num_queries} queries in blocks of block_size={block_size} need "
            f"[{batch}, 1 or {heads}, {blocks_needed}, places]."
        )
    if window is not None and (window < 1 or not is_causal):
        raise ValueError(
            f"window={window} with is_causal={is_causal}; a window is at least 1 and needs is_causal=True."
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive; leave it None for no cap.")
    if not torch.compiler.is_compiling() and indices.device.type == "cpu" and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < -1 or high >= key.shape[2]:
            raise ValueError(
                f"indices has {low if low < -1 else high}, but key has {key.shape[2]} positions."
            )
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "indices": indices,
        "block_size": block_size,
        "is_causal": is_causal,
        "window": window,
        "scale": head_dim**-0.5 if scale is None else scale,
        "softcap": softcap,
        "return_lse": return_lse,
    }
    out, lse = select("gathered_attention", BACKENDS, backend, query.device, arguments).run(**arguments)
    return (out, lse) if return_lse else out


__all__ = ["BACKENDS", "gathered_attention"]
