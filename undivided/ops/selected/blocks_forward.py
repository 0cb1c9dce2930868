"""Forward over lists of key blocks, for blocks of queries, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import LOG2E, block_width, load_tile, precision, rows_contiguous, shared_memory
from undivided.ops.block_map import block_bounds
from undivided.ops.selected._tiles import block_range, list_parts


@triton.jit
def add_blocks(
    accumulator, top, total, q, key, value, listed, first_entry, last_entry, bounds, limit, num_keys, scale,
    key_stride, value_stride,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, PACKED: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the listed blocks `first_entry .. last_entry - 1` to the running softmax; `scale` is in base 2.

    MASK is "none", "end" (keys from num_keys on do not exist) or "all" (a row sees the keys below its limit).
    """
    for entry in tl.range(first_entry, last_entry):
        first, last = block_range(bounds, tl.load(listed + entry), num_keys, BLOCK_N, PACKED)
        k = load_tile(key, first, key_stride, last, HEAD_DIM, BLOCK_N, BLOCK_D, MASK != "none")
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        column = first + tl.arange(0, BLOCK_N)
        if MASK == "end":
            # A term of each column: one operation an element, where a second loop for the last block costs more.
            scores = scores * scale + tl.where(column < last, 0.0, float("-inf"))[None, :]
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
        else:
            if MASK == "all":
                seen = (column[None, :] < limit[:, None]) & (column < last)[None, :]
                scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        v = load_tile(value, first, value_stride, last, VALUE_DIM, BLOCK_N, BLOCK_V, MASK != "none")
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision=PRECISION)
    return accumulator, top, total


@triton.jit
def attend_blocks(
    q, key, value, listed, count, key_bounds, first_row, last_row, num_queries, num_keys, scale,
    key_stride, value_stride,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PACKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax of a tile of queries over a list: the output, not yet divided, and the maximum and sum in base 2.

    EVEN: whether blocks divide the keys.
    """
    # Finite, so that differences of maxima are never NaN; the exponential of -inf minus it is 0.
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    limit = num_keys + tl.zeros([BLOCK_M], tl.int32)
    if IS_CAUSAL or PACKED:
        shift = num_keys - num_queries
        plain, seen = list_parts(
            listed, count, key_bounds, first_row, last_row, shift, num_keys, WIDTH, BLOCK_N, IS_CAUSAL, PACKED
        )
        if IS_CAUSAL:
            limit = first_row + tl.arange(0, BLOCK_M) + shift + 1
        accumulator, top, total = add_blocks(
            accumulator, top, total, q, key, value, listed, 0, plain, key_bounds, limit, num_keys, scale,
            key_stride, value_stride, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PACKED, "none", PRECISION,
        )  # fmt: skip
        accumulator, top, total = add_blocks(
            accumulator, top, total, q, key, value, listed, plain, seen, key_bounds, limit, num_keys, scale,
            key_stride, value_stride, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PACKED, "all", PRECISION,
        )  # fmt: skip
    else:
        accumulator, top, total = add_blocks(
            accumulator, top, total, q, key, value, listed, 0, count, key_bounds, limit, num_keys, scale,
            key_stride, value_stride, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PACKED,
            "none" if EVEN else "end", PRECISION,
        )  # fmt: skip
    return accumulator, top, total


# One program: the queries of one block and head against the key blocks of their list. In registers: the float32 output;
# keys and values of the blocks in flight are in shared memory. A block of 64 keys at 128 channels is 32 KB for 2 MFLOP
# of 64 queries: the rate of the L2 cache bounds the kernel, not that of the products.
@triton.jit
def _forward_kernel(
    query, key, value, index, counts, query_bounds, key_bounds, out, lse,
    scale, num_queries, num_keys, heads, key_group, list_group, rows, max_blocks,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PACKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // key_group) * value_stride_h
    lists = (batch * (heads // list_group) + head // list_group) * rows + row
    first_row, last_row = block_range(query_bounds, row, num_queries, BLOCK_M, PACKED)
    q = load_tile(query, first_row, query_stride_n, last_row, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    accumulator, top, total = attend_blocks(
        q, key, value, index + lists * max_blocks, tl.load(counts + lists), key_bounds, first_row, last_row,
        num_queries, num_keys, scale, key_stride_m, value_stride_m,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, WIDTH, IS_CAUSAL, PACKED, EVEN, PRECISION,
    )  # fmt: skip
    store_softmax(
        out, lse, accumulator, top, total, batch, head, heads, first_row, last_row, num_queries,
        VALUE_DIM, BLOCK_V, BLOCK_M, True,
    )  # fmt: skip


@triton.jit
def store_softmax(
    out, lse, accumulator, top, total, batch, head, heads, first_row, last_row, num_queries,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Divides a tile of outputs, stores it with KEEP, and its lse; returns it."""
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < last_row
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    # The natural logarithm: ln(2) brings the base back.
    log_sum = tl.where(seen, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + (batch * heads + head) * num_queries + rows, log_sum, mask=inside)
    result = tl.where(seen[:, None], accumulator / total[:, None], 0.0)
    if KEEP:
        store_rows(out, result, batch, head, heads, rows, inside, num_queries, VALUE_DIM, BLOCK_V)
    return result


@triton.jit
def store_rows(
    out, tile, batch, head, heads, rows, inside, num_queries, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Stores rows of one head of a contiguous `[batch, queries, heads, WIDTH]`."""
    column = tl.arange(0, COLUMNS)
    offset = ((batch * num_queries + rows) * heads + head)[:, None] * WIDTH + column[None, :]
    tl.store(out + offset, tile.to(out.dtype.element_ty), mask=inside[:, None] & (column < WIDTH)[None, :])


def forward_launch(block_m: int, block_n: int, widths: int, element_size: int, limit: int) -> dict[str, int]:
    """Returns the warps of a program and its stages: as many as leave room for a second program.

    Args:
        block_m: queries of a tile.
        block_n: keys of a block.
        widths: of a key and a value together.
        element_size: bytes of an element.
        limit: bytes of shared memory of a multiprocessor.
    """
    if element_size == 4:
        return {"num_warps": 4, "num_stages": 1}
    # One stage is that of the list's entry; the others hold a block of keys and values each.
    room = limit // (2 * element_size) - block_m * widths // 2
    stages = min(max(room // (block_n * widths), 1), 2) + 1
    return {"num_warps": 8 if block_m > 64 else 4, "num_stages": stages}


def forward(query, key, value, index, counts, query_block_size, block_size, scale, is_causal, cu_seqlens):
    """Returns out, a view of `[batch, queries, heads, value_dim]`, and the natural lse."""
    query, key, value = map(rows_contiguous, (query, key, value))
    batch, heads, num_queries, head_dim = query.shape
    num_keys, value_dim = key.shape[2], value.shape[3]
    out = query.new_empty((batch, num_queries, heads, value_dim)).transpose(1, 2)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    query_bounds, key_bounds = bounds(num_queries, num_keys, query_block_size, block_size, cu_seqlens, index)
    rows, max_blocks = index.shape[2:]
    _forward_kernel[rows, batch * heads](
        query, key, value, index.contiguous(), counts.contiguous(), query_bounds, key_bounds, out, lse,
        scale * LOG2E, num_queries, num_keys, heads, heads // key.shape[1], heads // index.shape[1], rows, max_blocks,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim), BLOCK_V=block_width(value_dim),
        BLOCK_M=query_block_size, BLOCK_N=block_size, WIDTH=triton.next_power_of_2(max(max_blocks, 1)),
        IS_CAUSAL=is_causal, PACKED=cu_seqlens is not None, EVEN=num_keys % block_size == 0,
        PRECISION=precision(query),
        **forward_launch(
            query_block_size, block_size, head_dim + value_dim, query.element_size(), shared_memory(query.device)
        ),
    )  # fmt: skip
    return out, lse


def bounds(num_queries, num_keys, query_block_size, block_size, cu_seqlens, placeholder):
    """The tables of where blocks begin and end, which only packed sequences have."""
    if cu_seqlens is None:
        return placeholder, placeholder
    return (
        block_bounds(num_queries, query_block_size, cu_seqlens.device, cu_seqlens),
        block_bounds(num_keys, block_size, cu_seqlens.device, cu_seqlens),
    )
