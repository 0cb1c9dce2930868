"""Two warpgroups with a tile of 64 rows each, at latent widths 64, 128 and 256.

One program: 128 rows against one part of the keys of one sequence. Each warpgroup has 64 of the rows, with
an accumulator [64, latent_dim] of its own in registers (128 a thread at width 256) and 32 scores a thread;
they share the blocks of keys and nothing else, and the softmax of one falls into the products of the other
by itself. The query and a ring of STAGES blocks of keys lie in shared memory. A program moves `keys *
(latent_dim + rope_dim) * 2` bytes.
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
    as_operand,
    barrier,
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
def _separate_loader(
    latent_desc, rope_desc, latent, rope, full, empty, block_table,
    part, latent_row, rope_row, latent_rows_per_page, rope_rows_per_page,
    BLOCKS_PER_PAGE: gl.constexpr, HAS_ROPE: gl.constexpr, HAS_LENGTHS: gl.constexpr,
    LATENT_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    cache_seqlens, batch, num_keys, split, num_splits = part
    length, first, last = part_of_sequence(cache_seqlens, batch, num_keys, split, num_splits, HAS_LENGTHS)
    bytes_of_block: gl.constexpr = 64 * 2 * (LATENT_DIM + (64 if HAS_ROPE else 0))
    for i in range(last - first):
        stage = i % STAGES
        row = cache_row(first + i, latent_row, block_table, latent_rows_per_page, BLOCKS_PER_PAGE)
        row_of_rope = cache_row(first + i, rope_row, block_table, rope_rows_per_page, BLOCKS_PER_PAGE)
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
    length, first, last = part_of_sequence(cache_seqlens, batch, num_keys, split, num_splits, HAS_LENGTHS)
    rows: gl.constexpr = gl.SliceLayout(1, SCORES)
    first_row += 64 * WARPGROUP
    query = query.index(WARPGROUP)
    query_rope_tile = query_rope_tile.index(WARPGROUP)
    load_query(
        query, query_latent, first_row, num_rows, num_queries, query_latent_stride_h, query_latent_stride_n,
        LATENT_DIM,
    )  # fmt: skip
    if HAS_ROPE:
        load_query(
            query_rope_tile, query_rope, first_row, num_rows, num_queries, query_rope_stride_h,
            query_rope_stride_n, 64,
        )  # fmt: skip
    fence_async_shared()
    barrier()

    accumulator = gl.zeros(
        [64, LATENT_DIM], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LATENT_DIM, 16])
    )
    top = gl.full([64], -1.0e30, gl.float32, rows)
    total = gl.zeros([64], gl.float32, rows)
    limit, common = row_limits(first_row, num_queries, length, last, IS_CAUSAL)
    for i in range(last - first):
        stage = i % STAGES
        block = first + i
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        scores = gl.zeros([64, 64], gl.float32, SCORES)
        scores = warpgroup_mma(
            query, latent.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True
        )
        if HAS_ROPE:
            scores = warpgroup_mma(query_rope_tile, rope.index(stage).permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        if block * 64 + 64 > common:
            scores = mask_scores(scores, block, limit)
            zero_rows(latent.index(stage), length - block * 64, LATENT_DIM)
            fence_async_shared()
            barrier()
        new_top = gl.maximum(top, gl.max(scores, 1) * scale)
        weights = gl.exp2(scores * scale - new_top[:, None])
        decay = gl.exp2(top - new_top)
        top = new_top
        accumulator = scale_rows(accumulator, decay)
        operand = as_operand(weights.to(query.dtype), accumulator)
        pending = warpgroup_mma(operand, latent.index(stage), accumulator, is_async=True)
        total = total * decay + gl.sum(weights, 1)
        accumulator = warpgroup_mma_wait(0, [pending])
        mbarrier.arrive(empty.index(stage))
    store_rows(
        accumulator,
        top,
        total,
        out,
        lse,
        first_row,
        num_rows,
        out_row,
        0,
        LATENT_DIM,
        LATENT_DIM,
        IS_FINAL,
        True,
    )


@gluon.jit(do_not_specialize=RUNTIME)
def separate_kernel(
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
            (_separate_warpgroup, (
                0, IS_CAUSAL, HAS_ROPE, IS_FINAL, HAS_LENGTHS, LATENT_DIM, STAGES, arguments,
            )),
            (_separate_warpgroup, (
                1, IS_CAUSAL, HAS_ROPE, IS_FINAL, HAS_LENGTHS, LATENT_DIM, STAGES, arguments,
            )),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip
