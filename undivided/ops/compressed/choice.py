"""The choice of blocks by the weights of compressed attention, in Triton.

One kernel recomputes the weights of a tile, adds them up over the heads of a group and over the compressed blocks that
a block of tokens shares, and writes a score for each block; a second one chooses the highest of each row. Of a few
thousand queries at a time the scores are in memory, the weights never: with `block_size / kernel_stride` strides in a
block and g heads in a group, these would be `g * block_size / kernel_stride` times as many.
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
from undivided.ops.block_map import num_blocks
from undivided.ops.block_map import triton as lists
from undivided.ops.compressed.triton import seen_blocks

# Bytes of scores at a time.
SCORE_BYTES = 2**28


# One program: the heads of a group, side by side in the rows of a tile, of ROWS queries. In registers: the weights of
# one tile of compressed keys, which are shared out to BLOCKS blocks; what the last compressed block of a tile shares
# with the next block of tokens is carried on. Sums have the same order for every block, so that equal ones stay equal.
@triton.jit(
    do_not_specialize=[
        "num_queries", "blocks", "before", "kernel_size", "kernel_stride", "key_heads", "first_query", "some_queries",
        "columns", "init_blocks", "local_blocks",
    ]
)  # fmt: skip
def _score_kernel(
    query, key, lse, scores, scale,
    num_queries, blocks, before, kernel_size, kernel_stride, key_heads, first_query, some_queries,
    columns, init_blocks, local_blocks,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, INSIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = BLOCK_N // INSIDE
    key_head = tl.program_id(0) % key_heads
    batch = (tl.program_id(0) // key_heads).to(tl.int64)
    head = (batch * key_heads + key_head) * GROUP
    # The longest rows first: what runs last is short.
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    # Rows of the tile: the heads of one query after those of another.
    place = tl.arange(0, ROWS * MEMBERS)
    member = place % MEMBERS
    row = start + place // MEMBERS
    real = (row < some_queries) & (member < GROUP)
    channel = tl.arange(0, BLOCK_D)
    query += batch * query_stride_b + key_head * GROUP * query_stride_h
    offset = member.to(tl.int64) * query_stride_h + (first_query + row).to(tl.int64) * query_stride_n
    q = tl.load(
        query + offset[:, None] + channel[None, :],
        mask=real[:, None] & (channel < HEAD_DIM)[None, :],
        other=0.0,
    )
    key += batch * key_stride_b + key_head * key_stride_h
    log_sum = tl.load(lse + (head + member) * num_queries + first_query + row, mask=real, other=float("inf"))
    # Rows that see nothing have -inf, rows that do not exist +inf: no weights.
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * 1.4426950408889634)
    limit = seen_blocks(before + first_query + row, kernel_size, kernel_stride, blocks)
    last_query = first_query + tl.minimum(start + ROWS, some_queries) - 1
    some = seen_blocks(before + last_query, kernel_size, kernel_stride, blocks)
    # How many strides a compressed block shares with the block in which it begins, and with the next.
    across = kernel_size // kernel_stride
    here = tl.minimum(across, INSIDE - tl.arange(0, INSIDE))
    beyond = across - here
    # Of each query, not of each head.
    own_row = start + tl.arange(0, ROWS)
    own = (before + first_query + own_row) // (INSIDE * kernel_stride)
    inside = own_row < some_queries
    target = scores + ((batch * key_heads + key_head) * some_queries + own_row) * columns
    number = tl.arange(0, BLOCKS)
    carried = tl.zeros([ROWS], tl.float32)
    # One tile more than compressed keys fill: the last ones may share the next block.
    computed = tl.cdiv(some, BLOCK_N) * BLOCKS
    for first in tl.range(0, computed, BLOCKS):
        k = load_tile(key, first * INSIDE, key_stride_m, blocks, HEAD_DIM, BLOCK_N, BLOCK_D, True)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        column = first * INSIDE + tl.arange(0, BLOCK_N)
        weights = tl.exp2(logits * scale - log_sum[:, None])
        weights = tl.where(column[None, :] < limit[:, None], weights, 0.0)
        weights = tl.sum(tl.reshape(weights, [ROWS, MEMBERS, BLOCK_N]), 1)
        weights = tl.reshape(weights, [ROWS, BLOCKS, INSIDE])
        score = tl.sum(weights * here[None, None, :], 2)
        shared = tl.sum(weights * beyond[None, None, :], 2)
        before_it = tl.gather(shared, tl.broadcast_to(tl.maximum(number - 1, 0)[None, :], [ROWS, BLOCKS]), 1)
        score += tl.where(number[None, :] == 0, carried[:, None], before_it)
        carried = tl.sum(tl.where(number[None, :] == BLOCKS - 1, shared, 0.0), 1)
        _store(target, score, first + number, own, inside, columns, init_blocks, local_blocks)
    for first in tl.range(computed, columns, BLOCKS):
        score = tl.where((number == 0)[None, :] & (first == computed), carried[:, None], 0.0)
        _store(target, score, first + number, own, inside, columns, init_blocks, local_blocks)


@triton.jit
def _store(target, score, block, own, inside, columns, init_blocks, local_blocks):
    """Stores scores, with +inf for the blocks that are always listed and -inf for those behind a query's own."""
    given = (block < init_blocks)[None, :] | (block[None, :] > (own - local_blocks)[:, None])
    score = tl.where(given, float("inf"), score)
    score = tl.where(block[None, :] <= own[:, None], score, float("-inf"))
    tl.store(target[:, None] + block[None, :], score, mask=inside[:, None] & (block < columns)[None, :])


# `rows` are queries times heads, `keys` compressed keys.
_HALF = (Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2))
_FLOAT32 = (Tiling(32, 32, 4, 1),)


def tiling(head_dim: int, group: int, inside: int, element_size: int, limit: int) -> tuple[Tiling, int, int]:
    """Returns the cut of the score kernel, the queries of its tile and the heads, padded to a power of two.

    Args:
        head_dim: width of a query.
        group: heads of a key head.
        inside: strides of a block of tokens.
        element_size: bytes of an element.
        limit: bytes of shared memory of a program.
    """
    cut = first_fitting(
        _HALF if element_size == 2 else _FLOAT32,
        lambda t: t.rows * head_dim + t.num_stages * t.keys * head_dim,
        limit // element_size,
    )
    members = triton.next_power_of_2(group)
    # A tile holds a block of tokens at least.
    cut = Tiling(max(cut.rows, members), max(cut.keys, 2 * inside), cut.num_warps, cut.num_stages)
    return cut, cut.rows // members, members


def choose(
    query, key, lse, num_keys, kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, scale
):  # fmt: skip
    """Returns the lists of blocks and their counts."""
    query, key, lse = rows_contiguous(query), rows_contiguous(key), lse.float().contiguous()
    batch, heads, num_queries, head_dim = query.shape
    key_heads, inside = key.shape[1], block_size // kernel_stride
    width = min(topk, num_blocks(num_keys, block_size))
    index = query.new_empty((batch, key_heads, num_queries, width), dtype=torch.int32)
    counts = query.new_empty((batch, key_heads, num_queries), dtype=torch.int32)
    if index.numel() == 0:
        return index, counts
    group = heads // key_heads
    cut, rows, members = tiling(
        block_width(head_dim), group, inside, query.element_size(), shared_memory(query.device)
    )
    before = num_keys - num_queries
    most = max(SCORE_BYTES // (4 * batch * key_heads * num_blocks(num_keys, block_size)) // rows, 1) * rows
    for first in range(0, num_queries, most):
        some = min(most, num_queries - first)
        # The blocks up to the last query's own.
        columns = max(num_blocks(before + first + some, block_size), width)
        scores = query.new_empty((batch, key_heads, some, columns), dtype=torch.float32)
        _score_kernel[batch * key_heads, triton.cdiv(some, rows)](
            query, key, lse, scores, scale * LOG2E,
            num_queries, key.shape[2], before, kernel_size, kernel_stride, key_heads, first, some,
            columns, init_blocks, local_blocks, *query.stride()[:3], *key.stride()[:3],
            HEAD_DIM=head_dim, BLOCK_D=block_width(head_dim), GROUP=group, MEMBERS=members, ROWS=rows,
            BLOCK_N=cut.keys, INSIDE=inside, PRECISION=precision(query), num_warps=cut.num_warps,
            num_stages=cut.num_stages,
        )  # fmt: skip
        part = slice(first, first + some)
        index[:, :, part], counts[:, :, part], _ = lists.select(scores, topk, width)
        del scores
    return index, counts
