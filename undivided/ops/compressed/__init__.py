"""Attention to compressed blocks of the past, and the choice of blocks of tokens that its weights make."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability
from undivided.ops.block_map import BlockLists
from undivided.ops.compressed import autograd, reference
from undivided.ops.compressed._blocks import compressed_blocks, importance, visible_blocks

BACKENDS: tuple[Backend, ...] = (
    Backend("triton", autograd.attend, autograd.reasons, availability, automatic=("cuda",)),
    Backend("reference", reference.attend, reference.reasons),
)
CHOICE_BACKENDS: tuple[Backend, ...] = (
    Backend("triton", autograd.choose, autograd.choice_reasons, availability, automatic=("cuda",)),
    Backend("reference", reference.choose, reference.reasons),
)
# So few leave most of a program's tile empty, and too few programs.
_FEW_QUERIES = 16


def compressed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_keys: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention to compressed blocks, of which a query sees those that end at its token or before.

    `out_t = sum_i softmax_i(scale * q_t . k_i) v_i` over the blocks i, of tokens `i d .. i d + l - 1`, with
    `i d + l - 1 <= t`. The first l - 1 tokens see no block: their output and gradients are zero, their `lse` -inf.

    Args:
        query: of the last tokens, `[batch, heads, queries, head_dim]`.
        key: of the blocks, `[batch, key_heads, blocks, head_dim]`; `key_heads` divides `heads`.
        value: `[batch, key_heads, blocks, value_dim]`.
        num_keys: tokens up to the last query.
        kernel_size: tokens l of a compressed block.
        kernel_stride: tokens d from one compressed block to the next; divides `kernel_size`.
        scale: factor of the logits; default `head_dim ** -0.5`.
        backend: "auto", "triton" or "reference".

    Returns:
        out: `[batch, heads, queries, value_dim]`, of the dtype of `query`.
        lse: `[batch, heads, queries]`, natural logarithm, float32 (float64 for float64 inputs); differentiable.

    Raises:
        ValueError: a shape or a number does not fit, or the backend cannot run the inputs.
        TypeError: dtypes do not fit.

    Source: Native Sparse Attention (arXiv 2502.11089), section 3.3.1.
    """
    _rules.check_rank(4, "[batch, heads, length, head_dim]", query=query, key=key, value=value)
    _rules.check_floating(query=query, key=key, value=value)
    _check(query, key, num_keys, kernel_size, kernel_stride)
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"key {list(key.shape)} and value {list(value.shape)} must share [batch, key_heads, blocks]."
        )
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "num_keys": num_keys,
        "kernel_size": kernel_size,
        "kernel_stride": kernel_stride,
        "scale": query.shape[3] ** -0.5 if scale is None else float(scale),
    }
    return _run("compressed_attention", BACKENDS, backend, arguments)


def select_compressed(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    num_keys: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    scale: float | None = None,
    backend: str = "auto",
) -> BlockLists:
    """The blocks of tokens that each query attends, one list for the heads of a group, by compressed attention.

    The weights `p_i = exp(scale * q_t . k_i - lse_t)` of compressed attention, summed over the heads of a group in
    float32, score the blocks of tokens j: each weight counts as often as there are strides that both blocks hold
    (`importance`). The first `init_blocks` and the `local_blocks` up to a query's own come before all others; then the
    highest, of equal ones the first; blocks behind the query's own are not listed. The weights are never in memory, and
    nothing has a gradient.

    Args:
        query: of the last tokens, `[batch, heads, queries, head_dim]`.
        key: of the compressed blocks, `[batch, key_heads, blocks, head_dim]`; `key_heads` divides `heads`.
        lse: of `compressed_attention`, natural logarithm, `[batch, heads, queries]`.
        num_keys: tokens up to the last query.
        kernel_size: tokens l of a compressed block.
        kernel_stride: tokens d from one compressed block to the next; divides `kernel_size` and `block_size`.
        block_size: tokens of a block that is listed.
        topk: most blocks of a list, the given ones included.
        init_blocks: blocks at the start that are always listed.
        local_blocks: blocks up to the query's own that are always listed.
        scale: factor of the logits; default `head_dim ** -0.5`.
        backend: "auto", "triton" or "reference".

    Returns:
        `BlockLists` for each query and key head, `[batch, key_heads, queries, topk]`.

    Raises:
        ValueError: a shape or a number does not fit, or the backend cannot run the inputs.
        TypeError: dtypes do not fit.

    Source: Native Sparse Attention (arXiv 2502.11089), equations 8 to 12.
    """
    _rules.check_rank(4, "[batch, heads, length, head_dim]", query=query, key=key)
    _rules.check_floating(query=query, key=key)
    _check(query, key, num_keys, kernel_size, kernel_stride)
    if lse.shape != query.shape[:3]:
        raise ValueError(f"lse has shape {list(lse.shape)}; query needs {list(query.shape[:3])}.")
    for name, size, least in (
        ("block_size", block_size, 1),
        ("topk", topk, 1),
        ("init_blocks", init_blocks, 0),
        ("local_blocks", local_blocks, 1),
    ):
        if size < least:
            raise ValueError(f"{name}={size} must be at least {least}.")
    if block_size % kernel_stride:
        raise ValueError(
            f"kernel_stride={kernel_stride} does not divide block_size={block_size}; overlaps of blocks are counted in "
            "strides."
        )
    if topk < init_blocks + local_blocks:
        raise ValueError(
            f"topk={topk} is less than init_blocks={init_blocks} plus local_blocks={local_blocks}, which are always "
            "listed."
        )
    arguments = {
        "query": query,
        "key": key,
        "lse": lse,
        "num_keys": num_keys,
        "kernel_size": kernel_size,
        "kernel_stride": kernel_stride,
        "block_size": block_size,
        "topk": topk,
        "init_blocks": init_blocks,
        "local_blocks": local_blocks,
        "scale": query.shape[3] ** -0.5 if scale is None else float(scale),
    }
    with torch.no_grad():
        return BlockLists(*_run("select_compressed", CHOICE_BACKENDS, backend, arguments))


def _check(
    query: torch.Tensor, key: torch.Tensor, num_keys: int, kernel_size: int, kernel_stride: int
) -> None:
    if key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key {list(key.shape)} must have the batch and head_dim of query {list(query.shape)}, and a number of "
            "heads that divides its."
        )
    for name, size in (("kernel_size", kernel_size), ("kernel_stride", kernel_stride)):
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1.")
    if kernel_size % kernel_stride:
        raise ValueError(
            f"kernel_stride={kernel_stride} does not divide kernel_size={kernel_size}; overlaps of blocks are counted "
            "in strides."
        )
    if num_keys < query.shape[2]:
        raise ValueError(
            f"num_keys={num_keys} is less than the {query.shape[2]} queries, which are the last tokens."
        )
    needed = compressed_blocks(num_keys, kernel_size, kernel_stride)
    if key.shape[2] < needed:
        raise ValueError(
            f"key has {key.shape[2]} blocks, but num_keys={num_keys} tokens hold {needed} (kernel_size={kernel_size}, "
            f"kernel_stride={kernel_stride})."
        )


def _run(name: str, backends: tuple[Backend, ...], requested: str, arguments: dict):
    query = arguments["query"]
    if requested == "auto" and query.shape[2] < _FEW_QUERIES:
        backends = tuple(backend for backend in backends if backend.name != "triton")
    return select(name, backends, requested, query.device, arguments).run(**arguments)


__all__ = [
    "BACKENDS",
    "CHOICE_BACKENDS",
    "compressed_attention",
    "compressed_blocks",
    "importance",
    "select_compressed",
    "visible_blocks",
]
