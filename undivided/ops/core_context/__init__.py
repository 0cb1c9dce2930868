"""Attention to summaries of the far past and to each token of the near past, in one softmax."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability
from undivided.ops.core_context import autograd, reference, sdpa
from undivided.ops.core_context._groups import group_weights, visible, visible_cores, weighted

POOLINGS = ("cca", "mean", "max")
CORE_HEADS = ("query", "kv")
# So few leave most of the tile of a program empty.
_FEW_QUERIES = 16

POOL_BACKENDS: tuple[Backend, ...] = (
    Backend("triton", autograd.pool, autograd.pool_reasons, availability, automatic=("cuda",)),
    Backend("reference", reference.pool, reference.reasons),
)
BACKENDS: tuple[Backend, ...] = (
    Backend("triton", autograd.attend, autograd.reasons, availability, automatic=("cuda",)),
    Backend("sdpa", sdpa.attend, sdpa.reasons),
    Backend("reference", reference.attend, reference.reasons),
)


def pool_core_tokens(
    query: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    group_size: int = 16,
    *,
    pooling: str = "cca",
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """One key and one value in place of those of each group of `group_size` neighbours.

    "cca": `a = softmax_j(scale * q_m . k_j)` over the keys of group m, with q_m the query of its last token;
    `core_key = sum_j a_j k_j`, `core_value = sum_j a_j v_j`. "mean" and "max" take the mean, or the largest of each
    dimension, and need no query.

    Args:
        query: the last query of each group to pool, `[batch, core_heads, groups, head_dim]`, such as
            `query[:, :, group_size - 1 :: group_size]`; None for "mean" and "max", which pool all whole groups.
        key: `[batch, key_heads, keys, head_dim]`, `key_heads` a divisor of `core_heads`. Group m is the keys from
            `m * group_size` on; keys behind the last group are left out.
        value: `[batch, key_heads, keys, value_dim]`.
        group_size: tokens g of a group.
        pooling: "cca", "mean" or "max".
        scale: factor of the logits; default `head_dim ** -0.5`.
        backend: "auto", "triton" ("cca" only) or "reference".

    Returns:
        `core_key` `[batch, core_heads, groups, head_dim]` and `core_value` `[batch, core_heads, groups, value_dim]`;
        for "mean" and "max" with `key_heads` heads.

    Raises:
        ValueError: a shape or a number does not fit; or the backend cannot run the inputs.
        TypeError: dtypes do not fit.

    Source: Core Context Aware Transformers (arXiv 2412.12465), globality-aware pooling.
    """
    _rules.check_rank(4, "[batch, heads, length, head_dim]", query=query, key=key, value=value)
    _rules.check_floating(key=key, value=value, query=query)
    check_sizes(group_size, 1, pooling)
    if (query is None) != (pooling != "cca"):
        raise ValueError(
            f'pooling="{pooling}" with query={"None" if query is None else "given"}: "cca" alone needs one.'
        )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key {list(key.shape)} and value {list(value.shape)} must share [batch, key_heads, keys]."
        )
    if query is not None:
        _check_query(query, key)
        if query.shape[2] * group_size > key.shape[2]:
            raise ValueError(
                f"query has {query.shape[2]} groups of group_size={group_size}, more than the {key.shape[2]} keys hold."
            )
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "group_size": group_size,
        "pooling": pooling,
        "scale": key.shape[3] ** -0.5 if scale is None else scale,
    }
    return select("pool_core_tokens", POOL_BACKENDS, backend, key.device, arguments).run(**arguments)


def core_context_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    core_key: torch.Tensor,
    core_value: torch.Tensor,
    *,
    group_size: int = 16,
    window: int = 1024,
    num_tokens: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    core_logit_bias: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention to the core tokens of the far past and to every key of the near past.

    The i-th token, counted from 1, sees `n = max(0, (i - window) // group_size)` core tokens and the keys of tokens
    `n * group_size + 1 .. i`, `window` to `window + group_size - 1` of them: `out_i = softmax(scale * q_i . [core keys,
    keys]) [core values, values]`, one softmax over both. Every token up to i is in exactly one of the two.

    Args:
        query: of the last tokens, `[batch, heads, queries, head_dim]`.
        key: of the last tokens, `[batch, key_heads, keys, head_dim]`; `key_heads` divides `heads`.
        value: `[batch, key_heads, keys, value_dim]`.
        core_key: of the first groups, `[batch, core_heads, cores, head_dim]`; `core_heads` divides `heads`. Those that
            no query sees yet are not read.
        core_value: `[batch, core_heads, cores, value_dim]`.
        group_size: tokens of a group.
        window: fewest single keys that a query with as many tokens sees.
        num_tokens: tokens up to the last query; default `keys`, a whole text. With a cache, whose keys before the
            window are dropped, more.
        scale: factor of the logits; default `head_dim ** -0.5`.
        softcap: bound of the logits; default none.
        core_logit_bias: added to the logits of core tokens; `log(group_size)` weighs a core token as so many.
        return_lse: also return the log-sum-exp of the logits.
        backend: "auto", "triton", "sdpa" (without `softcap` and `return_lse`) or "reference".

    Returns:
        `out` `[batch, heads, queries, value_dim]`; with `return_lse` also `lse` `[batch, heads, queries]`, natural
        logarithm, float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape or a number does not fit, or keys or core tokens that a query sees are missing; or the
            backend cannot run the inputs.
        TypeError: dtypes do not fit.

    Source: Core Context Aware Transformers (arXiv 2412.12465), locality-preserving attention. The paper begins the
    near past one token earlier, which is in the last core token too.
    """
    tensors = {"query": query, "key": key, "value": value, "core_key": core_key, "core_value": core_value}
    _rules.check_rank(4, "[batch, heads, length, head_dim]", **tensors)
    _rules.check_floating(**tensors)
    check_sizes(group_size, window)
    for name, keys, values in (("key", key, value), ("core_key", core_key, core_value)):
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"{name} {list(keys.shape)} and its values {list(values.shape)} must share [batch, heads, keys]."
            )
        if (
            keys.shape[0] != query.shape[0]
            or keys.shape[3] != query.shape[3]
            or query.shape[1] % keys.shape[1]
        ):
            raise ValueError(
                f"{name} {list(keys.shape)} must have the batch and head_dim of query {list(query.shape)}, and "
                "a number of heads that divides its."
            )
    if core_key.shape[1] % key.shape[1]:
        raise ValueError(
            f"core_key has {core_key.shape[1]} heads, which the {key.shape[1]} heads of key do not divide."
        )
    num_tokens = key.shape[2] if num_tokens is None else num_tokens
    _check_lengths(query.shape[2], key.shape[2], core_key.shape[2], num_tokens, group_size, window)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive; leave it None for no cap.")
    arguments = tensors | {
        "num_tokens": num_tokens,
        "group_size": group_size,
        "window": window,
        "scale": query.shape[3] ** -0.5 if scale is None else scale,
        "softcap": softcap,
        "core_logit_bias": core_logit_bias,
    }
    backends = BACKENDS
    if backend == "auto" and query.shape[2] < _FEW_QUERIES:
        backends = tuple(entry for entry in BACKENDS if entry.name != "triton")
    chosen = select(
        "core_context_attention", backends, backend, query.device, arguments | {"return_lse": return_lse}
    )
    out, lse = chosen.run(**arguments)
    return (out, lse) if return_lse else out


def check_sizes(group_size: int, window: int, pooling: str = "cca", core_heads: str = "query") -> None:
    """Raises a ValueError for options that no core context attention has."""
    if group_size < 1:
        raise ValueError(f"group_size={group_size} must be at least 1.")
    if window < 1:
        raise ValueError(f"window={window} must be at least 1: a query sees itself.")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r} is not one of {', '.join(map(repr, POOLINGS))}.")
    if core_heads not in CORE_HEADS:
        raise ValueError(f"core_heads={core_heads!r} is not one of {', '.join(map(repr, CORE_HEADS))}.")


def _check_query(query: torch.Tensor, key: torch.Tensor) -> None:
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query {list(query.shape)} must have the batch and head_dim of key {list(key.shape)}, and a number of "
            "heads that its divides."
        )


def _check_lengths(
    queries: int, keys: int, cores: int, num_tokens: int, group_size: int, window: int
) -> None:
    if not queries <= num_tokens or keys > num_tokens:
        raise ValueError(f"num_tokens={num_tokens} is less than the {queries} queries or the {keys} keys.")
    needed = visible_cores(num_tokens, group_size, window)
    if cores < needed:
        raise ValueError(
            f"core_key has {cores} core tokens, but the last of {num_tokens} tokens sees {needed} (group_size="
            f"{group_size}, window={window})."
        )
    reach = num_tokens - group_size * visible_cores(num_tokens - queries + 1, group_size, window)
    if keys < reach:
        raise ValueError(
            f"key has {keys} keys, but the first of {queries} queries sees the last {reach} of {num_tokens} tokens."
        )


__all__ = [
    "BACKENDS",
    "POOL_BACKENDS",
    "check_sizes",
    "core_context_attention",
    "group_weights",
    "pool_core_tokens",
    "visible",
    "visible_cores",
    "weighted",
]
