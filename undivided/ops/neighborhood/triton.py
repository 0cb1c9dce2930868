"""Neighborhood attention forward in Triton, and what the backward shares with it: boxes of rows meet boxes of columns.

Tokens stay where they are: a box is read by its strides, a row of `head_dim` numbers at a time, dilation included, so
that nothing is permuted or padded. Boxes of columns start at the first column that a box of rows sees, not on a fixed
grid, which visits fewest. Windows are computed from the numbers of the axis when a program starts, the columns of a
row from the window, the rows of a column from the inverse window: both kinds of kernel are the same to look at.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from undivided.ops._flash import (
    LOG2E,
    Tiling,
    block_width,
    precision,
    rows_contiguous,
    running_softmax,
    shared_memory,
)
from undivided.ops.neighborhood._tables import Neighborhood
from undivided.ops.neighborhood.boxes import Boxes, choose_boxes


@triton.jit
def window(index, last, kernel_size, stride, IS_CAUSAL: tl.constexpr, INVERSE: tl.constexpr):
    """Start and end of the window of a query along an axis that ends at `last`; INVERSE: of the queries of a key."""
    if INVERSE:
        if IS_CAUSAL:
            start = index
            group = (index + kernel_size - stride) // stride
            is_last = index + kernel_size > last
        else:
            left = kernel_size // 2
            half = stride // 2
            least = tl.maximum(index - kernel_size + 1 + left - half, 0)
            start = tl.where(index < kernel_size, 0, (least + stride - 1) // stride * stride)
            group = (index + left - half) // stride
            is_last = index + kernel_size > last
        end = tl.where(is_last, last + 1, tl.minimum((group + 1) * stride, last + 1))
    else:
        group = index // stride * stride
        if IS_CAUSAL:
            leader = tl.minimum(group + stride - 1, last)
            start = tl.maximum(leader - kernel_size + 1, 0)
            end = index + 1
        else:
            leader = tl.minimum(group + stride // 2, last)
            start = tl.minimum(tl.maximum(leader - kernel_size // 2, 0), last + 1 - kernel_size)
            end = start + kernel_size
    return start, end


@triton.jit
def place(size, dilation, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr):
    """Of this program: the first indices of its box of rows, their class, its last indices, and its head of all."""
    boxes_1 = tl.cdiv(tl.cdiv(size[1], dilation[1]), R1)
    boxes_2 = tl.cdiv(tl.cdiv(size[2], dilation[2]), R2)
    boxes = tl.cdiv(tl.cdiv(size[0], dilation[0]), R0) * boxes_1 * boxes_2
    classes = dilation[0] * dilation[1] * dilation[2]
    program = tl.program_id(0)
    # Neighbors run side by side: what they share is in the L2 cache.
    box = program % boxes
    program = program // boxes
    residue = program % classes
    head = program // classes
    residue_1 = residue // dilation[2] % dilation[1]
    residue_2 = residue % dilation[2]
    residue_0 = residue // (dilation[1] * dilation[2])
    first = (box // (boxes_1 * boxes_2) * R0, box // boxes_2 % boxes_1 * R1, box % boxes_2 * R2)
    last = (
        (size[0] - 1 - residue_0) // dilation[0],
        (size[1] - 1 - residue_1) // dilation[1],
        (size[2] - 1 - residue_2) // dilation[2],
    )
    return first, (residue_0, residue_1, residue_2), last, head


@triton.jit
def indices(COUNT: tl.constexpr, EDGE_1: tl.constexpr, EDGE_2: tl.constexpr):
    """The places within a box of the grid, along each axis, of its tokens in row-major order."""
    token = tl.arange(0, COUNT)
    return token // (EDGE_1 * EDGE_2), token // EDGE_2 % EDGE_1, token % EDGE_2


@triton.jit
def visits(
    first, last, kernel_size, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """Along an axis: the first column and the number of boxes to visit, and which columns all rows see."""
    start, high = window(first, last, kernel_size, stride, IS_CAUSAL, INVERSE)
    low, end = window(tl.minimum(first + ROWS - 1, last), last, kernel_size, stride, IS_CAUSAL, INVERSE)
    count = tl.cdiv(end - start, COLUMNS)
    # Moved so that a box ends with the axis instead of reaching beyond it.
    start = tl.maximum(tl.minimum(start, last + 1 - count * COLUMNS), 0)
    return start, count, low, high


@triton.jit
def corner(at, residue, dilation, strides):
    """Where a box begins that has its first token at these indices of a class."""
    return (
        (at[0] * dilation[0] + residue[0]).to(tl.int64) * strides[2]
        + (at[1] * dilation[1] + residue[1]).to(tl.int64) * strides[3]
        + (at[2] * dilation[2] + residue[2]).to(tl.int64) * strides[4]
    )


@triton.jit
def begin(batch, head, at, residue, dilation, strides):
    """Where a box of one head begins."""
    return batch * strides[0] + head * strides[1] + corner(at, residue, dilation, strides)


@triton.jit
def within(token, dilation, strides, WIDE: tl.constexpr):
    """Where the tokens of a box are, from where it begins; WIDE: more than 2**31 numbers from it."""
    if WIDE:
        token = (token[0].to(tl.int64), token[1].to(tl.int64), token[2].to(tl.int64))
    return (
        token[0] * (dilation[0] * strides[2])
        + token[1] * (dilation[1] * strides[3])
        + token[2] * (dilation[2] * strides[4])
    )


@triton.jit
def exist(at, token, last):
    """Which tokens of a box are on the grid."""
    return (at[0] + token[0] <= last[0]) & (at[1] + token[1] <= last[1]) & (at[2] + token[2] <= last[2])


@triton.jit
def load_rows(base, offset, inside, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """Rows of WIDTH at these offsets; with MASKED those outside are zero, as are columns from WIDTH on."""
    column = tl.arange(0, COLUMNS)
    pointer = base + offset[:, None] + column[None, :]
    if MASKED:
        rows = tl.load(pointer, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif WIDTH < COLUMNS:
        rows = tl.load(pointer, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        rows = tl.load(pointer)
    return rows


@triton.jit
def store_rows(base, offset, inside, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores what `load_rows` would load."""
    column = tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(base + offset[:, None] + column[None, :], rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def bounds(
    first, token, last, kernel_size, stride, IS_CAUSAL: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Start and width of the window of each row of a box along an axis; rows beyond the grid have that of the last."""
    start, end = window(tl.minimum(first + token, last), last, kernel_size, stride, IS_CAUSAL, INVERSE)
    return start, (end - start).to(tl.uint32)


@triton.jit
def sees(column, start, width):
    """Whether `start <= column < start + width`, by one comparison: what is before wraps around to large numbers."""
    return (column[None, :] - start[:, None]).to(tl.uint32) < width[:, None]


@triton.jit
def along(
    first, row, last, kernel_size, stride, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, C0: tl.constexpr,
    C1: tl.constexpr, C2: tl.constexpr, CAUSAL_0: tl.constexpr, CAUSAL_1: tl.constexpr, CAUSAL_2: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """Of the three axes `visits` and `bounds`: first columns, their end, all boxes; what all rows see; each row."""
    a, n_a, low_0, high_0 = visits(first[0], last[0], kernel_size[0], stride[0], R0, C0, CAUSAL_0, INVERSE)
    b, n_b, low_1, high_1 = visits(first[1], last[1], kernel_size[1], stride[1], R1, C1, CAUSAL_1, INVERSE)
    c, n_c, low_2, high_2 = visits(first[2], last[2], kernel_size[2], stride[2], R2, C2, CAUSAL_2, INVERSE)
    start_0, width_0 = bounds(first[0], row[0], last[0], kernel_size[0], stride[0], CAUSAL_0, INVERSE)
    start_1, width_1 = bounds(first[1], row[1], last[1], kernel_size[1], stride[1], CAUSAL_1, INVERSE)
    start_2, width_2 = bounds(first[2], row[2], last[2], kernel_size[2], stride[2], CAUSAL_2, INVERSE)
    end = (a + n_a * C0, b + n_b * C1, c + n_c * C2)
    low, high = (low_0, low_1, low_2), (high_0, high_1, high_2)
    return (
        (a, b, c),
        end,
        n_a * n_b * n_c,
        low,
        high,
        (start_0, start_1, start_2),
        (width_0, width_1, width_2),
    )


@triton.jit
def hide(
    scores, at, column, low, high, start, width, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    MASKED_0: tl.constexpr, MASKED_1: tl.constexpr, MASKED_2: tl.constexpr,
):  # fmt: skip
    """Scores of a box whose first indices are `at`, -inf where a row does not see a column.

    A box that all rows see takes no mask.
    """
    if MASKED_0 or MASKED_1 or MASKED_2:
        is_full = True
        if MASKED_0:
            is_full = is_full & (at[0] >= low[0]) & (at[0] + C0 <= high[0])
        if MASKED_1:
            is_full = is_full & (at[1] >= low[1]) & (at[1] + C1 <= high[1])
        if MASKED_2:
            is_full = is_full & (at[2] >= low[2]) & (at[2] + C2 <= high[2])
        if not is_full:
            if MASKED_0:
                scores = tl.where(sees(column[0] + at[0], start[0], width[0]), scores, float("-inf"))
            if MASKED_1:
                scores = tl.where(sees(column[1] + at[1], start[1], width[1]), scores, float("-inf"))
            if MASKED_2:
                scores = tl.where(sees(column[2] + at[2], start[2], width[2]), scores, float("-inf"))
    return scores


@triton.jit
def advance(
    a, b, c, begin, end, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr
):  # fmt: skip
    """The first indices of the next box in row-major order."""
    c += C2
    carry = c >= end[2]
    c = tl.where(carry, begin[2], c)
    b = tl.where(carry, b + C1, b)
    carry = carry & (b >= end[1])
    b = tl.where(carry, begin[1], b)
    a = tl.where(carry, a + C0, a)
    return a, b, c


# One program: a box of queries of one head against the boxes of keys that any of them sees. In registers: the float32
# accumulator, a maximum and a sum a row, the scores of one box of keys, and the start of each row's window along each
# axis. It does `2 * (head_dim + value_dim)` operations a pair; it moves its queries, its output and, mostly from the L2
# cache, the keys and values, which the boxes beside it also read. A box of keys that all rows see takes no mask.
@triton.jit
def _forward_kernel(
    query, key, value, out, lse, scale, heads, key_group, size, kernel_size, stride, dilation,
    query_strides, key_strides, value_strides, out_strides, lse_strides,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    CAUSAL_0: tl.constexpr, CAUSAL_1: tl.constexpr, CAUSAL_2: tl.constexpr,
    MASKED_0: tl.constexpr, MASKED_1: tl.constexpr, MASKED_2: tl.constexpr, OVERRUNS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
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
    q = load_rows(query, within(row, dilation, query_strides, WIDE), row_exists, HEAD_DIM, BLOCK_D, True)
    key += batch * key_strides[0] + (head // key_group) * key_strides[1]
    value += batch * value_strides[0] + (head // key_group) * value_strides[1]
    key_offset = within(column, dilation, key_strides, WIDE)
    value_offset = within(column, dilation, value_strides, WIDE)

    begins, ends, boxes, low, high, start, width = along(
        first, row, last, kernel_size, stride, R0, R1, R2, C0, C1, C2, CAUSAL_0, CAUSAL_1, CAUSAL_2, False
    )  # fmt: skip
    a, b, c = begins

    # Finite, so that differences of maxima are never NaN; the exponential of -inf minus it is 0.
    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for _ in tl.range(0, boxes):
        at = (a, b, c)
        inside = exist(at, column, last)
        k = key + corner(at, residue, dilation, key_strides)
        k = load_rows(k, key_offset, inside, HEAD_DIM, BLOCK_D, OVERRUNS)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = hide(
            scores, at, column, low, high, start, width, C0, C1, C2, MASKED_0, MASKED_1, MASKED_2
        )  # fmt: skip
        weights, top, total, decay = running_softmax(scores, top, total, scale)
        v = value + corner(at, residue, dilation, value_strides)
        v = load_rows(v, value_offset, inside, VALUE_DIM, BLOCK_V, OVERRUNS)
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision=PRECISION)
        a, b, c = advance(a, b, c, begins, ends, C0, C1, C2)

    # A query sees itself, so the sum is never 0.
    out += begin(batch, head, first, residue, dilation, out_strides)
    store_rows(
        out,
        within(row, dilation, out_strides, WIDE),
        row_exists,
        accumulator / total[:, None],
        VALUE_DIM,
        BLOCK_V,
    )
    lse += begin(batch, head, first, residue, dilation, lse_strides)
    sums = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + within(row, dilation, lse_strides, WIDE), sums, mask=row_exists)


# Tilings and their speed in TFLOPS: the first two as measured on an H100 at head_dim 128 with a window of everything;
# then smaller ones for less memory, estimated.
_FORWARD = (
    (Tiling(128, 64, 8, 3), 474),
    (Tiling(64, 64, 4, 3), 468),
    (Tiling(64, 32, 4, 2), 300),
    (Tiling(32, 32, 4, 1), 200),
)
_FORWARD_FLOAT32 = ((Tiling(32, 32, 8, 1), 1), (Tiling(16, 16, 4, 1), 1))
Candidates = tuple[tuple[Tiling, int], ...]


def choose_cut(
    candidates: Candidates,
    neighborhood: Neighborhood,
    inverse: bool,
    elements: Callable[[Tiling], int],
    limit: int,
) -> tuple[Tiling, Boxes]:
    """Returns the tiling and the boxes that take the least time, by what they visit and how fast a tiling is.

    Args:
        candidates: tilings and their speed.
        neighborhood: the grid and its windows.
        inverse: whether rows are keys and columns the queries that see them.
        elements: what a tiling keeps in shared memory.
        limit: what it may keep; if all keep more, the last, the smallest, is taken.
    """
    fitting = [entry for entry in candidates if elements(entry[0]) <= limit] or [candidates[-1]]

    def time(entry: tuple[Tiling, int]) -> float:
        cut, speed = entry
        return choose_boxes(neighborhood, cut.rows, cut.keys, inverse).cost * cut.rows * cut.keys / speed

    cut, _ = min(fitting, key=time)
    return cut, choose_boxes(neighborhood, cut.rows, cut.keys, inverse)


def forward_cut(query, value, neighborhood: Neighborhood, memory: int) -> tuple[Tiling, Boxes]:
    """Returns the tiling and the boxes of the forward, for so many bytes of shared memory."""
    head_dim, value_dim = block_width(query.shape[-1]), block_width(value.shape[-1])
    return choose_cut(
        _FORWARD if query.element_size() == 2 else _FORWARD_FLOAT32,
        neighborhood,
        False,
        lambda t: t.rows * head_dim + t.num_stages * t.keys * (head_dim + value_dim),
        memory // query.element_size(),
    )


def forward(query, key, value, kernel_size, stride, dilation, is_causal, scale):
    """Returns out and the natural log-sums of the logits."""
    neighborhood = Neighborhood.of(query.shape[2:-1], kernel_size, stride, dilation, is_causal)
    query, key, value = map(rows_contiguous, (query, key, value))
    out, lse = empty_outputs(query, value)
    if out.numel() == 0:
        return out, lse
    cut, boxes = forward_cut(query, value, neighborhood, shared_memory(query.device))
    batch, heads = query.shape[:2]
    _forward_kernel[boxes.programs * batch * heads,](
        query, key, value, out, lse, scale * LOG2E, heads, heads // key.shape[1], *numbers(neighborhood),
        *map(strides, (query, key, value, out, lse[..., None])),
        **box_constants(boxes, neighborhood, query, key, value, out), **sizes_of(query, value),
        num_warps=cut.num_warps, num_stages=cut.num_stages,
    )  # fmt: skip
    return out, lse


def empty_outputs(query, value):
    """Returns the tensors that `forward` fills; the heads of a token are side by side in memory."""
    batch, heads, *size, _ = query.shape
    out = query.new_empty((batch, *size, heads, value.shape[-1])).movedim(-2, 1)
    return out, query.new_empty((batch, heads, *size), dtype=torch.float32)


def sizes_of(query, value) -> dict[str, object]:
    """Returns the constants that depend on the tensors alone."""
    return {
        "HEAD_DIM": query.shape[-1],
        "VALUE_DIM": value.shape[-1],
        "BLOCK_D": block_width(query.shape[-1]),
        "BLOCK_V": block_width(value.shape[-1]),
        "PRECISION": precision(query),
    }


def numbers(neighborhood: Neighborhood) -> list[tuple[int, ...]]:
    """Returns size, kernel_size, stride and dilation of three axes."""
    given = (neighborhood.size, neighborhood.kernel_size, neighborhood.stride, neighborhood.dilation)
    return [(1,) * (3 - len(entries)) + entries for entries in given]


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Returns the strides of batch, heads and three axes."""
    batch, heads, *grid, _ = tensor.stride()
    return (batch, heads, *(0,) * (3 - len(grid)), *grid)


def box_constants(boxes: Boxes, neighborhood: Neighborhood, *tensors: torch.Tensor) -> dict[str, object]:
    """Returns the constants that say how the grid is cut, what is masked, and how far apart the tokens of a box are."""
    missing = 3 - len(neighborhood.size)
    is_causal = (False,) * missing + neighborhood.is_causal
    dilation = (1,) * missing + neighborhood.dilation
    edges = [max(edge) - 1 for edge in zip(boxes.rows, boxes.columns, strict=True)]
    reach = max(
        sum(edge * step * stride for edge, step, stride in zip(edges, dilation, strides(x)[2:], strict=True))
        for x in tensors
    )
    constants: dict[str, object] = {"OVERRUNS": boxes.overruns, "WIDE": reach >= 2**31}
    for axis in range(3):
        constants[f"R{axis}"] = boxes.rows[axis]
        constants[f"C{axis}"] = boxes.columns[axis]
        constants[f"CAUSAL_{axis}"] = is_causal[axis]
        constants[f"MASKED_{axis}"] = boxes.is_masked[axis]
    return constants
