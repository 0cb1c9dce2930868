"""Softmax attention over all keys that a mask allows."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability
from undivided.ops.dense import flash, flex, local, mapped, reference, sdpa
from undivided.ops.dense.head_maps import by_copies, check_maps, without_maps

BACKENDS: tuple[Backend, ...] = (
    Backend("triton", mapped.attend, mapped.reasons, availability, automatic=("cuda",)),
    Backend(
        "flash", by_copies(flash.attend), without_maps(flash.reasons), flash.availability, automatic=("cuda",)
    ),
    Backend("local", by_copies(local.attend), without_maps(local.reasons)),
    Backend("sdpa", by_copies(sdpa.attend), without_maps(sdpa.reasons)),
    Backend("flex", by_copies(flex.attend), without_maps(flex.reasons), automatic=("cuda",)),
    Backend("reference", by_copies(reference.attend), without_maps(reference.reasons)),
)

# Up to so many keys the kernel for head maps is faster than copies of heads and a faster kernel.
_FEW_KEYS = 2048


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    key_head_map: torch.Tensor | None = None,
    value_head_map: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention.

    `out_n = sum_m softmax_m(cap(scale * q_n . k_m) + mask_nm) v_m`, with `cap(s) = softcap * tanh(s / softcap)` when
    `softcap` is given. A query that sees no key gets a zero output, zero gradients and `lse = -inf`.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key_heads, keys, head_dim]`; `key_heads` divides `heads` (grouped-query attention: query head
            h uses key head `h // (heads // key_heads)`), or a head map says which are used.
        value: `[batch, key_heads, keys, value_dim]`; `value_dim` may differ from `head_dim`, and with a map the number
            of value heads from that of key heads.
        key_head_map: the key head of each query head, int64 `[heads]`, or `[batch, heads]` where samples differ. Any
            map will do: heads may be left out. Indices are not checked on a GPU, where that would wait for the device.
        value_head_map: the same for values; default `key_head_map`.
        attn_mask: broadcasts to `[batch, heads, queries, keys]`; boolean (True = seen) or an additive bias.
        is_causal: query n of N sees key m of M only if `m <= n + M - N` (aligned bottom right, as a cache needs).
        window: with `is_causal`, a query sees itself and the `window - 1` keys before it.
        scale: factor of the logits; default `head_dim ** -0.5`.
        softcap: bound of the logits, before the mask; default none.
        return_lse: also return the log-sum-exp of the masked logits.
        backend: "auto", "triton" (head maps, without gradients), "flash" or "local" (windows only), "sdpa", "flex" or
            "reference".

    Returns:
        `out` `[batch, heads, queries, value_dim]` of the dtype of `query`; with `return_lse` also `lse`
        `[batch, heads, queries]`, natural logarithm, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, `window`, `scale` or `softcap` do not fit; or the backend cannot run the inputs.
        TypeError: dtypes do not fit.

    Source: Attention Is All You Need (arXiv 1706.03762), section 3.2; grouped heads: GQA (arXiv 2305.13245).
    """
    _rules.check_rank(4, "[batch, heads, length, head_dim]", query=query, key=key, value=value)
    _rules.check_floating(query=query, key=key, value=value)
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    check_maps(batch, heads, query.device, key_head_map, value_head_map)
    if value_head_map is None:
        value_head_map = key_head_map
    is_mapped = value_head_map is not None
    if key.shape[0] != batch or value.shape[0] != batch or value.shape[2] != num_keys:
        raise ValueError(
            f"key {list(key.shape)} and value {list(value.shape)} must share [batch, keys] and the batch of query "
            f"{list(query.shape)}."
        )
    if not is_mapped and value.shape[1] != key.shape[1]:
        raise ValueError(
            f"key {list(key.shape)} and value {list(value.shape)} must share [batch, key_heads, keys] "
            f"and the batch of query {list(query.shape)}."
        )
    if key.shape[3] != head_dim:
        raise ValueError(f"key has head_dim {key.shape[3]}, but query has {head_dim}; they must be equal.")
    if key_head_map is None and heads % key.shape[1]:
        raise ValueError(f"key has {key.shape[1]} heads, which does not divide the {heads} heads of query.")
    _rules.check_mask(attn_mask, batch, heads, num_queries, num_keys)
    if window is not None and (window < 1 or not is_causal):
        raise ValueError(
            f"window={window} with is_causal={is_causal}; a window is at least 1 and needs is_causal=True."
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive; leave it None for no cap.")
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "key_head_map": key_head_map,
        "value_head_map": value_head_map,
        "attn_mask": attn_mask,
        # One query sees every key, and kernels without a mask divide long caches among programs.
        "is_causal": is_causal and (num_queries > 1 or (window is not None and window < num_keys)),
        # A window that reaches all keys forbids nothing, and would keep kernels that know no window away.
        "window": None if window is not None and window >= num_keys else window,
        "scale": head_dim**-0.5 if scale is None else scale,
        "softcap": softcap,
        "return_lse": return_lse,
    }
    backends = BACKENDS
    if backend == "auto" and num_keys > _FEW_KEYS:
        backends = tuple(entry for entry in BACKENDS if entry.name != "triton")
    return select("dense_attention", backends, backend, query.device, arguments).run(**arguments)
