"""What the Gluon kernels for Hopper share: layouts, and functions of one warpgroup."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Triton 3.8 calls it `barrier`.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

# Sizes that change from call to call: one compiled kernel serves them all.
RUNTIME = [
    "num_keys", "num_queries", "heads_per_latent", "latent_heads", "num_splits", "total_rows",
    "latent_rows_b", "latent_rows_h", "rope_rows_b", "table_stride_b", "latent_end", "rope_end",
]  # fmt: skip
# Rows of a block of keys, and of a warpgroup's tile of queries.
BLOCK: gl.constexpr = gl.constexpr(64)
# Eight threads move 128 contiguous bytes of a row.
COPY: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
SCORES: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
VECTOR: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def release_dependents():
    """Lets the next kernel be launched once all programs have come here; it waits for their end by itself."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def cache_row(block, base_row, block_table, rows_per_page, BLOCKS_PER_PAGE: gl.constexpr):
    """First row of a block of keys in the flattened cache; a page is one block or several."""
    if BLOCKS_PER_PAGE == 0:
        row = base_row + block * BLOCK
    else:
        page = gl.load(block_table + block // BLOCKS_PER_PAGE)
        row = base_row + page * rows_per_page + block % BLOCKS_PER_PAGE * BLOCK
    return row


@gluon.jit
def load_query(tile, source, first_row, num_rows, num_queries, stride_h, stride_n, WIDTH: gl.constexpr):
    """Copies 64 query rows to shared memory; rows that do not exist are zero."""
    row = first_row + gl.arange(0, BLOCK, gl.SliceLayout(1, COPY))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, COPY))
    offset = row // num_queries * stride_h + row % num_queries * stride_n
    values = gl.load(source + offset[:, None] + column[None, :], mask=(row < num_rows)[:, None], other=0.0)
    tile.store(values)


@gluon.jit
def zero_rows(tile, kept, WIDTH: gl.constexpr):
    """Zeroes the rows of a block of keys from `kept` on: a weight of zero does not silence a NaN."""
    row = gl.arange(0, BLOCK, gl.SliceLayout(1, COPY))
    for first in gl.static_range(0, WIDTH, 64):
        part = tile.slice(first, 64, 1)
        values = part.load(COPY)
        part.store(gl.where((row < kept)[:, None], values, gl.zeros_like(values)))


@gluon.jit
def mask_scores(scores, block, limit):
    """Scores with -inf where the key of the block is at or behind the limit of the row."""
    key = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
    return gl.where(key[None, :] < limit[:, None], scores, float("-inf"))


@gluon.jit
def scale_rows(tensor, factor):
    return tensor * gl.convert_layout(factor, gl.SliceLayout(1, tensor.type.layout))[:, None]


@gluon.jit
def as_operand(weights, like):
    """The weights as left operand, in registers, of a product that is added to `like`."""
    return gl.convert_layout(weights, gl.DotOperandLayout(0, like.type.layout, 2))


@gluon.jit
def store_rows(
    accumulator, top, total, out, lse, first_row, num_rows, out_row, first_column,
    LATENT_DIM: gl.constexpr, WIDTH: gl.constexpr, IS_FINAL: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """Divides by the sum of the weights; writes columns first_column .. of the rows, and their log-sums."""
    seen = total > 0
    safe = gl.where(seen, total, gl.full_like(total, 1.0))
    accumulator = scale_rows(accumulator, gl.where(seen, 1 / safe, gl.zeros_like(total)))
    layout: gl.constexpr = accumulator.type.layout
    row = first_row + gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
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
        row = first_row + gl.arange(0, BLOCK, gl.SliceLayout(1, SCORES))
        gl.store(lse + (out_row + row).to(gl.int64), log, mask=row < num_rows)


@gluon.jit
def part_of_sequence(cache_seqlens, batch, num_keys, split, num_splits, HAS_LENGTHS: gl.constexpr):
    """Length of the sequence; its blocks first .. last - 1 are this part. Parts differ by at most one."""
    length = num_keys
    if HAS_LENGTHS:
        length = gl.minimum(gl.load(cache_seqlens + batch), num_keys)
    blocks = gl.cdiv(length, BLOCK)
    return length, split * blocks // num_splits, (split + 1) * blocks // num_splits


@gluon.jit
def row_limits(first_row, num_queries, length, last, IS_CAUSAL: gl.constexpr):
    """Each row sees the keys of this part before its limit; all rows see those before `common`."""
    row = first_row + gl.arange(0, BLOCK, gl.SliceLayout(1, SCORES))
    limit = length + gl.zeros_like(row)
    common = length
    if IS_CAUSAL:
        limit = limit - num_queries + 1 + row % num_queries
        common = length - num_queries + 1
    # The block that a pair of blocks may lack is behind the end of this part.
    return gl.minimum(limit, last * BLOCK), gl.minimum(common, last * BLOCK)
