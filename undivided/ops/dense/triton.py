"""Attention forward with head maps in Triton: a query head reads the key and value head its map names, uncopied."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import LOG2E, Tiling, add_keys, block_width, load_tile, precision, rows_contiguous

_SIZES = ("num_queries", "num_keys", "heads", "key_heads", "value_heads")


# One program: BLOCK_M queries of one head against all keys. In registers: the float32 accumulator
# [BLOCK_M, value_dim], a maximum and a sum a row, the scores of one block of keys. It moves its queries and its output,
# and the keys and values of one head, which the programs of the heads that share them find in the L2 cache.
@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    query, key, value, key_map, value_map, out, lse, scale, num_queries, num_keys, heads, key_heads, value_heads,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, key_map_stride_b, value_map_stride_b,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, WITH_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_inside = rows < num_queries
    key_head = tl.load(key_map + batch * key_map_stride_b + head)
    value_head = tl.load(value_map + batch * value_map_stride_b + head)
    # A wrong index must not read foreign memory; its output is NaN.
    exists = (key_head >= 0) & (key_head < key_heads) & (value_head >= 0) & (value_head < value_heads)
    key_head = tl.where(exists, key_head, 0)
    value_head = tl.where(exists, value_head, 0)

    q = load_tile(
        query + batch * query_stride_b + head * query_stride_h, first_row, query_stride_n, num_queries,
        HEAD_DIM, BLOCK_M, BLOCK_D, True,
    )  # fmt: skip
    key += batch * key_stride_b + key_head * key_stride_h
    value += batch * value_stride_b + value_head * value_stride_h

    # Query n sees the keys before `limit`; all rows of the block see those before `common`.
    limit = num_keys + tl.zeros_like(rows)
    common = num_keys
    last = num_keys
    if IS_CAUSAL:
        limit = tl.minimum(rows + (num_keys - num_queries + 1), num_keys)
        common = tl.minimum(tl.maximum(first_row + num_keys - num_queries + 1, 0), num_keys)
        last = tl.minimum(tl.maximum(first_row + BLOCK_M + num_keys - num_queries, 0), num_keys)
    common = common // BLOCK_N * BLOCK_N

    # Finite, so that differences of maxima are never NaN; the exponential of -inf minus it is 0.
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    accumulator, top, total = add_keys(
        accumulator, top, total, q, key, value, 0, common, limit, num_keys, scale, key_stride_m, value_stride_m,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    accumulator, top, total = add_keys(
        accumulator, top, total, q, key, value, common, last, limit, num_keys, scale, key_stride_m, value_stride_m,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, True, PRECISION,
    )  # fmt: skip

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    accumulator *= tl.where(seen, 1.0 / total, 0.0)[:, None]
    accumulator = tl.where(exists, accumulator, float("nan"))
    if WITH_LSE:
        row = (batch * heads + head) * num_queries + rows
        sums = tl.where(seen, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
        tl.store(lse + row, tl.where(exists, sums, float("nan")), mask=row_inside)
    # [batch, queries, heads, value_dim] in memory: what follows reads the heads of a token side by side.
    columns = tl.arange(0, BLOCK_V)
    offset = ((batch * num_queries + rows) * heads + head)[:, None] * VALUE_DIM + columns[None, :]
    inside = row_inside[:, None] & (columns < VALUE_DIM)[None, :]
    tl.store(out + offset, accumulator.to(out.dtype.element_ty), mask=inside)


def tiling(head_dim: int, value_dim: int, element_size: int) -> Tiling:
    """Returns the tiling for padded widths: measured on an H100 at 64; smaller tiles keep wider heads in registers."""
    if element_size == 4:
        return Tiling(32, 32, 8, 1) if max(head_dim, value_dim) <= 64 else Tiling(16, 16, 4, 1)
    if max(head_dim, value_dim) <= 64:
        return Tiling(64, 64, 4, 2)
    return Tiling(64, 64, 4, 2) if max(head_dim, value_dim) <= 128 else Tiling(64, 32, 4, 2)


def forward(query, key, value, key_map, value_map, is_causal, scale, with_lse, cut: Tiling | None = None):
    """Returns out and the natural log-sums; the latter have no element without `with_lse`."""
    batch, heads, num_queries, head_dim = query.shape
    value_dim = value.shape[3]
    if scale <= 0:
        # The loop over keys takes the maximum before it scales, which needs a positive factor.
        query, scale = (-query, -scale) if scale < 0 else (torch.zeros_like(query), 1.0)
    query, key, value = map(rows_contiguous, (query, key, value))
    out = query.new_empty((batch, num_queries, heads, value_dim)).transpose(1, 2)
    lse = query.new_empty((batch, heads, num_queries) if with_lse else (0,), dtype=torch.float32)
    if query.numel() == 0:
        return out, lse
    block_d, block_v = block_width(head_dim), block_width(value_dim)
    cut = tiling(block_d, block_v, query.element_size()) if cut is None else cut
    _forward_kernel[triton.cdiv(num_queries, cut.rows), batch * heads](
        query, key, value, key_map, value_map, out, lse, scale * LOG2E,
        num_queries, key.shape[2], heads, key.shape[1], value.shape[1],
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *map(_batch_stride, (key_map, value_map)),
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_d, BLOCK_V=block_v, BLOCK_M=cut.rows, BLOCK_N=cut.keys,
        IS_CAUSAL=is_causal, WITH_LSE=with_lse, PRECISION=precision(query),
        num_warps=cut.num_warps, num_stages=cut.num_stages,
    )  # fmt: skip
    return out, lse


def _batch_stride(head_map: torch.Tensor) -> int:
    return 0 if head_map.dim() == 1 else head_map.stride(0)
