"""Softmax attention in which each block of queries has its list of key blocks."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops.block_map import check_block_size, check_lists, num_blocks
from undivided.ops.selected import blocks, reference, tokens

BACKENDS: tuple[Backend, ...] = (
    *blocks.BACKENDS,
    *tokens.BACKENDS,
    Backend("reference", reference.attend, reference.reasons),
)


def selected_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    counts: torch.Tensor,
    *,
    query_block_size: int,
    block_size: int,
    scale: float | None = None,
    is_causal: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over listed blocks of keys.

    `out_n = sum_{m in S(n)} softmax_m(scale * q_n . k_m) v_m`, where S(n) holds the keys of the blocks listed for the
    block of queries that n belongs to, and with `is_causal` only those that n may see. A query that sees no key has
    a zero output, zero gradients and `lse = -inf`.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key_heads, keys, head_dim]`; `key_heads` divides `heads`.
        value: `[batch, key_heads, keys, value_dim]`.
        index: numbers of key blocks, int32 `[batch, key_heads or heads, query_blocks, max_blocks]`, ascending in each
            list; with `key_heads` lists the heads of a group share one. What stands behind the valid entries may be
            anything. Numbers are checked on a CPU only: elsewhere that would wait for the device.
        counts: how many entries of each list are valid, int32, the shape of `index` without its last axis.
        query_block_size: queries that share a list; 1 gives every token its own.
        block_size: keys of a block.
        scale: factor of the logits; default `head_dim ** -0.5`.
        is_causal: query n of N sees key m of M only if `m <= n + M - N`.
        cu_seqlens: int32 `[sequences + 1]`: where packed sequences begin, and the length. Then batch is 1, queries are
            as many as keys, and blocks are cut inside each sequence and numbered through all of them
            (`block_map.block_bounds`); lists name blocks of their own sequence only.
        backend: "auto" or the name of one of `BACKENDS`.

    Returns:
        out: `[batch, heads, queries, value_dim]`, of the dtype of `query`.
        lse: `[batch, heads, queries]`, natural logarithm, float32 (float64 for float64 inputs); differentiable.

    Raises:
        ValueError: a shape or a number does not fit, or the backend cannot run the inputs.
        TypeError: dtypes do not fit.

    Source: Native Sparse Attention (arXiv 2502.11089), section 3.3.2; blocks of queries: SLA (arXiv 2509.24006).
    """
    _rules.check_rank(4, "[batch, heads, length, head_dim]", query=query, key=key, value=value)
    _rules.check_floating(query=query, key=key, value=value)
    batch, heads, num_queries, head_dim = query.shape
    key_heads, num_keys = key.shape[1], key.shape[2]
    if (
        key.shape[:3] != value.shape[:3]
        or key.shape[0] != batch
        or key.shape[3] != head_dim
        or heads % key_heads
    ):
        raise ValueError(
            f"key {list(key.shape)} and value {list(value.shape)} must share [batch, key_heads, keys], with the batch "
            f"and head_dim of query {list(query.shape)} and a number of heads that divides its."
        )
    check_block_size("query_block_size", query_block_size)
    check_block_size("block_size", block_size)
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens has shape {list(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; it needs "
                "[sequences + 1] integers."
            )
        if batch != 1 or num_queries != num_keys:
            raise ValueError(
                f"cu_seqlens is given with batch {batch}, {num_queries} queries and {num_keys} keys; packed sequences "
                "have batch 1 and as many queries as keys."
            )
    check_lists(index, counts, num_blocks(num_keys, block_size, cu_seqlens))
    rows = num_blocks(num_queries, query_block_size, cu_seqlens)
    if index.shape[0] != batch or index.shape[1] not in (key_heads, heads) or index.shape[2] != rows:
        raise ValueError(
            f"index has shape {list(index.shape)}; {num_queries} queries in blocks of {query_block_size} need "
            f"[{batch}, {key_heads} or {heads}, {rows}, max_blocks]."
        )
    for name, tensor in (("index", index), ("counts", counts)):
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, but query is on {query.device}; use one device.")
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "index": index,
        "counts": counts,
        "query_block_size": query_block_size,
        "block_size": block_size,
        "scale": head_dim**-0.5 if scale is None else float(scale),
        "is_causal": is_causal,
        "cu_seqlens": cu_seqlens,
    }
    return select("selected_attention", BACKENDS, backend, query.device, arguments).run(**arguments)


__all__ = ["BACKENDS", "selected_attention"]
