"""Two warpgroups share the accumulator of one tile of 64 rows, at latent widths 128, 256 and 512.

At width 512 the float32 accumulator of 64 rows is half of the registers of a multiprocessor, so two
warpgroups share it. One program: 64 rows against one part of the keys of one sequence. Each warpgroup keeps
half of the columns of the accumulator in registers (128 a thread at width 512), and 32 scores a thread.
They take turns at the blocks of keys: the owner of a block computes its scores and weights, passes the
weights on through shared memory, and both multiply them by their half of the values. The running maximum
goes from block to block, so that the two halves always have one scale. While one warpgroup does a softmax,
the other may work. The weights of a block take the place of its rope keys, which only its scores need: at
width 512 the query (72 KB) and two blocks (72 KB each) fill the 227 KB of shared memory. A half of a block
is free again as soon as it has been multiplied: what limits these kernels is how much of the cache is on
its way at any time. A program moves `keys * (latent_dim + rope_dim) * 2` bytes; a second tile of 64 rows
(128 heads) finds them in the L2 cache.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from undivided.ops.latent_decode._hopper import (
    RUNTIME,
    SCORES,
    VECTOR,
    as_operand,
    cache_row,
    load_query,
    mask_scores,
    part_of_sequence,
    release_dependents,
    row_limits,
    scale_rows,
    store_rows,
    zero_rows,
)


@gluon.jit
def _shared_loader(
    latent_desc, rope_desc, left, right, rope, full, empty, block_table,
    part, latent_row, rope_row, latent_rows_per_page, rope_rows_per_page, latent_end, rope_end,
    BLOCKS_PER_PAGE: gl.constexpr, HAS_ROPE: gl.constexpr, HAS_LENGTHS: gl.constexpr, HALF: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    cache_seqlens, batch, num_keys, split, num_splits = part
    length, first, last = part_of_sequence(cache_seqlens, batch, num_keys, split, num_splits, HAS_LENGTHS)
    for i in range((last - first + 1) // 2 * 2):
        block = first + i
        stage = i % STAGES
        free = (i // STAGES & 1) ^ 1
        # The block that a pair may lack lies past the end of the cache, where the copy engine writes zeros.
        row = latent_end
        row_of_rope = rope_end
        if block < last:
            row = cache_row(block, latent_row, block_table, latent_rows_per_page, BLOCKS_PER_PAGE)
            row_of_rope = cache_row(block, rope_row, block_table, rope_rows_per_page, BLOCKS_PER_PAGE)
        mbarrier.wait(empty.index(3 * stage), free)
        mbarrier.expect(full.index(3 * stage), 64 * HALF * 2)
        tma.async_copy_global_to_shared(latent_desc, [row, 0], full.index(3 * stage), left.index(stage))
        mbarrier.wait(empty.index(3 * stage + 1), free)
        mbarrier.expect(full.index(3 * stage + 1), 64 * HALF * 2)
        tma.async_copy_global_to_shared(
            latent_desc, [row, HALF], full.index(3 * stage + 1), right.index(stage)
        )
        if HAS_ROPE:
            mbarrier.wait(empty.index(3 * stage + 2), free)
            mbarrier.expect(full.index(3 * stage + 2), 64 * 64 * 2)
            tma.async_copy_global_to_shared(
                rope_desc, [row_of_rope, 0], full.index(3 * stage + 2), rope.index(stage)
            )


@gluon.jit
def _shared_own_block(
    query, query_rope, left, right, rope, full, empty, ready, tops, values,
    accumulator, top, total, block, i, zero, scale, length, limit, common,
    WARPGROUP: gl.constexpr, HAS_ROPE: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores and weights of a block of this warpgroup, and its half of the values weighted by them."""
    stage = i % STAGES
    phase = i // STAGES & 1
    scores = gl.zeros([64, 64], gl.float32, SCORES)
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
        scores = mask_scores(scores, block, limit)
        zero_rows(left.index(stage), length - block * 64, HALF)
        zero_rows(right.index(stage), length - block * 64, HALF)

    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    tops.index(WARPGROUP).store(new_top)
    mbarrier.arrive(ready.index(WARPGROUP))
    weights = gl.exp2(scores * scale - new_top[:, None])
    decay = gl.exp2(top - new_top)
    accumulator = scale_rows(accumulator, decay)
    narrow = weights.to(query.dtype)
    rope.index(stage).store(narrow)
    fence_async_shared()
    mbarrier.arrive(ready.index(2 + WARPGROUP))
    operand = as_operand(narrow, accumulator)
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
    new_top = tops.index(OWNER).load(gl.SliceLayout(1, SCORES))
    decay = gl.exp2(top - new_top)
    accumulator = scale_rows(accumulator, decay)
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
    length, first, last = part_of_sequence(cache_seqlens, batch, num_keys, split, num_splits, HAS_LENGTHS)
    rows: gl.constexpr = gl.SliceLayout(1, SCORES)
    load_query(
        query.index(WARPGROUP), query_latent + HALF * WARPGROUP, first_row, num_rows, num_queries,
        query_latent_stride_h, query_latent_stride_n, HALF,
    )  # fmt: skip
    if HAS_ROPE and WARPGROUP == 0:
        load_query(
            query_rope_tile, query_rope, first_row, num_rows, num_queries, query_rope_stride_h,
            query_rope_stride_n, 64,
        )  # fmt: skip
    fence_async_shared()
    mbarrier.arrive(ready.index(4))
    mbarrier.wait(ready.index(4), 0)

    values = left if WARPGROUP == 0 else right
    accumulator = gl.zeros([64, HALF], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16]))
    top = gl.full([64], -1.0e30, gl.float32, rows)
    total = gl.zeros([64], gl.float32, rows)
    limit, common = row_limits(first_row, num_queries, length, last, IS_CAUSAL)
    # Warpgroup 0 owns blocks 0, 2, ... and warpgroup 1 blocks 1, 3, ...; both take all blocks in order.
    for pair in range((last - first + 1) // 2):
        own = 2 * pair + WARPGROUP
        # Always 0, which the compiler cannot know: else it keeps the addresses of 72 operands in registers.
        zero = pair >> 30
        if WARPGROUP == 1:
            accumulator, top, total = _shared_other_block(
                rope, empty, ready, tops, values, accumulator, top, total, own - 1, WARPGROUP, HAS_ROPE,
                STAGES,
            )  # fmt: skip
        accumulator, top, total = _shared_own_block(
            query, query_rope_tile, left, right, rope, full, empty, ready, tops, values,
            accumulator, top, total, first + own, own, zero, scale, length, limit, common,
            WARPGROUP, HAS_ROPE, HALF, STAGES,
        )  # fmt: skip
        if WARPGROUP == 0:
            accumulator, top, total = _shared_other_block(
                rope, empty, ready, tops, values, accumulator, top, total, own + 1, WARPGROUP, HAS_ROPE,
                STAGES,
            )  # fmt: skip

    # Each has summed the weights of its own blocks.
    totals.index(WARPGROUP).store(total)
    mbarrier.arrive(ready.index(5))
    mbarrier.wait(ready.index(5), 0)
    total += totals.index(1 - WARPGROUP).load(rows)
    store_rows(
        accumulator, top, total, out, lse, first_row, num_rows, out_row, HALF * WARPGROUP, 2 * HALF, HALF,
        IS_FINAL, WARPGROUP == 0,
    )  # fmt: skip


@gluon.jit(do_not_specialize=RUNTIME)
def shared_kernel(
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
    tops = gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR)
    totals = gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR)
    # Three barriers a stage: left half, right half, rope keys.
    full = gl.allocate_shared_memory(gl.int64, [3 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [3 * STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [6, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3 * STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    # The maxima 0, 1 and the weights 2, 3 of the warpgroups' blocks, the query 4, the sums of weights 5.
    for i in gl.static_range(6):
        mbarrier.init(ready.index(i), count=1 if i < 4 else 2)
    fence_async_shared()
    if not IS_FINAL:
        release_dependents()

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
