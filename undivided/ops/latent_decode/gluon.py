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
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from undivided.ops.latent_decode._splits import choose_splits, merge_splits, multiprocessors

_LOG2E = 1.4426950408889634
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
def _block_range(length, split, num_splits):
    """Blocks first .. last - 1 of a sequence belong to this part; parts differ by one block at most."""
    blocks = gl.cdiv(length, _BLOCK)
    first = split * blocks // num_splits
    last = (split + 1) * blocks // num_splits
    return first, last


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
# Latent width 512: the float32 accumulator of 64 rows is half of a multiprocessor's registers, so two warpgroups share
# it. One program: 64 rows against one part of the keys of one sequence. Warpgroup 0 keeps columns 0 .. 255 of the
# accumulator in registers, warpgroup 1 columns 256 .. 511; each thread holds 128 of the accumulator and 32 scores.
# Blocks of keys go in pairs: warpgroup 0 computes the scores and weights of the even block, warpgroup 1 of the odd
# one, each passes its weights to the other through shared memory, and both multiply both by their half of the values.
# The running maximum goes from the even to the odd block and on, so the two halves always have one scale. The weights
# of a block take the place of its rope keys, which only its scores need: 72 KB of query and two blocks of 72 KB fill
# the 227 KB of shared memory. Warpgroup 1 runs half a pair behind, and the softmax of one overlaps the products of the
# other. A program moves `keys * 576 * 2` bytes; the second tile of 64 rows (128 heads) finds them in the L2 cache.
# ---------------------------------------------------------------------------------------------------------------------
@gluon.jit
def _wide_loader(
    latent_desc, rope_desc, left, right, rope, full, empty, block_table,
    first, num_pairs, last, latent_row, rope_row, latent_rows_per_page, rope_rows_per_page, latent_end, rope_end,
    BLOCKS_PER_PAGE: gl.constexpr, HAS_ROPE: gl.constexpr,
):  # fmt: skip
    for i in range(2 * num_pairs):
        block = first + i
        stage = i % 2
        free = (i // 2 & 1) ^ 1
        # The block that a pair may lack lies past the end of the cache, where the copy engine writes zeros.
        row = latent_end
        row_of_rope = rope_end
        if block < last:
            row = _cache_row(block, latent_row, block_table, latent_rows_per_page, BLOCKS_PER_PAGE)
            row_of_rope = _cache_row(block, rope_row, block_table, rope_rows_per_page, BLOCKS_PER_PAGE)
        mbarrier.wait(empty.index(3 * stage), free)
        mbarrier.expect(full.index(3 * stage), 64 * 256 * 2)
        tma.async_copy_global_to_shared(latent_desc, [row, 0], full.index(3 * stage), left.index(stage))
        mbarrier.wait(empty.index(3 * stage + 1), free)
        mbarrier.expect(full.index(3 * stage + 1), 64 * 256 * 2)
        tma.async_copy_global_to_shared(latent_desc, [row, 256], full.index(3 * stage + 1), right.index(stage))
        if HAS_ROPE:
            mbarrier.wait(empty.index(3 * stage + 2), free)
            mbarrier.expect(full.index(3 * stage + 2), 64 * 64 * 2)
            tma.async_copy_global_to_shared(rope_desc, [row_of_rope, 0], full.index(3 * stage + 2), rope.index(stage))


@gluon.jit
def _wide_scores(
    query, query_rope, left, right, rope, full, phase, STAGE: gl.constexpr, HAS_ROPE: gl.constexpr
):  # fmt: skip
    scores = gl.zeros([64, 64], gl.float32, _SCORES)
    mbarrier.wait(full.index(3 * STAGE), phase)
    scores = warpgroup_mma(query.index(0), left.index(STAGE).permute((1, 0)), scores, use_acc=False, is_async=True)
    mbarrier.wait(full.index(3 * STAGE + 1), phase)
    scores = warpgroup_mma(query.index(1), right.index(STAGE).permute((1, 0)), scores, is_async=True)
    if HAS_ROPE:
        mbarrier.wait(full.index(3 * STAGE + 2), phase)
        scores = warpgroup_mma(query_rope, rope.index(STAGE).permute((1, 0)), scores, is_async=True)
    return warpgroup_mma_wait(0, [scores])


@gluon.jit
def _wide_clear(left, right, kept, STAGE: gl.constexpr):
    _zero_rows(left.index(STAGE), kept, 256)
    _zero_rows(right.index(STAGE), kept, 256)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _wide_even(
    query, query_rope, left, right, rope, full, empty, ready, tops, totals,
    out, lse, scale, length, first, last, num_pairs, first_row, num_rows, out_row, num_queries,
    IS_CAUSAL: gl.constexpr, HAS_ROPE: gl.constexpr, IS_FINAL: gl.constexpr,
):  # fmt: skip
    """Warpgroup 0: scores of the even blocks, columns 0 .. 255 of the output."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    rows: gl.constexpr = gl.SliceLayout(1, _SCORES)
    accumulator = gl.zeros([64, 256], gl.float32, layout)
    top = gl.full([64], -1.0e30, gl.float32, rows)
    total = gl.zeros([64], gl.float32, rows)
    limit, common = _row_limits(first_row, num_queries, length, last, IS_CAUSAL)
    for pair in range(num_pairs):
        phase = pair & 1
        block = first + 2 * pair
        scores = _wide_scores(query, query_rope, left, right, rope, full, phase, 0, HAS_ROPE)
        if block * 64 + 64 > common:
            scores = _mask(scores, block, limit)
            _wide_clear(left, right, length - block * 64, 0)
        even_top = gl.maximum(top, gl.max(scores, 1) * scale)
        weights = gl.exp2(scores * scale - even_top[:, None])
        decay = gl.exp2(top - even_top)
        total = total * decay + gl.sum(weights, 1)
        weights = weights.to(query.dtype)
        rope.index(0).store(weights)
        tops.index(0).store(even_top)
        fence_async_shared()
        mbarrier.arrive(ready.index(0))
        accumulator = _scale_rows(accumulator, decay)
        accumulator = warpgroup_mma(_as_operand(weights, accumulator), left.index(0), accumulator, is_async=True)

        mbarrier.wait(ready.index(1), phase)
        top = tops.index(1).load(rows)
        decay = gl.exp2(even_top - top)
        total *= decay
        accumulator = warpgroup_mma_wait(0, [accumulator])
        mbarrier.arrive(empty.index(0))
        accumulator = _scale_rows(accumulator, decay)
        accumulator = warpgroup_mma(rope.index(1), left.index(1), accumulator, is_async=True)
        accumulator = warpgroup_mma_wait(0, [accumulator])
        mbarrier.arrive(empty.index(3))
        if HAS_ROPE:
            mbarrier.arrive(empty.index(5))

    totals.index(0).store(total)
    mbarrier.arrive(ready.index(2))
    mbarrier.wait(ready.index(3), 0)
    total += totals.index(1).load(rows)
    _store(accumulator, top, total, out, lse, first_row, num_rows, out_row, 0, 512, 256, IS_FINAL, True)


@gluon.jit
def _wide_odd(
    query, query_rope, left, right, rope, full, empty, ready, tops, totals,
    out, lse, scale, length, first, last, num_pairs, first_row, num_rows, out_row, num_queries,
    IS_CAUSAL: gl.constexpr, HAS_ROPE: gl.constexpr, IS_FINAL: gl.constexpr,
):  # fmt: skip
    """Warpgroup 1: scores of the odd blocks, columns 256 .. 511 of the output."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    rows: gl.constexpr = gl.SliceLayout(1, _SCORES)
    accumulator = gl.zeros([64, 256], gl.float32, layout)
    top = gl.full([64], -1.0e30, gl.float32, rows)
    total = gl.zeros([64], gl.float32, rows)
    limit, common = _row_limits(first_row, num_queries, length, last, IS_CAUSAL)
    for pair in range(num_pairs):
        phase = pair & 1
        block = first + 2 * pair + 1
        scores = _wide_scores(query, query_rope, left, right, rope, full, phase, 1, HAS_ROPE)
        if block * 64 + 64 > common:
            scores = _mask(scores, block, limit)
            _wide_clear(left, right, length - block * 64, 1)

        mbarrier.wait(ready.index(0), phase)
        even_top = tops.index(0).load(rows)
        decay = gl.exp2(top - even_top)
        total *= decay
        accumulator = _scale_rows(accumulator, decay)
        accumulator = warpgroup_mma(rope.index(0), right.index(0), accumulator, is_async=True)

        # This softmax runs while the tensor cores work on the even block.
        top = gl.maximum(even_top, gl.max(scores, 1) * scale)
        weights = gl.exp2(scores * scale - top[:, None])
        decay = gl.exp2(even_top - top)
        total = total * decay + gl.sum(weights, 1)
        weights = weights.to(query.dtype)
        rope.index(1).store(weights)
        tops.index(1).store(top)
        fence_async_shared()
        mbarrier.arrive(ready.index(1))

        accumulator = warpgroup_mma_wait(0, [accumulator])
        mbarrier.arrive(empty.index(1))
        if HAS_ROPE:
            mbarrier.arrive(empty.index(2))
        accumulator = _scale_rows(accumulator, decay)
        accumulator = warpgroup_mma(_as_operand(weights, accumulator), right.index(1), accumulator, is_async=True)
        accumulator = warpgroup_mma_wait(0, [accumulator])
        mbarrier.arrive(empty.index(4))

    totals.index(1).store(total)
    mbarrier.arrive(ready.index(3))
    mbarrier.wait(ready.index(2), 0)
    total += totals.index(0).load(rows)
    _store(accumulator, top, total, out, lse, first_row, num_rows, out_row, 256, 512, 256, IS_FINAL, False)


@gluon.jit
def _wide_kernel(
    latent_desc, rope_desc, query_latent, query_rope, cache_seqlens, block_table, out, lse,
    scale, num_keys, num_queries, heads_per_latent, latent_heads, num_splits, total_rows,
    query_latent_stride_b, query_latent_stride_h, query_latent_stride_n,
    query_rope_stride_b, query_rope_stride_h, query_rope_stride_n,
    latent_rows_b, latent_rows_h, latent_end, rope_rows_b, rope_end, table_stride_b,
    BLOCKS_PER_PAGE: gl.constexpr, HAS_ROPE: gl.constexpr, IS_CAUSAL: gl.constexpr, HAS_LENGTHS: gl.constexpr,
    IS_FINAL: gl.constexpr,
):  # fmt: skip
    first_row = gl.program_id(0) * 64
    split = gl.program_id(1)
    batch = gl.program_id(2) // latent_heads
    latent_head = gl.program_id(2) % latent_heads
    num_rows = heads_per_latent * num_queries
    length = num_keys
    if HAS_LENGTHS:
        length = gl.minimum(gl.load(cache_seqlens + batch), num_keys)
    first, last = _block_range(length, split, num_splits)
    num_pairs = (last - first + 1) // 2
    out_row = split * total_rows + (batch * latent_heads + latent_head) * num_rows

    dtype: gl.constexpr = latent_desc.dtype
    half: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    query = gl.allocate_shared_memory(dtype, [2, 64, 256], half)
    query_rope_tile = gl.allocate_shared_memory(dtype, [64, 64], half)
    left = gl.allocate_shared_memory(dtype, [2, 64, 256], half)
    right = gl.allocate_shared_memory(dtype, [2, 64, 256], half)
    rope = gl.allocate_shared_memory(dtype, [2, 64, 64], half)
    tops = gl.allocate_shared_memory(gl.float32, [2, 64], _VECTOR)
    totals = gl.allocate_shared_memory(gl.float32, [2, 64], _VECTOR)
    full = gl.allocate_shared_memory(gl.int64, [6, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [6, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(6):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(4):
        mbarrier.init(ready.index(i), count=1)

    # int64: a batch of queries may be large, one sequence is not.
    query_latent += gl.cast(batch, gl.int64) * query_latent_stride_b + latent_head * heads_per_latent * query_latent_stride_h
    _load_query(
        query.index(0), query_latent, first_row, num_rows, num_queries,
        query_latent_stride_h, query_latent_stride_n, 256,
    )  # fmt: skip
    _load_query(
        query.index(1), query_latent + 256, first_row, num_rows, num_queries,
        query_latent_stride_h, query_latent_stride_n, 256,
    )  # fmt: skip
    if HAS_ROPE:
        query_rope += gl.cast(batch, gl.int64) * query_rope_stride_b + latent_head * heads_per_latent * query_rope_stride_h
        _load_query(
            query_rope_tile, query_rope, first_row, num_rows, num_queries, query_rope_stride_h, query_rope_stride_n, 64
        )
    fence_async_shared()
    gl.thread_barrier()

    latent_row = latent_head * latent_rows_h
    rope_row = 0
    if BLOCKS_PER_PAGE == 0:
        latent_row += batch * latent_rows_b
        rope_row += batch * rope_rows_b
    else:
        block_table += batch * table_stride_b
    arguments = (
        query, query_rope_tile, left, right, rope, full, empty, ready, tops, totals,
        out, lse, scale, length, first, last, num_pairs, first_row, num_rows, out_row, num_queries,
        IS_CAUSAL, HAS_ROPE, IS_FINAL,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_wide_even, arguments),
            (_wide_odd, arguments),
            (_wide_loader, (
                latent_desc, rope_desc, left, right, rope, full, empty, block_table,
                first, num_pairs, last, latent_row, rope_row, latent_rows_b, rope_rows_b, latent_end, rope_end,
                BLOCKS_PER_PAGE, HAS_ROPE,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Latent widths 64, 128 and 256: each warpgroup has an accumulator [64, latent_dim] of its own in registers (128 a
# thread at width 256, and 64 for the scores of two blocks). One program: 128 rows against one part of the keys of one
# sequence, 64 rows a warpgroup, both on the same blocks of keys; or, if there are no more than 64 rows, the warpgroups
# take turns at the blocks and their sums are merged as if they were two parts. The scores of the next block are
# computed while the softmax of this one runs. The query and a ring of STAGES blocks of keys fill the shared memory. A
# program moves `keys * (latent_dim + rope_dim) * 2` bytes.
# ---------------------------------------------------------------------------------------------------------------------
@gluon.jit
def _narrow_loader(
    latent_desc, rope_desc, latent, rope, full, empty, block_table,
    first, last, latent_row, rope_row, latent_rows_per_page, rope_rows_per_page,
    BLOCKS_PER_PAGE: gl.constexpr, HAS_ROPE: gl.constexpr, LATENT_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
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
def _narrow_scores(query, query_rope, latent, rope, HAS_ROPE: gl.constexpr):
    """Starts the scores of a block."""
    scores = gl.zeros([64, 64], gl.float32, _SCORES)
    scores = warpgroup_mma(query, latent.permute((1, 0)), scores, use_acc=False, is_async=True)
    if HAS_ROPE:
        scores = warpgroup_mma(query_rope, rope.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _narrow_warpgroup(
    query, query_rope, latent, rope, full, empty,
    out, lse, scale, length, first, last, first_row, num_rows, out_row, num_queries, start,
    STEP: gl.constexpr, IS_CAUSAL: gl.constexpr, HAS_ROPE: gl.constexpr, IS_FINAL: gl.constexpr,
    LATENT_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Every STEP-th block of keys from the `start`-th on, for 64 rows."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LATENT_DIM, 16])
    rows: gl.constexpr = gl.SliceLayout(1, _SCORES)
    accumulator = warpgroup_mma_init(gl.zeros([64, LATENT_DIM], gl.float32, layout))
    top = gl.full([64], -1.0e30, gl.float32, rows)
    total = gl.zeros([64], gl.float32, rows)
    limit, common = _row_limits(first_row, num_queries, length, last, IS_CAUSAL)

    num_blocks = last - first
    mbarrier.wait(full.index(start), 0, pred=start < num_blocks)
    scores = _narrow_scores(query, query_rope, latent.index(start), rope.index(start), HAS_ROPE)
    scores = warpgroup_mma_wait(0, [scores])
    for i in range(start, num_blocks, STEP):
        stage = i % STAGES
        block = first + i
        if block * 64 + 64 > common:
            scores = _mask(scores, block, limit)
            _zero_rows(latent.index(stage), length - block * 64, LATENT_DIM)
            fence_async_shared()
            gl.thread_barrier()
        new_top = gl.maximum(top, gl.max(scores, 1) * scale)
        weights = gl.exp2(scores * scale - new_top[:, None])
        decay = gl.exp2(top - new_top)
        total = total * decay + gl.sum(weights, 1)
        top = new_top

        # Freed before the next block is waited for: it may be this very place that the next block lands in.
        values = warpgroup_mma_wait(0, [accumulator])
        mbarrier.arrive(empty.index((i + STAGES - STEP) % STAGES), pred=i >= STEP)
        # Behind the last block this computes scores of whatever is there, and nobody uses them.
        ahead = i + STEP
        mbarrier.wait(full.index(ahead % STAGES), ahead // STAGES & 1, pred=ahead < num_blocks)
        next_scores = _narrow_scores(
            query, query_rope, latent.index(ahead % STAGES), rope.index(ahead % STAGES), HAS_ROPE
        )
        values = _scale_rows(values, decay)
        operand = _as_operand(weights.to(query.dtype), values)
        accumulator = warpgroup_mma(operand, latent.index(stage), values, is_async=True)
        scores = warpgroup_mma_wait(1, [next_scores])

    values = warpgroup_mma_wait(0, [accumulator])
    _store(values, top, total, out, lse, first_row, num_rows, out_row, 0, LATENT_DIM, LATENT_DIM, IS_FINAL, True)


@gluon.jit
def _narrow_kernel(
    latent_desc, rope_desc, query_latent, query_rope, cache_seqlens, block_table, out, lse,
    scale, num_keys, num_queries, heads_per_latent, latent_heads, num_splits, total_rows,
    query_latent_stride_b, query_latent_stride_h, query_latent_stride_n,
    query_rope_stride_b, query_rope_stride_h, query_rope_stride_n,
    latent_rows_b, latent_rows_h, rope_rows_b, table_stride_b,
    BLOCKS_PER_PAGE: gl.constexpr, HAS_ROPE: gl.constexpr, IS_CAUSAL: gl.constexpr, HAS_LENGTHS: gl.constexpr,
    IS_FINAL: gl.constexpr, LATENT_DIM: gl.constexpr, STAGES: gl.constexpr, TAKE_TURNS: gl.constexpr,
):  # fmt: skip
    TILES: gl.constexpr = 1 if TAKE_TURNS else 2
    first_row = gl.program_id(0) * 64 * TILES
    split = gl.program_id(1)
    batch = gl.program_id(2) // latent_heads
    latent_head = gl.program_id(2) % latent_heads
    num_rows = heads_per_latent * num_queries
    length = num_keys
    if HAS_LENGTHS:
        length = gl.minimum(gl.load(cache_seqlens + batch), num_keys)
    first, last = _block_range(length, split, num_splits)

    dtype: gl.constexpr = latent_desc.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    query = gl.allocate_shared_memory(dtype, [TILES, 64, LATENT_DIM], tile)
    query_rope_tile = gl.allocate_shared_memory(dtype, [TILES, 64, 64], tile)
    latent = gl.allocate_shared_memory(dtype, [STAGES, 64, LATENT_DIM], tile)
    rope = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], tile)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=TILES)

    # int64: a batch of queries may be large, one sequence is not.
    query_latent += gl.cast(batch, gl.int64) * query_latent_stride_b + latent_head * heads_per_latent * query_latent_stride_h
    if HAS_ROPE:
        query_rope += gl.cast(batch, gl.int64) * query_rope_stride_b + latent_head * heads_per_latent * query_rope_stride_h
    for i in gl.static_range(TILES):
        _load_query(
            query.index(i), query_latent, first_row + i * 64, num_rows, num_queries,
            query_latent_stride_h, query_latent_stride_n, LATENT_DIM,
        )  # fmt: skip
        if HAS_ROPE:
            _load_query(
                query_rope_tile.index(i), query_rope, first_row + i * 64, num_rows, num_queries,
                query_rope_stride_h, query_rope_stride_n, 64,
            )  # fmt: skip
    fence_async_shared()
    gl.thread_barrier()

    latent_row = latent_head * latent_rows_h
    rope_row = 0
    if BLOCKS_PER_PAGE == 0:
        latent_row += batch * latent_rows_b
        rope_row += batch * rope_rows_b
    else:
        block_table += batch * table_stride_b
    rows_before = (batch * latent_heads + latent_head) * num_rows
    if TAKE_TURNS:
        second = 0
        start = 1
        second_row = first_row
        out_row = 2 * split * total_rows + rows_before
        second_out_row = out_row + total_rows
    else:
        second = 1
        start = 0
        second_row = first_row + 64
        out_row = split * total_rows + rows_before
        second_out_row = out_row
    gl.warp_specialize(
        [
            (_narrow_warpgroup, (
                query.index(0), query_rope_tile.index(0), latent, rope, full, empty,
                out, lse, scale, length, first, last, first_row, num_rows, out_row, num_queries, 0,
                3 - TILES, IS_CAUSAL, HAS_ROPE, IS_FINAL, LATENT_DIM, STAGES,
            )),
            (_narrow_warpgroup, (
                query.index(second), query_rope_tile.index(second), latent, rope, full, empty,
                out, lse, scale, length, first, last, second_row, num_rows, second_out_row, num_queries, start,
                3 - TILES, IS_CAUSAL, HAS_ROPE, IS_FINAL, LATENT_DIM, STAGES,
            )),
            (_narrow_loader, (
                latent_desc, rope_desc, latent, rope, full, empty, block_table,
                first, last, latent_row, rope_row, latent_rows_b, rope_rows_b,
                BLOCKS_PER_PAGE, HAS_ROPE, LATENT_DIM, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
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


def _attend(
    query_latent, query_rope, latent, rope_key, scale, cache_seqlens, block_table, is_causal, num_splits
):
    batch, heads, num_queries, latent_dim = query_latent.shape
    latent_heads = latent.shape[1]
    page_size = 0 if block_table is None else latent.shape[2]
    num_keys = latent.shape[2] if block_table is None else block_table.shape[1] * page_size
    rows = heads // latent_heads * num_queries
    num_rows = batch * heads * num_queries
    wide = latent_dim == 512
    take_turns = not wide and rows <= 64
    row_tiles = triton.cdiv(rows, 64 if wide or take_turns else 128)
    if num_splits is None:
        num_splits = choose_splits(
            row_tiles * batch * latent_heads, triton.cdiv(num_keys, 64), multiprocessors(query_latent.device)
        )
    parts = 2 * num_splits if take_turns else num_splits
    out = query_latent.new_empty((batch, heads, num_queries, latent_dim))
    lse = query_latent.new_empty((batch, heads, num_queries), dtype=torch.float32)
    partial, partial_lse = out, lse
    if parts > 1:
        partial = query_latent.new_empty((parts, num_rows, latent_dim), dtype=torch.float32)
        partial_lse = query_latent.new_empty((parts, num_rows), dtype=torch.float32)
    latent_desc, latent_rows_b, latent_rows_h, latent_end = _flat(latent, min(latent_dim, 256))
    rope_desc, rope_rows_b, _, rope_end = _flat(latent if rope_key is None else rope_key, 64)
    arguments = (
        latent_desc, rope_desc, query_latent, query_rope, cache_seqlens, block_table, partial, partial_lse,
        scale * _LOG2E, num_keys, num_queries, heads // latent_heads, latent_heads, num_splits, num_rows,
        *query_latent.stride()[:3], *((0, 0, 0) if query_rope is None else query_rope.stride()[:3]),
        latent_rows_b, latent_rows_h,
    )  # fmt: skip
    table_stride = 0 if block_table is None else block_table.stride(0)
    options = dict(
        BLOCKS_PER_PAGE=page_size // 64, HAS_ROPE=rope_key is not None, IS_CAUSAL=is_causal and num_queries > 1,
        HAS_LENGTHS=cache_seqlens is not None, IS_FINAL=parts == 1, num_warps=4,
    )  # fmt: skip
    grid = (row_tiles, num_splits, batch * latent_heads)
    if wide:
        _wide_kernel[grid](*arguments, latent_end, rope_rows_b, rope_end, table_stride, **options)
    else:
        _narrow_kernel[grid](
            *arguments, rope_rows_b, table_stride, **options,
            LATENT_DIM=latent_dim, STAGES=4 if take_turns else 3, TAKE_TURNS=take_turns,
        )  # fmt: skip
    if parts > 1:
        merge_splits(partial, partial_lse, out, lse)
    return out, lse
