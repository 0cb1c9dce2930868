"""Softmax attention inside groups of tokens, such as the windows of a map."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops.grouped import reference, sdpa
from undivided.ops.grouped.windows import Windows

BACKENDS = (
    Backend("sdpa", sdpa.attend, sdpa.reasons),
    Backend("reference", reference.attend, reference.reasons),
)


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: Windows,
    *,
    shared_query: bool = False,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Softmax attention of each token to the tokens of its own group.

    With the tokens of each group g at places t: `out_gt = sum_u softmax_u(scale * q_gt . k_gu + bias_tu) v_gu`, and
    with `shared_query` all groups have one query each place, `q_gt = q_t`.

    Tokens keep their order outside: the operator permutes, attends and permutes back. Shared queries are not repeated
    for the groups.

    Args:
        query: `[batch, heads, tokens, head_dim]`; with `shared_query` `[batch, heads, group_size, head_dim]`.
        key: `[batch, heads, tokens, head_dim]`.
        value: `[batch, heads, tokens, value_dim]`; `value_dim` may differ from `head_dim`.
        groups: which tokens belong together.
        shared_query: whether the groups of an image share the queries.
        bias: added to the logits, `[heads, group_size, group_size]`, query place before key place; default none.
        scale: factor of the products; default `head_dim ** -0.5`.
        backend: "auto", "sdpa" or "reference".

    Returns:
        `[batch, heads, tokens, value_dim]`, of the dtype of `query`; token t of a group is the output of its query t.

    Raises:
        ValueError: shapes do not fit each other or the groups.
        TypeError: dtypes do not fit.

    Source: windows: Swin Transformer (arXiv 2103.14030), section 3.2; shared queries: GC ViT (arXiv 2206.09959).
    """
    _rules.check_rank(4, "[batch, heads, length, head_dim]", query=query, key=key, value=value)
    _rules.check_floating(query=query, key=key, value=value)
    tokens, size = groups.num_tokens, groups.group_size
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[2] != tokens:
            raise ValueError(f"{name} has {tensor.shape[2]} tokens, but groups has {tokens}: {groups}.")
    queries = size if shared_query else tokens
    if query.shape[2] != queries:
        whose = "a group" if shared_query else "groups"
        raise ValueError(
            f"query has {query.shape[2]} tokens with shared_query={shared_query}, but {whose} has {queries}: {groups}."
        )
    if not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        raise ValueError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} must share "
            "[batch, heads]."
        )
    if key.shape[3] != query.shape[3]:
        raise ValueError(
            f"key has head_dim {key.shape[3]}, but query has {query.shape[3]}; they must be equal."
        )
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"bias has dtype {bias.dtype}; use a floating-point dtype.")
        if bias.shape != (query.shape[1], size, size):
            raise ValueError(
                f"bias has shape {list(bias.shape)}; it must be [heads, group_size, group_size] = "
                f"{[query.shape[1], size, size]}."
            )
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "groups": groups,
        "shared_query": shared_query,
        "bias": bias,
        "scale": query.shape[3] ** -0.5 if scale is None else scale,
    }
    return select("grouped_attention", BACKENDS, backend, query.device, arguments).run(**arguments)


__all__ = ["BACKENDS", "Windows", "grouped_attention"]
