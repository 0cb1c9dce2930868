"""Dynamic mask attention: each query attends the keys of its prefix that a learned bias ranks highest."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, interprets
from undivided.ops.dynamic_mask import autograd, composed, reference

SELECTIONS = ("per_row", "global", "relu")


def _triton(key, key_bias, keep_window_size, selection, block_smooth, **arguments):
    """Kernels in Triton, forward, backward and decoding: the kept keys of each tile of queries are gathered."""
    if selection == "relu":
        # As many as there are, of those that are left.
        key_bias, keep_window_size = key_bias.masked_fill(key_bias <= 0, float("-inf")), key.shape[2]
    return autograd.attend(
        key=key, key_bias=key_bias, keep_window_size=keep_window_size, selection="per_row", **arguments
    )


def _triton_reasons(
    query, key, value, key_bias, keep_window_size, attn_mask, is_causal, scale, selection, block_smooth
) -> list[str]:  # fmt: skip
    found = availability()
    if found:
        return found
    found = []
    num_queries, num_keys = query.shape[2], key.shape[2]
    if attn_mask is not None:
        found.append("attn_mask is given (the kernels know is_causal, and a bias of -inf for padding)")
    if not is_causal and num_queries > 1:
        found.append("is_causal is False (needed with more than one query)")
    if block_smooth is not None:
        found.append(f"block_smooth is {block_smooth} (the kernels keep single keys)")
    if selection == "global" and num_queries > 1:
        found.append(f'selection is "{selection}" (needs "per_row" with more than one query)')
    if num_queries > num_keys:
        found.append(f"there are {num_queries} queries for {num_keys} keys (at most as many)")
    elif num_queries < num_keys and autograd.needs_gradient(query, key, value, key_bias):
        found.append("a gradient is wanted with more keys than queries")
    if num_keys == 0:
        found.append("key has no positions")
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"query is {str(query.dtype).removeprefix('torch.')}")
    if key_bias.dtype == torch.float64:
        found.append("key_bias is float64")
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
    Backend("reference", reference.attend, reference.reasons),
    Backend("sdpa", composed.attend, composed.reasons, automatic=()),
)


def dynamic_mask_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_bias: torch.Tensor,
    keep_window_size: int,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    selection: str = "per_row",
    block_smooth: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of the keys that a bias ranks highest among those that a query may see.

    `out_n = sum_{j in K(n)} softmax_j(scale * q_n . k_j + b_j) v_j`, where K(n) holds the `keep_window_size` visible
    keys of the largest `b_j`, all if there are fewer; of equal ones the latest, so that a constant bias is a sliding
    window. A key of bias -inf is never attended (padding). Gradients pass through the bias of kept keys; the choice has
    none.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key heads, keys, head_dim]`; key heads divide heads.
        value: `[batch, key heads, keys, value_dim]`.
        key_bias: `[batch, key heads, keys]`, floating; the query heads of a key head share it. Best in float32: it
            ranks the keys. (Backend "sdpa" adds it in the precision of the queries.)
        keep_window_size: keys that a query keeps, at least 1.
        attn_mask: boolean (True = seen), broadcasts to `[batch, key heads, queries, keys]`; hidden keys are not ranked.
        is_causal: query n of N sees key m of M only if `m <= n + M - N`.
        scale: factor of the products; default `head_dim ** -0.5`.
        selection: "per_row" ranks the keys of each query's own prefix; "global" ranks all keys once and hides later
            ones afterwards, so that what a query keeps depends on later tokens and may be nothing (zeros). "relu" keeps
            every key of a positive bias, however many, and may keep nothing.
        block_smooth: keys of a block that stays or goes as a whole: it stays if more than half of the keys in it that
            the query may see are kept.
        backend: "auto", "triton", "reference" or "sdpa" (the mask written out; queries that keep no key are undefined).

    Returns:
        `[batch, heads, queries, value_dim]`, of the dtype of `query`; zeros where a query sees no key.

    Raises:
        ValueError: shapes or options do not fit; or the backend cannot run the inputs.
        TypeError: dtypes do not fit, or `keep_window_size` is no integer.

    Source: Trainable Dynamic Mask Sparse Attention (arXiv 2508.02124), section 3; "relu" and the blocks: the masks of
    the authors' release, which counts the keys that a query does not see too.
    """
    _check(query, key, value, key_bias, attn_mask)
    # bool is an int in Python.
    if isinstance(keep_window_size, bool) or not isinstance(keep_window_size, int | torch.SymInt):
        raise TypeError(f"keep_window_size={keep_window_size!r} must be an integer.")
    if keep_window_size < 1:
        raise ValueError(f"keep_window_size={keep_window_size} must be at least 1: a query keeps a key.")
    if selection not in SELECTIONS:
        raise ValueError(f"selection={selection!r} is not one of {', '.join(map(repr, SELECTIONS))}.")
    if block_smooth is not None and block_smooth < 1:
        raise ValueError(f"block_smooth={block_smooth} must be at least 1; leave it None for single keys.")
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "key_bias": key_bias,
        "keep_window_size": keep_window_size,
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "scale": query.shape[3] ** -0.5 if scale is None else scale,
        "selection": selection,
        "block_smooth": block_smooth,
    }
    return select("dynamic_mask_attention", BACKENDS, backend, query.device, arguments).run(**arguments)


def _check(query, key, value, key_bias, attn_mask) -> None:
    tensors = {"query": query, "key": key, "value": value}
    _rules.check_rank(4, "[batch, heads, length, head_dim]", **tensors)
    _rules.check_floating(**tensors)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} has batch {tensor.shape[0]}, but query has {query.shape[0]}.")
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(
            f"value {list(value.shape)} must have the heads and the length of key {list(key.shape)}."
        )
    if key.shape[3] != query.shape[3]:
        raise ValueError(
            f"key has head_dim {key.shape[3]}, but query has {query.shape[3]}; they must be equal."
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key has {key.shape[1]} heads, which does not divide the {query.shape[1]} heads of query."
        )
    if not key_bias.is_floating_point():
        raise TypeError(f"key_bias has dtype {key_bias.dtype}; it needs a floating-point dtype.")
    if key_bias.shape != key.shape[:3]:
        raise ValueError(
            f"key_bias has shape {list(key_bias.shape)}; it needs [batch, key heads, keys] = {list(key.shape[:3])}."
        )
    if key_bias.device != query.device:
        raise ValueError(f"key_bias is on {key_bias.device}, but query is on {query.device}; use one device.")
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        raise TypeError(f"attn_mask has dtype {attn_mask.dtype}; use bool (True = seen).")
    _rules.check_mask(attn_mask, query.shape[0], key.shape[1], query.shape[2], key.shape[2])
