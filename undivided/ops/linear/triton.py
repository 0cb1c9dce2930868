"""Linear attention in Triton: keys and values into partial buffers, these into one, queries through it.

Features, rotations, weights of tokens, the local term and the modulation are computed where they are read: nothing of
the size of the tokens is written but the output. Pairs of channels are kept as two halves, `[tokens, head_dim / 2]`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from undivided.ops._flash import block_width, rows_contiguous

# How many programs should share the keys of all heads.
_PROGRAMS = 528


@triton.jit
def feature(x, NAME: tl.constexpr):
    if NAME == "elu1":
        x = tl.where(x >= 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    elif NAME == "softplus":
        x = tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))
    elif NAME == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def load_pairs(base, place, count, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """The first and the second channels of pairs in float32, and which of them are inside of rows and columns."""
    column, pair = tl.arange(0, COLUMNS), tl.arange(0, COLUMNS // 2)
    inside = (place < count)[:, None] & (column < WIDTH)[None, :]
    # int64: a token's stride times a million tokens passes 2**31.
    x = tl.load(base + place.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)
    first, second = tl.split(tl.reshape(x.to(tl.float32), [TILE, COLUMNS // 2, 2]))
    return first, second, (place < count)[:, None] & (pair < WIDTH // 2)[None, :]


@triton.jit
def _features(
    base, place, count, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, NAME: tl.constexpr
):  # fmt: skip
    """Features of the first and of the second channels of pairs; zero outside."""
    first, second, inside = load_pairs(base, place, count, stride, WIDTH, COLUMNS, TILE)
    return tl.where(inside, feature(first, NAME), 0.0), tl.where(inside, feature(second, NAME), 0.0)


@triton.jit
def rotated(first, second, cos, sin, place, count, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    pair = tl.arange(0, COLUMNS // 2)
    offset = place.to(tl.int64)[:, None] * (WIDTH // 2) + pair[None, :]
    inside = (place < count)[:, None] & (pair < WIDTH // 2)[None, :]
    c = tl.load(cos + offset, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + offset, mask=inside, other=0.0).to(tl.float32)
    return first * c - second * s, second * c + first * s


@triton.jit
def pair_vector(base, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The first and the second channels of a vector of float32."""
    pair = tl.arange(0, COLUMNS // 2)
    inside = pair < WIDTH // 2
    return tl.load(base + 2 * pair, mask=inside, other=0.0), tl.load(
        base + 2 * pair + 1, mask=inside, other=0.0
    )


# One program: a share of one head's queries, whose features it adds up. It reads them once.
@triton.jit(do_not_specialize=("count", "tiles"))
def _mean_kernel(
    query, sums, count, heads, tiles, stride_b, stride_h, stride_n,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    index, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query += (index // heads) * stride_b + (index % heads) * stride_h
    sum_first = tl.zeros([COLUMNS // 2], tl.float32)
    sum_second = tl.zeros([COLUMNS // 2], tl.float32)
    for tile in range(share * tiles, min((share + 1) * tiles, tl.cdiv(count, TILE))):
        place = tile * TILE + tl.arange(0, TILE)
        first, second = _features(query, place, count, stride_n, WIDTH, COLUMNS, TILE, NAME)
        sum_first += tl.sum(first, 0)
        sum_second += tl.sum(second, 0)
    pair = tl.arange(0, COLUMNS // 2)
    sums += (index * tl.num_programs(1) + share) * WIDTH
    tl.store(sums + 2 * pair, sum_first, mask=pair < WIDTH // 2)
    tl.store(sums + 2 * pair + 1, sum_second, mask=pair < WIDTH // 2)


# One program: a share of one head's keys and values, read once. In registers: its part of the buffer, of the sum of
# keys, and the running maximum and sum of a softmax over tokens; all are written, for the next kernel to add up.
@triton.jit(do_not_specialize=("count", "tiles"))
def _buffer_kernel(
    key, value, cos, sin, mean, buffers, key_sums, tops, totals, scale, count, heads, tiles,
    key_stride_b, key_stride_h, key_stride_n, value_stride_b, value_stride_h, value_stride_n,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr, TILE: tl.constexpr,
    NAME: tl.constexpr, ROTATE: tl.constexpr, CONTEXT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    index, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key += (index // heads) * key_stride_b + (index % heads) * key_stride_h
    value += (index // heads) * value_stride_b + (index % heads) * value_stride_h
    if CONTEXT:
        mean_first, mean_second = pair_vector(mean + index * WIDTH, WIDTH, COLUMNS)
    columns = tl.arange(0, VALUES)
    buffer_first = tl.zeros([COLUMNS // 2, VALUES], tl.float32)
    buffer_second = tl.zeros([COLUMNS // 2, VALUES], tl.float32)
    sum_first = tl.zeros([COLUMNS // 2], tl.float32)
    sum_second = tl.zeros([COLUMNS // 2], tl.float32)
    # Finite, so that differences of maxima are never NaN.
    top = -1.0e30
    total = 0.0
    for tile in range(share * tiles, min((share + 1) * tiles, tl.cdiv(count, TILE))):
        place = tile * TILE + tl.arange(0, TILE)
        first, second = _features(key, place, count, key_stride_n, WIDTH, COLUMNS, TILE, NAME)
        inside = (place < count)[:, None] & (columns < VALUE_WIDTH)[None, :]
        pointers = value + place.to(tl.int64)[:, None] * value_stride_n + columns[None, :]
        v = tl.load(pointers, mask=inside, other=0.0)
        if CONTEXT:
            logits = tl.sum(first * mean_first[None, :], 1) + tl.sum(second * mean_second[None, :], 1)
            logits = tl.where(place < count, logits * scale, -1.0e30)
            new_top = tl.maximum(top, tl.max(logits, 0))
            weights = tl.exp(logits - new_top)
            decay = tl.exp(top - new_top)
            top = new_top
            total = total * decay + tl.sum(weights, 0)
            first *= weights[:, None]
            second *= weights[:, None]
            buffer_first *= decay
            buffer_second *= decay
            sum_first *= decay
            sum_second *= decay
        sum_first += tl.sum(first, 0)
        sum_second += tl.sum(second, 0)
        if ROTATE:
            first, second = rotated(first, second, cos, sin, place, count, WIDTH, COLUMNS)
        if v.dtype == tl.bfloat16:
            # Rounded as the values are; of float16, whose range is narrow, features and their weights are not.
            first, second = first.to(tl.bfloat16), second.to(tl.bfloat16)
        else:
            v = v.to(tl.float32)
        buffer_first = tl.dot(tl.trans(first), v, buffer_first, input_precision=PRECISION)
        buffer_second = tl.dot(tl.trans(second), v, buffer_second, input_precision=PRECISION)
    part = index * tl.num_programs(1) + share
    pair = tl.arange(0, COLUMNS // 2)
    offset = 2 * pair[:, None] * VALUE_WIDTH + columns[None, :]
    inside = (pair < WIDTH // 2)[:, None] & (columns < VALUE_WIDTH)[None, :]
    buffers += part * WIDTH * VALUE_WIDTH
    tl.store(buffers + offset, buffer_first, mask=inside)
    tl.store(buffers + VALUE_WIDTH + offset, buffer_second, mask=inside)
    key_sums += part * WIDTH
    tl.store(key_sums + 2 * pair, sum_first, mask=pair < WIDTH // 2)
    tl.store(key_sums + 2 * pair + 1, sum_second, mask=pair < WIDTH // 2)
    if CONTEXT:
        tl.store(tops + part, top)
        tl.store(totals + part, total)


# One program: one row of one head's buffer, and that number of its mean of keys, from all shares; the first also the
# logarithm of the sum of the softmax.
@triton.jit(do_not_specialize=("count", "shares"))
def _sum_kernel(
    buffers, key_sums, tops, totals, buffer, key_mean, log_total, count, shares,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUES: tl.constexpr, SHARES: tl.constexpr, CONTEXT: tl.constexpr,
):  # fmt: skip
    index, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    share, columns = tl.arange(0, SHARES), tl.arange(0, VALUES)
    part = index * shares + share
    if CONTEXT:
        top = tl.load(tops + part, mask=share < shares, other=-1.0e30)
        weight = tl.exp(top - tl.max(top, 0))
        total = tl.sum(weight * tl.load(totals + part, mask=share < shares, other=0.0), 0)
        weight /= total
        if row == 0:
            tl.store(log_total + index, tl.max(top, 0) + tl.log(total))
    else:
        weight = tl.full([SHARES], 1.0, tl.float32) / count
    inside = (share < shares)[:, None] & (columns < VALUE_WIDTH)[None, :]
    pointers = buffers + (part * WIDTH + row)[:, None] * VALUE_WIDTH + columns[None, :]
    added = tl.sum(tl.load(pointers, mask=inside, other=0.0) * weight[:, None], 0)
    tl.store(buffer + (index * WIDTH + row) * VALUE_WIDTH + columns, added, mask=columns < VALUE_WIDTH)
    numbers = tl.load(key_sums + part * WIDTH + row, mask=share < shares, other=0.0)
    tl.store(key_mean + index * WIDTH + row, tl.sum(numbers * weight, 0))


# One program: a tile of one head's queries. It reads them, the buffer, the local term and the modulation, and writes
# the output, 2 * head_dim * value_dim operations a query.
@triton.jit(do_not_specialize=("count",))
def _out_kernel(
    query, cos, sin, buffer, key_mean, local, modulation, out, eps, count, heads,
    query_stride_b, query_stride_h, query_stride_n, local_stride_b, local_stride_h, local_stride_n,
    modulation_stride_b, modulation_stride_h, modulation_stride_n,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr, TILE: tl.constexpr,
    NAME: tl.constexpr, ROTATE: tl.constexpr, NORMALIZE: tl.constexpr, LOCAL: tl.constexpr, MODULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(count, TILE)
    index = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = index // heads, index % heads
    place = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    query += batch * query_stride_b + head * query_stride_h
    first, second = _features(query, place, count, query_stride_n, WIDTH, COLUMNS, TILE, NAME)
    pair, columns = tl.arange(0, COLUMNS // 2), tl.arange(0, VALUES)
    if NORMALIZE:
        mean_first, mean_second = pair_vector(key_mean + index * WIDTH, WIDTH, COLUMNS)
        norm = tl.sum(first * mean_first[None, :], 1) + tl.sum(second * mean_second[None, :], 1) + eps
        # Rows outside have no features.
        norm = tl.where(place < count, norm, 1.0)
    if ROTATE:
        first, second = rotated(first, second, cos, sin, place, count, WIDTH, COLUMNS)
    buffer += index * (WIDTH * VALUE_WIDTH)
    offset = 2 * pair[:, None] * VALUE_WIDTH + columns[None, :]
    inside = (pair < WIDTH // 2)[:, None] & (columns < VALUE_WIDTH)[None, :]
    y = tl.dot(first, tl.load(buffer + offset, mask=inside, other=0.0), input_precision=PRECISION)
    y = tl.dot(
        second, tl.load(buffer + VALUE_WIDTH + offset, mask=inside, other=0.0), y, input_precision=PRECISION
    )
    if NORMALIZE:
        y /= norm[:, None]
    inside = (place < count)[:, None] & (columns < VALUE_WIDTH)[None, :]
    token = place.to(tl.int64)[:, None]
    if LOCAL:
        local += batch * local_stride_b + head * local_stride_h
        y += tl.load(local + token * local_stride_n + columns[None, :], mask=inside, other=0.0)
    if MODULATE:
        modulation += batch * modulation_stride_b + head * modulation_stride_h
        y *= tl.load(modulation + token * modulation_stride_n + columns[None, :], mask=inside, other=0.0)
    # [batch, tokens, heads, value_dim] in memory: what follows reads the heads of a token side by side.
    out += ((batch * count + token) * heads + head) * VALUE_WIDTH + columns[None, :]
    tl.store(out, y.to(out.dtype.element_ty), mask=inside)


class Context(NamedTuple):
    """What all queries read: S and z, float32 `[batch * heads, ...]`, and what they are made of.

    `mean` is the sum of the queries' features and `scale` that of the logits over their number; `log_total` the
    logarithm of the sum of the exponentials of the logits; `cos` and `sin` the tables as the kernels read them.
    """

    buffer: torch.Tensor
    key_mean: torch.Tensor
    mean: torch.Tensor | None
    log_total: torch.Tensor
    scale: float
    cos: torch.Tensor | None
    sin: torch.Tensor | None


def shares_of(count: int, tile: int, rows: int, programs: int, most: int = 128) -> tuple[int, int]:
    """Returns tiles a share and shares, `most` at most, so that so many programs share the tokens of all heads."""
    tiles = triton.cdiv(triton.cdiv(count, tile), max(1, min(most, programs // rows)))
    return tiles, triton.cdiv(triton.cdiv(count, tile), tiles)


def context(
    query, key, value, feature_map, has_context, scale, cos, sin, *, tile=None, num_warps=4, programs=_PROGRAMS
):  # fmt: skip
    """Returns what all queries read; `has_context` says whether tokens have weights."""
    tile = tile or tile_of(query)
    batch, heads, queries, width = query.shape
    keys, value_width = value.shape[2:]
    rotate = cos is not None
    if rotate:
        cos, sin = ((x.float() if x.dtype == torch.float64 else x).contiguous() for x in (cos, sin))
    # A pair of channels is one column of each half, and a product needs 16 of them.
    columns, values = max(32, block_width(width)), block_width(value_width)
    rows = batch * heads
    tiles, shares = shares_of(keys, tile, rows, programs)
    new = {"dtype": torch.float32, "device": query.device}
    buffers = torch.empty(rows, shares, width, value_width, **new)
    key_sums = torch.empty(rows, shares, width, **new)
    tops, totals = torch.empty(2, rows, shares, **new)
    buffer, key_mean = torch.empty(rows, width, value_width, **new), torch.empty(rows, width, **new)
    log_total = torch.empty(rows, **new)
    widths = {"WIDTH": width, "COLUMNS": columns, "TILE": tile, "NAME": feature_map}
    mean = None
    if has_context:
        # A share of the mean is one row of numbers, and reads little: more of them keep more reads in flight.
        query_tiles, query_shares = shares_of(queries, tile, rows, 4 * programs, 1024)
        sums = torch.empty(rows, query_shares, width, **new)
        _mean_kernel[rows, query_shares](
            query, sums, queries, heads, query_tiles, *query.stride()[:3], **widths, num_warps=num_warps
        )
        mean = sums.sum(1)
        scale = scale / queries
    _buffer_kernel[rows, shares](
        key, value, cos, sin, mean, buffers, key_sums, tops, totals, scale, keys, heads, tiles,
        *key.stride()[:3], *value.stride()[:3], **widths, VALUE_WIDTH=value_width, VALUES=values,
        PRECISION=precision(query), ROTATE=rotate, CONTEXT=has_context, num_warps=num_warps, num_stages=2,
    )  # fmt: skip
    _sum_kernel[rows, width](
        buffers, key_sums, tops, totals, buffer, key_mean, log_total, keys, shares, WIDTH=width,
        VALUE_WIDTH=value_width, VALUES=values, SHARES=triton.next_power_of_2(shares), CONTEXT=has_context,
        num_warps=num_warps,
    )  # fmt: skip
    return Context(buffer, key_mean, mean, log_total, scale, cos, sin)


def forward(
    query, key, value, feature_map, has_context, scale, cos, sin, local, modulation, normalize, eps, *, tile=None,
    num_warps=4, programs=_PROGRAMS,
):  # fmt: skip
    """Returns the output, `[batch, tokens, heads, value_dim]` in memory."""
    batch, heads, queries, width = query.shape
    value_width = value.shape[3]
    query, key, value = map(rows_contiguous, (query, key, value))
    tile = tile or tile_of(query)
    found = context(
        query, key, value, feature_map, has_context, scale, cos, sin, tile=tile, num_warps=num_warps,
        programs=programs,
    )  # fmt: skip
    out = query.new_empty((batch, queries, heads, value_width)).transpose(1, 2)
    local, modulation = (None if x is None else rows_contiguous(x) for x in (local, modulation))
    strides = [(0, 0, 0) if x is None else x.stride()[:3] for x in (local, modulation)]
    _out_kernel[(batch * heads * triton.cdiv(queries, tile),)](
        query, found.cos, found.sin, found.buffer, found.key_mean, local, modulation, out, eps, queries, heads,
        *query.stride()[:3], *strides[0], *strides[1],
        WIDTH=width, VALUE_WIDTH=value_width, COLUMNS=max(32, block_width(width)), VALUES=block_width(value_width),
        TILE=tile, NAME=feature_map, ROTATE=cos is not None, NORMALIZE=normalize, LOCAL=local is not None,
        MODULATE=modulation is not None, PRECISION=precision(query), num_warps=num_warps,
    )  # fmt: skip
    return out


def tile_of(tensor: torch.Tensor) -> int:
    """How many tokens a tile has."""
    return 64 if tensor.element_size() == 2 else 32


def precision(tensor: torch.Tensor) -> str:
    """How products are rounded: of half-precision inputs to three bits more than these have, else almost not."""
    return "tf32x3" if tensor.dtype == torch.float32 else "tf32"
