"""Latent attention as split-key decode kernels for Hopper, in Gluon: explicit warpgroups, copies and barriers.

Where 64 or more rows (query heads x queries) share a latent head, the tensor cores and not the memory are the
bottleneck, and two warpgroups must overlap what a plain Triton program does in turn. In both kernels one warp loads
blocks of 64 cache rows through the bulk tensor copy engine, and two warpgroups compute.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from undivided.ops.latent_decode._splits import allocate, choose_splits, merge_splits, multiprocessors

# Triton 3.8 calls it `barrier`.
_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

_LOG2E = 1.4426950408889634
# Sizes that change from call to call: one compiled kernel serves them all.
_RUNTIME = [
    "num_keys", "num_queries", "heads_per_latent", "latent_heads", "num_splits", "total_rows",
    "latent_rows_b", "latent_rows_h", "rope_rows_b", "table_stride_b", "latent_end", "rope_end",
]  # fmt: skip
# Rows of a block of keys, and of a warpgroup's tile of queries.
_BLOCK: gl.constexpr = gl.constexpr(64)
# Eight threads move 128 contiguous bytes of a row.
_COPY: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
_SCORES: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_VECTOR: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _cache_row(block, base_row, block_table, rows_per_page, BLOCKS_PER_PAGE: gl.constexpr):
    """First row of a block of keys in the flattened cache; a page is one block or several."""
    if BLOCKS_PER_PAGE == 0:
        row = base_row + block * _BLOCK
    else:
        page = gl.load(block_table + block // BLOCKS_PER_PAGE)
        row = base_row + page * rows_per_page + block % BLOCKS_PER_PAGE * _BLOCK
    return row


@gluon.jit
def _load_query(tile, source, first_row, num_rows, num_queries, stride_h, stride_n, WIDTH: gl.constexpr):
    """Copies 64 query rows to shared memory; rows that do not exist are zero."""
    row = first_row + gl.arange(0, _BLOCK, gl.SliceLayout(1, _COPY))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, _COPY))
    offset = row // num_queries * stride_h + row % num_queries * stride_n
    values = gl.load(source + offset[:, None] + column[None, :], mask=(row < num_rows)[:, None], other=0.0)
    tile.store(values)


@gluon.jit
def _zero_rows(tile, kept, WIDTH: gl.constexpr):
    """Zeroes the rows of a block of keys from `kept` on: a weight of zero does not silence a NaN."""
    row = gl.arange(0, _BLOCK, gl.SliceLayout(1, _COPY))
    for first in gl.static_range(0, WIDTH, 64):
        part = tile.slice(first, 64, 1)
        values = part.load(_COPY)
        part.store(gl.where((row < kept)[:, None], values, gl.zeros_like(values)))


@gluon.jit
def _mask(scores, block, limit):
    """Scores with -inf where the key of the block is at or behind the limit of the row."""
    key = block * _BLOCK + gl.arange(0, _BLOCK, gl.SliceLayout(0, _SCORES))
    return gl.where(key[None, :] < limit[:, None], scores, float("-inf"))


@gluon.jit
def _scale_rows(tensor, factor):
    return tensor * gl.convert_layout(factor, gl.SliceLayout(1, tensor.type.layout))[:, None]


@gluon.jit
def _as_operand(weights, like):
    """The weights as left operand, in registers, of a product that is added to `like`."""
    return gl.convert_layout(weights, gl.DotOperandLayout(0, like.type.layout, 2))


@gluon.jit
def _store(
    accumulator, top, total, out, lse, first_row, num_rows, out_row, first_column,
    LATENT_DIM: gl.constexpr, WIDTH: gl.constexpr, IS_FINAL: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """Divides by the sum of the weights and writes columns first_column .. of the rows, and their log-sums."""
    seen = total > 0
    safe = gl.where(seen, total, gl.full_like(total, 1.0))
    accumulator = _scale_rows(accumulator, gl.where(seen, 1 / safe, gl.zeros_like(total)))
    layout: gl.constexpr = accumulator.type.layout
    row = first_row + gl.arange(0, _BLOCK, gl.SliceLayout(1, layout))
    column = first_column + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    gl.store(
        out + (out_row + row)[:, None].to(gl.int64) * LATENT_DIM + column[None, :],
        accumulator.to(out.dtype.element_ty),
        mask=(row < num_rows)[:, None],
    )
    if WITH_LSE:
        log = gl.where(seen, top + gl.log2(safe), gl.full_like(total, float("-inf")))
        if IS_FINAL:
            log *= 0.6931471805599453
        row = first_row + gl.arange(0, _BLOCK, gl.SliceLayout(1, _SCORES))
        gl.store(lse + (out_row + row).to(gl.int64), log, mask=row < num_rows)


@gluon.jit
def _part(cache_seqlens, batch, num_keys, split, num_splits, HAS_LENGTHS: gl.constexpr):
    """Length of the sequence; blocks first .. last - 1 of it are this part. Parts differ by one block at most."""
    length = num_keys
    if HAS_LENGTHS:
        length = gl.minimum(gl.load(cache_seqlens + batch), num_keys)
    blocks = gl.cdiv(length, _BLOCK)
    return length, split * blocks // num_splits, (split + 1) * blocks // num_splits


@gluon.jit
def _row_limits(first_row, num_queries, length, last, IS_CAUSAL: gl.constexpr):
    """Each row sees the keys of this part before its limit; all rows see those before `common`."""
    row = first_row + gl.arange(0, _BLOCK, gl.SliceLayout(1, _SCORES))
    limit = length + gl.zeros_like(row)
    common = length
    if IS_CAUSAL:
        limit = limit - num_queries + 1 + row % num_queries
        common = length - num_queries + 1
    # The block that a pair of blocks may lack is behind the end of this part.
    return gl.minimum(limit, last * _BLOCK), gl.minimum(common, last * _BLOCK)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles of 64 rows, latent widths 128, 256 and 512. At 512 the float32 accumulator of 64 rows is half of the registers of
# a multiprocessor, so two warpgroups share it. One program: 64 rows against one part of the keys of one sequence. Each
# warpgroup keeps half of the columns of the accumulator in registers (128 a thread at width 512), and 32 scores a
# thread. They take turns at the blocks of keys: the owner of a block computes its scores and weights, passes the
# weights on through shared memory, and both multiply them by their half of the values. The running maximum goes from
# block to block, so that the two halves always have one scale. While one warpgroup does a softmax, the other may work.
# The weights of a block take the place of its rope keys, which only its scores need: at width 512 the query (72 KB)
# and two blocks (72 KB each) fill the 227 KB of shared memory. A half of a block is free again as soon as it has been
# multiplied: what limits these kernels is how much of the cache is on its way at any time. A program moves
# `keys * (latent_dim + rope_dim) * 2` bytes; a second tile of 64 rows (128 heads) finds them in the L2 cache.
# ---------------------------------------------------------------------------------------------------------------------
@gluon.jit
def _shared_loader(
    latent_desc, rope_desc, left, right, rope, full, empty, block_table,
    part, latent_row, rope_row, latent_rows_per_page, rope_rows_per_page, latent_end, rope_end,
    BLOCKS_PER_PAGE: gl.constexpr, HAS_ROPE: gl.constexpr, HAS_LENGTHS: gl.constexpr, HALF: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    cache_seqlens, batch, num_keys, split, num_splits = part
    length, first, last = _part(cache_seqlens, batch, num_keys, split, num_splits, HAS_LENGTHS)
    for i in range((last - first + 1) // 2 * 2):
        block = first + i
        stage = i % STAGES
        free = (i // STAGES & 1) ^ 1
        # The block that a pair may lack lies past the end of the cache, where the copy engine writes zeros.
        row = latent_end
        row_of_rope = rope_end
        if block < last:
            row = _cache_row(block, latent_row, block_table, latent_rows_per_page, BLOCKS_PER_PAGE)
            row_of_rope = _cache_row(block, rope_row, block_table, rope_rows_per_page, BLOCKS_PER_PAGE)
        mbarrier.wait(empty.index(3 * stage), free)
        mbarrier.expect(full.index(3 * stage), 64 * HALF * 2)
        tma.async_copy_global_to_shared(latent_desc, [row, 0], full.index(3 * stage), left.index(stage))
        mbarrier.wait(empty.index(3 * stage + 1), free)
        mbarrier.expect(full.index(3 * stage + 1), 64 * HALF * 2)
        tma.async_copy_global_to_shared(latent_desc, [row, HALF], full.index(3 * stage + 1), right.index(stage))
        if HAS_ROPE:
            mbarrier.wait(empty.index(3 * stage + 2), free)
            mbarrier.expect(full.index(3 * stage + 2), 64 * 64 * 2)
            tma.async_copy_global_to_shared(rope_desc, [row_of_rope, 0], full.index(3 * stage + 2), rope.index(stage))


@gluon.jit
def _shared_own_block(
    query, query_rope, left, right, rope, full, empty, ready, tops, values,
    accumulator, top, total, block, i, zero, scale, length, limit, common,
    WARPGROUP: gl.constexpr, HAS_ROPE: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores and weights of a block of this warpgroup, and its half of the values weighted by them."""
    stage = i % STAGES
    phase = i // STAGES & 1
    scores = gl.zeros([64, 64], gl.float32, _SCORES)
    mbarrier.wait(full.index(3 * stage), phase)
    key = left.index(stage + zero).permute((1, 0))
    scores = warpgroup_mma(query.index(zero), key, scores, use_acc=False, is_async=True)
    mbarrier.wait(full.index(3 * stage + 1), phase)
    key = right.index(stage + zero).permute((1, 0))
    scores = warpgroup_mma(query.index(1 + zero), key, scores, is_async=True)
    if HAS_ROPE:
        mbarrier.wait(full.index(3 * stage + 2), phase)
        scores = warpgroup_mma(query_rope, rope.index(stage + zero).permute((1, 0)), scores, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    if block * 64 + 64 > common:
        scores = _mask(scores, block, limit)
        _zero_rows(left.index(stage), length - block * 64, HALF)
        _zero_rows(right.index(stage), length - block * 64, HALF)

    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    tops.index(WARPGROUP).store(new_top)
    mbarrier.arrive(ready.index(WARPGROUP))
    weights = gl.exp2(scores * scale - new_top[:, None])
    decay = gl.exp2(top - new_top)
    accumulator = _scale_rows(accumulator, decay)
    narrow = weights.to(query.dtype)
    rope.index(stage).store(narrow)
    fence_async_shared()
    mbarrier.arrive(ready.index(2 + WARPGROUP))
    operand = _as_operand(narrow, accumulator)
    pending = warpgroup_mma(operand, values.index(stage), accumulator, is_async=True)
    total = total * decay + gl.sum(weights, 1)
    accumulator = warpgroup_mma_wait(0, [pending])
    mbarrier.arrive(empty.index(3 * stage + WARPGROUP))
    return accumulator, new_top, total


@gluon.jit
def _shared_other_block(
    rope, empty, ready, tops, values, accumulator, top, total, i,
    WARPGROUP: gl.constexpr, HAS_ROPE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """This warpgroup's half of the values of a block whose weights come from the other warpgroup."""
    OWNER: gl.constexpr = 1 - WARPGROUP
    stage = i % STAGES
    turn = i // 2 & 1
    mbarrier.wait(ready.index(OWNER), turn)
    new_top = tops.index(OWNER).load(gl.SliceLayout(1, _SCORES))
    decay = gl.exp2(top - new_top)
    accumulator = _scale_rows(accumulator, decay)
    total *= decay
    mbarrier.wait(ready.index(2 + OWNER), turn)
    pending = warpgroup_mma(rope.index(stage), values.index(stage), accumulator, is_async=True)
    accumulator = warpgroup_mma_wait(0, [pending])
    mbarrier.arrive(empty.index(3 * stage + WARPGROUP))
    if HAS_ROPE:
        mbarrier.arrive(empty.index(3 * stage + 2))
    return accumulator, new_top, total


@gluon.jit
def _shared_warpgroup(
    WARPGROUP: gl.constexpr, IS_CAUSAL: gl.constexpr, HAS_ROPE: gl.constexpr, IS_FINAL: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, arguments,
):  # fmt: skip
    (
        query_latent, query_rope, query_latent_stride_h, query_latent_stride_n, query_rope_stride_h,
        query_rope_stride_n, query, query_rope_tile, left, right, rope, full, empty, ready, tops, totals,
        out, lse, scale, part, first_row, num_rows, out_row, num_queries,
    ) = arguments  # fmt: skip
    cache_seqlens, batch, num_keys, split, num_splits = part
    length, first, last = _part(cache_seqlens, batch, num_keys, split, num_splits, HAS_LENGTHS)
    rows: gl.constexpr = gl.SliceLayout(1, _SCORES)
    _load_query(
        query.index(WARPGROUP), query_latent + HALF * WARPGROUP, first_row, num_rows, num_queries,
        query_latent_stride_h, query_latent_stride_n, HALF,
    )  # fmt: skip
    if HAS_ROPE and WARPGROUP == 0:
        _load_query(
            query_rope_tile, query_rope, first_row, num_rows, num_queries, query_rope_stride_h, query_rope_stride_n, 64
        )
    fence_async_shared()
    mbarrier.arrive(ready.index(4))
    mbarrier.wait(ready.index(4), 0)

    values = left if WARPGROUP == 0 else right
    accumulator = gl.zeros([64, HALF], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16]))
    top = gl.full([64], -1.0e30, gl.float32, rows)
    total = gl.zeros([64], gl.float32, rows)
    limit, common = _row_limits(first_row, num_queries, length, last, IS_CAUSAL)
    # Warpgroup 0 owns blocks 0, 2, ... and warpgroup 1 blocks 1, 3, ...; both take all blocks in order.
    for pair in range((last - first + 1) // 2):
        own = 2 * pair + WARPGROUP
        # Always 0, which the compiler cannot know: else it keeps the addresses of 72 operands in registers.
        zero = pair >> 30
        if WARPGROUP == 1:
            accumulator, top, total = _shared_other_block(
                rope, empty, ready, tops, values, accumulator, top, total, own - 1, WARPGROUP, HAS_ROPE, STAGES
            )
        accumulator, top, total = _shared_own_block(
            query, query_rope_tile, left, right, rope, full, empty, ready, tops, values,
            accumulator, top, total, first + own, own, zero, scale, length, limit, common,
            WARPGROUP, HAS_ROPE, HALF, STAGES,
        )  # fmt: skip
        if WARPGROUP == 0:
            accumulator, top, total = _shared_other_block(
                rope, empty, ready, tops, values, accumulator, top, total, own + 1, WARPGROUP, HAS_ROPE, STAGES
            )

    # Each has summed the weights of its own blocks.
    totals.index(WARPGROUP).store(total)
    mbarrier.arrive(ready.index(5))
    mbarrier.wait(ready.index(5), 0)
    total += totals.index(1 - WARPGROUP).load(rows)
    _store(
        accumulator, top, total, out, lse, first_row, num_rows, out_row, HALF * WARPGROUP, 2 * HALF, HALF,
        IS_FINAL, WARPGROUP == 0,
    )  # fmt: skip


@gluon.jit(do_not_specialize=_RUNTIME)
def _shared_kernel(
    latent_desc, rope_desc, query_latent, query_rope, cache_seqlens, block_table, out, lse,
    scale, num_keys, num_queries, heads_per_latent, latent_heads, num_splits, total_rows,
    query_latent_stride_b, query_latent_stride_h, query_latent_stride_n,
    query_rope_stride_b, query_rope_stride_h, query_rope_stride_n,
    latent_rows_b, latent_rows_h, rope_rows_b, latent_end, rope_end, table_stride_b,
    BLOCKS_PER_PAGE: gl.constexpr, HAS_ROPE: gl.constexpr, IS_CAUSAL: gl.constexpr, HAS_LENGTHS: gl.constexpr,
    IS_FINAL: gl.constexpr, LATENT_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    first_row = gl.program_id(0) * 64
    split = gl.program_id(1)
    batch = gl.program_id(2) // latent_heads
    latent_head = gl.program_id(2) % latent_heads
    num_rows = heads_per_latent * num_queries
    part = (cache_seqlens, batch, num_keys, split, num_splits)
    out_row = split * total_rows + (batch * latent_heads + latent_head) * num_rows

    HALF: gl.constexpr = LATENT_DIM // 2
    dtype: gl.constexpr = latent_desc.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    query = gl.allocate_shared_memory(dtype, [2, 64, HALF], tile)
    query_rope_tile = gl.allocate_shared_memory(dtype, [64, 64], tile)
    left = gl.allocate_shared_memory(dtype, [STAGES, 64, HALF], tile)
    right = gl.allocate_shared_memory(dtype, [STAGES, 64, HALF], tile)
    rope = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], tile)
    tops = gl.allocate_shared_memory(gl.float32, [2, 64], _VECTOR)
    totals = gl.allocate_shared_memory(gl.float32, [2, 64], _VECTOR)
    full = gl.allocate_shared_memory(gl.int64, [3 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [3 * STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [6, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3 * STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(6):
        mbarrier.init(ready.index(i), count=1 if i < 4 else 2)
    fence_async_shared()

    # int64: a batch of queries may be large, one sequence is not.
    first_head = latent_head * heads_per_latent
    query_latent += gl.cast(batch, gl.int64) * query_latent_stride_b + first_head * query_latent_stride_h
    if HAS_ROPE:
        query_rope += gl.cast(batch, gl.int64) * query_rope_stride_b + first_head * query_rope_stride_h
    latent_row = latent_head * latent_rows_h
    rope_row = 0
    if BLOCKS_PER_PAGE == 0:
        latent_row += batch * latent_rows_b
        rope_row += batch * rope_rows_b
    else:
        block_table += batch * table_stride_b
    arguments = (
        query_latent, query_rope, query_latent_stride_h, query_latent_stride_n, query_rope_stride_h,
        query_rope_stride_n, query, query_rope_tile, left, right, rope, full, empty, ready, tops, totals,
        out, lse, scale, part, first_row, num_rows, out_row, num_queries,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_shared_loader, (
                latent_desc, rope_desc, left, right, rope, full, empty, block_table,
                part, latent_row, rope_row, latent_rows_b, rope_rows_b, latent_end, rope_end,
                BLOCKS_PER_PAGE, HAS_ROPE, HAS_LENGTHS, HALF, STAGES,
            )),
            (_shared_warpgroup, (0, IS_CAUSAL, HAS_ROPE, IS_FINAL, HAS_LENGTHS, HALF, STAGES, arguments)),
            (_shared_warpgroup, (1, IS_CAUSAL, HAS_ROPE, IS_FINAL, HAS_LENGTHS, HALF, STAGES, arguments)),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Tiles of 128 rows, latent widths 64, 128 and 256. One program: 128 rows against one part of the keys of one sequence.
# Each warpgroup has 64 of the rows, with an accumulator [64, latent_dim] of its own in registers (128 a thread at width
# 256) and 32 scores a thread; they share the blocks of keys and nothing else, and the softmax of one falls into the
# products of the other by itself. The query and a ring of STAGES blocks of keys lie in shared memory. A program moves
# `keys * (latent_dim + rope_dim) * 2` bytes.
# ---------------------------------------------------------------------------------------------------------------------
@gluon.jit
def _separate_loader(
    latent_desc, rope_desc, latent, rope, full, empty, block_table,
    part, latent_row, rope_row, latent_rows_per_page, rope_rows_per_page,
    BLOCKS_PER_PAGE: gl.constexpr, HAS_ROPE: gl.constexpr, HAS_LENGTHS: gl.constexpr, LATENT_DIM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    cache_seqlens, batch, num_keys, split, num_splits = part
    length, first, last = _part(cache_seqlens, batch, num_keys, split, num_splits, HAS_LENGTHS)
    bytes_of_block: gl.constexpr = 64 * 2 * (LATENT_DIM + (64 if HAS_ROPE else 0))
    for i in range(last - first):
        stage = i % STAGES
        row = _cache_row(first + i, latent_row, block_table, latent_rows_per_page, BLOCKS_PER_PAGE)
        row_of_rope = _cache_row(first + i, rope_row, block_table, rope_rows_per_page, BLOCKS_PER_PAGE)
        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), bytes_of_block)
        tma.async_copy_global_to_shared(latent_desc, [row, 0], full.index(stage), latent.index(stage))
        if HAS_ROPE:
            tma.async_copy_global_to_shared(rope_desc, [row_of_rope, 0], full.index(stage), rope.index(stage))


@gluon.jit
def _separate_warpgroup(
    WARPGROUP: gl.constexpr, IS_CAUSAL: gl.constexpr, HAS_ROPE: gl.constexpr, IS_FINAL: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, LATENT_DIM: gl.constexpr, STAGES: gl.constexpr, arguments,
):  # fmt: skip
    (
        query_latent, query_rope, query_latent_stride_h, query_latent_stride_n, query_rope_stride_h,
        query_rope_stride_n, query, query_rope_tile, latent, rope, full, empty,
        out, lse, scale, part, first_row, num_rows, out_row, num_queries,
    ) = arguments  # fmt: skip
    cache_seqlens, batch, num_keys, split, num_splits = part
    length, first, last = _part(cache_seqlens, batch, num_keys, split, num_splits, HAS_LENGTHS)
    rows: gl.constexpr = gl.SliceLayout(1, _SCORES)
    first_row += 64 * WARPGROUP
    query = query.index(WARPGROUP)
    query_rope_tile = query_rope_tile.index(WARPGROUP)
    _load_query(
        query, query_latent, first_row, num_rows, num_queries, query_latent_stride_h, query_latent_stride_n, LATENT_DIM
    )
    if HAS_ROPE:
        _load_query(
            query_rope_tile, query_rope, first_row, num_rows, num_queries, query_rope_stride_h, query_rope_stride_n, 64
        )
    fence_async_shared()
    _barrier()

    accumulator = gl.zeros(
        [64, LATENT_DIM], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LATENT_DIM, 16])
    )
    top = gl.full([64], -1.0e30, gl.float32, rows)
    total = gl.zeros([64], gl.float32, rows)
    limit, common = _row_limits(first_row, num_queries, length, last, IS_CAUSAL)
    for i in range(last - first):
        stage = i % STAGES
        block = first + i
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        scores = gl.zeros([64, 64], gl.float32, _SCORES)
        scores = warpgroup_mma(query, latent.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True)
        if HAS_ROPE:
            scores = warpgroup_mma(query_rope_tile, rope.index(stage).permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        if block * 64 + 64 > common:
            scores = _mask(scores, block, limit)
            _zero_rows(latent.index(stage), length - block * 64, LATENT_DIM)
            fence_async_shared()
            _barrier()
        new_top = gl.maximum(top, gl.max(scores, 1) * scale)
        weights = gl.exp2(scores * scale - new_top[:, None])
        decay = gl.exp2(top - new_top)
        top = new_top
        accumulator = _scale_rows(accumulator, decay)
        operand = _as_operand(weights.to(query.dtype), accumulator)
        pending = warpgroup_mma(operand, latent.index(stage), accumulator, is_async=True)
        total = total * decay + gl.sum(weights, 1)
        accumulator = warpgroup_mma_wait(0, [pending])
        mbarrier.arrive(empty.index(stage))
    _store(accumulator, top, total, out, lse, first_row, num_rows, out_row, 0, LATENT_DIM, LATENT_DIM, IS_FINAL, True)


@gluon.jit(do_not_specialize=_RUNTIME)
def _separate_kernel(
    latent_desc, rope_desc, query_latent, query_rope, cache_seqlens, block_table, out, lse,
    scale, num_keys, num_queries, heads_per_latent, latent_heads, num_splits, total_rows,
    query_latent_stride_b, query_latent_stride_h, query_latent_stride_n,
    query_rope_stride_b, query_rope_stride_h, query_rope_stride_n,
    latent_rows_b, latent_rows_h, rope_rows_b, latent_end, rope_end, table_stride_b,
    BLOCKS_PER_PAGE: gl.constexpr, HAS_ROPE: gl.constexpr, IS_CAUSAL: gl.constexpr, HAS_LENGTHS: gl.constexpr,
    IS_FINAL: gl.constexpr, LATENT_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    first_row = gl.program_id(0) * 128
    split = gl.program_id(1)
    batch = gl.program_id(2) // latent_heads
    latent_head = gl.program_id(2) % latent_heads
    num_rows = heads_per_latent * num_queries
    part = (cache_seqlens, batch, num_keys, split, num_splits)
    out_row = split * total_rows + (batch * latent_heads + latent_head) * num_rows

    dtype: gl.constexpr = latent_desc.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    query = gl.allocate_shared_memory(dtype, [2, 64, LATENT_DIM], tile)
    query_rope_tile = gl.allocate_shared_memory(dtype, [2, 64, 64], tile)
    latent = gl.allocate_shared_memory(dtype, [STAGES, 64, LATENT_DIM], tile)
    rope = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], tile)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()

    # int64: a batch of queries may be large, one sequence is not.
    first_head = latent_head * heads_per_latent
    query_latent += gl.cast(batch, gl.int64) * query_latent_stride_b + first_head * query_latent_stride_h
    if HAS_ROPE:
        query_rope += gl.cast(batch, gl.int64) * query_rope_stride_b + first_head * query_rope_stride_h
    latent_row = latent_head * latent_rows_h
    rope_row = 0
    if BLOCKS_PER_PAGE == 0:
        latent_row += batch * latent_rows_b
        rope_row += batch * rope_rows_b
    else:
        block_table += batch * table_stride_b
    arguments = (
        query_latent, query_rope, query_latent_stride_h, query_latent_stride_n, query_rope_stride_h,
        query_rope_stride_n, query, query_rope_tile, latent, rope, full, empty,
        out, lse, scale, part, first_row, num_rows, out_row, num_queries,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_separate_loader, (
                latent_desc, rope_desc, latent, rope, full, empty, block_table,
                part, latent_row, rope_row, latent_rows_b, rope_rows_b,
                BLOCKS_PER_PAGE, HAS_ROPE, HAS_LENGTHS, LATENT_DIM, STAGES,
            )),
            (_separate_warpgroup, (0, IS_CAUSAL, HAS_ROPE, IS_FINAL, HAS_LENGTHS, LATENT_DIM, STAGES, arguments)),
            (_separate_warpgroup, (1, IS_CAUSAL, HAS_ROPE, IS_FINAL, HAS_LENGTHS, LATENT_DIM, STAGES, arguments)),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip


def _flat(cache: torch.Tensor, columns: int) -> tuple[TensorDescriptor, int, int, int]:
    """The cache `[batch or pages, heads, rows, dim]` as one matrix of rows for the copy engine.

    Returns:
        The descriptor of blocks of 64 rows; rows between batch entries (or pages) and between heads; all rows.
    """
    stride_b, stride_h, stride_m = cache.stride()[:3]
    rows = (cache.shape[0] - 1) * stride_b + (cache.shape[1] - 1) * stride_h
    rows = rows // stride_m + cache.shape[2]
    layout = gl.NVMMASharedLayout(128, 16, 2)
    descriptor = TensorDescriptor(cache, [rows, cache.shape[3]], [stride_m, 1], [64, columns], layout)
    return descriptor, stride_b // stride_m, stride_h // stride_m, rows


def latent_attention_forward(
    query_latent: torch.Tensor,
    query_rope: torch.Tensor | None,
    latent: torch.Tensor,
    rope_key: torch.Tensor | None,
    scale: float,
    cache_seqlens: torch.Tensor | None,
    block_table: torch.Tensor | None,
    latent_scale: None,
    softcap: None,
    is_causal: bool,
    num_splits: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `out` and `lse` of `latent_attention`, whose checked arguments these are."""
    if query_latent.stride(3) != 1:
        query_latent = query_latent.contiguous()
    if query_rope is not None and query_rope.stride(3) != 1:
        query_rope = query_rope.contiguous()
    batch, heads, num_queries, latent_dim = query_latent.shape
    latent_heads = latent.shape[1]
    page_size = 0 if block_table is None else latent.shape[2]
    num_keys = latent.shape[2] if block_table is None else block_table.shape[1] * page_size
    rows = heads // latent_heads * num_queries

    shared = latent_dim == 512 or (rows <= 64 and latent_dim >= 128)
    row_tiles = triton.cdiv(rows, 64 if shared else 128)
    if num_splits is None:
        tiles = row_tiles * batch * latent_heads
        num_splits = choose_splits(tiles, triton.cdiv(num_keys, 64), multiprocessors(query_latent.device))
    out, lse, partial, partial_lse = allocate(query_latent, num_splits)
    if out.numel() == 0:
        return out, lse

    latent_desc, latent_rows_b, latent_rows_h, latent_end = _flat(latent, latent_dim // 2 if shared else latent_dim)
    rope_desc, rope_rows_b, _, rope_end = _flat(latent if rope_key is None else rope_key, 64)
    kernel = _shared_kernel if shared else _separate_kernel
    stages = 3 if not shared else 2 if latent_dim == 512 else 4
    kernel[row_tiles, num_splits, batch * latent_heads](
        latent_desc, rope_desc, query_latent, query_rope, cache_seqlens, block_table, partial, partial_lse,
        scale * _LOG2E, num_keys, num_queries, heads // latent_heads, latent_heads, num_splits,
        batch * heads * num_queries,
        *query_latent.stride()[:3], *((0, 0, 0) if query_rope is None else query_rope.stride()[:3]),
        latent_rows_b, latent_rows_h, rope_rows_b, latent_end, rope_end,
        0 if block_table is None else block_table.stride(0),
        BLOCKS_PER_PAGE=page_size // 64, HAS_ROPE=rope_key is not None, IS_CAUSAL=is_causal and num_queries > 1,
        HAS_LENGTHS=cache_seqlens is not None, IS_FINAL=num_splits == 1, LATENT_DIM=latent_dim,
        STAGES=stages, num_warps=4,
    )  # fmt: skip
    if num_splits > 1:
        merge_splits(partial, partial_lse, out, lse)
    return out, lse
