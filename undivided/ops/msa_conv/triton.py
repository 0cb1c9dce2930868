"""MSA-Conv forward in Triton, and what the backward shares with it: tiles of queries that meet tiles of keys.

A dilated map is `dilation_0 * dilation_1` maps of every so-manieth token, which do not see each other; a program
stays within one of them. Tiles are read where they lie, by strides; nothing is unfolded or padded. Beyond the map,
zeros that stay in the softmax are counted: each adds `exp(0)` to the sum and nothing to the output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from undivided.ops._flash import block_width, precision
from undivided.ops.msa_conv._border import empty_like_tokens, empty_sums


@triton.jit
def place(size, dilation, R0: tl.constexpr, R1: tl.constexpr):
    """Of this program: the first indices of its tile, its class, the lengths of the class, and its head of all."""
    tiles_0 = tl.cdiv(tl.cdiv(size[0], dilation[0]), R0)
    tiles_1 = tl.cdiv(tl.cdiv(size[1], dilation[1]), R1)
    program = tl.program_id(0)
    # Neighbors run side by side: what they share is in the L2 cache.
    tile = program % (tiles_0 * tiles_1)
    program = program // (tiles_0 * tiles_1)
    residue = program % (dilation[0] * dilation[1])
    head = program // (dilation[0] * dilation[1])
    residue_0, residue_1 = residue // dilation[1], residue % dilation[1]
    length = ((size[0] - 1 - residue_0) // dilation[0] + 1, (size[1] - 1 - residue_1) // dilation[1] + 1)
    return (tile // tiles_1 * R0, tile % tiles_1 * R1), (residue_0, residue_1), length, head


@triton.jit
def tokens(first, residue, length, size, dilation, T0: tl.constexpr, T1: tl.constexpr, WRAP: tl.constexpr):
    """Of a tile: the indices of its tokens in their class, which exist, and their places on the map."""
    token = tl.arange(0, T0 * T1)
    a = first[0] + token // T1
    b = first[1] + token % T1
    row = a * dilation[0] + residue[0]
    column = b * dilation[1] + residue[1]
    if WRAP:
        exists = tl.full([T0 * T1], True, tl.int1)
        row = ((row % size[0]) + size[0]) % size[0]
        column = ((column % size[1]) + size[1]) % size[1]
    else:
        exists = (a >= 0) & (b >= 0) & (a < length[0]) & (b < length[1])
    return a, b, exists, row, column


@triton.jit
def load_rows(base, row, column, exists, strides, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of `WIDTH` numbers of the tokens at these places; zeros where there is none."""
    lane = tl.arange(0, BLOCK)
    offset = row.to(tl.int64) * strides[2] + column.to(tl.int64) * strides[3]
    mask = exists[:, None]
    if WIDTH < BLOCK:
        mask = mask & (lane < WIDTH)[None, :]
    return tl.load(base + offset[:, None] + lane[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, row, column, exists, strides, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Stores such rows."""
    lane = tl.arange(0, BLOCK)
    offset = row.to(tl.int64) * strides[2] + column.to(tl.int64) * strides[3]
    mask = exists[:, None] & (lane < WIDTH)[None, :]
    tl.store(base + offset[:, None] + lane[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def sees(a, b, c, d, K0: tl.constexpr, K1: tl.constexpr):
    """Which tokens at `(c, d)` lie in the window of those at `(a, b)`, and the other way round."""
    # Unsigned, one comparison answers for both ends.
    near_0 = (c[None, :] - a[:, None] + K0 // 2).to(tl.uint32) < K0
    near_1 = (d[None, :] - b[:, None] + K1 // 2).to(tl.uint32) < K1
    return near_0 & near_1


@triton.jit
def unit(PRECISION: tl.constexpr):
    """The factor of logits: weights are powers of two, but of e in float32, which a factor would round."""
    return 1.0 if PRECISION == "ieee" else 1.4426950408889634


@triton.jit
def power(logits, PRECISION: tl.constexpr):
    """The exponentials of logits that have had that factor."""
    if PRECISION == "ieee":
        return tl.exp(logits)
    return tl.exp2(logits)


@triton.jit
def taps_beyond(a, b, length, K0: tl.constexpr, K1: tl.constexpr):
    """How many taps of the tokens at `(a, b)` lie beyond the map."""
    on_0 = tl.minimum(a + K0 // 2, length[0] - 1) - tl.maximum(a - K0 // 2, 0) + 1
    on_1 = tl.minimum(b + K1 // 2, length[1] - 1) - tl.maximum(b - K1 // 2, 0) + 1
    return K0 * K1 - on_0 * on_1


# One program: a tile of queries of one head against the tiles of keys that any of them sees. In registers: the float32
# accumulator, a maximum and a sum a row, and the scores of one tile of keys. It does `2 * (head_dim + value_dim)`
# operations a pair of a query and a key of the tiles, `kernel_size` of which count; it moves its queries and its
# output, and keys and values mostly from the L2 cache, where the tiles beside it find them too.
@triton.jit
def _forward_kernel(
    query, key, value, out, lse, scale, heads, size, dilation,
    query_strides, key_strides, value_strides, out_strides, lse_strides,
    K0: tl.constexpr, K1: tl.constexpr, WRAP: tl.constexpr, COUNT_ZEROS: tl.constexpr,
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
    q = load_rows(query, row, column, exists, query_strides, HEAD_DIM, BLOCK_D)

    # Finite, so that differences of maxima are never NaN; the exponential of -inf minus it is 0.
    top = tl.full([R0 * R1], -1.0e30, tl.float32)
    total = tl.zeros([R0 * R1], tl.float32)
    if COUNT_ZEROS:
        beyond = taps_beyond(a, b, length, K0, K1)
        top = tl.where(beyond > 0, 0.0, top)
        total = beyond.to(tl.float32)
    accumulator = tl.zeros([R0 * R1, BLOCK_V], tl.float32)
    ALONG: tl.constexpr = (R1 + K1 - 2) // C1 + 1
    TILES: tl.constexpr = ((R0 + K0 - 2) // C0 + 1) * ALONG
    for step in tl.range(0, TILES):
        at = (first[0] - K0 // 2 + step // ALONG * C0, first[1] - K1 // 2 + step % ALONG * C1)
        c, d, found, key_row, key_column = tokens(at, residue, length, size, dilation, C0, C1, WRAP)
        k = load_rows(key, key_row, key_column, found, key_strides, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where(
            sees(a, b, c, d, K0, K1) & found[None, :], scores * (scale * unit(PRECISION)), float("-inf")
        )
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = power(scores - new_top[:, None], PRECISION)
        decay = power(top - new_top, PRECISION)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        v = load_rows(value, key_row, key_column, found, value_strides, VALUE_DIM, BLOCK_V)
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision=PRECISION)

    # The middle tap is on the map, so the sum is never 0; rows that do not exist divide by 1.
    total = tl.where(exists, total, 1.0)
    out += batch * out_strides[0] + head * out_strides[1]
    store_rows(out, row, column, exists, out_strides, accumulator / total[:, None], VALUE_DIM, BLOCK_V)
    lse += batch * lse_strides[0] + head * lse_strides[1]
    sums = top / unit(PRECISION) + tl.log(total)
    tl.store(lse + row * lse_strides[2] + column * lse_strides[3], sums, mask=exists)


class Tiles(NamedTuple):
    """How a kernel is cut: edges of the tile it keeps and of those it visits, and warps."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    num_warps: int
    num_stages: int


def visited(rows: tuple[int, int], kernel_size: tuple[int, int], count: int) -> tuple[int, int]:
    """Returns the edges of tiles of `count` tokens, of which the fewest cover what the tile `rows` sees."""
    halo = [length + kernel - 1 for length, kernel in zip(rows, kernel_size, strict=True)]
    shapes = [(2**power, count // 2**power) for power in range(count.bit_length())]
    # Of equals the one with the longest runs of tokens.
    return min(shapes, key=lambda s: (-(-halo[0] // s[0]) * -(-halo[1] // s[1]), -s[1]))


def choose_tiles(
    kernel_size: tuple[int, int], widths: int, element_size: int, is_backward: bool = False
) -> Tiles:
    """Returns the tiles for rows of padded `head_dim + value_dim` numbers of `element_size` bytes."""
    if element_size == 4:
        # Without tensor cores a product is written out, and a large one takes minutes to compile.
        rows, count, warps, stages = (4, 4), 16, 4, 1
    elif widths <= 128:
        rows, count, warps, stages = (8, 8), 64, 4, 2
    elif widths <= 256:
        rows, count, warps, stages = (8, 8), 32 if is_backward else 64, 4, 2
    else:
        rows, count, warps, stages = (4, 8), 32, 4, 1
    return Tiles(rows, visited(rows, kernel_size, count), warps, stages)


def forward(query, key, value, kernel_size, dilation, border, scale, cut: Tiles | None = None):
    """Returns out and the natural log-sums of the logits."""
    query, key, value = map(rows_contiguous, (query, key, value))
    out = empty_like_tokens(query, value.shape[-1])
    lse = empty_sums(query, value)
    if out.numel() == 0:
        return out, lse
    constants = constants_of(query, value, kernel_size, border)
    widths = constants["BLOCK_D"] + constants["BLOCK_V"]
    cut = cut or choose_tiles(tuple(kernel_size), widths, query.element_size())
    _forward_kernel[programs(query, dilation, cut.rows),](
        query, key, value, out, lse, scale, query.shape[1], tuple(query.shape[2:4]), tuple(dilation),
        *(tensor.stride()[:4] for tensor in (query, key, value, out, lse)),
        COUNT_ZEROS=border == "zero", **constants, **edges_of(cut),
        num_warps=cut.num_warps, num_stages=cut.num_stages,
    )  # fmt: skip
    return out, lse


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its last axis contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def programs(query: torch.Tensor, dilation, edges: tuple[int, int]) -> int:
    """Returns how many programs there are: tiles of the longest class, classes, heads of all samples."""
    count = query.shape[0] * query.shape[1]
    for length, step, edge in zip(query.shape[2:4], dilation, edges, strict=True):
        longest = -(-length // step)
        count *= step * -(-longest // edge)
    return count


def constants_of(query, value, kernel_size, border: str) -> dict[str, Any]:
    """Returns the constants that depend on tensors, kernel and border alone."""
    return {
        "K0": kernel_size[0],
        "K1": kernel_size[1],
        "WRAP": border == "circular",
        "HEAD_DIM": query.shape[-1],
        "VALUE_DIM": value.shape[-1],
        "BLOCK_D": block_width(query.shape[-1]),
        "BLOCK_V": block_width(value.shape[-1]),
        "PRECISION": precision(query),
    }


def edges_of(cut: Tiles) -> dict[str, int]:
    """Returns the edges of the tiles as constants."""
    return {"R0": cut.rows[0], "R1": cut.rows[1], "C0": cut.columns[0], "C1": cut.columns[1]}
