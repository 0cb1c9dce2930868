"""Attention over a latent cache: one row of it is read once and serves as key and as value."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, hopper_availability
from undivided.ops.latent_decode import kernels, reference, sdpa

BACKENDS = (
    Backend("gluon", kernels.attend_gluon, kernels.gluon_reasons, hopper_availability, automatic=("cuda",)),
    Backend("triton", kernels.attend_triton, kernels.triton_reasons, availability, automatic=("cuda",)),
    Backend("sdpa", sdpa.attend, sdpa.reasons),
    Backend("reference", reference.attend, reference.reasons),
)


def latent_attention(
    query_latent: torch.Tensor,
    query_rope: torch.Tensor | None,
    latent: torch.Tensor,
    rope_key: torch.Tensor | None,
    *,
    scale: float,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = True,
    cache_seqlens: torch.Tensor | None = None,
    softcap: float | None = None,
    block_table: torch.Tensor | None = None,
    latent_scale: torch.Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Multi-head latent attention in absorbed form.

    `s_hnm = scale * (q_hn . c_gm + r_hn . k_m)`, `out_hn = sum_m softmax_m(s_hnm) c_gm`, with g the latent head of
    query head h (`g = h // (heads // latent_heads)`); the rope key k is shared by all heads. MLA has one latent
    head, GLA and TPLA several. A query that sees no key gets a zero output and `lse = -inf`.

    Args:
        query_latent: `[batch, heads, queries, latent_dim]`, the query with the key up-projection absorbed.
        query_rope: `[batch, heads, queries, rope_dim]`, rotated; None without a rope part.
        latent: `[batch, latent_heads, keys, latent_dim]`; with `block_table` `[pages, latent_heads, page_size,
            latent_dim]`. May be a strided view of rows `[latent, rope]`: such a row is read once.
        rope_key: `[batch, 1, keys, rope_dim]`, rotated; with `block_table` `[pages, 1, page_size, rope_dim]`.
        scale: factor of the logits. There is no default: it belongs to the un-absorbed head dims.
        attn_mask: broadcasts to `[batch, heads, queries, keys]`; boolean (True = seen) or an additive bias.
        is_causal: query n of N sees key m of the L keys of its sequence only if `m <= n + L - N`.
        cache_seqlens: `[batch]`, int32: how many keys of each sequence are filled (the new ones included); what
            lies behind is never read. Default: all.
        softcap: bound of the logits; default none.
        block_table: `[batch, max_pages]`, int32: which page holds keys `p * page_size ...` of a sequence.
        latent_scale: factor of each row of an fp8 cache, `[batch, keys]` or `[pages, page_size]`, float32 and
            positive; it multiplies the latent and the rope key of that row.
        num_splits: into how many parts the keys are cut to fill the device; default chosen from the shapes. It
            changes only the order of summation.
        return_lse: also return the log-sum-exp.
        backend: "auto", "gluon" (Hopper), "triton", "sdpa" or "reference".

    Returns:
        `out` `[batch, heads, queries, latent_dim]` of the dtype of `query_latent`; with `return_lse` also `lse`
        `[batch, heads, queries]`, natural logarithm, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or options do not fit; or the backend cannot run the inputs.
        TypeError: dtypes do not fit.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; GLA (arXiv 2505.21487); TPLA (arXiv
    2508.15881).
    """
    _rules.check_rank(4, "[batch, heads, length, dim]", query_latent=query_latent, latent=latent)
    _rules.check_rank(4, "[batch, heads, length, dim]", query_rope=query_rope, rope_key=rope_key)
    batch, heads, num_queries, latent_dim = query_latent.shape
    latent_heads = latent.shape[1]
    if (query_rope is None) != (rope_key is None):
        missing, given = ("query_rope", "rope_key") if query_rope is None else ("rope_key", "query_rope")
        raise ValueError(f"{missing} is None, but {given} is given; give both, or neither.")
    if latent_scale is None:
        _rules.check_floating(
            query_latent=query_latent, query_rope=query_rope, latent=latent, rope_key=rope_key
        )
    elif latent.dtype != torch.float8_e4m3fn:
        raise TypeError(
            f"latent_scale is given, but latent has dtype {latent.dtype}; it is for float8_e4m3fn caches."
        )
    if latent.shape[3] != latent_dim:
        raise ValueError(f"latent has latent_dim {latent.shape[3]}, but query_latent has {latent_dim}.")
    if heads % latent_heads:
        raise ValueError(
            f"latent has {latent_heads} heads, which does not divide the {heads} heads of query_latent."
        )
    if query_rope is not None and rope_key is not None:
        if query_rope.shape[:3] != query_latent.shape[:3]:
            raise ValueError(
                f"query_rope {list(query_rope.shape)} and query_latent {list(query_latent.shape)} must share "
                "[batch, heads, queries]."
            )
        expected = (latent.shape[0], 1, latent.shape[2], query_rope.shape[3])
        if tuple(rope_key.shape) != expected:
            raise ValueError(
                f"rope_key has shape {list(rope_key.shape)}; with this latent and query_rope it is {list(expected)}."
            )
    if block_table is None:
        if latent.shape[0] != batch:
            raise ValueError(f"latent has batch {latent.shape[0]}, but query_latent has {batch}.")
        num_keys = latent.shape[2]
    else:
        if block_table.shape[:1] != (batch,) or block_table.dim() != 2:
            raise ValueError(
                f"block_table has shape {list(block_table.shape)}; it needs [batch={batch}, max_pages]."
            )
        num_keys = block_table.shape[1] * latent.shape[2]
    if cache_seqlens is not None and tuple(cache_seqlens.shape) != (batch,):
        raise ValueError(f"cache_seqlens has shape {list(cache_seqlens.shape)}; it needs [batch={batch}].")
    if latent_scale is not None and tuple(latent_scale.shape) != (latent.shape[0], latent.shape[2]):
        raise ValueError(
            f"latent_scale has shape {list(latent_scale.shape)}; it needs {[latent.shape[0], latent.shape[2]]}."
        )
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits={num_splits} must be at least 1.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive; leave it None for no cap.")
    _rules.check_mask(attn_mask, batch, heads, num_queries, num_keys)
    arguments = {
        "query_latent": query_latent,
        "query_rope": query_rope,
        "latent": latent,
        "rope_key": rope_key,
        "scale": scale,
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "cache_seqlens": cache_seqlens,
        "softcap": softcap,
        "block_table": block_table,
        "latent_scale": latent_scale,
        "num_splits": num_splits,
        "return_lse": return_lse,
    }
    return select("latent_attention", BACKENDS, backend, query_latent.device, arguments).run(**arguments)
