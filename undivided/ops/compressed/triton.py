"""Forward of attention to compressed blocks in Triton: a staircase, each `kernel_stride` tokens one block more."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import (
    LOG2E,
    Tiling,
    add_keys,
    block_width,
    forward_tiling,
    load_tile,
    precision,
    rows_contiguous,
    shared_memory,
)

# Sizes that change from call to call and speed nothing up: a kernel is not compiled anew for each.
RUNTIME = ("num_queries", "blocks", "before", "kernel_size", "kernel_stride", "heads", "key_group")


@triton.jit
def seen_blocks(position, kernel_size, kernel_stride, blocks):
    """How many compressed blocks end at a token or before it."""
    return tl.minimum(tl.maximum(position + 1 - kernel_size + kernel_stride, 0) // kernel_stride, blocks)


# One program: BLOCK_M queries of one head. In registers: the float32 accumulator [BLOCK_M, value_dim] and the scores of
# one tile of keys. It moves its queries and its output, and, mostly from the L2 cache, the blocks before them.
@triton.jit(do_not_specialize=RUNTIME)
def _forward_kernel(
    query, key, value, out, lse, scale,
    num_queries, blocks, before, kernel_size, kernel_stride, heads, key_group,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    # The longest rows first: what runs last is short.
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < num_queries
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // key_group) * value_stride_h
    q = load_tile(query, first_row, query_stride_n, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    limit = seen_blocks(before + rows, kernel_size, kernel_stride, blocks)
    common = seen_blocks(before + first_row, kernel_size, kernel_stride, blocks) // BLOCK_N * BLOCK_N
    last_row = tl.minimum(first_row + BLOCK_M, num_queries) - 1
    some = seen_blocks(before + last_row, kernel_size, kernel_stride, blocks)
    # Finite, so that differences of maxima are never NaN; the exponential of -inf minus it is 0.
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    accumulator, top, total = add_keys(
        accumulator, top, total, q, key, value, 0, common, limit, blocks, scale, key_stride_m, value_stride_m,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    accumulator, top, total = add_keys(
        accumulator, top, total, q, key, value, common, some, limit, blocks, scale, key_stride_m, value_stride_m,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    nonempty = total > 0
    total = tl.where(nonempty, total, 1.0)
    result = tl.where(nonempty[:, None], accumulator / total[:, None], 0.0)
    # The natural logarithm: ln(2) brings the base back.
    log_sum = tl.where(nonempty, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + (batch * heads + head) * num_queries + rows, log_sum, mask=inside)
    # [batch, queries, heads, value_dim] in memory: what follows reads the heads of a token side by side.
    column = tl.arange(0, BLOCK_V)
    offset = ((batch * num_queries + rows) * heads + head)[:, None] * VALUE_DIM + column[None, :]
    tl.store(
        out + offset, result.to(out.dtype.element_ty), mask=inside[:, None] & (column < VALUE_DIM)[None, :]
    )


# Two such programs share a multiprocessor: one multiplies while the other takes its softmax.
_PAIRED = Tiling(64, 64, 4, 3)


def tiling(head_dim: int, value_dim: int, element_size: int, limit: int) -> Tiling:
    """Returns how the forward is cut: in pairs of programs where two fit, else as other forwards are."""
    elements = _PAIRED.rows * head_dim + _PAIRED.num_stages * _PAIRED.keys * (head_dim + value_dim)
    if element_size == 2 and 2 * elements * element_size <= limit:
        return _PAIRED
    return forward_tiling(head_dim, value_dim, element_size, limit)


def constants(query, value) -> dict[str, object]:
    """What the kernels are compiled for."""
    return {
        "HEAD_DIM": query.shape[3],
        "VALUE_DIM": value.shape[3],
        "BLOCK_D": block_width(query.shape[3]),
        "BLOCK_V": block_width(value.shape[3]),
        "PRECISION": precision(query),
    }


def forward(query, key, value, num_keys, kernel_size, kernel_stride, scale):
    """Returns out, a view of `[batch, queries, heads, value_dim]`, and the natural lse."""
    query, key, value = map(rows_contiguous, (query, key, value))
    batch, heads, num_queries, head_dim = query.shape
    out = query.new_empty((batch, num_queries, heads, value.shape[3])).transpose(1, 2)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    cut = tiling(
        block_width(head_dim), block_width(value.shape[3]), query.element_size(), shared_memory(query.device)
    )
    if out.numel():
        _forward_kernel[batch * heads, triton.cdiv(num_queries, cut.rows)](
            query, key, value, out, lse, scale * LOG2E,
            num_queries, key.shape[2], num_keys - num_queries, kernel_size, kernel_stride, heads, heads // key.shape[1],
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            BLOCK_M=cut.rows, BLOCK_N=cut.keys, num_warps=cut.num_warps, num_stages=cut.num_stages,
            **constants(query, value),
        )  # fmt: skip
    return out, lse
