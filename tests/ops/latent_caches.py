"""Latent caches for the tests of the decode kernels: NaN wherever nothing may be read."""

from __future__ import annotations

import torch

from undivided.ops.latent_decode import reference
from undivided.testing import assert_as_accurate, poison_buffer

# The log-sum-exp is float32 in all of them; the kernels take it through base-2 exponentials of two roundings
# each.
LSE_FACTOR = 8.0


def decode_inputs(
    batch=2, heads=4, latent_heads=1, queries=1, keys=40, latent_dim=64, rope_dim=16, lengths=None,
    page_size=None, dtype=torch.float32, device="cpu",
):  # fmt: skip
    """Arguments of a backend of `latent_attention`.

    The rows `[latent, rope]` of the cache lie in one buffer, with NaN behind the length of each sequence, or
    with `page_size` in shuffled pages of a buffer that has three more, all NaN.
    """
    width = latent_dim + rope_dim
    filled = [keys] * batch if lengths is None else lengths
    rows = [torch.randn(latent_heads, length, width, dtype=torch.float64).to(dtype) for length in filled]
    if page_size is None:
        cache, table = poison_buffer(batch, latent_heads, keys, width, dtype=dtype), None
        for b, row in enumerate(rows):
            cache[b, :, : filled[b]] = row
    else:
        pages = -(-keys // page_size)
        cache = poison_buffer(batch * pages + 3, latent_heads, page_size, width, dtype=dtype)
        table = torch.randperm(batch * pages + 3)[: batch * pages].reshape(batch, pages).int()
        for b, row in enumerate(rows):
            for start in range(0, filled[b], page_size):
                part = row[:, start : start + page_size]
                cache[table[b, start // page_size], :, : part.shape[1]] = part
    cache = cache.to(device)
    query = torch.randn(batch, heads, queries, width, dtype=torch.float64).to(device, dtype)
    return {
        "query_latent": query[..., :latent_dim],
        "query_rope": query[..., latent_dim:] if rope_dim else None,
        "latent": cache[..., :latent_dim],
        "rope_key": cache[:, :1, :, latent_dim:] if rope_dim else None,
        "scale": 0.3,
        "attn_mask": None,
        "is_causal": True,
        "cache_seqlens": None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=device),
        "softcap": None,
        "block_table": None if table is None else table.to(device),
        "latent_scale": None,
        "num_splits": None,
        "return_lse": True,
    }


def widened(x):
    """The same arguments in float64."""
    names = ("query_latent", "query_rope", "latent", "rope_key")
    return x | {name: x[name].double() for name in names if x[name] is not None}


def assert_decodes(attend, x, factor=2.0):
    """Holds `attend` against the reference in float64, and the reference on the same inputs."""
    out, lse = attend(**x)
    eager_out, eager_lse = reference.attend(**x)
    exact_out, exact_lse = reference.attend(**widened(x))
    if x["latent_scale"] is not None:
        # The reference forms the scaled rows in the dtype of the query; here they are exact.
        eager_out, eager_lse = reference.attend(**(x | {"query_latent": x["query_latent"].float()}))
        eager_out = eager_out.to(out.dtype)
    assert_as_accurate(out, eager_out, exact_out, factor, name="out")
    assert_as_accurate(lse, eager_lse, exact_lse, LSE_FACTOR, name="lse")
    return out, lse
