"""What the kernels of the gated scan share: rows of a chunk, sums of its gates, and the recurrence inside it."""

from __future__ import annotations

import triton
import triton.language as tl

from undivided.ops._flash import LOG2E

_LOG2E: tl.constexpr = tl.constexpr(LOG2E)
# 2 ** -160 is zero in float32, so that -inf need not be one: its differences would be NaN.
_LOWEST: tl.constexpr = tl.constexpr(-160.0)
# Half a chunk that forgets less than by 2 ** -20 is one product of matrices: its factors lie in 2 ** -20 ... 2 ** 20.
_MILD: tl.constexpr = tl.constexpr(20.0)


@triton.jit
def load_rows(base, row, inside, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a sequence in float32; those that are not inside and columns from WIDTH on are zero."""
    column = tl.arange(0, COLUMNS)
    # int64: a token's stride times a million tokens passes 2**31.
    pointers = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointers, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_gates(base, row, inside, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Logarithms of gates in base 2."""
    return tl.maximum(load_rows(base, row, inside, stride, WIDTH, COLUMNS) * _LOG2E, _LOWEST)


@triton.jit
def multiply(a, b, c, PRECISION: tl.constexpr):
    """`a @ b + c` in float32; its factors are rounded to bfloat16, or as `tl.dot` has it."""
    if PRECISION == "bf16":
        c = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), c)
    else:
        c = tl.dot(a, b, c, input_precision=PRECISION)
    return c


@triton.jit
def load_state(
    base, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr
):
    """A state of float32, `[COLUMNS, VALUES]`."""
    column, value = tl.arange(0, COLUMNS), tl.arange(0, VALUES)
    offset = column[:, None] * VALUE_WIDTH + value[None, :]
    return tl.load(base + offset, mask=(column < WIDTH)[:, None] & (value < VALUE_WIDTH)[None, :], other=0.0)


@triton.jit
def sums_of_gates(
    base, first, count, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    FROM_END: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Sums of a chunk's gates, in the order in which a scan passes them.

    Returns:
        until: from the first token of the chunk to each, itself included.
        after: behind each token to the last of the chunk.
        centred: from the middle of the chunk to each token; positive before it.
        total: of the chunk.
        mild: whether both halves are. Without EXACT the others are only to be used then: they are rounded as a sum of
            mild gates is, far less than half precision shows.
    """
    row = tl.arange(0, CHUNK)
    place = first + row
    gate = load_gates(base, place, place < count, stride, WIDTH, COLUMNS)
    if FROM_END:
        is_later = (row < CHUNK // 2)[:, None]
    else:
        is_later = (row >= CHUNK // 2)[:, None]
    earlier = tl.sum(tl.where(is_later, 0.0, gate), 0)
    later = tl.sum(tl.where(is_later, gate, 0.0), 0)
    total = earlier + later
    if EXACT:
        # The gates of the token that is passed next are read again, and halves are summed apart: differences of sums
        # would be rounded as the sums are.
        if FROM_END:
            following = place - 1
            has_following = (row > 0) & (following < count)
            follows_earlier = (row > CHUNK // 2)[:, None]
        else:
            following = place + 1
            has_following = (row + 1 < CHUNK) & (following < count)
            follows_earlier = (row + 1 < CHUNK // 2)[:, None]
        gate_next = load_gates(base, following, has_following, stride, WIDTH, COLUMNS)
        until_earlier = tl.cumsum(tl.where(is_later, 0.0, gate), 0, reverse=FROM_END)
        until_later = tl.cumsum(tl.where(is_later, gate, 0.0), 0, reverse=FROM_END)
        after_earlier = tl.cumsum(tl.where(follows_earlier, gate_next, 0.0), 0, reverse=not FROM_END)
        after_later = tl.cumsum(tl.where(follows_earlier, 0.0, gate_next), 0, reverse=not FROM_END)
        until, after = until_earlier + until_later, after_earlier + after_later
        centred = until_later - after_earlier
    else:
        until = tl.cumsum(gate, 0, reverse=FROM_END)
        after = total[None, :] - until
        centred = until - earlier[None, :]
    mild = tl.min(tl.minimum(earlier, later), 0) > -_MILD
    return until, after, centred, total, mild


@triton.jit
def pairs(CHUNK: tl.constexpr, FROM_END: tl.constexpr):
    """`[query, key]`: whether the key is passed before the query."""
    row = tl.arange(0, CHUNK)
    if FROM_END:
        before = row[:, None] < row[None, :]
    else:
        before = row[:, None] > row[None, :]
    return before


# The recurrence itself, for chunks that forget too much for products. At each token, before it is added,
# `read_keys_t = state x_t` and `read_values_t = y_t state`; then the outer product of a_t and b_t is added.
@triton.jit
def walk(
    state, x, y, a, b, gate, x_stride, y_stride, a_stride, b_stride, gate_stride, first, count,
    GATE_SHIFT: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    VALUES: tl.constexpr, CHUNK: tl.constexpr, FROM_END: tl.constexpr, READ_KEYS: tl.constexpr,
    READ_VALUES: tl.constexpr,
):  # fmt: skip
    """Tokens of a chunk one by one; GATE_SHIFT is 1 where a token decays by the gate of the one passed before it."""
    row = tl.arange(0, CHUNK)
    column, value = tl.arange(0, COLUMNS), tl.arange(0, VALUES)
    read_keys = tl.zeros([CHUNK, COLUMNS], tl.float32)
    read_values = tl.zeros([CHUNK, VALUES], tl.float32)
    last = tl.minimum(count - first, CHUNK)
    for step in range(last):
        if FROM_END:
            at = last - 1 - step
            gate_place = first + at + GATE_SHIFT
            has_gate = at + GATE_SHIFT < last
        else:
            at = step
            gate_place = first + at - GATE_SHIFT
            has_gate = at - GATE_SHIFT >= 0
        place = (first + at).to(tl.int64)
        g = tl.load(
            gate + gate_place.to(tl.int64) * gate_stride + column, mask=(column < WIDTH) & has_gate, other=0.0
        )
        state *= tl.exp2(tl.maximum(g.to(tl.float32) * _LOG2E, _LOWEST))[:, None]
        if READ_KEYS:
            x_row = tl.load(x + place * x_stride + value, mask=value < VALUE_WIDTH, other=0.0).to(tl.float32)
            read = tl.sum(state * x_row[None, :], 1)
            read_keys = tl.where((row == at)[:, None], read[None, :], read_keys)
        if READ_VALUES:
            y_row = tl.load(y + place * y_stride + column, mask=column < WIDTH, other=0.0).to(tl.float32)
            read = tl.sum(state * y_row[:, None], 0)
            read_values = tl.where((row == at)[:, None], read[None, :], read_values)
        a_row = tl.load(a + place * a_stride + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        b_row = tl.load(b + place * b_stride + value, mask=value < VALUE_WIDTH, other=0.0).to(tl.float32)
        state += a_row[:, None] * b_row[None, :]
    return state, read_keys, read_values
