"""The gated scan in Triton, both directions in one launch: states between chunks first, then all chunks at once.

Tokens stay where they are: the scan from the end reads chunks from the end, and nothing is flipped or copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import block_width, rows_contiguous
from undivided.ops.scan._chunks import load_gates, load_rows, load_state, multiply, pairs, sums_of_gates, walk

# Tokens of a chunk.
CHUNK = 64


# One program: one direction of one head. It keeps the state `[head_dim, value_dim]` in registers, writes it before each
# chunk and adds the chunk: `state = exp(total) * state + (exp(sums) * a)^T b`. For states of keys and values the sums
# are those behind a token; ADJOINT, for their gradients, it walks the other way, over queries and gradients of outputs,
# with sums that include the token. It reads a, b and the gates once and writes a state a chunk.
@triton.jit(do_not_specialize=("count",))
def _state_kernel(
    a, b, gate, reverse_gate, states, count, heads,
    a_stride_b, a_stride_h, a_stride_n, b_stride_b, b_stride_h, b_stride_n,
    gate_stride_b, gate_stride_h, gate_stride_n, reverse_stride_b, reverse_stride_h, reverse_stride_n,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
    ADJOINT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % heads).to(tl.int64)
    batch = (tl.program_id(0) // heads).to(tl.int64)
    direction = tl.program_id(1)
    a += batch * a_stride_b + head * a_stride_h
    b += batch * b_stride_b + head * b_stride_h
    gate += batch * gate_stride_b + head * gate_stride_h
    gate_stride = gate_stride_n
    if direction == 1:
        gate = reverse_gate + batch * reverse_stride_b + head * reverse_stride_h
        gate_stride = reverse_stride_n
    upwards = (direction == 1) == ADJOINT
    chunks = tl.cdiv(count, CHUNK)
    states += (
        (direction * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * chunks * (WIDTH * VALUE_WIDTH)
    )
    row, column, value = tl.arange(0, CHUNK), tl.arange(0, COLUMNS), tl.arange(0, VALUES)
    state_offset = column[:, None] * VALUE_WIDTH + value[None, :]
    state_inside = (column < WIDTH)[:, None] & (value < VALUE_WIDTH)[None, :]
    state = tl.zeros([COLUMNS, VALUES], tl.float32)
    for step in range(chunks):
        chunk = tl.where(upwards, step, chunks - 1 - step)
        tl.store(states + chunk.to(tl.int64) * (WIDTH * VALUE_WIDTH) + state_offset, state, mask=state_inside)
        # In the order of the walk: the sums are then those to the end of the chunk, whichever way it goes.
        place = chunk * CHUNK + tl.where(upwards, row, CHUNK - 1 - row)
        inside = place < count
        if ADJOINT:
            gates = load_gates(gate, place, inside, gate_stride, WIDTH, COLUMNS)
            total = tl.sum(gates, 0)
        else:
            following = place + tl.where(upwards, 1, -1)
            has_following = (row + 1 < CHUNK) & (following < count)
            gates = load_gates(gate, following, has_following, gate_stride, WIDTH, COLUMNS)
            first = chunk * CHUNK + tl.where(upwards, 0, CHUNK - 1) + tl.arange(0, 1)
            total = tl.sum(gates, 0) + tl.sum(
                load_gates(gate, first, first < count, gate_stride, WIDTH, COLUMNS), 0
            )
        weighted = load_rows(a, place, inside, a_stride_n, WIDTH, COLUMNS) * tl.exp2(
            tl.cumsum(gates, 0, reverse=True)
        )
        added = load_rows(b, place, inside, b_stride_n, VALUE_WIDTH, VALUES)
        state = multiply(tl.trans(weighted), added, state * tl.exp2(total)[:, None], PRECISION)


# One program: one chunk of one head, both directions. In registers: its queries, keys, values and sums of gates, the
# weights `[CHUNK, CHUNK]` of all pairs (below the diagonal from the start, above it from the end), and the output.
@triton.jit(do_not_specialize=("count",))
def _out_kernel(
    query, key, value, gate, reverse_gate, states, out, scale, count, heads,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, gate_stride_b, gate_stride_h, gate_stride_n,
    reverse_stride_b, reverse_stride_h, reverse_stride_n,
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
    states += (index * chunks + chunk) * (WIDTH * VALUE_WIDTH)
    first = chunk * CHUNK
    row = first + tl.arange(0, CHUNK)
    q = load_rows(query, row, row < count, query_stride_n, WIDTH, COLUMNS)
    k = load_rows(key, row, row < count, key_stride_n, WIDTH, COLUMNS)
    v = load_rows(value, row, row < count, value_stride_n, VALUE_WIDTH, VALUES)
    accumulator = tl.sum(q * k, 1)[:, None] * v
    if BOTH:
        accumulator *= 2
    accumulator += _read(
        q, k, v, query, key, value, gate, states, query_stride_n, key_stride_n, value_stride_n, gate_stride_n,
        first, count, WIDTH, VALUE_WIDTH, COLUMNS, VALUES, CHUNK, False, PRECISION,
    )  # fmt: skip
    if BOTH:
        states += (tl.num_programs(0) // chunks).to(tl.int64) * chunks * (WIDTH * VALUE_WIDTH)
        accumulator += _read(
            q, k, v, query, key, value, reverse_gate, states, query_stride_n, key_stride_n, value_stride_n,
            reverse_stride_n, first, count, WIDTH, VALUE_WIDTH, COLUMNS, VALUES, CHUNK, True, PRECISION,
        )  # fmt: skip
    # [batch, tokens, heads, value_dim] in memory: what follows reads the heads of a token side by side.
    columns = tl.arange(0, VALUES)
    offset = ((batch * count + row) * heads + head)[:, None] * VALUE_WIDTH + columns[None, :]
    inside = (row < count)[:, None] & (columns < VALUE_WIDTH)[None, :]
    tl.store(out + offset, (accumulator * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _read(
    q, k, v, query, key, value, gate, states, query_stride, key_stride, value_stride, gate_stride, first, count,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
    FROM_END: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What queries of a chunk read of all tokens passed before them, in one direction."""
    exact: tl.constexpr = PRECISION == "tf32x3"
    until, after, centred, total, mild = sums_of_gates(
        gate, first, count, gate_stride, WIDTH, COLUMNS, CHUNK, FROM_END, exact
    )
    state = load_state(states, WIDTH, VALUE_WIDTH, COLUMNS, VALUES)
    if mild:
        weights = tl.zeros([CHUNK, CHUNK], tl.float32)
        weights = multiply(q * tl.exp2(centred), tl.trans(k * tl.exp2(-centred)), weights, PRECISION)
        weights = tl.where(pairs(CHUNK, FROM_END), weights, 0.0)
        out = multiply(q * tl.exp2(until), state, tl.zeros([CHUNK, VALUES], tl.float32), PRECISION)
        out = multiply(weights, v, out, PRECISION)
    else:
        walked, unread, out = walk(
            state, value, query, key, value, gate, value_stride, query_stride, key_stride, value_stride, gate_stride,
            first, count, 0, WIDTH, VALUE_WIDTH, COLUMNS, VALUES, CHUNK, FROM_END, False, True,
        )  # fmt: skip
    return out


def states_of(a, b, log_gate, reverse_log_gate, *, adjoint, chunk=CHUNK, num_warps=4):
    """Returns the states before each chunk, float32 `[directions, batch * heads, chunks, head_dim, value_dim]`.

    With `adjoint` those of the gradients: behind each chunk, of a the queries and b the gradients of the output.
    """
    batch, heads, count, width = a.shape
    value_width = b.shape[3]
    directions = 1 if reverse_log_gate is None else 2
    states = a.new_empty(
        (directions, batch * heads, triton.cdiv(count, chunk), width, value_width), dtype=torch.float32
    )
    reverse = log_gate if reverse_log_gate is None else reverse_log_gate
    _state_kernel[batch * heads, directions](
        a, b, log_gate, reverse, states, count, heads,
        *a.stride()[:3], *b.stride()[:3], *log_gate.stride()[:3], *reverse.stride()[:3],
        WIDTH=width, VALUE_WIDTH=value_width, COLUMNS=block_width(width), VALUES=block_width(value_width), CHUNK=chunk,
        ADJOINT=adjoint, PRECISION=precision(a), num_warps=num_warps,
    )  # fmt: skip
    return states


def forward(
    query, key, value, log_gate, reverse_log_gate, scale, *, chunk=CHUNK, num_warps=(4, 4)
):  # fmt: skip
    """Returns the output, `[batch, tokens, heads, value_dim]` in memory."""
    batch, heads, count, width = query.shape
    value_width = value.shape[3]
    query, key, value, log_gate = map(rows_contiguous, (query, key, value, log_gate))
    reverse = log_gate if reverse_log_gate is None else rows_contiguous(reverse_log_gate)
    both = reverse_log_gate is not None
    states = states_of(
        key, value, log_gate, reverse if both else None, adjoint=False, chunk=chunk, num_warps=num_warps[0]
    )
    out = query.new_empty((batch, count, heads, value_width)).transpose(1, 2)
    _out_kernel[(batch * heads * triton.cdiv(count, chunk),)](
        query, key, value, log_gate, reverse, states, out, scale / 2 if both else scale, count, heads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *log_gate.stride()[:3], *reverse.stride()[:3],
        WIDTH=width, VALUE_WIDTH=value_width, COLUMNS=block_width(width), VALUES=block_width(value_width), CHUNK=chunk,
        BOTH=both, PRECISION=precision(query), num_warps=num_warps[1],
    )  # fmt: skip
    return out


def precision(tensor: torch.Tensor) -> str:
    """How factors of products are rounded: float16 to as many bits, for its range, and float32 almost not."""
    return {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}[tensor.dtype]
