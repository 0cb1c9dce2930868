"""Gradients of the fused linear attention in Triton: queries, then keys, then queries again.

`out = g (phi_R(q) S / (phi(q) . z + eps) + l)`. The first pass adds up the gradients of S and z over queries, the
second writes those of keys and values and adds up what the weights of tokens hand back to the mean of the queries, the
third writes those of the queries. Features, rotations and weights are computed again where they are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import block_width, rows_contiguous
from undivided.ops.linear.triton import (
    context,
    feature,
    load_pairs,
    pair_vector,
    precision,
    rotated,
    shares_of,
)

# How many programs should share the tokens of all heads.
_PROGRAMS = 528


@triton.jit
def _slope(x, NAME: tl.constexpr):
    if NAME == "elu1":
        x = tl.exp(tl.minimum(x, 0.0))
    elif NAME == "softplus":
        x = 1.0 / (1.0 + tl.exp(-x))
    elif NAME == "relu":
        x = tl.where(x > 0, 1.0, 0.0)
    else:
        x = tl.full(x.shape, 1.0, tl.float32)
    return x


@triton.jit
def _load_values(base, place, count, stride, WIDTH: tl.constexpr, VALUES: tl.constexpr):
    """Rows of width WIDTH in float32, zero outside."""
    column = tl.arange(0, VALUES)
    inside = (place < count)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(base + place.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store_pairs(
    base, first, second, offset, inside, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr
):
    """Stores rows of pairs of channels; `offset` is of each row."""
    column = tl.arange(0, COLUMNS)
    x = tl.reshape(tl.join(first, second), [TILE, COLUMNS])
    pointers = base + offset[:, None] + column[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=inside[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _load_buffer(
    base, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr
):
    """The rows of a buffer of the first and of the second channels of pairs, each `[COLUMNS / 2, VALUES]`."""
    pair, column = tl.arange(0, COLUMNS // 2), tl.arange(0, VALUES)
    offset = 2 * pair[:, None] * VALUE_WIDTH + column[None, :]
    inside = (pair < WIDTH // 2)[:, None] & (column < VALUE_WIDTH)[None, :]
    first = tl.load(base + offset, mask=inside, other=0.0)
    return first, tl.load(base + VALUE_WIDTH + offset, mask=inside, other=0.0)


# One program: a share of one head's queries. In registers: its part of the gradients of the buffer and of the mean of
# keys, added up with the next kernel's. It reads queries, gradients of the output, local term and modulation once, and
# writes the gradients of the last two.
@triton.jit(do_not_specialize=("count", "tiles"))
def _buffer_gradient_kernel(
    query, cos, sin, buffer, key_mean, local, modulation, dout, dlocal, dmodulation, dbuffers, dmeans,
    eps, count, heads, tiles,
    query_stride_b, query_stride_h, query_stride_n, local_stride_b, local_stride_h, local_stride_n,
    modulation_stride_b, modulation_stride_h, modulation_stride_n, dout_stride_b, dout_stride_h, dout_stride_n,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr, TILE: tl.constexpr,
    NAME: tl.constexpr, ROTATE: tl.constexpr, NORMALIZE: tl.constexpr, LOCAL: tl.constexpr, MODULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    index, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = index // heads, index % heads
    query += batch * query_stride_b + head * query_stride_h
    dout += batch * dout_stride_b + head * dout_stride_h
    local += batch * local_stride_b + head * local_stride_h
    modulation += batch * modulation_stride_b + head * modulation_stride_h
    pair, column = tl.arange(0, COLUMNS // 2), tl.arange(0, VALUES)
    buffer_first, buffer_second = _load_buffer(
        buffer + index * (WIDTH * VALUE_WIDTH), WIDTH, VALUE_WIDTH, COLUMNS, VALUES
    )
    mean_first, mean_second = pair_vector(key_mean + index * WIDTH, WIDTH, COLUMNS)
    added_first = tl.zeros([COLUMNS // 2, VALUES], tl.float32)
    added_second = tl.zeros([COLUMNS // 2, VALUES], tl.float32)
    dmean_first = tl.zeros([COLUMNS // 2], tl.float32)
    dmean_second = tl.zeros([COLUMNS // 2], tl.float32)
    for tile in range(share * tiles, min((share + 1) * tiles, tl.cdiv(count, TILE))):
        place = tile * TILE + tl.arange(0, TILE)
        first, second, inside = load_pairs(query, place, count, query_stride_n, WIDTH, COLUMNS, TILE)
        first = tl.where(inside, feature(first, NAME), 0.0)
        second = tl.where(inside, feature(second, NAME), 0.0)
        gradient = _load_values(dout, place, count, dout_stride_n, VALUE_WIDTH, VALUES)
        norm = tl.full([TILE], 1.0, tl.float32)
        if NORMALIZE:
            norm = tl.sum(first * mean_first[None, :], 1) + tl.sum(second * mean_second[None, :], 1) + eps
            norm = tl.where(place < count, norm, 1.0)
        turned_first, turned_second = first, second
        if ROTATE:
            turned_first, turned_second = rotated(first, second, cos, sin, place, count, WIDTH, COLUMNS)
        # Not yet divided: Triton 3.6 compiles no division of this product where it is used by a sum alone.
        y = tl.dot(turned_first, buffer_first, input_precision=PRECISION)
        y = tl.dot(turned_second, buffer_second, y, input_precision=PRECISION)
        if MODULATE or LOCAL:
            mask = (place < count)[:, None] & (column < VALUE_WIDTH)[None, :]
            row = ((batch * count + place) * heads + head) * VALUE_WIDTH
            offset = row[:, None] + column[None, :]
        if MODULATE:
            before = y / norm[:, None]
            if LOCAL:
                before += _load_values(local, place, count, local_stride_n, VALUE_WIDTH, VALUES)
            tl.store(dmodulation + offset, (gradient * before).to(dmodulation.dtype.element_ty), mask=mask)
            gradient *= _load_values(modulation, place, count, modulation_stride_n, VALUE_WIDTH, VALUES)
        if LOCAL:
            tl.store(dlocal + offset, gradient.to(dlocal.dtype.element_ty), mask=mask)
        gradient /= norm[:, None]
        added_first = tl.dot(tl.trans(turned_first), gradient, added_first, input_precision=PRECISION)
        added_second = tl.dot(tl.trans(turned_second), gradient, added_second, input_precision=PRECISION)
        if NORMALIZE:
            dnorm = -tl.sum(gradient * y, 1) / norm
            dmean_first += tl.sum(first * dnorm[:, None], 0)
            dmean_second += tl.sum(second * dnorm[:, None], 0)
    part = index * tl.num_programs(1) + share
    offset = 2 * pair[:, None] * VALUE_WIDTH + column[None, :]
    inside = (pair < WIDTH // 2)[:, None] & (column < VALUE_WIDTH)[None, :]
    dbuffers += part * WIDTH * VALUE_WIDTH
    tl.store(dbuffers + offset, added_first, mask=inside)
    tl.store(dbuffers + VALUE_WIDTH + offset, added_second, mask=inside)
    dmeans += part * WIDTH
    tl.store(dmeans + 2 * pair, dmean_first, mask=pair < WIDTH // 2)
    tl.store(dmeans + 2 * pair + 1, dmean_second, mask=pair < WIDTH // 2)


# One program: a share of one head's keys and values, read once; it writes their gradients and, with weights of tokens,
# its part of the sum of keys that the gradient of the mean of the queries is.
@triton.jit(do_not_specialize=("count", "tiles"))
def _key_gradient_kernel(
    key, value, cos, sin, mean, log_total, common, dbuffer, dmean, dkey, dvalue, dcontexts, scale, count, heads, tiles,
    key_stride_b, key_stride_h, key_stride_n, value_stride_b, value_stride_h, value_stride_n,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr, TILE: tl.constexpr,
    NAME: tl.constexpr, ROTATE: tl.constexpr, CONTEXT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    index, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = index // heads, index % heads
    key += batch * key_stride_b + head * key_stride_h
    value += batch * value_stride_b + head * value_stride_h
    column = tl.arange(0, VALUES)
    buffer_first, buffer_second = _load_buffer(
        dbuffer + index * (WIDTH * VALUE_WIDTH), WIDTH, VALUE_WIDTH, COLUMNS, VALUES
    )
    dmean_first, dmean_second = pair_vector(dmean + index * WIDTH, WIDTH, COLUMNS)
    sum_first = tl.zeros([COLUMNS // 2], tl.float32)
    sum_second = tl.zeros([COLUMNS // 2], tl.float32)
    if CONTEXT:
        mean_first, mean_second = pair_vector(mean + index * WIDTH, WIDTH, COLUMNS)
        shift = tl.load(log_total + index)
        mean_share = tl.load(common + index)
    for tile in range(part * tiles, min((part + 1) * tiles, tl.cdiv(count, TILE))):
        place = tile * TILE + tl.arange(0, TILE)
        x_first, x_second, inside = load_pairs(key, place, count, key_stride_n, WIDTH, COLUMNS, TILE)
        first = tl.where(inside, feature(x_first, NAME), 0.0)
        second = tl.where(inside, feature(x_second, NAME), 0.0)
        v = _load_values(value, place, count, value_stride_n, VALUE_WIDTH, VALUES)
        if CONTEXT:
            logits = tl.sum(first * mean_first[None, :], 1) + tl.sum(second * mean_second[None, :], 1)
            share = tl.exp(logits * scale - shift)
        else:
            share = tl.full([TILE], 1.0, tl.float32) / count
        turned_first, turned_second = first, second
        if ROTATE:
            turned_first, turned_second = rotated(first, second, cos, sin, place, count, WIDTH, COLUMNS)
        dv = tl.dot(turned_first, buffer_first, input_precision=PRECISION)
        dv = tl.dot(turned_second, buffer_second, dv, input_precision=PRECISION) * share[:, None]
        dfirst = tl.dot(v, tl.trans(buffer_first), input_precision=PRECISION)
        dsecond = tl.dot(v, tl.trans(buffer_second), input_precision=PRECISION)
        if ROTATE:
            dsecond, dfirst = rotated(dsecond, dfirst, cos, sin, place, count, WIDTH, COLUMNS)
        dfirst += dmean_first[None, :]
        dsecond += dmean_second[None, :]
        if CONTEXT:
            dshare = tl.sum(dfirst * first, 1) + tl.sum(dsecond * second, 1)
            dlogits = share * (dshare - mean_share) * scale
            dlogits = tl.where(place < count, dlogits, 0.0)
            sum_first += tl.sum(first * dlogits[:, None], 0)
            sum_second += tl.sum(second * dlogits[:, None], 0)
            dfirst = dfirst * share[:, None] + dlogits[:, None] * mean_first[None, :]
            dsecond = dsecond * share[:, None] + dlogits[:, None] * mean_second[None, :]
        else:
            dfirst *= share[:, None]
            dsecond *= share[:, None]
        row = (batch * count + place) * heads + head
        _store_pairs(
            dkey, dfirst * _slope(x_first, NAME), dsecond * _slope(x_second, NAME), row * WIDTH, place < count,
            WIDTH, COLUMNS, TILE,
        )  # fmt: skip
        mask = (place < count)[:, None] & (column < VALUE_WIDTH)[None, :]
        tl.store(
            dvalue + (row * VALUE_WIDTH)[:, None] + column[None, :], dv.to(dvalue.dtype.element_ty), mask=mask
        )
    if CONTEXT:
        pair = tl.arange(0, COLUMNS // 2)
        dcontexts += (index * tl.num_programs(1) + part) * WIDTH
        tl.store(dcontexts + 2 * pair, sum_first, mask=pair < WIDTH // 2)
        tl.store(dcontexts + 2 * pair + 1, sum_second, mask=pair < WIDTH // 2)


# One program: a tile of one head's queries, and their gradient.
@triton.jit(do_not_specialize=("count",))
def _query_gradient_kernel(
    query, cos, sin, buffer, key_mean, modulation, dout, dcontext, dquery, eps, count, heads,
    query_stride_b, query_stride_h, query_stride_n, modulation_stride_b, modulation_stride_h, modulation_stride_n,
    dout_stride_b, dout_stride_h, dout_stride_n,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr, TILE: tl.constexpr,
    NAME: tl.constexpr, ROTATE: tl.constexpr, NORMALIZE: tl.constexpr, MODULATE: tl.constexpr, CONTEXT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(count, TILE)
    index = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = index // heads, index % heads
    place = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    query += batch * query_stride_b + head * query_stride_h
    dout += batch * dout_stride_b + head * dout_stride_h
    modulation += batch * modulation_stride_b + head * modulation_stride_h
    x_first, x_second, inside = load_pairs(query, place, count, query_stride_n, WIDTH, COLUMNS, TILE)
    gradient = _load_values(dout, place, count, dout_stride_n, VALUE_WIDTH, VALUES)
    if MODULATE:
        gradient *= _load_values(modulation, place, count, modulation_stride_n, VALUE_WIDTH, VALUES)
    buffer_first, buffer_second = _load_buffer(
        buffer + index * (WIDTH * VALUE_WIDTH), WIDTH, VALUE_WIDTH, COLUMNS, VALUES
    )
    dfirst = tl.dot(gradient, tl.trans(buffer_first), input_precision=PRECISION)
    dsecond = tl.dot(gradient, tl.trans(buffer_second), input_precision=PRECISION)
    if NORMALIZE:
        first = tl.where(inside, feature(x_first, NAME), 0.0)
        second = tl.where(inside, feature(x_second, NAME), 0.0)
        mean_first, mean_second = pair_vector(key_mean + index * WIDTH, WIDTH, COLUMNS)
        norm = tl.sum(first * mean_first[None, :], 1) + tl.sum(second * mean_second[None, :], 1) + eps
        norm = tl.where(place < count, norm, 1.0)
        turned_first, turned_second = first, second
        if ROTATE:
            turned_first, turned_second = rotated(first, second, cos, sin, place, count, WIDTH, COLUMNS)
        # phi_R(q) S . gradient, without S a second time.
        product = tl.sum(dfirst * turned_first, 1) + tl.sum(dsecond * turned_second, 1)
        dnorm = -product / (norm * norm)
        dfirst /= norm[:, None]
        dsecond /= norm[:, None]
    if ROTATE:
        dsecond, dfirst = rotated(dsecond, dfirst, cos, sin, place, count, WIDTH, COLUMNS)
    if NORMALIZE:
        dfirst += dnorm[:, None] * mean_first[None, :]
        dsecond += dnorm[:, None] * mean_second[None, :]
    if CONTEXT:
        context_first, context_second = pair_vector(dcontext + index * WIDTH, WIDTH, COLUMNS)
        dfirst += context_first[None, :]
        dsecond += context_second[None, :]
    row = ((batch * count + place) * heads + head) * WIDTH
    _store_pairs(
        dquery, dfirst * _slope(x_first, NAME), dsecond * _slope(x_second, NAME), row, place < count, WIDTH, COLUMNS,
        TILE,
    )  # fmt: skip


def backward(
    dout, query, key, value, local, modulation, cos, sin, feature_map, has_context, scale, normalize, eps, *,
    tile=None, num_warps=4, programs=_PROGRAMS,
):  # fmt: skip
    """Returns the gradients of query, key, value, local and modulation; empty ones of what is not given."""
    batch, heads, queries, width = query.shape
    keys, value_width = value.shape[2:]
    rows = batch * heads
    # More tokens of a tile, or of these widths, do not fit in registers.
    tile = tile or (32 if query.element_size() == 2 and max(width, value_width) <= 64 else 16)
    query, key, value, dout = map(rows_contiguous, (query, key, value, dout))
    found = context(query, key, value, feature_map, has_context, scale, cos, sin)
    local, modulation = (None if x is None else rows_contiguous(x) for x in (local, modulation))
    dquery, dkey, dvalue, dlocal, dmodulation = (
        query.new_empty(0) if x is None else x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)
        for x in (query, key, value, local, modulation)
    )
    new = {"dtype": torch.float32, "device": query.device}
    # What is not given is never read; a pointer it needs.
    given_local, given_modulation = (dout if x is None else x for x in (local, modulation))
    widths = {
        "WIDTH": width, "VALUE_WIDTH": value_width, "COLUMNS": max(32, block_width(width)),
        "VALUES": block_width(value_width), "TILE": tile, "NAME": feature_map, "ROTATE": cos is not None,
        "PRECISION": precision(query),
    }  # fmt: skip
    query_tiles, query_shares = shares_of(queries, tile, rows, programs)
    dbuffers, dmeans = (
        torch.empty(rows, query_shares, width, value_width, **new),
        torch.empty(rows, query_shares, width, **new),
    )
    _buffer_gradient_kernel[rows, query_shares](
        query, found.cos, found.sin, found.buffer, found.key_mean, given_local, given_modulation, dout, dlocal,
        dmodulation, dbuffers, dmeans, eps, queries, heads, query_tiles,
        *query.stride()[:3], *given_local.stride()[:3], *given_modulation.stride()[:3], *dout.stride()[:3],
        NORMALIZE=normalize, LOCAL=local is not None, MODULATE=modulation is not None, num_warps=num_warps, **widths,
    )  # fmt: skip
    dbuffer, dmean = dbuffers.sum(1), dmeans.sum(1)
    # The mean over keys of the gradients of their weights: of S and z all keys' parts together.
    common = (dbuffer * found.buffer).sum((1, 2)) + (dmean * found.key_mean).sum(1)
    key_tiles, key_shares = shares_of(keys, tile, rows, programs)
    dcontexts = torch.empty(rows, key_shares, width, **new)
    _key_gradient_kernel[rows, key_shares](
        key, value, found.cos, found.sin, found.mean, found.log_total, common, dbuffer, dmean, dkey, dvalue, dcontexts,
        found.scale, keys, heads, key_tiles, *key.stride()[:3], *value.stride()[:3],
        CONTEXT=has_context, num_warps=num_warps, **widths,
    )  # fmt: skip
    # The logits read the mean of the queries, as the sum of their features times the scale over their number.
    dcontext = dcontexts.sum(1) if has_context else dcontexts
    _query_gradient_kernel[(rows * triton.cdiv(queries, tile),)](
        query, found.cos, found.sin, found.buffer, found.key_mean, given_modulation, dout, dcontext, dquery, eps,
        queries, heads, *query.stride()[:3], *given_modulation.stride()[:3], *dout.stride()[:3],
        NORMALIZE=normalize, MODULATE=modulation is not None, CONTEXT=has_context, num_warps=num_warps, **widths,
    )  # fmt: skip
    return dquery, dkey, dvalue, dlocal, dmodulation
