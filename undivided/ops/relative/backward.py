"""The gradients of attention with distances in Triton: of queries, of keys and values, and of the distances.

With `p = exp(s - lse)` computed again and `delta = dout . out`: `ds = p (dout . v - delta)`,
`dq_i = scale sum_j ds_ij (k_j + r_(i-j))`, `dk_j = scale sum_i ds_ij (q_i + u)`, `du = scale sum_ij ds_ij k_j`,
`dr_d = scale sum_i ds_i,(i-d) q_i`, `db_d = scale sum_i ds_i,(i-d)`. Three passes compute the scores three times, but
nothing is added atomically, so that a gradient has the same bits in every run.
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
from undivided.ops.relative.triton import (
    MARGIN,
    RUNTIME,
    by_distance,
    by_key,
    load_band,
    load_biases,
    tables,
)


@triton.jit
def _add_key_gradients(
    dq, b, q, gradient, log_sum, row_delta, key, value, content, vectors, biases, first, last, place, num_keys,
    scale_log2, key_stride, value_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what keys `first .. last - 1`, and the distances to them, give to the gradient of a tile of queries."""
    a = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, BLOCK)
    for start in tl.range(first, last, BLOCK):
        k = load_tile(key, start, key_stride, num_keys, HEAD_DIM, BLOCK, BLOCK_D, MASKED)
        v = load_tile(value, start, value_stride, num_keys, HEAD_DIM, BLOCK, BLOCK_D, MASKED)
        if MASKED:
            of_key = tl.load(content + start + c, mask=start + c < num_keys, other=0.0)
        else:
            of_key = tl.load(content + start + c)
        r = load_band(vectors, place - start - BLOCK, HEAD_DIM, 2 * BLOCK, BLOCK_D)
        b_next = load_biases(biases, place - start - 2 * BLOCK, 2 * BLOCK)
        products = tl.dot(q, tl.trans(r), input_precision=PRECISION) + b[None, :]
        scores = by_key(products, BLOCK, False) + of_key[None, :]
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        b = b_next
        weights = tl.exp2(scores * scale_log2 - log_sum[:, None])
        if MASKED:
            weights = tl.where(start + c[None, :] <= place + a, weights, 0.0)
        dweights = tl.dot(gradient, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - row_delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
        dq = tl.dot(by_distance(dscores, products, BLOCK).to(k.dtype), r, dq, input_precision=PRECISION)
    return dq, b


# One program: a tile of queries of one head against all keys that they see; it also writes `delta`. In registers: the
# float32 gradient of the queries, and scores and their gradient of a tile, by key and by distance. It does
# `14 * head_dim` operations a pair, six for products that it uses half of.
@triton.jit(do_not_specialize=RUNTIME)
def _query_kernel(
    query, key, value, content, vectors, biases, out, dout, lse, dlse, delta, dquery,
    scale, scale_log2, num_queries, num_keys, heads, key_group,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    out_stride_b, out_stride_h, out_stride_n, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK
    place = first_row + num_keys - num_queries
    rows = first_row + tl.arange(0, BLOCK)
    row_inside = rows < num_queries
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // key_group) * value_stride_h
    out += batch * out_stride_b + head * out_stride_h
    dout += batch * dout_stride_b + head * dout_stride_h
    content += (batch * heads + head) * num_keys
    vectors += tl.cast(head, tl.int64) * (num_keys + 2 * MARGIN) * HEAD_DIM
    biases += head * (num_keys + 2 * MARGIN)
    q = load_tile(query, first_row, query_stride_n, num_queries, HEAD_DIM, BLOCK, BLOCK_D, True)
    gradient = load_tile(dout, first_row, dout_stride_n, num_queries, HEAD_DIM, BLOCK, BLOCK_D, True)
    o = load_tile(out, first_row, out_stride_n, num_queries, HEAD_DIM, BLOCK, BLOCK_D, True)
    row = (batch * heads + head) * num_queries + rows
    log_sum = tl.load(lse + row, mask=row_inside, other=float("inf")) * 1.4426950408889634
    row_delta = tl.sum(o.to(tl.float32) * gradient.to(tl.float32), 1)
    row_delta -= tl.load(dlse + row, mask=row_inside, other=0.0)
    tl.store(delta + row, row_delta, mask=row_inside)

    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    b = load_biases(biases, place - BLOCK, 2 * BLOCK)
    common = (place + 1) // BLOCK * BLOCK
    dq, b = _add_key_gradients(
        dq, b, q, gradient, log_sum, row_delta, key, value, content, vectors, biases, 0, common, place, num_keys,
        scale_log2, key_stride_m, value_stride_m, HEAD_DIM, BLOCK_D, BLOCK, False, PRECISION,
    )  # fmt: skip
    dq, b = _add_key_gradients(
        dq, b, q, gradient, log_sum, row_delta, key, value, content, vectors, biases, common, place + BLOCK, place,
        num_keys, scale_log2, key_stride_m, value_stride_m, HEAD_DIM, BLOCK_D, BLOCK, True, PRECISION,
    )  # fmt: skip
    column = tl.arange(0, BLOCK_D)
    offset = ((batch * num_queries + rows) * heads + head)[:, None] * HEAD_DIM + column[None, :]
    inside = row_inside[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(dquery + offset, (dq * scale).to(dquery.dtype.element_ty), mask=inside)


@triton.jit
def _add_queries(
    dk, dv, weight, k, v, of_key, query, dout, lse, delta, vectors, biases, first, last, shift, num_queries,
    scale_log2, query_stride, dout_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what queries `first .. last - 1` of one head, which stand `shift` behind these keys, give to the gradients.

    `weight` sums the gradients of the scores by key.
    """
    c = tl.arange(0, BLOCK)[:, None]
    a = tl.arange(0, BLOCK)[None, :]
    for start in tl.range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        q = load_tile(query, start, query_stride, num_queries, HEAD_DIM, BLOCK, BLOCK_D, True)
        gradient = load_tile(dout, start, dout_stride, num_queries, HEAD_DIM, BLOCK, BLOCK_D, True)
        # Rows that do not exist get +inf, and so weights of zero.
        log_sum = tl.load(lse + rows, mask=rows < num_queries, other=float("inf")) * 1.4426950408889634
        row_delta = tl.load(delta + rows, mask=rows < num_queries, other=0.0)
        r = load_band(vectors, start + shift - BLOCK, HEAD_DIM, 2 * BLOCK, BLOCK_D)
        b = load_biases(biases, start + shift - BLOCK, 2 * BLOCK)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) + of_key[:, None]
        scores += by_key(tl.dot(r, tl.trans(q), input_precision=PRECISION) + b[:, None], BLOCK, True)
        weights = tl.exp2(scores * scale_log2 - log_sum[None, :])
        if MASKED:
            weights = tl.where(c <= start + shift + a, weights, 0.0)
        dv = tl.dot(weights.to(gradient.dtype), gradient, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
        dscores = weights * (dweights - row_delta[None, :])
        weight += tl.sum(dscores, 1)
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, weight


# One program: a tile of keys of one key head against all queries that see them, of all its heads. In registers: the
# float32 gradients of keys and values, scores and their gradient of a tile. It does `12 * head_dim` operations a pair.
# It leaves its part of the gradient of `content_bias`.
@triton.jit(do_not_specialize=(*RUNTIME[:3], "key_heads"))
def _key_kernel(
    query, key, value, content, vectors, biases, content_bias, dout, lse, delta, dkey, dvalue, dcontent,
    scale, scale_log2, num_queries, num_keys, heads, key_heads,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key_head = tl.program_id(0) % key_heads
    batch = (tl.program_id(0) // key_heads).to(tl.int64)
    # The first keys are seen by the most queries, so they go first.
    first_key = tl.program_id(1) * BLOCK
    shift = num_keys - num_queries - first_key
    query += batch * query_stride_b
    dout += batch * dout_stride_b
    key += batch * key_stride_b + key_head * key_stride_h
    value += batch * value_stride_b + key_head * value_stride_h
    k = load_tile(key, first_key, key_stride_m, num_keys, HEAD_DIM, BLOCK, BLOCK_D, True)
    v = load_tile(value, first_key, value_stride_m, num_keys, HEAD_DIM, BLOCK, BLOCK_D, True)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    rows = first_key + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    # Queries before `first` see none of these keys, those from `common` on all.
    first = tl.maximum(-shift, 0) // BLOCK * BLOCK
    common = tl.minimum((tl.maximum(BLOCK - 1 - shift, 0) + BLOCK - 1) // BLOCK * BLOCK, num_queries)
    for head in range(key_head * (heads // key_heads), (key_head + 1) * (heads // key_heads)):
        row = (batch * heads + head) * num_queries
        of_head = tl.cast(head, tl.int64) * (num_keys + 2 * MARGIN)
        of_key = tl.load(content + (batch * heads + head) * num_keys + rows, mask=rows < num_keys, other=0.0)
        weight = tl.zeros([BLOCK], tl.float32)
        dk, dv, weight = _add_queries(
            dk, dv, weight, k, v, of_key, query + head * query_stride_h, dout + head * dout_stride_h, lse + row,
            delta + row, vectors + of_head * HEAD_DIM, biases + of_head, first, common, shift, num_queries,
            scale_log2, query_stride_n, dout_stride_n, HEAD_DIM, BLOCK_D, BLOCK, True, PRECISION,
        )  # fmt: skip
        dk, dv, weight = _add_queries(
            dk, dv, weight, k, v, of_key, query + head * query_stride_h, dout + head * dout_stride_h, lse + row,
            delta + row, vectors + of_head * HEAD_DIM, biases + of_head, common, num_queries, shift, num_queries,
            scale_log2, query_stride_n, dout_stride_n, HEAD_DIM, BLOCK_D, BLOCK, False, PRECISION,
        )  # fmt: skip
        u = tl.load(content_bias + head * HEAD_DIM + column, mask=column < HEAD_DIM, other=0.0).to(tl.float32)
        dk += weight[:, None] * u[None, :]
        part = tl.sum(weight[:, None] * k.to(tl.float32), 0) * scale
        program = (batch * heads + head) * tl.num_programs(1) + tl.program_id(1)
        tl.store(dcontent + program * HEAD_DIM + column, part, mask=column < HEAD_DIM)
    offset = ((batch * num_keys + rows) * key_heads + key_head)[:, None] * HEAD_DIM + column[None, :]
    inside = (rows < num_keys)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(dkey + offset, (dk * scale).to(dkey.dtype.element_ty), mask=inside)
    tl.store(dvalue + offset, dv.to(dvalue.dtype.element_ty), mask=inside)


@triton.jit
def _load_keys(base, first, stride, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows `first .. first + ROWS - 1`; in place of those that are not there, the first or the last."""
    start = tl.minimum(tl.maximum(first, 0), count - 1)
    row = tl.minimum(tl.maximum(first + tl.arange(0, ROWS), 0), count - 1) - start
    column = tl.arange(0, COLUMNS)
    # int64: a token's stride times a million tokens passes 2**31. Within a tile it does not.
    base += tl.cast(start, tl.int64) * stride
    offset = row[:, None] * stride + column[None, :]
    if WIDTH < COLUMNS:
        return tl.load(base + offset, mask=(column < WIDTH)[None, :], other=0.0)
    return tl.load(base + offset)


# One program: a block of distances of one head against all queries' keys at these distances, of the texts that it is
# dealt. A tile is of distances and queries: what queries and keys give is made for the band of keys that it touches and
# read by distance. In registers: the float32 gradients of vectors and biases, scores and their gradient of a tile. It
# does `12 * head_dim` operations a pair.
@triton.jit(do_not_specialize=(*RUNTIME, "batches", "shares"))
def _distance_kernel(
    query, key, value, content, vectors, biases, dout, lse, delta, dvectors, dbiases,
    scale, scale_log2, num_queries, num_keys, heads, key_group, batches, shares,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    share = tl.program_id(0) // heads
    # The shortest distances have the most pairs, so they go first.
    distance = tl.program_id(1) * BLOCK
    shift = num_keys - num_queries - distance
    of_head = tl.cast(head, tl.int64) * (num_keys + 2 * MARGIN)
    r = load_band(vectors + of_head * HEAD_DIM, distance, HEAD_DIM, BLOCK, BLOCK_D)
    b = load_biases(biases + of_head, distance, BLOCK)
    dr = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    m = tl.arange(0, BLOCK)[:, None]
    a = tl.arange(0, BLOCK)[None, :]
    first = tl.maximum(-shift, 0) // BLOCK * BLOCK
    for batch_index in range(share, batches, shares):
        batch = tl.cast(batch_index, tl.int64)
        row = (batch * heads + head) * num_queries
        of_text = content + (batch * heads + head) * num_keys
        keys = key + batch * key_stride_b + (head // key_group) * key_stride_h
        values = value + batch * value_stride_b + (head // key_group) * value_stride_h
        for start in tl.range(first, num_queries, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            q = load_tile(
                query + batch * query_stride_b + head * query_stride_h,
                start, query_stride_n, num_queries, HEAD_DIM, BLOCK, BLOCK_D, True,
            )  # fmt: skip
            gradient = load_tile(
                dout + batch * dout_stride_b + head * dout_stride_h,
                start, dout_stride_n, num_queries, HEAD_DIM, BLOCK, BLOCK_D, True,
            )  # fmt: skip
            log_sum = (
                tl.load(lse + row + rows, mask=rows < num_queries, other=float("inf")) * 1.4426950408889634
            )
            row_delta = tl.load(delta + row + rows, mask=rows < num_queries, other=0.0)
            # Distance m of query a is of key `place + a - m`.
            place = start + shift
            k = _load_keys(keys, place - BLOCK, key_stride_m, num_keys, HEAD_DIM, 2 * BLOCK, BLOCK_D)
            v = _load_keys(values, place - BLOCK, value_stride_m, num_keys, HEAD_DIM, 2 * BLOCK, BLOCK_D)
            band = place - BLOCK + tl.arange(0, 2 * BLOCK)
            of_key = tl.load(of_text + band, mask=(band >= 0) & (band < num_keys), other=0.0)
            scores = tl.dot(r, tl.trans(q), input_precision=PRECISION) + b[:, None]
            scores += by_key(tl.dot(k, tl.trans(q), input_precision=PRECISION) + of_key[:, None], BLOCK, True)
            weights = tl.exp2(scores * scale_log2 - log_sum[None, :])
            weights = tl.where(m <= place + a, weights, 0.0)
            dweights = by_key(tl.dot(v, tl.trans(gradient), input_precision=PRECISION), BLOCK, True)
            dscores = weights * (dweights - row_delta[None, :])
            db += tl.sum(dscores, 1)
            dr = tl.dot(dscores.to(q.dtype), q, dr, input_precision=PRECISION)
    distances = distance + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    # [shares, distances, heads, head_dim], the layout of the table.
    place = (share * num_keys + distances).to(tl.int64) * heads + head
    inside = distances < num_keys
    tl.store(
        dvectors + place[:, None] * HEAD_DIM + column[None, :], dr * scale,
        mask=inside[:, None] & (column < HEAD_DIM)[None, :],
    )  # fmt: skip
    tl.store(dbiases + place, db * scale, mask=inside)


# So cut, two programs fit on a multiprocessor of an H100 at heads of 64; then smaller ones for wider heads.
_QUERY = (Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 1), Tiling(32, 32, 4, 1))
_OTHER = (Tiling(64, 64, 4, 1), Tiling(32, 32, 4, 1))
_FLOAT32 = Tiling(16, 16, 4, 1)
# About as many programs as an H100 runs at once, several times over.
_PROGRAMS = 1024


def backward_tiling(head_dim: int, element_size: int, shared_memory: int) -> tuple[Tiling, Tiling, Tiling]:
    """Returns the tilings of the kernels for queries, for keys and for distances; arguments as in `forward_tiling`."""
    if element_size == 4:
        return (_FLOAT32,) * 3
    limit = shared_memory // element_size
    # Tiles that stay, tiles in flight with one band or two, and the products with a band, in float32.
    of_query = first_fitting(
        _QUERY, lambda t: t.rows * (2 + 4 * t.num_stages) * head_dim + 4 * t.rows**2, limit
    )
    of_key = first_fitting(_OTHER, lambda t: t.rows * 6 * head_dim + 4 * t.rows**2, limit)
    of_distance = first_fitting(_OTHER, lambda t: t.rows * 7 * head_dim + 4 * t.rows**2, limit)
    return of_query, of_key, of_distance


def backward(
    dout, dlse, out, lse, query, key, value, content_bias, distance_vectors, distance_bias, scale, *,
    tilings=None,
):  # fmt: skip
    """Returns the gradients of query, key and value, and in float32 those of the three tables."""
    batch, heads, num_queries, head_dim = query.shape
    key_heads, num_keys = key.shape[1], key.shape[2]
    query, key, value, out, dout = map(rows_contiguous, (query, key, value, out, dout))
    dquery, dkey, dvalue = (
        x.new_empty((batch, x.shape[2], x.shape[1], head_dim)).transpose(1, 2) for x in (query, key, value)
    )
    if query.numel() == 0:
        small = (lse.new_zeros(x.shape) for x in (content_bias, distance_vectors, distance_bias))
        return dquery, dkey.zero_(), dvalue.zero_(), *small
    width = block_width(head_dim)
    tilings = tilings or backward_tiling(width, query.element_size(), shared_memory(query.device))
    for_queries, for_keys, for_distances = tilings
    delta = torch.empty_like(lse)
    strides = tuple(x.stride(axis) for x in (query, key, value) for axis in range(3))
    inputs = query, key, value, *tables(query, key, content_bias, distance_vectors, distance_bias)
    sizes = scale, scale * LOG2E, num_queries, num_keys, heads
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": width, "PRECISION": precision(query)}
    group = heads // key_heads
    _query_kernel[batch * heads, triton.cdiv(num_queries, for_queries.rows)](
        *inputs, out, dout, lse, dlse.contiguous(), delta, dquery, *sizes, group,
        *strides, *out.stride()[:3], *dout.stride()[:3],
        BLOCK=for_queries.rows, num_warps=for_queries.num_warps, num_stages=for_queries.num_stages, **constants,
    )  # fmt: skip
    tiles = triton.cdiv(num_keys, for_keys.rows)
    dcontent = lse.new_empty((batch, heads, tiles, head_dim))
    _key_kernel[batch * key_heads, tiles](
        *inputs, content_bias.contiguous(), dout, lse, delta, dkey, dvalue, dcontent, *sizes, key_heads,
        *strides, *dout.stride()[:3],
        BLOCK=for_keys.rows, num_warps=for_keys.num_warps, num_stages=for_keys.num_stages, **constants,
    )  # fmt: skip
    tiles = triton.cdiv(num_keys, for_distances.rows)
    # Sums of texts apart, where one would leave a device idle.
    shares = min(batch, triton.cdiv(_PROGRAMS, heads * tiles))
    dvectors = lse.new_empty((shares, num_keys, heads, head_dim))
    dbiases = lse.new_empty((shares, num_keys, heads))
    _distance_kernel[heads * shares, tiles](
        *inputs, dout, lse, delta, dvectors, dbiases, *sizes, group, batch, shares, *strides, *dout.stride()[:3],
        BLOCK=for_distances.rows, num_warps=for_distances.num_warps, num_stages=for_distances.num_stages, **constants,
    )  # fmt: skip
    return dquery, dkey, dvalue, dcontent.sum((0, 2)), dvectors.sum(0), dbiases.sum(0)
