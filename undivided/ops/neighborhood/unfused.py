"""Neighborhood attention in three products with the weights of every window in memory, in Triton.

The weights `[batch, heads, *size, w]`, w keys a window, are a tensor of their own, in the dtype of the inputs; slot
`(m_1, ..., m_n)` of a query, row-major, is the key `start + m` of its window. Three bilinear maps, each the transpose
of the others in one argument, make attention and its gradient (Faster Neighborhood Attention, arXiv 2403.04690,
section 3):

- scores (PN): `s_im = q_i . k_start(i)+m`; also the gradient of the weights, from that of the output and the values;
- mix (NN): `o_i = sum_m p_im v_start(i)+m`; also the gradient of the queries;
- gather (IN): `g_j = sum_{i sees j} p_i,j-start(i) x_i`; the gradients of keys and values.

With `as_gemm` a box of rows meets boxes of columns as products of matrices, and what is valid is scattered to the
weights or gathered from them. Without, a program has one row and multiplies a vector: the simple form.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from undivided.ops._flash import block_width, precision, rows_contiguous
from undivided.ops.neighborhood._tables import Neighborhood
from undivided.ops.neighborhood.boxes import choose_boxes
from undivided.ops.neighborhood.triton import (
    advance,
    along,
    begin,
    bounds,
    box_constants,
    corner,
    exist,
    indices,
    load_rows,
    numbers,
    place,
    sees,
    store_rows,
    strides,
    within,
)


@triton.jit
def _slot(a, b, c, kernel_size):
    """Slots of windows in row-major order; differences of these are slots too."""
    return (a * kernel_size[1] + b) * kernel_size[2] + c


@triton.jit
def _product(left, right, AS_GEMM: tl.constexpr, PRECISION: tl.constexpr):
    """`left @ right.T` in float32."""
    if AS_GEMM:
        return tl.dot(left, tl.trans(right), input_precision=PRECISION)
    return tl.sum(left[:, None, :].to(tl.float32) * right[None, :, :].to(tl.float32), 2)


@triton.jit
def _add_product(accumulator, left, right, AS_GEMM: tl.constexpr, PRECISION: tl.constexpr):
    """`accumulator + left @ right`."""
    if AS_GEMM:
        return tl.dot(left.to(right.dtype), right, accumulator, input_precision=PRECISION)
    return accumulator + tl.sum(left[:, :, None].to(tl.float32) * right[None, :, :].to(tl.float32), 1)


# One program: a box of queries against the boxes of keys that any of them sees. It writes the scores of each query's
# window, single elements that lie `w` apart from row to row. With MIXES it reads them instead and writes the mix.
@triton.jit
def _query_kernel(
    query, key, weights, scale, heads, key_group, size, kernel_size, stride, dilation,
    query_strides, key_strides, weight_strides,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    CAUSAL_0: tl.constexpr, CAUSAL_1: tl.constexpr, CAUSAL_2: tl.constexpr, MIXES: tl.constexpr,
    AS_GEMM: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
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
    query_offset = within(row, dilation, query_strides, WIDE)
    key += batch * key_strides[0] + (head // key_group) * key_strides[1]
    key_offset = within(column, dilation, key_strides, WIDE)
    weights += begin(batch, head, first, residue, dilation, weight_strides)
    weight_offset = within(row, dilation, weight_strides, WIDE)

    begins, ends, boxes, low, high, start, width = along(
        first, row, last, kernel_size, stride, R0, R1, R2, C0, C1, C2, CAUSAL_0, CAUSAL_1, CAUSAL_2, False
    )  # fmt: skip
    a, b, c = begins
    start_slot = _slot(start[0], start[1], start[2], kernel_size)
    if MIXES:
        accumulator = tl.zeros([ROWS, BLOCK], tl.float32)
    else:
        q = load_rows(query, query_offset, row_exists, WIDTH, BLOCK, True)
    for _ in tl.range(0, boxes):
        at = (a, b, c)
        k = key + corner(at, residue, dilation, key_strides)
        k = load_rows(k, key_offset, exist(at, column, last), WIDTH, BLOCK, True)
        seen = sees(column[0] + a, start[0], width[0]) & sees(column[1] + b, start[1], width[1])
        seen = seen & sees(column[2] + c, start[2], width[2]) & row_exists[:, None]
        slot = _slot(column[0] + a, column[1] + b, column[2] + c, kernel_size)[None, :] - start_slot[:, None]
        pointer = weights + weight_offset[:, None] + slot
        if MIXES:
            w = tl.load(pointer, mask=seen, other=0.0)
            accumulator = _add_product(accumulator, w, k, AS_GEMM, PRECISION)
        else:
            scores = _product(q, k, AS_GEMM, PRECISION) * scale
            tl.store(pointer, scores.to(weights.dtype.element_ty), mask=seen)
        a, b, c = advance(a, b, c, begins, ends, C0, C1, C2)
    if MIXES:
        store_rows(query, query_offset, row_exists, accumulator * scale, WIDTH, BLOCK)


# One program: a box of keys against the boxes of queries that see any of them, of all heads of its group. It reads the
# weight that each query has for each key, single elements whose distance changes from query to query.
@triton.jit
def _key_kernel(
    query, key, weights, scale, key_heads, key_group, size, kernel_size, stride, dilation,
    query_strides, key_strides, weight_strides,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    CAUSAL_0: tl.constexpr, CAUSAL_1: tl.constexpr, CAUSAL_2: tl.constexpr,
    AS_GEMM: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
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
    begins, ends, boxes, low, high, start, width = along(
        first, row, last, kernel_size, stride, R0, R1, R2, C0, C1, C2, CAUSAL_0, CAUSAL_1, CAUSAL_2, True
    )  # fmt: skip
    key_slot = _slot(first[0] + row[0], first[1] + row[1], first[2] + row[2], kernel_size)
    query_offset = within(column, dilation, query_strides, WIDE)
    weight_offset = within(column, dilation, weight_strides, WIDE)
    accumulator = tl.zeros([ROWS, BLOCK], tl.float32)
    for member in range(key_group):
        head = key_head * key_group + member
        queries = query + batch * query_strides[0] + head * query_strides[1]
        own = weights + batch * weight_strides[0] + head * weight_strides[1]
        a, b, c = begins
        for _ in tl.range(0, boxes):
            at = (a, b, c)
            q = queries + corner(at, residue, dilation, query_strides)
            q = load_rows(q, query_offset, exist(at, column, last), WIDTH, BLOCK, True)
            seen = sees(column[0] + a, start[0], width[0]) & sees(column[1] + b, start[1], width[1])
            seen = seen & sees(column[2] + c, start[2], width[2]) & row_exists[:, None]
            from_0, _ = bounds(a, column[0], last[0], kernel_size[0], stride[0], CAUSAL_0, False)
            from_1, _ = bounds(b, column[1], last[1], kernel_size[1], stride[1], CAUSAL_1, False)
            from_2, _ = bounds(c, column[2], last[2], kernel_size[2], stride[2], CAUSAL_2, False)
            slot = key_slot[:, None] - _slot(from_0, from_1, from_2, kernel_size)[None, :]
            origin = own + corner(at, residue, dilation, weight_strides)
            w = tl.load(origin + weight_offset[None, :] + slot, mask=seen, other=0.0)
            accumulator = _add_product(accumulator, w, q, AS_GEMM, PRECISION)
            a, b, c = advance(a, b, c, begins, ends, C0, C1, C2)
    key += begin(batch, key_head, first, residue, dilation, key_strides)
    store_rows(key, within(row, dilation, key_strides, WIDE), row_exists, accumulator * scale, WIDTH, BLOCK)


def scores(query, key, neighborhood: Neighborhood, scale: float, as_gemm: bool, fill: float = float("-inf")):
    """Returns `scale * q_i . k_j` of each window, `[batch, heads, *size, w]`; `fill` where a causal one has no key."""
    query, key = map(rows_contiguous, (query, key))
    shape = (*query.shape[:-1], math.prod(neighborhood.kernel_size))
    # Windows that no axis cuts are written whole.
    weights = query.new_full(shape, fill) if any(neighborhood.is_causal) else query.new_empty(shape)
    _launch(_query_kernel, query, key, weights, neighborhood, scale, as_gemm, MIXES=False)
    return weights


def mix(weights, value, neighborhood: Neighborhood, scale: float, as_gemm: bool):
    """Returns `scale * sum_m p_im v_start(i)+m` `[batch, heads, *size, value_dim]`."""
    weights, value = weights.contiguous(), rows_contiguous(value)
    out = value.new_empty((*weights.shape[:-1], value.shape[-1]))
    _launch(_query_kernel, out, value, weights, neighborhood, scale, as_gemm, MIXES=True)
    return out


def gather(weights, query, neighborhood: Neighborhood, scale: float, as_gemm: bool, key_heads: int):
    """Returns `scale * sum_i p_i,j-start(i) x_i` over the queries that see key j, `[batch, key_heads, *size, dim]`."""
    weights, query = weights.contiguous(), rows_contiguous(query)
    out = query.new_empty((query.shape[0], key_heads, *query.shape[2:]))
    _launch(_key_kernel, query, out, weights, neighborhood, scale, as_gemm)
    return out


def _launch(kernel, query, key, weights, neighborhood, scale, as_gemm, **constants):
    if weights.numel() == 0:
        return
    inverse = kernel is _key_kernel
    batch, heads, key_heads = query.shape[0], query.shape[1], key.shape[1]
    width = query.shape[-1]
    is_half = query.element_size() == 2
    # Rows and columns of a program, as for the fused kernels; one row where the product is not one of matrices.
    rows, columns = (64 if is_half else 16, 64 if is_half else 16) if as_gemm else (1, 32)
    boxes = choose_boxes(neighborhood, rows, columns, inverse)
    owners = key_heads if inverse else heads
    constants |= box_constants(boxes, neighborhood, query, key, weights)
    # Masks are always needed here: they say which slots there are.
    for name in ("OVERRUNS", "MASKED_0", "MASKED_1", "MASKED_2"):
        del constants[name]
    kernel[boxes.programs * batch * owners,](
        query, key, weights, scale, owners, heads // key_heads, *numbers(neighborhood),
        *map(strides, (query, key, weights)), WIDTH=width, BLOCK=block_width(width),
        AS_GEMM=as_gemm, PRECISION=precision(query), num_warps=4 if as_gemm else 1,
        num_stages=2 if as_gemm and is_half else 1, **constants,
    )  # fmt: skip


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, neighborhood, scale, as_gemm):
        ctx.save_for_backward(query, key)
        ctx.options = neighborhood, scale, as_gemm
        return scores(query, key, neighborhood, scale, as_gemm)

    @staticmethod
    def backward(ctx, dweights):
        query, key = ctx.saved_tensors
        dquery = mix(dweights, key, *ctx.options)
        dkey = gather(dweights, query, *ctx.options, key.shape[1])
        return dquery, dkey, None, None, None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, value, neighborhood, as_gemm):
        ctx.save_for_backward(weights, value)
        ctx.options = neighborhood, 1.0, as_gemm
        return mix(weights, value, neighborhood, 1.0, as_gemm)

    @staticmethod
    def backward(ctx, dout):
        weights, value = ctx.saved_tensors
        dweights = scores(dout, value, *ctx.options, fill=0.0)
        return dweights, gather(weights, dout, *ctx.options, value.shape[1]), None, None


def attend(query, key, value, neighborhood, scale, return_lse, as_gemm, bias=None):
    """Attention in the three steps; `bias`, `[heads, *size, w]`, is added to the scores."""
    logits = _Scores.apply(query, key, neighborhood, scale, as_gemm)
    if bias is not None:
        logits = logits + bias
    out = _Mix.apply(torch.softmax(logits, dim=-1), value, neighborhood, as_gemm)
    return (out, torch.logsumexp(logits.float(), dim=-1)) if return_lse else out
