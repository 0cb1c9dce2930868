"""Dynamic mask attention in Triton, forward: each tile of queries gathers the keys of its list.

A tile of T queries does `4 D (w + T)` operations a query where dense causal attention does `2 D N` on average, and
gathers rows of `2 D` elements; lists of neighbouring tiles are nearly the same, so that nearly all come from the L2
cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import (
    LOG2E,
    Tiling,
    block_width,
    first_fitting,
    load_tile,
    precision,
    rows_contiguous,
    shared_memory,
)


@triton.jit
def gather_tile(
    base, index, inside, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Rows `index`; with MASKED those not `inside` are zero, and so are columns from WIDTH on."""
    column = tl.arange(0, COLUMNS)
    # int64: a token's stride times a million tokens passes 2**31.
    row = base + index.to(tl.int64) * stride
    if MASKED:
        tile = tl.load(
            row[:, None] + column[None, :], mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0
        )
    elif WIDTH < COLUMNS:
        tile = tl.load(row[:, None] + column[None, :], mask=(column < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(row[:, None] + column[None, :])
    return tile


@triton.jit
def shared(size, TILE: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many keys of a list of `size` all queries of its tile attend, at least, in whole blocks."""
    # Each query but the first can take the place of one.
    return tl.maximum(size - TILE, 0) // BLOCK_N * BLOCK_N


@triton.jit
def listed(kept, start, end, BLOCK_N: tl.constexpr):
    """Keys `start ..` of a list, before `end`."""
    place = start + tl.arange(0, BLOCK_N)
    return tl.load(kept + place, mask=place < end, other=0)


@triton.jit
def attended(kept, death, start, size, prefix, rows, num_keys, num_queries, BLOCK_N: tl.constexpr):
    """Places `start ..` of a tile's list of `size` keys, behind which its own follow: keys, and who attends them."""
    place = start + tl.arange(0, BLOCK_N)
    listed = place < size
    index = tl.load(kept + place, mask=listed, other=0)
    index = tl.where(listed, index, prefix - size + place)
    inside = index < num_keys
    lost_to = tl.load(death + index, mask=inside, other=0)
    born = index - (num_keys - num_queries)
    seen = (born[None, :] <= rows[:, None]) & (rows[:, None] < lost_to[None, :])
    return index, inside, seen


@triton.jit
def add_values(accumulator, top, total, scores, v, PRECISION: tl.constexpr):
    """Adds values to the running softmax of a tile of queries; scores are in base 2."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weights, 1)
    accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision=PRECISION)
    return accumulator, new_top, total


# One program: TILE queries of one head against their list and their own keys. In registers: the float32 accumulator
# [TILE, value_dim], a maximum and a sum a row, and the scores of one block of keys.
@triton.jit(do_not_specialize=("num_queries", "num_keys", "keep"))
def _forward_kernel(
    query, key, value, bias, kept, death, out, lse,
    scale_log2, log2e, num_queries, num_keys, keep, heads, group,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    tile = tl.program_id(1)
    first = tile * TILE
    rows = first + tl.arange(0, TILE)
    row_inside = rows < num_queries
    key_head = batch * (heads // group) + head // group
    prefix = first + num_keys - num_queries
    size = tl.minimum(keep, prefix)

    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + (head // group) * key_stride_h
    value += batch * value_stride_b + (head // group) * value_stride_h
    bias += key_head * num_keys
    death += key_head * num_keys
    kept += (key_head * tl.num_programs(1) + tile) * keep
    q = load_tile(query, first, query_stride_n, num_queries, HEAD_DIM, TILE, BLOCK_D, True)

    # Finite, so that differences of maxima are never NaN; the exponential of -inf minus it is 0.
    top = tl.full([TILE], -1.0e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    accumulator = tl.zeros([TILE, BLOCK_V], tl.float32)
    # First the keys that some queries of the tile do not attend: its own, and the last of the list.
    common = shared(size, TILE, BLOCK_N)
    for start in tl.range(common, size + tl.minimum(TILE, num_queries - first), BLOCK_N):
        index, inside, seen = attended(kept, death, start, size, prefix, rows, num_keys, num_queries, BLOCK_N)
        k = gather_tile(key, index, inside, key_stride_m, HEAD_DIM, BLOCK_D, True)
        b = tl.load(bias + index, mask=inside, other=0.0) * log2e
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + b[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        v = gather_tile(value, index, inside, value_stride_m, VALUE_DIM, BLOCK_V, True)
        accumulator, top, total = add_values(accumulator, top, total, scores, v, PRECISION)
    following = listed(kept, 0, common, BLOCK_N)
    for start in tl.range(0, common, BLOCK_N):
        # Read one round ahead, so that keys and values, whose places it tells, are loaded two rounds ahead.
        index = following
        following = listed(kept, start + BLOCK_N, common, BLOCK_N)
        k = gather_tile(key, index, index >= 0, key_stride_m, HEAD_DIM, BLOCK_D, False)
        b = tl.load(bias + index) * log2e
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + b[None, :]
        v = gather_tile(value, index, index >= 0, value_stride_m, VALUE_DIM, BLOCK_V, False)
        accumulator, top, total = add_values(accumulator, top, total, scores, v, PRECISION)

    attends = total > 0
    total = tl.where(attends, total, 1.0)
    accumulator *= tl.where(attends, 1.0 / total, 0.0)[:, None]
    row = (batch * heads + head) * num_queries + rows
    # +inf for a row without keys: every weight that a backward pass recomputes with it is 0.
    tl.store(lse + row, tl.where(attends, top + tl.log2(total), float("inf")), mask=row_inside)
    # [batch, queries, heads, value_dim] in memory: what follows reads the heads of a token side by side.
    out_row = (batch * num_queries + rows) * heads + head
    column = tl.arange(0, BLOCK_V)
    tl.store(
        out + out_row[:, None] * VALUE_DIM + column[None, :],
        accumulator.to(out.dtype.element_ty),
        mask=row_inside[:, None] & (column < VALUE_DIM)[None, :],
    )


_FORWARD = (Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2), Tiling(128, 32, 8, 1))
_FORWARD_FLOAT32 = (Tiling(32, 32, 8, 1), Tiling(32, 16, 8, 1))


def tile_size(element_size: int) -> int:
    """Returns how many queries share a list of keys."""
    return 128 if element_size == 2 else 32


def forward_tiling(head_dim: int, value_dim: int, element_size: int, shared_memory: int) -> Tiling:
    """Returns the tiling of the forward kernel: the first whose queries, and keys and values in flight, fit."""
    return first_fitting(
        _FORWARD if element_size == 2 else _FORWARD_FLOAT32,
        lambda t: t.rows * head_dim + t.num_stages * t.keys * (head_dim + value_dim),
        shared_memory // element_size,
    )


def forward(query, key, value, key_bias, kept, death, scale):
    """Returns the output and the base-2 log-sums."""
    query, key, value = map(rows_contiguous, (query, key, value))
    batch, heads, num_queries, head_dim = query.shape
    value_dim = value.shape[3]
    out = query.new_empty((batch, num_queries, heads, value_dim)).transpose(1, 2)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    if query.numel() == 0:
        return out, lse
    tiling = forward_tiling(
        block_width(head_dim), block_width(value_dim), query.element_size(), shared_memory(query.device)
    )
    _forward_kernel[batch * heads, kept.shape[2]](
        query, key, value, key_bias, kept, death, out, lse,
        scale * LOG2E, LOG2E, num_queries, key.shape[2], kept.shape[3], heads, heads // key.shape[1],
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim), BLOCK_V=block_width(value_dim),
        TILE=tiling.rows, BLOCK_N=tiling.keys, PRECISION=precision(query),
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return out, lse
