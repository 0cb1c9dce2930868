"""Attention with distances in Triton: the products with the vectors of distances are shifted inside the kernel.

Of a square tile of queries and keys the distances are `place + a - c`, for row a and column c: a band of twice as many
as there are keys. The products of the queries with the band, `[a, e]`, are read at `e = a - c + BLOCK` by way of shared
memory. Nothing is handed on from one tile of keys to the next: to make half of the products twice takes fewer
instructions than to carry them, and these kernels wait for instructions, not for the tensor cores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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

# Sizes that change from call to call and speed nothing up: a kernel is not compiled anew for each.
RUNTIME = ("num_queries", "num_keys", "heads", "key_group")
# Rows of zeros before and behind the tables: a band, and the next one's biases, reach this far out at most.
MARGIN = tl.constexpr(256)


@triton.jit
def by_key(tile, BLOCK: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Element `[a, a - c + BLOCK]` of `[BLOCK, 2 BLOCK]` at `[a, c]`; with KEYS_FIRST all of it transposed.

    The gather goes through shared memory. There an element's place begins with the bits in which the lanes of a warp
    differ that hold the result of a product, so that neither writing nor reading has bank conflicts; and it is reckoned
    in parts of eight, so that the places of what a thread reads differ by constants.
    """
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    shift = column % 8 - row % 8
    high = column // 8 - row // 8
    if not KEYS_FIRST:
        shift = -shift
        high = -high
    low = shift & 7
    high += BLOCK // 8 - (shift < 0).to(tl.int32)
    if KEYS_FIRST:
        place = (high * (BLOCK // 8) + column // 8) * 64 + column % 2 * 32 + low * 4 + column // 2 % 4
        flat = tl.reshape(tile, [BLOCK // 4, 8, BLOCK // 8, 4, 2])
    else:
        place = (row // 8 * (BLOCK // 4) + high) * 64 + low % 2 * 32 + row % 8 * 4 + low // 2
        flat = tl.reshape(tile, [BLOCK // 8, 8, BLOCK // 4, 4, 2])
    flat = tl.reshape(tl.permute(flat, [0, 2, 4, 1, 3]), [2 * BLOCK * BLOCK])
    return tl.reshape(tl.gather(flat, tl.reshape(place, [BLOCK * BLOCK]), 0), [BLOCK, BLOCK])


@triton.jit
def by_distance(tile, like, BLOCK: tl.constexpr):
    """Element `[a, a - e + BLOCK]` of `[BLOCK, BLOCK]` at `[a, e]`, `[BLOCK, 2 BLOCK]`; zero where there is none.

    `like` is a tile of products of that shape, of which nothing is added: its layout is one that products can read
    from registers, and the compiler would choose another.
    """
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, 2 * BLOCK)[None, :]
    shift = row % 8 - column % 8
    low = shift & 7
    high = row // 8 - column // 8 + BLOCK // 8 - (shift < 0).to(tl.int32)
    place = (row // 8 * (BLOCK // 8) + (high & (BLOCK // 8 - 1))) * 64 + low % 2 * 32 + row % 8 * 4 + low // 2
    flat = tl.permute(tl.reshape(tile, [BLOCK // 8, 8, BLOCK // 8, 4, 2]), [0, 2, 4, 1, 3])
    spread = tl.gather(tl.reshape(flat, [BLOCK * BLOCK]), tl.reshape(place, [2 * BLOCK * BLOCK]), 0)
    inside = (column > row) & (column <= row + BLOCK)
    return tl.where(inside, tl.reshape(spread, [BLOCK, 2 * BLOCK]), like * 0.0)


@triton.jit
def load_band(base, first, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a head's vectors from distance `first` on, which may lie in the margin."""
    column = tl.arange(0, COLUMNS)
    base += tl.cast(first + MARGIN, tl.int64) * WIDTH
    offset = tl.arange(0, ROWS)[:, None] * WIDTH + column[None, :]
    if WIDTH < COLUMNS:
        return tl.load(base + offset, mask=(column < WIDTH)[None, :], other=0.0)
    return tl.load(base + offset)


@triton.jit
def load_biases(base, first, ROWS: tl.constexpr):
    """Biases of a head from distance `first` on, which may lie in the margin."""
    return tl.load(base + (first + MARGIN) + tl.arange(0, ROWS))


@triton.jit(do_not_specialize=RUNTIME[1:])
def _content_kernel(
    key, content_bias, content, num_keys, heads, key_group, key_stride_b, key_stride_h, key_stride_m,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the content bias adds to all scores of a key, `u . k`: one program for a tile of keys of a query head."""
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = tl.arange(0, BLOCK_D)
    u = tl.load(content_bias + head * HEAD_DIM + column, mask=column < HEAD_DIM, other=0.0).to(tl.float32)
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    k = load_tile(key, first, key_stride_m, num_keys, HEAD_DIM, BLOCK, BLOCK_D, True)
    rows = first + tl.arange(0, BLOCK)
    content += (batch * heads + head) * num_keys
    tl.store(content + rows, tl.sum(k.to(tl.float32) * u[None, :], 1), mask=rows < num_keys)


@triton.jit
def _add_keys(
    accumulator, top, total, b, q, key, value, content, vectors, biases, first, last, place, num_keys, scale,
    key_stride, value_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds keys `first .. last - 1` to the running softmax of queries of which the first stands at key `place`.

    `b` are the biases of the distances to the first tile; they are loaded a step ahead.
    """
    a = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, BLOCK)
    for start in tl.range(first, last, BLOCK):
        k = load_tile(key, start, key_stride, num_keys, HEAD_DIM, BLOCK, BLOCK_D, MASKED)
        if MASKED:
            of_key = tl.load(content + start + c, mask=start + c < num_keys, other=0.0)
        else:
            of_key = tl.load(content + start + c)
        r = load_band(vectors, place - start - BLOCK, HEAD_DIM, 2 * BLOCK, BLOCK_D)
        b_next = load_biases(biases, place - start - 2 * BLOCK, 2 * BLOCK)
        scores = by_key(tl.dot(q, tl.trans(r), input_precision=PRECISION) + b[None, :], BLOCK, False)
        scores = tl.dot(q, tl.trans(k), scores + of_key[None, :], input_precision=PRECISION)
        b = b_next
        if MASKED:
            scores = tl.where(start + c[None, :] <= place + a, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        v = load_tile(value, start, value_stride, num_keys, HEAD_DIM, BLOCK, BLOCK_D, MASKED)
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision=PRECISION)
    return accumulator, top, total, b


# One program: a tile of queries of one head against all keys that they see. In registers: the float32 accumulator, the
# scores of a tile and its products with a band of distances. It does `8 * head_dim` operations a pair, half of them for
# distances, and moves three tiles of float32 through shared memory; from the L2 cache it reads keys, values and bands.
@triton.jit(do_not_specialize=RUNTIME)
def _forward_kernel(
    query, key, value, content, vectors, biases, out, lse, scale_log2, num_queries, num_keys, heads, key_group,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    # The longest rows first: what runs last is short.
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK
    place = first_row + num_keys - num_queries
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // key_group) * value_stride_h
    content += (batch * heads + head) * num_keys
    vectors += tl.cast(head, tl.int64) * (num_keys + 2 * MARGIN) * HEAD_DIM
    biases += head * (num_keys + 2 * MARGIN)
    q = load_tile(query, first_row, query_stride_n, num_queries, HEAD_DIM, BLOCK, BLOCK_D, True)
    b = load_biases(biases, place - BLOCK, 2 * BLOCK)

    # Finite, so that differences of maxima are never NaN; the exponential of -inf minus it is 0.
    top = tl.full([BLOCK], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    accumulator = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    # All rows of the tile see the keys before `common`.
    common = (place + 1) // BLOCK * BLOCK
    accumulator, top, total, b = _add_keys(
        accumulator, top, total, b, q, key, value, content, vectors, biases, 0, common, place, num_keys,
        scale_log2, key_stride_m, value_stride_m, HEAD_DIM, BLOCK_D, BLOCK, False, PRECISION,
    )  # fmt: skip
    accumulator, top, total, b = _add_keys(
        accumulator, top, total, b, q, key, value, content, vectors, biases, common, place + BLOCK, place, num_keys,
        scale_log2, key_stride_m, value_stride_m, HEAD_DIM, BLOCK_D, BLOCK, True, PRECISION,
    )  # fmt: skip

    rows = first_row + tl.arange(0, BLOCK)
    row_inside = rows < num_queries
    column = tl.arange(0, BLOCK_D)
    offset = ((batch * num_queries + rows) * heads + head)[:, None] * HEAD_DIM + column[None, :]
    inside = row_inside[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(out + offset, (accumulator / total[:, None]).to(out.dtype.element_ty), mask=inside)
    log_sum = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + (batch * heads + head) * num_queries + rows, log_sum, mask=row_inside)


# Tiles are square: `rows` are both queries and keys.
_FORWARD = (Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 1), Tiling(32, 32, 4, 1))
# Without tensor cores a product is written out, and a large one takes minutes to compile.
_FORWARD_FLOAT32 = (Tiling(16, 16, 4, 1),)


def forward_tiling(head_dim: int, element_size: int, shared_memory: int) -> Tiling:
    """Returns the tiling of the forward kernel: the first that fits.

    Args:
        head_dim: width of a query.
        element_size: bytes of an element.
        shared_memory: bytes a program may use.
    """
    return first_fitting(
        _FORWARD if element_size == 2 else _FORWARD_FLOAT32,
        # Queries; keys, values and a band in flight; the products with the band, in float32.
        lambda t: t.rows * (1 + 4 * t.num_stages) * head_dim + 2 * t.rows**2 * 4 // element_size,
        shared_memory // element_size,
    )


def tables(query, key, content_bias, distance_vectors, distance_bias):
    """Returns the tables as kernels read them.

    These are what the content bias gives each key, `[batch, heads, keys]`; and by head, between margins of zeros, the
    vectors of distances in the precision of the products, and the biases.
    """
    batch, heads, _, head_dim = query.shape
    num_keys = key.shape[2]
    content = query.new_empty((batch, heads, num_keys), dtype=torch.float32)
    block = 128
    _content_kernel[batch * heads, triton.cdiv(num_keys, block)](
        key, content_bias.contiguous(), content, num_keys, heads, heads // key.shape[1], *key.stride()[:3],
        HEAD_DIM=head_dim, BLOCK_D=block_width(head_dim), BLOCK=block, num_warps=4,
    )  # fmt: skip
    margins = MARGIN.value, MARGIN.value
    vectors = F.pad(distance_vectors.to(query.dtype).transpose(0, 1), (0, 0, *margins)).contiguous()
    return content, vectors, F.pad(distance_bias.T.float(), margins).contiguous()


def forward(query, key, value, content_bias, distance_vectors, distance_bias, scale, *, tiling=None):
    """Returns the output and the log-sum, `[batch, heads, queries]`."""
    batch, heads, num_queries, head_dim = query.shape
    query, key, value = map(rows_contiguous, (query, key, value))
    # [batch, queries, heads, head_dim] in memory: the projection that follows reads the heads of a token side by side.
    out = query.new_empty((batch, num_queries, heads, head_dim)).transpose(1, 2)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    if query.numel() == 0:
        return out, lse
    width = block_width(head_dim)
    tiling = tiling or forward_tiling(width, query.element_size(), shared_memory(query.device))
    _forward_kernel[batch * heads, triton.cdiv(num_queries, tiling.rows)](
        query, key, value, *tables(query, key, content_bias, distance_vectors, distance_bias), out, lse,
        scale * LOG2E, num_queries, key.shape[2], heads, heads // key.shape[1],
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        HEAD_DIM=head_dim, BLOCK_D=width, BLOCK=tiling.rows, PRECISION=precision(query),
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return out, lse
