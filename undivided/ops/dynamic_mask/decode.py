"""Dynamic mask attention of one query a sequence: the kept keys are gathered and split among programs.

A step moves `(head_dim + value_dim)` elements for each of at most w kept keys of a key head, once for all its query
heads, however long the cache is. Finding the w best of M keys reads `4 M` bytes a key head; a cache that holds only
keys that can still be attended (`undivided.layers.dma`) has nothing to find.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import LOG2E, block_width, precision, rows_contiguous
from undivided.ops.dynamic_mask._rank import best_keys
from undivided.ops.dynamic_mask.triton import gather_tile
from undivided.ops.latent_decode._splits import merge_splits, multiprocessors


# One program: all query heads of one key head against one part of its kept keys. In registers: one accumulator
# [BLOCK_R, value_dim], a maximum and a sum a row.
@triton.jit(do_not_specialize=("num_keys", "count", "num_splits", "num_rows"))
def _decode_kernel(
    query, key, value, bias, kept, partial, partial_lse,
    scale_log2, log2e, num_keys, count, key_heads, num_splits, num_rows,
    query_stride_b, query_stride_h, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LIST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    local_head = tl.program_id(1) % key_heads
    batch = (tl.program_id(1) // key_heads).to(tl.int64)
    key_head = batch * key_heads + local_head
    row = tl.arange(0, BLOCK_R)
    row_inside = row < GROUP
    column = tl.arange(0, BLOCK_D)
    query += batch * query_stride_b + local_head * GROUP * query_stride_h
    q = tl.load(
        query + row[:, None] * query_stride_h + column[None, :],
        mask=row_inside[:, None] & (column < HEAD_DIM)[None, :],
        other=0.0,
    )
    key += batch * key_stride_b + local_head * key_stride_h
    value += batch * value_stride_b + local_head * value_stride_h
    bias += key_head * num_keys
    kept += key_head * count
    blocks = tl.cdiv(count, BLOCK_N)
    first = (split * blocks // num_splits) * BLOCK_N
    last = tl.minimum(((split + 1) * blocks // num_splits) * BLOCK_N, count)

    top = tl.full([BLOCK_R], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    accumulator = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for start in tl.range(first, last, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        inside = index < last
        if HAS_LIST:
            index = tl.load(kept + index, mask=inside, other=0)
        k = gather_tile(key, index, inside, key_stride_m, HEAD_DIM, BLOCK_D, True)
        v = gather_tile(value, index, inside, value_stride_m, VALUE_DIM, BLOCK_V, True)
        b = tl.load(bias + index, mask=inside, other=float("-inf")) * log2e
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + b[None, :]
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision=PRECISION)

    attends = total > 0
    total = tl.where(attends, total, 1.0)
    accumulator *= tl.where(attends, 1.0 / total, 0.0)[:, None]
    out_row = split.to(tl.int64) * num_rows + key_head * GROUP + row
    column = tl.arange(0, BLOCK_V)
    tl.store(
        partial + out_row[:, None] * VALUE_DIM + column[None, :],
        accumulator,
        mask=row_inside[:, None] & (column < VALUE_DIM)[None, :],
    )
    tl.store(partial_lse + out_row, tl.where(attends, top + tl.log2(total), float("-inf")), mask=row_inside)


def attend(query, key, value, key_bias, keep, scale, num_splits=None):
    """Returns the output; `num_splits` is into how many parts the kept keys are cut, chosen by default."""
    query, key, value = map(rows_contiguous, (query, key, value))
    batch, heads, _, head_dim = query.shape
    key_heads, num_keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    kept = best_keys(key_bias, keep) if keep < num_keys else None
    count = min(keep, num_keys)
    block_keys, num_warps, num_stages = (32, 4, 3) if query.element_size() == 2 else (16, 8, 1)
    blocks = triton.cdiv(count, block_keys)
    if num_splits is None:
        # Four programs a multiprocessor, and parts of at least two blocks: a gather is bound by its latency.
        slots = 4 * multiprocessors(query.device)
        num_splits = max(1, min(triton.cdiv(blocks, 2), slots // max(batch * key_heads, 1), 32))
    rows = batch * heads
    partial = query.new_empty((num_splits, rows, value_dim), dtype=torch.float32)
    partial_lse = query.new_empty((num_splits, rows), dtype=torch.float32)
    out = query.new_empty((batch, heads, 1, value_dim))
    group = heads // key_heads
    _decode_kernel[num_splits, batch * key_heads](
        query, key, value, key_bias, key_bias if kept is None else kept, partial, partial_lse,
        scale * LOG2E, LOG2E, num_keys, count, key_heads, num_splits, rows,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3],
        GROUP=group, HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim),
        BLOCK_V=block_width(value_dim), BLOCK_R=block_width(group), BLOCK_N=block_keys, HAS_LIST=kept is not None,
        PRECISION=precision(query), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    merge_splits(partial, partial_lse, out, query.new_empty((batch, heads, 1), dtype=torch.float32))
    return out
