"""The backward of MSA-Conv in Triton: one pass for the queries, one for keys and values.

With `p = exp(s - lse)` recomputed and `delta = dout . out - dlse`: `ds = p (dout . v - delta)`, `dq = scale ds k`,
`dk = scale ds^T q`, `dv = p^T dout`. Kernels are odd, so the queries that see a key are a window of the same shape
around it; nothing is added atomically, and a gradient has the same bits in every run. Zeros beyond the map have no
gradient of their own; they are in the log-sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops.msa_conv._border import empty_like_tokens
from undivided.ops.msa_conv.triton import (
    Tiles,
    choose_tiles,
    constants_of,
    edges_of,
    load_rows,
    place,
    power,
    programs,
    rows_contiguous,
    sees,
    store_rows,
    tokens,
    unit,
)


# One program: a tile of queries of one head against the tiles of keys that any of them sees. In registers: the float32
# gradient of the queries, and the scores and their gradient of one tile of keys. It also leaves delta for the other
# pass.
@triton.jit
def _query_kernel(
    query, key, value, out, dout, lse, dlse, delta, dquery, scale, heads, size, dilation,
    query_strides, key_strides, value_strides, out_strides, dout_strides, lse_strides, dquery_strides,
    K0: tl.constexpr, K1: tl.constexpr, WRAP: tl.constexpr, HAS_DLSE: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, residue, length, head = place(size, dilation, R0, R1)
    if (first[0] >= length[0]) | (first[1] >= length[1]):
        return
    batch = (head // heads).to(tl.int64)
    head = head % heads
    a, b, exists, row, column = tokens(first, residue, length, size, dilation, R0, R1, False)
    query += batch * query_strides[0] + head * query_strides[1]
    key += batch * key_strides[0] + head * key_strides[1]
    value += batch * value_strides[0] + head * value_strides[1]
    out += batch * out_strides[0] + head * out_strides[1]
    dout += batch * dout_strides[0] + head * dout_strides[1]
    q = load_rows(query, row, column, exists, query_strides, HEAD_DIM, BLOCK_D)
    gradient = load_rows(dout, row, column, exists, dout_strides, VALUE_DIM, BLOCK_V)
    result = load_rows(out, row, column, exists, out_strides, VALUE_DIM, BLOCK_V)
    sums = batch * lse_strides[0] + head * lse_strides[1] + row * lse_strides[2] + column * lse_strides[3]
    log_sum = tl.load(lse + sums, mask=exists, other=0.0) * unit(PRECISION)
    row_delta = tl.sum(gradient.to(tl.float32) * result.to(tl.float32), 1)
    if HAS_DLSE:
        row_delta -= tl.load(dlse + sums, mask=exists, other=0.0)
    tl.store(delta + sums, row_delta, mask=exists)

    dq = tl.zeros([R0 * R1, BLOCK_D], tl.float32)
    ALONG: tl.constexpr = (R1 + K1 - 2) // C1 + 1
    TILES: tl.constexpr = ((R0 + K0 - 2) // C0 + 1) * ALONG
    for step in tl.range(0, TILES):
        at = (first[0] - K0 // 2 + step // ALONG * C0, first[1] - K1 // 2 + step % ALONG * C1)
        c, d, found, key_row, key_column = tokens(at, residue, length, size, dilation, C0, C1, WRAP)
        k = load_rows(key, key_row, key_column, found, key_strides, HEAD_DIM, BLOCK_D)
        v = load_rows(value, key_row, key_column, found, value_strides, VALUE_DIM, BLOCK_V)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        seen = sees(a, b, c, d, K0, K1) & found[None, :] & exists[:, None]
        weights = power(
            tl.where(seen, scores * (scale * unit(PRECISION)) - log_sum[:, None], float("-inf")), PRECISION
        )
        dweights = tl.dot(gradient, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - row_delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    dquery += batch * dquery_strides[0] + head * dquery_strides[1]
    store_rows(dquery, row, column, exists, dquery_strides, dq * scale, HEAD_DIM, BLOCK_D)


# One program: a tile of keys of one head against the tiles of queries that see any of them. In registers: the float32
# gradients of keys and values, and the scores and their gradient of one tile of queries.
@triton.jit
def _key_kernel(
    query, key, value, dout, lse, delta, dkey, dvalue, scale, heads, size, dilation,
    query_strides, key_strides, value_strides, dout_strides, lse_strides, dkey_strides, dvalue_strides,
    K0: tl.constexpr, K1: tl.constexpr, WRAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, residue, length, head = place(size, dilation, R0, R1)
    if (first[0] >= length[0]) | (first[1] >= length[1]):
        return
    batch = (head // heads).to(tl.int64)
    head = head % heads
    a, b, exists, row, column = tokens(first, residue, length, size, dilation, R0, R1, False)
    query += batch * query_strides[0] + head * query_strides[1]
    key += batch * key_strides[0] + head * key_strides[1]
    value += batch * value_strides[0] + head * value_strides[1]
    dout += batch * dout_strides[0] + head * dout_strides[1]
    lse += batch * lse_strides[0] + head * lse_strides[1]
    delta += batch * lse_strides[0] + head * lse_strides[1]
    k = load_rows(key, row, column, exists, key_strides, HEAD_DIM, BLOCK_D)
    v = load_rows(value, row, column, exists, value_strides, VALUE_DIM, BLOCK_V)

    dk = tl.zeros([R0 * R1, BLOCK_D], tl.float32)
    dv = tl.zeros([R0 * R1, BLOCK_V], tl.float32)
    ALONG: tl.constexpr = (R1 + K1 - 2) // C1 + 1
    TILES: tl.constexpr = ((R0 + K0 - 2) // C0 + 1) * ALONG
    for step in tl.range(0, TILES):
        at = (first[0] - K0 // 2 + step // ALONG * C0, first[1] - K1 // 2 + step % ALONG * C1)
        c, d, found, query_row, query_column = tokens(at, residue, length, size, dilation, C0, C1, WRAP)
        q = load_rows(query, query_row, query_column, found, query_strides, HEAD_DIM, BLOCK_D)
        gradient = load_rows(dout, query_row, query_column, found, dout_strides, VALUE_DIM, BLOCK_V)
        sums = query_row * lse_strides[2] + query_column * lse_strides[3]
        log_sum = tl.load(lse + sums, mask=found, other=0.0) * unit(PRECISION)
        row_delta = tl.load(delta + sums, mask=found, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        seen = sees(a, b, c, d, K0, K1) & found[None, :] & exists[:, None]
        weights = power(
            tl.where(seen, scores * (scale * unit(PRECISION)) - log_sum[None, :], float("-inf")), PRECISION
        )
        dv = tl.dot(weights.to(gradient.dtype), gradient, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
        dscores = weights * (dweights - row_delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    dkey += batch * dkey_strides[0] + head * dkey_strides[1]
    dvalue += batch * dvalue_strides[0] + head * dvalue_strides[1]
    store_rows(dkey, row, column, exists, dkey_strides, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(dvalue, row, column, exists, dvalue_strides, dv, VALUE_DIM, BLOCK_V)


def backward(
    dout, dlse, out, lse, query, key, value, kernel_size, dilation, border, scale,
    query_cut: Tiles | None = None, key_cut: Tiles | None = None,
):  # fmt: skip
    """Returns the gradients of query, key and value; `dlse` may be None."""
    query, key, value, out, dout = map(rows_contiguous, (query, key, value, out, dout))
    dquery, dkey, dvalue = (empty_like_tokens(x, x.shape[-1]) for x in (query, key, value))
    if out.numel() == 0:
        return tuple(x.zero_() for x in (dquery, dkey, dvalue))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    dlse = None if dlse is None else dlse.contiguous()
    constants = constants_of(query, value, kernel_size, border)
    widths = constants["BLOCK_D"] + constants["BLOCK_V"]
    default = choose_tiles(tuple(kernel_size), widths, query.element_size(), is_backward=True)
    common = scale, query.shape[1], tuple(query.shape[2:4]), tuple(dilation)

    def strides(*tensors):
        return tuple(tensor.stride()[:4] for tensor in tensors)

    cut = query_cut or default
    _query_kernel[programs(query, dilation, cut.rows),](
        query, key, value, out, dout, lse, lse if dlse is None else dlse, delta, dquery, *common,
        *strides(query, key, value, out, dout, lse, dquery),
        HAS_DLSE=dlse is not None, **constants, **edges_of(cut), num_warps=cut.num_warps, num_stages=cut.num_stages,
    )  # fmt: skip
    cut = key_cut or default
    _key_kernel[programs(query, dilation, cut.rows),](
        query, key, value, dout, lse, delta, dkey, dvalue, *common,
        *strides(query, key, value, dout, lse, dkey, dvalue),
        **constants, **edges_of(cut), num_warps=cut.num_warps, num_stages=cut.num_stages,
    )  # fmt: skip
    return dquery, dkey, dvalue
