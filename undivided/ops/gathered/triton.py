"""Attention to listed keys in Triton: rows are loaded from where the list says, block of places by block of places."""

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

RUNTIME = ("num_queries", "num_keys", "heads", "places", "tiles_per_block", "window")


# One program: BLOCK_M queries of one head and one list. In registers: the float32 accumulator [BLOCK_M, value_dim], a
# maximum and a sum a row, and the scores of BLOCK_N places. It moves its queries and its output once, and, mostly from
# the L2 cache, for heads and tiles share a list, the keys and values of its places.
@triton.jit(do_not_specialize=RUNTIME)
def _forward_kernel(
    query, key, value, indices, counts, out, lse,
    scale, softcap, num_queries, num_keys, heads, key_group, places, tiles_per_block, block_size, window,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, indices_stride_b, indices_stride_h, indices_stride_n,
    counts_stride_b, counts_stride_h, counts_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    # The last lists are the longest, so they go first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    block = tile // tiles_per_block
    first_row = block * block_size + (tile % tiles_per_block) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    # The last tile of a block is cut where the block ends.
    inside_rows = (rows < num_queries) & (rows < (block + 1) * block_size)
    position = rows + (num_keys - num_queries)
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // key_group) * value_stride_h
    indices += batch * indices_stride_b + head * indices_stride_h + block * indices_stride_n
    count = tl.load(counts + batch * counts_stride_b + head * counts_stride_h + block * counts_stride_n)
    q = load_tile(query, first_row, query_stride_n, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    column_d = tl.arange(0, BLOCK_D)
    column_v = tl.arange(0, BLOCK_V)

    # Finite, so that differences of maxima are never NaN; the exponential of -inf minus it is 0.
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    place = tl.arange(0, BLOCK_N)
    next_index = tl.load(indices + place, mask=place < count, other=-1)
    for start in tl.range(0, count, BLOCK_N):
        # Read a turn ahead: keys can only be fetched during the turn before once it is known which.
        index = next_index
        place = start + BLOCK_N + tl.arange(0, BLOCK_N)
        next_index = tl.load(indices + place, mask=place < count, other=-1)
        is_listed = index >= 0
        offset = tl.where(is_listed, index, 0)
        if WIDE:
            # A token's stride times a million tokens passes 2**31.
            offset = offset.to(tl.int64)
        k = tl.load(
            key + offset[:, None] * key_stride_m + column_d[None, :],
            mask=is_listed[:, None] & (column_d < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_CAP:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), in the base of 2 that the scores have.
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * 1.4426950408889634)) + 1.0))
        seen = is_listed[None, :]
        if IS_CAUSAL:
            seen = seen & (index[None, :] <= position[:, None])
        if HAS_WINDOW:
            seen = seen & (index[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        v = tl.load(
            value + offset[:, None] * value_stride_m + column_v[None, :],
            mask=is_listed[:, None] & (column_v < VALUE_DIM)[None, :], other=0.0,
        )  # fmt: skip
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision=PRECISION)

    seen_any = total > 0
    total = tl.where(seen_any, total, 1.0)
    accumulator *= tl.where(seen_any, 1.0 / total, 0.0)[:, None]
    tl.store(
        lse + (batch * heads + head) * num_queries + rows,
        tl.where(seen_any, (top + tl.log2(total)) * 0.6931471805599453, float("-inf")),
        mask=inside_rows,
    )
    # [batch, queries, heads, value_dim] in memory: what follows reads the heads of a token side by side.
    offset_out = ((batch * num_queries + rows) * heads + head)[:, None] * VALUE_DIM + column_v[None, :]
    tl.store(
        out + offset_out,
        accumulator.to(out.dtype.element_ty),
        mask=inside_rows[:, None] & (column_v < VALUE_DIM)[None, :],
    )


# Rows are at most a block of queries. Three blocks of keys in flight: with two, the next is fetched when this one is
# done, and a program waits for memory at every turn.
_FORWARD = (
    Tiling(128, 64, 8, 3), Tiling(128, 32, 8, 3), Tiling(64, 64, 4, 3), Tiling(64, 32, 4, 2), Tiling(32, 32, 4, 1),
    Tiling(16, 64, 4, 3), Tiling(16, 32, 4, 2),
)  # fmt: skip
_FORWARD_FLOAT32 = (Tiling(32, 32, 8, 1), Tiling(16, 16, 4, 1))


def forward(query, key, value, indices, counts, block_size, is_causal, window, scale, softcap):
    """Returns the output and the natural log-sum-exp."""
    batch, heads, num_queries, head_dim = query.shape
    num_keys, value_dim = value.shape[2], value.shape[3]
    query, key, value = map(rows_contiguous, (query, key, value))
    out = query.new_empty((batch, num_queries, heads, value_dim)).transpose(1, 2)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    indices = indices.contiguous()
    # Lists for all heads have a stride of zero over them.
    lists, numbers = (x.expand(-1, heads, *(-1 for _ in x.shape[2:])) for x in (indices, counts))
    rows_needed = max(16, triton.next_power_of_2(min(block_size, num_queries)))
    candidates = _FORWARD if query.element_size() == 2 else _FORWARD_FLOAT32
    candidates = tuple(t for t in candidates if t.rows <= rows_needed)
    width = block_width(head_dim) + block_width(value_dim)
    tiling = first_fitting(
        candidates,
        lambda t: t.rows * block_width(head_dim) + t.num_stages * t.keys * width,
        shared_memory(query.device) // query.element_size(),
    )
    tiles_per_block = triton.cdiv(block_size, tiling.rows)
    has_cap = softcap is not None
    _forward_kernel[batch * heads, indices.shape[2] * tiles_per_block](
        query, key, value, lists, numbers, out, lse,
        scale / softcap if has_cap else scale * LOG2E, softcap * LOG2E if has_cap else 0.0, num_queries, num_keys,
        heads, heads // key.shape[1], indices.shape[3], tiles_per_block, block_size, 0 if window is None else window,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *lists.stride()[:3], *numbers.stride()[:3],
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim), BLOCK_V=block_width(value_dim),
        BLOCK_M=tiling.rows, BLOCK_N=tiling.keys, IS_CAUSAL=is_causal, HAS_WINDOW=window is not None, HAS_CAP=has_cap,
        WIDE=num_keys * max(key.stride(2), value.stride(2)) >= 2**31,
        PRECISION=precision(query), num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return out, lse
