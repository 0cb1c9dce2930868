"""The backward of neighborhood attention in Triton: one pass for the queries, one for keys and values.

With `p = exp(s - lse)` recomputed and `delta = dout . out - dlse`: `ds = p (dout . v - delta)`, `dq = scale ds k`,
`dk = scale ds^T q`, `dv = p^T dout`. Two passes compute the scores twice, but nothing is added atomically, so that a
gradient has the same bits in every run. The second pass has keys for rows, and their inverse windows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import LOG2E, Tiling, block_width, rows_contiguous, shared_memory
from undivided.ops.neighborhood._tables import Neighborhood
from undivided.ops.neighborhood.boxes import Boxes
from undivided.ops.neighborhood.triton import (
    Candidates,
    advance,
    along,
    begin,
    box_constants,
    choose_cut,
    corner,
    exist,
    hide,
    indices,
    load_rows,
    numbers,
    place,
    sizes_of,
    store_rows,
    strides,
    within,
)


# One program: a box of queries of one head against the boxes of keys that any of them sees. In registers: the float32
# gradient of the queries, and the scores and their gradient of one box of keys; queries and output gradient stay in
# shared memory. It also leaves delta for the other pass.
@triton.jit
def _query_kernel(
    query, key, value, out, dout, lse, dlse, delta, dquery, scale, scale_log2, heads, key_group,
    size, kernel_size, stride, dilation,
    query_strides, key_strides, value_strides, out_strides, dout_strides, lse_strides, dquery_strides,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    CAUSAL_0: tl.constexpr, CAUSAL_1: tl.constexpr, CAUSAL_2: tl.constexpr,
    MASKED_0: tl.constexpr, MASKED_1: tl.constexpr, MASKED_2: tl.constexpr, OVERRUNS: tl.constexpr,
    HAS_DLSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = R0 * R1 * R2
    COLUMNS: tl.constexpr = C0 * C1 * C2
    first, residue, last, head = place(size, dilation, R0, R1, R2)
    if (first[0] > last[0]) | (first[1] > last[1]) | (first[2] > last[2]):
        return
    batch = (head // heads).to(tl.int64)
    head = head % heads
    row = indices(ROWS, R1, R2)
    column = indices(COLUMNS, C1, C2)
    row_exists = exist(first, row, last)

    query += begin(batch, head, first, residue, dilation, query_strides)
    out += begin(batch, head, first, residue, dilation, out_strides)
    dout += begin(batch, head, first, residue, dilation, dout_strides)
    q = load_rows(query, within(row, dilation, query_strides, WIDE), row_exists, HEAD_DIM, BLOCK_D, True)
    result = load_rows(out, within(row, dilation, out_strides, WIDE), row_exists, VALUE_DIM, BLOCK_V, True)
    gradient = load_rows(
        dout, within(row, dilation, dout_strides, WIDE), row_exists, VALUE_DIM, BLOCK_V, True
    )
    sums = begin(batch, head, first, residue, dilation, lse_strides)
    sums += within(row, dilation, lse_strides, WIDE)
    log_sum = tl.load(lse + sums, mask=row_exists, other=float("inf")) * 1.4426950408889634
    row_delta = tl.sum(gradient.to(tl.float32) * result.to(tl.float32), 1)
    if HAS_DLSE:
        row_delta -= tl.load(dlse + sums, mask=row_exists, other=0.0)
    tl.store(delta + sums, row_delta, mask=row_exists)
    key += batch * key_strides[0] + (head // key_group) * key_strides[1]
    value += batch * value_strides[0] + (head // key_group) * value_strides[1]
    key_offset = within(column, dilation, key_strides, WIDE)
    value_offset = within(column, dilation, value_strides, WIDE)

    begins, ends, boxes, low, high, start, width = along(
        first, row, last, kernel_size, stride, R0, R1, R2, C0, C1, C2, CAUSAL_0, CAUSAL_1, CAUSAL_2, False
    )  # fmt: skip
    a, b, c = begins
    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for _ in tl.range(0, boxes):
        at = (a, b, c)
        inside = exist(at, column, last)
        k = key + corner(at, residue, dilation, key_strides)
        k = load_rows(k, key_offset, inside, HEAD_DIM, BLOCK_D, OVERRUNS)
        v = value + corner(at, residue, dilation, value_strides)
        v = load_rows(v, value_offset, inside, VALUE_DIM, BLOCK_V, OVERRUNS)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = hide(
            scores, at, column, low, high, start, width, C0, C1, C2, MASKED_0, MASKED_1, MASKED_2
        )  # fmt: skip
        weights = tl.exp2(scores * scale_log2 - log_sum[:, None])
        dweights = tl.dot(gradient, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - row_delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
        a, b, c = advance(a, b, c, begins, ends, C0, C1, C2)

    dquery += begin(batch, head, first, residue, dilation, dquery_strides)
    store_rows(dquery, within(row, dilation, dquery_strides, WIDE), row_exists, dq * scale, HEAD_DIM, BLOCK_D)


# One program: a box of keys of one key head against the boxes of queries that see any of them, of all heads of its
# group. In registers: the float32 gradients of keys and values, and scores and their gradient for one box of queries.
@triton.jit
def _key_kernel(
    query, key, value, dout, lse, delta, dkey, dvalue, scale, scale_log2, key_heads, key_group,
    size, kernel_size, stride, dilation,
    query_strides, key_strides, value_strides, dout_strides, lse_strides, dkey_strides, dvalue_strides,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    CAUSAL_0: tl.constexpr, CAUSAL_1: tl.constexpr, CAUSAL_2: tl.constexpr,
    MASKED_0: tl.constexpr, MASKED_1: tl.constexpr, MASKED_2: tl.constexpr, OVERRUNS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = R0 * R1 * R2
    COLUMNS: tl.constexpr = C0 * C1 * C2
    first, residue, last, key_head = place(size, dilation, R0, R1, R2)
    if (first[0] > last[0]) | (first[1] > last[1]) | (first[2] > last[2]):
        return
    batch = (key_head // key_heads).to(tl.int64)
    key_head = key_head % key_heads
    row = indices(ROWS, R1, R2)
    column = indices(COLUMNS, C1, C2)
    row_exists = exist(first, row, last)

    key += begin(batch, key_head, first, residue, dilation, key_strides)
    value += begin(batch, key_head, first, residue, dilation, value_strides)
    k = load_rows(key, within(row, dilation, key_strides, WIDE), row_exists, HEAD_DIM, BLOCK_D, True)
    v = load_rows(value, within(row, dilation, value_strides, WIDE), row_exists, VALUE_DIM, BLOCK_V, True)
    query_offset = within(column, dilation, query_strides, WIDE)
    dout_offset = within(column, dilation, dout_strides, WIDE)
    sums_offset = within(column, dilation, lse_strides, WIDE)

    begins, ends, boxes, low, high, start, width = along(
        first, row, last, kernel_size, stride, R0, R1, R2, C0, C1, C2, CAUSAL_0, CAUSAL_1, CAUSAL_2, True
    )  # fmt: skip
    dk = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dv = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for member in range(key_group):
        head = key_head * key_group + member
        queries = query + batch * query_strides[0] + head * query_strides[1]
        gradients = dout + batch * dout_strides[0] + head * dout_strides[1]
        sums = batch * lse_strides[0] + head * lse_strides[1]
        a, b, c = begins
        for _ in tl.range(0, boxes):
            at = (a, b, c)
            inside = exist(at, column, last)
            q = queries + corner(at, residue, dilation, query_strides)
            q = load_rows(q, query_offset, inside, HEAD_DIM, BLOCK_D, OVERRUNS)
            gradient = gradients + corner(at, residue, dilation, dout_strides)
            gradient = load_rows(gradient, dout_offset, inside, VALUE_DIM, BLOCK_V, OVERRUNS)
            sums_at = sums + corner(at, residue, dilation, lse_strides) + sums_offset
            if OVERRUNS:
                log_sum = tl.load(lse + sums_at, mask=inside, other=float("inf"))
                row_delta = tl.load(delta + sums_at, mask=inside, other=0.0)
            else:
                log_sum = tl.load(lse + sums_at)
                row_delta = tl.load(delta + sums_at)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            scores = hide(
                scores, at, column, low, high, start, width, C0, C1, C2, MASKED_0, MASKED_1, MASKED_2
            )  # fmt: skip
            weights = tl.exp2(scores * scale_log2 - (log_sum * 1.4426950408889634)[None, :])
            dv = tl.dot(weights.to(gradient.dtype), gradient, dv, input_precision=PRECISION)
            dweights = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
            dscores = weights * (dweights - row_delta[None, :])
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
            a, b, c = advance(a, b, c, begins, ends, C0, C1, C2)

    dkey += begin(batch, key_head, first, residue, dilation, dkey_strides)
    dvalue += begin(batch, key_head, first, residue, dilation, dvalue_strides)
    store_rows(dkey, within(row, dilation, dkey_strides, WIDE), row_exists, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(dvalue, within(row, dilation, dvalue_strides, WIDE), row_exists, dv, VALUE_DIM, BLOCK_V)


# Tilings and their speed in TFLOPS: the first two for queries and the first for keys as measured on an H100 at head_dim
# 128 with a window of everything; the others, for less memory, estimated. `rows` are what a program keeps.
_QUERY = (
    (Tiling(64, 64, 4, 2), 540),
    (Tiling(128, 64, 8, 2), 458),
    (Tiling(64, 32, 4, 1), 250),
    (Tiling(32, 16, 4, 1), 100),
)
_KEY = (
    (Tiling(128, 32, 8, 3), 417),
    (Tiling(64, 32, 4, 3), 400),
    (Tiling(32, 32, 4, 1), 200),
    (Tiling(16, 16, 4, 1), 100),
)
_QUERY_FLOAT32 = ((Tiling(16, 32, 8, 1), 1), (Tiling(16, 16, 4, 1), 1))
_KEY_FLOAT32 = ((Tiling(16, 16, 8, 1), 1),)


def backward(
    dout, dlse, out, lse, query, key, value, kernel_size, stride, dilation, is_causal, scale,
):  # fmt: skip
    """Returns the gradients of query, key and value; `dlse` may be None."""
    neighborhood = Neighborhood.of(query.shape[2:-1], kernel_size, stride, dilation, is_causal)
    query, key, value, out, dout = map(rows_contiguous, (query, key, value, out, dout))
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    if out.numel() == 0:
        return tuple(gradient.zero_() for gradient in gradients)
    dquery, dkey, dvalue = gradients
    delta = torch.empty_like(lse)
    dlse = None if dlse is None else dlse.contiguous()
    constants = sizes_of(query, value)
    is_half = query.element_size() == 2
    batch, heads = query.shape[:2]
    key_heads = key.shape[1]
    width = block_width(query.shape[-1]) + block_width(value.shape[-1])

    def cut_of(candidates: Candidates, inverse: bool) -> tuple[Tiling, Boxes]:
        limit = shared_memory(query.device) // query.element_size()
        kept = lambda t: (t.rows + t.num_stages * t.keys) * width  # noqa: E731
        return choose_cut(candidates, neighborhood, inverse, kept, limit)

    cut, boxes = cut_of(_QUERY if is_half else _QUERY_FLOAT32, False)
    _query_kernel[boxes.programs * batch * heads,](
        query, key, value, out, dout, lse, dlse, delta, dquery, scale, scale * LOG2E, heads, heads // key_heads,
        *numbers(neighborhood), *map(strides, (query, key, value, out, dout, lse[..., None], dquery)),
        **box_constants(boxes, neighborhood, query, key, value, out, dout, dquery),
        HAS_DLSE=dlse is not None, **constants,
        num_warps=cut.num_warps, num_stages=cut.num_stages,
    )  # fmt: skip
    cut, boxes = cut_of(_KEY if is_half else _KEY_FLOAT32, True)
    _key_kernel[boxes.programs * batch * key_heads,](
        query, key, value, dout, lse, delta, dkey, dvalue, scale, scale * LOG2E, key_heads, heads // key_heads,
        *numbers(neighborhood), *map(strides, (query, key, value, dout, lse[..., None], dkey, dvalue)),
        **box_constants(boxes, neighborhood, query, key, value, dout, dkey, dvalue), **constants,
        num_warps=cut.num_warps, num_stages=cut.num_stages,
    )  # fmt: skip
    return gradients
