"""A cache of float8 rows under a tile of 64 rows of queries, at latent widths 256 and 512.

The tensor cores multiply float8 only with float8, and values only where the keys' axis is the contiguous one,
so every row is widened to float16 on its way: a conversion of two numbers an instruction, exact, where
bfloat16 takes five. One program has three parts. Four warps convert: the copy engine lands blocks of KEYS rows
in a ring of RING blocks, from which they write STAGES blocks of float16, each row's factor beside it. Two
warpgroups compute as in `hopper_shared`, in turns at the blocks, each with half of the columns of the
accumulator [64, latent_dim]. Key m is `f_m c_m`: its factor goes to its scores, and as `log2 f_m` into the
exponent of its weight, whatever its size; the sum of the weights is taken without it. A query row is divided by
a power of two, so that float16 holds it. A program moves `keys * (latent_dim + rope_dim + 4)` bytes. In
shared memory: the query, STAGES blocks of two bytes a number, RING of one, and the weights of two blocks; at
width 512 that leaves room for blocks of 32 keys.
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
    BLOCK,
    COPY,
    RUNTIME,
    SCORES,
    VECTOR,
    barrier,
    cache_row,
    part_of_sequence,
    release_dependents,
    row_limits,
    scale_rows,
    store_rows,
)

# A half warp reads 128 contiguous bytes of a block, and a quarter of one writes 128.
CONVERT: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
CONVERT_ROPE: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
FACTORS: gl.constexpr = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _begin(
    latent_desc, rope_desc, raw, raw_rope, landed, block_table, i, count, first, latent_row, rope_row,
    latent_rows_per_page, rope_rows_per_page,
    BLOCKS_PER_PAGE: gl.constexpr, HAS_ROPE: gl.constexpr, LATENT_DIM: gl.constexpr, KEYS: gl.constexpr,
    RING: gl.constexpr,
):  # fmt: skip
    """Lets the copy engine fetch block i of this part."""
    PER_BLOCK: gl.constexpr = BLOCK // KEYS
    if i < count:
        slot = i % RING
        block = first + i // PER_BLOCK
        behind = i % PER_BLOCK * KEYS
        mbarrier.expect(landed.index(slot), KEYS * (LATENT_DIM + (64 if HAS_ROPE else 0)))
        row = cache_row(block, latent_row, block_table, latent_rows_per_page, BLOCKS_PER_PAGE) + behind
        tma.async_copy_global_to_shared(latent_desc, [row, 0], landed.index(slot), raw.index(slot))
        if HAS_ROPE:
            row = cache_row(block, rope_row, block_table, rope_rows_per_page, BLOCKS_PER_PAGE) + behind
            tma.async_copy_global_to_shared(rope_desc, [row, 0], landed.index(slot), raw_rope.index(slot))


@gluon.jit
def _factors(
    row_scale, block_table, i, count, first, scale_row, scale_rows_per_page, length,
    BLOCKS_PER_PAGE: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """The factors of the rows of block i; 1 where there is no row."""
    PER_BLOCK: gl.constexpr = BLOCK // KEYS
    block = gl.minimum(first + i // PER_BLOCK, first + (count - 1) // PER_BLOCK)
    row = cache_row(block, scale_row, block_table, scale_rows_per_page, BLOCKS_PER_PAGE)
    key = gl.arange(0, KEYS, FACTORS)
    inside = first * BLOCK + i * KEYS + key < gl.minimum(length, first * BLOCK + count * KEYS)
    return gl.load(row_scale + row + i % PER_BLOCK * KEYS + key, mask=inside, other=1.0)


@gluon.jit
def _widen(target, source, kept, LAYOUT: gl.constexpr, IS_FULL: gl.constexpr, KEYS: gl.constexpr):
    """Writes a tile of float8 as float16, its rows from `kept` on as zeros: there may be NaN in them."""
    values = source.load(LAYOUT).to(gl.float16)
    if not IS_FULL:
        row = gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
        values = gl.where((row < kept)[:, None], values, gl.zeros_like(values))
    target.store(values)


@gluon.jit
def _widen_block(
    raw, raw_rope, left, right, rope, kept,
    HAS_ROPE: gl.constexpr, HALF: gl.constexpr, KEYS: gl.constexpr, IS_FULL: gl.constexpr,
):  # fmt: skip
    for column in gl.static_range(0, HALF, 128):
        _widen(left.slice(column, 128, 1), raw.slice(column, 128, 1), kept, CONVERT, IS_FULL, KEYS)
        _widen(right.slice(column, 128, 1), raw.slice(HALF + column, 128, 1), kept, CONVERT, IS_FULL, KEYS)
    if HAS_ROPE:
        _widen(rope, raw_rope, kept, CONVERT_ROPE, IS_FULL, KEYS)


@gluon.jit
def _fp8_converter(
    latent_desc, rope_desc, raw, raw_rope, left, right, rope, factors, landed, full, empty, block_table, row_scale,
    part, latent_row, rope_row, scale_row, latent_rows_per_page, rope_rows_per_page, scale_rows_per_page,
    BLOCKS_PER_PAGE: gl.constexpr, HAS_ROPE: gl.constexpr, HAS_LENGTHS: gl.constexpr, HALF: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    cache_seqlens, batch, num_keys, split, num_splits = part
    length, first, last = part_of_sequence(cache_seqlens, batch, num_keys, split, num_splits, HAS_LENGTHS)
    count = (last - first) * (BLOCK // KEYS)
    for i in range(RING):
        _begin(
            latent_desc, rope_desc, raw, raw_rope, landed, block_table, i, count, first, latent_row, rope_row,
            latent_rows_per_page, rope_rows_per_page, BLOCKS_PER_PAGE, HAS_ROPE, 2 * HALF, KEYS, RING,
        )  # fmt: skip
    if count > 0:
        # One block ahead: its load must not stand between the blocks.
        ahead = _factors(
            row_scale, block_table, 0, count, first, scale_row, scale_rows_per_page, length, BLOCKS_PER_PAGE, KEYS,
        )  # fmt: skip
        for i in range((count + 1) // 2 * 2):
            factor = ahead
            ahead = _factors(
                row_scale, block_table, i + 1, count, first, scale_row, scale_rows_per_page, length,
                BLOCKS_PER_PAGE, KEYS,
            )  # fmt: skip
            slot = i % RING
            stage = i % STAGES
            # The block that a pair may lack is zero, and never seen.
            kept = 0
            if i < count:
                kept = length - first * BLOCK - i * KEYS
                mbarrier.wait(landed.index(slot), i // RING & 1)
            mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
            if kept >= KEYS:
                _widen_block(
                    raw.index(slot), raw_rope.index(slot), left.index(stage), right.index(stage),
                    rope.index(stage), kept, HAS_ROPE, HALF, KEYS, True,
                )  # fmt: skip
            else:
                _widen_block(
                    raw.index(slot), raw_rope.index(slot), left.index(stage), right.index(stage),
                    rope.index(stage), kept, HAS_ROPE, HALF, KEYS, False,
                )  # fmt: skip
            factors.index(stage).store(factor)
            fence_async_shared()
            barrier()
            mbarrier.arrive(full.index(stage))
            _begin(
                latent_desc, rope_desc, raw, raw_rope, landed, block_table, i + RING, count, first, latent_row,
                rope_row, latent_rows_per_page, rope_rows_per_page, BLOCKS_PER_PAGE, HAS_ROPE, 2 * HALF, KEYS,
                RING,
            )  # fmt: skip


@gluon.jit
def _query_peak(
    peak, source, first_row, num_rows, num_queries, stride_h, stride_n, WIDTH: gl.constexpr
):  # fmt: skip
    """The larger of `peak` and the magnitudes of 64 query rows, still apart in 64 columns."""
    row = first_row + gl.arange(0, BLOCK, gl.SliceLayout(1, COPY))
    column = gl.arange(0, 64, gl.SliceLayout(0, COPY))
    offset = row // num_queries * stride_h + row % num_queries * stride_n
    for first in gl.static_range(0, WIDTH, 64):
        values = gl.load(
            source + offset[:, None] + (first + column)[None, :], mask=(row < num_rows)[:, None], other=0.0
        ).to(gl.float32)
        peak = gl.maximum(peak, gl.maximum(values, -values))
    return peak


@gluon.jit
def _load_scaled_query(
    tile, factor, source, first_row, num_rows, num_queries, stride_h, stride_n, WIDTH: gl.constexpr
):  # fmt: skip
    """Copies 64 query rows times their factors to shared memory; rows that do not exist are zero."""
    row = first_row + gl.arange(0, BLOCK, gl.SliceLayout(1, COPY))
    column = gl.arange(0, 64, gl.SliceLayout(0, COPY))
    offset = row // num_queries * stride_h + row % num_queries * stride_n
    for first in gl.static_range(0, WIDTH, 64):
        values = gl.load(
            source + offset[:, None] + (first + column)[None, :], mask=(row < num_rows)[:, None], other=0.0
        ).to(gl.float32)
        tile.slice(first, 64, 1).store((values * factor[:, None]).to(gl.float16))


@gluon.jit
def _fp8_own_block(
    query, query_rope, left, right, rope, factors, weights_tile, full, empty, ready, tops, values,
    accumulator, top, total, key, i, zero, scale, limit, common,
    WARPGROUP: gl.constexpr, HAS_ROPE: gl.constexpr, TILE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores and weights of a block of this warpgroup, and its half of the values weighted by them."""
    stage = i % STAGES
    mbarrier.wait(full.index(stage), i // STAGES & 1)
    scores = gl.zeros([64, KEYS], gl.float32, TILE)
    across = left.index(stage + zero).permute((1, 0))
    scores = warpgroup_mma(query.index(zero), across, scores, use_acc=False, is_async=True)
    across = right.index(stage + zero).permute((1, 0))
    scores = warpgroup_mma(query.index(1 + zero), across, scores, is_async=True)
    if HAS_ROPE:
        scores = warpgroup_mma(query_rope, rope.index(stage + zero).permute((1, 0)), scores, is_async=True)
    factor = factors.index(stage).load(gl.SliceLayout(0, TILE))
    exponent = gl.log2(factor)
    scores = warpgroup_mma_wait(0, [scores])
    scores = scores * scale[:, None] * factor[None, :] + exponent[None, :]
    if key + KEYS > common:
        column = key + gl.arange(0, KEYS, gl.SliceLayout(0, TILE))
        scores = gl.where(column[None, :] < limit[:, None], scores, float("-inf"))

    new_top = gl.maximum(top, gl.max(scores, 1))
    tops.index(WARPGROUP).store(new_top)
    mbarrier.arrive(ready.index(WARPGROUP))
    weights = gl.exp2(scores - new_top[:, None])
    decay = gl.exp2(top - new_top)
    accumulator = scale_rows(accumulator, decay)
    weights_tile.index(WARPGROUP).store(weights.to(gl.float16))
    fence_async_shared()
    mbarrier.arrive(ready.index(2 + WARPGROUP))
    # From shared memory, where the other warpgroup finds them too.
    pending = warpgroup_mma(weights_tile.index(WARPGROUP), values.index(stage), accumulator, is_async=True)
    total = total * decay + gl.sum(weights * gl.exp2(-exponent)[None, :], 1)
    accumulator = warpgroup_mma_wait(0, [pending])
    mbarrier.arrive(empty.index(stage))
    return accumulator, new_top, total


@gluon.jit
def _fp8_other_block(
    weights_tile, empty, ready, tops, values, accumulator, top, total, i,
    WARPGROUP: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """This warpgroup's half of the values of a block whose weights come from the other warpgroup."""
    OWNER: gl.constexpr = 1 - WARPGROUP
    stage = i % STAGES
    turn = i // 2 & 1
    mbarrier.wait(ready.index(OWNER), turn)
    new_top = tops.index(OWNER).load(gl.SliceLayout(1, TILE))
    decay = gl.exp2(top - new_top)
    accumulator = scale_rows(accumulator, decay)
    total *= decay
    mbarrier.wait(ready.index(2 + OWNER), turn)
    pending = warpgroup_mma(weights_tile.index(OWNER), values.index(stage), accumulator, is_async=True)
    accumulator = warpgroup_mma_wait(0, [pending])
    mbarrier.arrive(empty.index(stage))
    return accumulator, new_top, total


@gluon.jit
def _fp8_warpgroup(
    WARPGROUP: gl.constexpr, IS_CAUSAL: gl.constexpr, HAS_ROPE: gl.constexpr, IS_FINAL: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, HALF: gl.constexpr, TILE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    arguments,
):  # fmt: skip
    (
        query_latent, query_rope, query_latent_stride_h, query_latent_stride_n, query_rope_stride_h,
        query_rope_stride_n, query, query_rope_tile, left, right, rope, factors, weights_tile, full, empty, ready,
        tops, totals, out, lse, scale, part, first_row, num_rows, out_row, num_queries,
    ) = arguments  # fmt: skip
    cache_seqlens, batch, num_keys, split, num_splits = part
    length, first, last = part_of_sequence(cache_seqlens, batch, num_keys, split, num_splits, HAS_LENGTHS)
    rows: gl.constexpr = gl.SliceLayout(1, TILE)
    # Each has half of the columns, and the largest number of a row may be in any.
    peak = _query_peak(
        gl.zeros([64, 64], gl.float32, COPY), query_latent, first_row, num_rows, num_queries,
        query_latent_stride_h, query_latent_stride_n, 2 * HALF,
    )  # fmt: skip
    if HAS_ROPE:
        peak = _query_peak(
            peak, query_rope, first_row, num_rows, num_queries, query_rope_stride_h, query_rope_stride_n, 64
        )
    largest = gl.max(peak, 1)
    largest = gl.where(largest > 0, largest, gl.full_like(largest, 1.0))
    # A power of two: no digit of the query is lost.
    largest = gl.exp2(gl.log2(largest).to(gl.int32).to(gl.float32))
    _load_scaled_query(
        query.index(WARPGROUP), 1 / largest, query_latent + HALF * WARPGROUP, first_row, num_rows, num_queries,
        query_latent_stride_h, query_latent_stride_n, HALF,
    )  # fmt: skip
    if HAS_ROPE and WARPGROUP == 0:
        _load_scaled_query(
            query_rope_tile, 1 / largest, query_rope, first_row, num_rows, num_queries, query_rope_stride_h,
            query_rope_stride_n, 64,
        )  # fmt: skip
    row_scale = gl.convert_layout(largest * scale, rows)
    fence_async_shared()
    mbarrier.arrive(ready.index(4))
    mbarrier.wait(ready.index(4), 0)

    values = left if WARPGROUP == 0 else right
    accumulator = gl.zeros([64, HALF], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16]))
    top = gl.full([64], -1.0e30, gl.float32, rows)
    total = gl.zeros([64], gl.float32, rows)
    limit, common = row_limits(first_row, num_queries, length, last, IS_CAUSAL)
    limit = gl.convert_layout(limit, rows)
    # Warpgroup 0 owns blocks 0, 2, ... and warpgroup 1 blocks 1, 3, ...; both take all blocks in order.
    for pair in range(((last - first) * (BLOCK // KEYS) + 1) // 2):
        own = 2 * pair + WARPGROUP
        # Always 0, which the compiler cannot know: else it keeps the addresses of all operands in registers.
        zero = pair >> 30
        if WARPGROUP == 1:
            accumulator, top, total = _fp8_other_block(
                weights_tile, empty, ready, tops, values, accumulator, top, total, own - 1, WARPGROUP, TILE, STAGES,
            )  # fmt: skip
        accumulator, top, total = _fp8_own_block(
            query, query_rope_tile, left, right, rope, factors, weights_tile, full, empty, ready, tops, values,
            accumulator, top, total, first * BLOCK + own * KEYS, own, zero, row_scale, limit, common,
            WARPGROUP, HAS_ROPE, TILE, KEYS, STAGES,
        )  # fmt: skip
        if WARPGROUP == 0:
            accumulator, top, total = _fp8_other_block(
                weights_tile, empty, ready, tops, values, accumulator, top, total, own + 1, WARPGROUP, TILE, STAGES,
            )  # fmt: skip

    # Each has summed the weights of its own blocks.
    totals.index(WARPGROUP).store(total)
    mbarrier.arrive(ready.index(5))
    mbarrier.wait(ready.index(5), 0)
    total += totals.index(1 - WARPGROUP).load(rows)
    store_rows(
        accumulator, gl.convert_layout(top, gl.SliceLayout(1, SCORES)),
        gl.convert_layout(total, gl.SliceLayout(1, SCORES)), out, lse, first_row, num_rows, out_row,
        HALF * WARPGROUP, 2 * HALF, HALF, IS_FINAL, WARPGROUP == 0,
    )  # fmt: skip


@gluon.jit(do_not_specialize=[*RUNTIME, "scale_rows_b"])
def fp8_kernel(
    latent_desc, rope_desc, query_latent, query_rope, cache_seqlens, block_table, row_scale, out, lse,
    scale, num_keys, num_queries, heads_per_latent, latent_heads, num_splits, total_rows,
    query_latent_stride_b, query_latent_stride_h, query_latent_stride_n,
    query_rope_stride_b, query_rope_stride_h, query_rope_stride_n,
    latent_rows_b, latent_rows_h, rope_rows_b, scale_rows_b, table_stride_b,
    BLOCKS_PER_PAGE: gl.constexpr, HAS_ROPE: gl.constexpr, IS_CAUSAL: gl.constexpr, HAS_LENGTHS: gl.constexpr,
    IS_FINAL: gl.constexpr, LATENT_DIM: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    RING: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    first_row = gl.program_id(0) * 64
    split = gl.program_id(1)
    batch = gl.program_id(2) // latent_heads
    latent_head = gl.program_id(2) % latent_heads
    num_rows = heads_per_latent * num_queries
    part = (cache_seqlens, batch, num_keys, split, num_splits)
    out_row = split * total_rows + (batch * latent_heads + latent_head) * num_rows

    HALF: gl.constexpr = LATENT_DIM // 2
    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    query = gl.allocate_shared_memory(gl.float16, [2, 64, HALF], tile)
    query_rope_tile = gl.allocate_shared_memory(gl.float16, [64, 64], tile)
    raw = gl.allocate_shared_memory(
        latent_desc.dtype, [RING, KEYS, LATENT_DIM], gl.NVMMASharedLayout(128, 8, 2)
    )
    raw_rope = gl.allocate_shared_memory(latent_desc.dtype, [RING, KEYS, 64], gl.NVMMASharedLayout(64, 8, 2))
    left = gl.allocate_shared_memory(gl.float16, [STAGES, KEYS, HALF], tile)
    right = gl.allocate_shared_memory(gl.float16, [STAGES, KEYS, HALF], tile)
    rope = gl.allocate_shared_memory(gl.float16, [STAGES, KEYS, 64], tile)
    weights_tile = gl.allocate_shared_memory(gl.float16, [2, 64, KEYS], gl.NVMMASharedLayout(2 * KEYS, 16, 2))
    factors = gl.allocate_shared_memory(gl.float32, [STAGES, KEYS], VECTOR)
    tops = gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR)
    totals = gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR)
    landed = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [6, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(landed.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
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
    scale_row = 0
    if BLOCKS_PER_PAGE == 0:
        latent_row += batch * latent_rows_b
        rope_row += batch * rope_rows_b
        scale_row += batch * scale_rows_b
    else:
        block_table += batch * table_stride_b
    arguments = (
        query_latent, query_rope, query_latent_stride_h, query_latent_stride_n, query_rope_stride_h,
        query_rope_stride_n, query, query_rope_tile, left, right, rope, factors, weights_tile, full, empty, ready,
        tops, totals, out, lse, scale, part, first_row, num_rows, out_row, num_queries,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_fp8_converter, (
                latent_desc, rope_desc, raw, raw_rope, left, right, rope, factors, landed, full, empty, block_table,
                row_scale, part, latent_row, rope_row, scale_row, latent_rows_b, rope_rows_b, scale_rows_b,
                BLOCKS_PER_PAGE, HAS_ROPE, HAS_LENGTHS, HALF, KEYS, STAGES, RING,
            )),
            (_fp8_warpgroup, (
                0, IS_CAUSAL, HAS_ROPE, IS_FINAL, HAS_LENGTHS, HALF, TILE, KEYS, STAGES, arguments,
            )),
            (_fp8_warpgroup, (
                1, IS_CAUSAL, HAS_ROPE, IS_FINAL, HAS_LENGTHS, HALF, TILE, KEYS, STAGES, arguments,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip
