"""Gradients of the gated scan: states again, states of gradients the other way, then all chunks at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import block_width, rows_contiguous
from undivided.ops.scan._chunks import load_rows, load_state, multiply, pairs, sums_of_gates, walk
from undivided.ops.scan.triton import CHUNK, precision, states_of


# One program: one chunk of one head, both directions. Products of gradients and values are those of all pairs; each
# direction takes its own half. The gradient of a gate is the sum over the pairs that it lies between: over pairs of the
# queries from it on, less those of the keys from it on, plus all pairs that leave the chunk. Sums are those of a chunk,
# and a token's pair with itself is in none of them, so that little cancels.
@triton.jit(do_not_specialize=("count",))
def _gradient_kernel(
    query, key, value, gate, reverse_gate, dout, states, adjoints, dquery, dkey, dvalue, dgate, dreverse,
    scale, count, heads,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, gate_stride_b, gate_stride_h, gate_stride_n,
    reverse_stride_b, reverse_stride_h, reverse_stride_n, dout_stride_b, dout_stride_h, dout_stride_n,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
    BOTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(count, CHUNK)
    index = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    batch, head = index // heads, index % heads
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + head * key_stride_h
    value += batch * value_stride_b + head * value_stride_h
    gate += batch * gate_stride_b + head * gate_stride_h
    reverse_gate += batch * reverse_stride_b + head * reverse_stride_h
    dout += batch * dout_stride_b + head * dout_stride_h
    states += (index * chunks + chunk) * (WIDTH * VALUE_WIDTH)
    adjoints += (index * chunks + chunk) * (WIDTH * VALUE_WIDTH)
    first = chunk * CHUNK
    row = first + tl.arange(0, CHUNK)
    inside = row < count

    dq, dk, dv, dg = _of_direction(
        query, key, value, gate, dout, states, adjoints, query_stride_n, key_stride_n,
        value_stride_n, gate_stride_n, dout_stride_n, first, count,
        WIDTH, VALUE_WIDTH, COLUMNS, VALUES, CHUNK, False, PRECISION,
    )  # fmt: skip
    # [batch, tokens, heads, width] in memory, as the projections of a layer give them.
    token = (batch * count + row) * heads + head
    column = tl.arange(0, COLUMNS)
    offset = token[:, None] * WIDTH + column[None, :]
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(dgate + offset, (dg * scale).to(dgate.dtype.element_ty), mask=mask)
    if BOTH:
        step = (tl.num_programs(0) // chunks).to(tl.int64) * chunks * (WIDTH * VALUE_WIDTH)
        dq_end, dk_end, dv_end, dg = _of_direction(
            query, key, value, reverse_gate, dout, states + step, adjoints + step,
            query_stride_n, key_stride_n, value_stride_n, reverse_stride_n, dout_stride_n, first, count,
            WIDTH, VALUE_WIDTH, COLUMNS, VALUES, CHUNK, True, PRECISION,
        )  # fmt: skip
        tl.store(dreverse + offset, (dg * scale).to(dreverse.dtype.element_ty), mask=mask)
        dq += dq_end
        dk += dk_end
        dv += dv_end
    q = load_rows(query, row, inside, query_stride_n, WIDTH, COLUMNS)
    k = load_rows(key, row, inside, key_stride_n, WIDTH, COLUMNS)
    v = load_rows(value, row, inside, value_stride_n, VALUE_WIDTH, VALUES)
    do = load_rows(dout, row, inside, dout_stride_n, VALUE_WIDTH, VALUES)
    own = tl.sum(do * v, 1)[:, None]
    own_weight = tl.sum(q * k, 1)[:, None]
    if BOTH:
        own *= 2
        own_weight *= 2
    tl.store(dquery + offset, ((dq + own * k) * scale).to(dquery.dtype.element_ty), mask=mask)
    tl.store(dkey + offset, ((dk + own * q) * scale).to(dkey.dtype.element_ty), mask=mask)
    values = tl.arange(0, VALUES)
    offset = token[:, None] * VALUE_WIDTH + values[None, :]
    mask = inside[:, None] & (values < VALUE_WIDTH)[None, :]
    tl.store(dvalue + offset, ((dv + own_weight * do) * scale).to(dvalue.dtype.element_ty), mask=mask)


@triton.jit
def _of_direction(
    query, key, value, gate, dout, states, adjoints,
    query_stride, key_stride, value_stride, gate_stride, dout_stride, first, count,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
    FROM_END: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's queries, keys, values and gates, without the pairs of a token with itself."""
    exact: tl.constexpr = PRECISION == "tf32x3"
    # What the gradients of gates subtract.
    inner: tl.constexpr = "tf32" if PRECISION == "bf16" else PRECISION
    until, after, centred, total, mild = sums_of_gates(
        gate, first, count, gate_stride, WIDTH, COLUMNS, CHUNK, FROM_END, exact
    )
    row = first + tl.arange(0, CHUNK)
    q = load_rows(query, row, row < count, query_stride, WIDTH, COLUMNS)
    k = load_rows(key, row, row < count, key_stride, WIDTH, COLUMNS)
    state = load_state(states, WIDTH, VALUE_WIDTH, COLUMNS, VALUES)
    adjoint = load_state(adjoints, WIDTH, VALUE_WIDTH, COLUMNS, VALUES)
    if mild:
        v = load_rows(value, row, row < count, value_stride, VALUE_WIDTH, VALUES)
        do = load_rows(dout, row, row < count, dout_stride, VALUE_WIDTH, VALUES)
        before = pairs(CHUNK, FROM_END)
        q_scaled, k_scaled = q * tl.exp2(centred), k * tl.exp2(-centred)
        k_after = k * tl.exp2(after)
        by_pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
        by_columns = tl.zeros([CHUNK, COLUMNS], tl.float32)
        by_values = tl.zeros([CHUNK, VALUES], tl.float32)
        weights = tl.where(before, multiply(q_scaled, tl.trans(k_scaled), by_pairs, inner), 0.0)
        dv = multiply(k_after, adjoint, by_values, PRECISION)
        dv = multiply(tl.trans(weights), do, dv, PRECISION)
        dweights = tl.where(before, multiply(do, tl.trans(v), by_pairs, PRECISION), 0.0)
        dq = multiply(dweights, k_scaled, by_columns, inner) * tl.exp2(centred)
        dq += multiply(do, tl.trans(state), by_columns, PRECISION) * tl.exp2(until)
        dk_after = multiply(v, tl.trans(adjoint), by_columns, PRECISION)
        leaving = tl.sum(state * adjoint, 1) * tl.exp2(total) + tl.sum(k_after * dk_after, 0)
        dk = multiply(tl.trans(dweights), q_scaled, by_columns, inner) * tl.exp2(-centred)
        dk += dk_after * tl.exp2(after)
    else:
        last, dq, unread = walk(
            state, dout, query, key, value, gate, dout_stride, query_stride, key_stride, value_stride, gate_stride,
            first, count, 0, WIDTH, VALUE_WIDTH, COLUMNS, VALUES, CHUNK, FROM_END, True, False,
        )  # fmt: skip
        leaving = tl.sum(last * adjoint, 1)
        walked, dk, dv = walk(
            adjoint, value, key, query, dout, gate, value_stride, key_stride, query_stride, dout_stride, gate_stride,
            first, count, 1, WIDTH, VALUE_WIDTH, COLUMNS, VALUES, CHUNK, not FROM_END, True, True,
        )  # fmt: skip
    dg = tl.cumsum(q * dq - k * dk, 0, reverse=not FROM_END) + leaving[None, :]
    return dq, dk, dv, dg


def backward(dout, query, key, value, log_gate, reverse_log_gate, scale, *, chunk=CHUNK, num_warps=None):
    """Returns the gradients of query, key, value and both gates; without the second gate that one is empty."""
    # With eight warps gradients of queries and keys of float32 came out wrong on an H100 (Triton 3.6).
    num_warps = num_warps or (4, 8 if query.element_size() == 2 else 4)
    batch, heads, count, width = query.shape
    value_width = value.shape[3]
    dout, query, key, value, log_gate = map(rows_contiguous, (dout, query, key, value, log_gate))
    both = reverse_log_gate is not None
    reverse = rows_contiguous(reverse_log_gate) if both else log_gate
    gates = (log_gate, reverse if both else None)
    scale = scale / 2 if both else scale
    options = {"chunk": chunk, "num_warps": num_warps[0]}
    states = states_of(key, value, *gates, adjoint=False, **options)
    adjoints = states_of(query, dout, *gates, adjoint=True, **options)
    dquery, dkey, dvalue, dgate, dreverse = empty_gradients(query, key, value, log_gate, reverse)
    _gradient_kernel[(batch * heads * triton.cdiv(count, chunk),)](
        query, key, value, log_gate, reverse, dout, states, adjoints, dquery, dkey, dvalue, dgate,
        dreverse if both else dgate, scale, count, heads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *log_gate.stride()[:3], *reverse.stride()[:3],
        *dout.stride()[:3],
        WIDTH=width, VALUE_WIDTH=value_width, COLUMNS=block_width(width), VALUES=block_width(value_width), CHUNK=chunk,
        BOTH=both, PRECISION=precision(query), num_warps=num_warps[1],
    )  # fmt: skip
    return dquery, dkey, dvalue, dgate, dreverse


def empty_gradients(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns uninitialised gradients, `[batch, tokens, heads, width]` in memory."""
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in tensors)
