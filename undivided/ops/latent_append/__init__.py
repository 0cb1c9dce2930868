"""What stands between a layer's projections and its latent cache: normalise, rotate, and write the row."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability
from undivided.ops.latent_append import kernels, reference

BACKENDS = (
    Backend("triton", kernels.append_triton, kernels.reasons, availability, automatic=("cuda",)),
    Backend("reference", reference.append, reference.reasons),
)


def append_latent(
    row: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    cache: torch.Tensor,
    lengths: torch.Tensor,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
    block_table: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    shard_scale: torch.Tensor | None = None,
    latent_scale: torch.Tensor | None = None,
    query_rope: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Writes new tokens into a latent cache: `[RMSNorm(c), RoPE(k)]` from the raw projection `[c, k]`.

    `c_j <- weight_j * c_j / sqrt(shard_scale_j * |c_j|^2 / latent_dim + eps)` over equal shards j of the latent (one
    of scale 1 by default: RMSNorm), and each pair `(a, b)` of k becomes `(a cos - b sin, b cos + a sin)`. Token t of
    sequence b goes to position `lengths[b] + t`. Everything is computed in float32 at least and rounded once. No
    value is read on the host: a CUDA graph of the call follows `lengths`, `counts` and `block_table`. Queries may
    be rotated on the way.

    Args:
        row: `[batch, tokens, latent_dim + rope_dim]`, what `kv_a_proj_with_mqa` gives.
        cos, sin: `[batch or 1, tokens, rope_dim / 2]`, of the tokens' positions; None without a rope part.
        norm_weight: `[latent_dim]`; None where the latent is not normalised, as in converted models.
        cache: changed in place. `[batch, positions, latent_dim + rope_dim]`; with `block_table` `[pages, page_size,
            latent_dim + rope_dim]`. Of the dtype of `row`, or float8_e4m3fn with `latent_scale`.
        lengths: `[batch]`, int32: rows of each sequence filled before this call. They are not advanced.
        eps: added to the mean square.
        interleaved: pairs of k are `(x0, x1), (x2, x3), ...` (DeepSeek); otherwise `(x0, x_pairs), ...` (Llama).
        block_table: `[batch, max_pages]`, int32: which page holds positions `p * page_size ...` of a sequence.
        counts: `[batch]`, int32: only the first `counts[b]` of the tokens are written, none for an idle sequence.
            Default: all. A position behind the capacity is not written either.
        shard_scale: `[shards]`: TPLA's estimate of the whole latent's energy from each shard's. On a rank with shard
            j of g alone, `row` has that shard, and its scale is divided by g.
        latent_scale: changed in place, for an fp8 cache: `[batch, positions]` or `[pages, page_size]`, float32. A
            row is divided by `max |row| / 448`, which is kept here, as `latent_attention` wants it.
        query_rope: `[batch, heads, tokens, rope_dim]`, changed in place: rotated as k is, for every token.
        backend: "auto", "triton" or "reference".

    Raises:
        ValueError: shapes do not fit; or the backend cannot run the inputs.
        TypeError: dtypes do not fit.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; the shards' normalisation: TPLA (arXiv 2508.15881).
    """
    _rules.check_rank(3, "[batch, tokens, width]", row=row, cos=cos, sin=sin)
    _rules.check_rank(3, "[batch or pages, rows, width]", cache=cache)
    batch, tokens, width = row.shape
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together, or neither.")
    rope_dim = 0 if cos is None else 2 * cos.shape[2]
    latent_dim = width - rope_dim
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and (
            table.shape[0] not in (1, batch) or table.shape[1:] != (tokens, rope_dim // 2)
        ):
            raise ValueError(
                f"{name} has shape {list(table.shape)}; it needs [{batch} or 1, {tokens}, rope_dim / 2]."
            )
    if latent_dim < 1:
        raise ValueError(f"row has width {width}, which leaves no latent beside a rope part of {rope_dim}.")
    if norm_weight is not None and tuple(norm_weight.shape) != (latent_dim,):
        raise ValueError(
            f"norm_weight has shape {list(norm_weight.shape)}; it needs [latent_dim={latent_dim}]."
        )
    if shard_scale is not None:
        if norm_weight is None:
            raise ValueError(
                "shard_scale is given, but norm_weight is None; a latent without norm has no scale."
            )
        if shard_scale.dim() != 1 or latent_dim % max(len(shard_scale), 1) or len(shard_scale) == 0:
            raise ValueError(
                f"shard_scale has shape {list(shard_scale.shape)}; its length must divide latent_dim={latent_dim}."
            )
    if cache.shape[2] != width:
        raise ValueError(f"cache has rows of {cache.shape[2]}, but row has width {width}.")
    if block_table is None and cache.shape[0] != batch:
        raise ValueError(f"cache has batch {cache.shape[0]}, but row has {batch}.")
    if block_table is not None and (block_table.dim() != 2 or block_table.shape[0] != batch):
        raise ValueError(
            f"block_table has shape {list(block_table.shape)}; it needs [batch={batch}, max_pages]."
        )
    for name, tensor in (("lengths", lengths), ("counts", counts)):
        if tensor is not None and tuple(tensor.shape) != (batch,):
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it needs [batch={batch}].")
    for name, tensor in (("lengths", lengths), ("counts", counts), ("block_table", block_table)):
        if tensor is not None and tensor.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it needs torch.int32.")
    expected = torch.float8_e4m3fn if latent_scale is not None else row.dtype
    if cache.dtype != expected:
        raise TypeError(
            f"cache has dtype {cache.dtype}; beside rows of {row.dtype} it is that, or float8_e4m3fn with latent_scale."
        )
    if latent_scale is not None and (
        latent_scale.dtype != torch.float32 or latent_scale.shape != cache.shape[:2]
    ):
        raise ValueError(
            f"latent_scale is {latent_scale.dtype} {list(latent_scale.shape)}; it needs torch.float32 "
            f"{list(cache.shape[:2])}."
        )
    if query_rope is not None:
        if cos is None:
            raise ValueError("query_rope is given, but cos and sin are None; give the angles of its tokens.")
        _rules.check_rank(4, "[batch, heads, tokens, rope_dim]", query_rope=query_rope)
        if query_rope.shape[0] != batch or tuple(query_rope.shape[2:]) != (tokens, rope_dim):
            raise ValueError(
                f"query_rope has shape {list(query_rope.shape)}; it needs [{batch}, heads, {tokens}, {rope_dim}]."
            )
        if torch.is_grad_enabled() and query_rope.requires_grad:
            raise ValueError("query_rope needs a gradient, and is changed in place; rotate it by itself.")
        if query_rope.dtype != row.dtype:
            raise TypeError(f"query_rope has dtype {query_rope.dtype}, but row has {row.dtype}.")
    arguments = {
        "row": row,
        "cos": cos,
        "sin": sin,
        "norm_weight": norm_weight,
        "cache": cache,
        "lengths": lengths,
        "eps": eps,
        "interleaved": interleaved,
        "block_table": block_table,
        "counts": counts,
        "shard_scale": shard_scale,
        "latent_scale": latent_scale,
        "query_rope": query_rope,
    }
    # What is in a cache has no history.
    with torch.no_grad():
        select("append_latent", BACKENDS, backend, row.device, arguments).run(**arguments)
