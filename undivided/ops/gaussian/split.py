"""Kernels of Gaussian gates along a long axis, which is cut in parts so that a few columns keep a whole device busy.

Three passes, each over x once: moments of the parts; the softmax's maxima and sums of the parts, once the moments of
the whole axis are known; the result. The floor of one pass is a third of it: x does not fit in a cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import LOG2E

# Rows of a part, unless that makes more parts than a program should put together.
_PART, _MOST = 1024, 64
_LENGTH, _INNER, _WARPS = 64, 64, 4


@triton.jit
def _tile(base, start, stop, column, inner, LENGTH: tl.constexpr):
    row = start + tl.arange(0, LENGTH)
    keep = (row < stop)[:, None] & (column < inner)[None, :]
    offset = row[:, None] * inner + column[None, :]
    return tl.load(base + offset, mask=keep, other=0.0).to(tl.float32), keep, offset


@triton.jit
def _columns(inner, INNER: tl.constexpr):
    """The sample and head of a program, and its columns: those of one tensor row lie beside each other."""
    blocks = tl.cdiv(inner, INNER)
    pair = tl.program_id(0) // blocks
    return pair.to(tl.int64), tl.program_id(0) % blocks * INNER + tl.arange(0, INNER)


@triton.jit
def _moments_kernel(
    x, parts, length, inner, columns, size, LENGTH: tl.constexpr, INNER: tl.constexpr
):  # fmt: skip
    pair, column = _columns(inner, INNER)
    part = tl.program_id(1)
    first, stop = part * size, tl.minimum((part + 1) * size, length)
    base = x + pair * length * inner
    # Chan's update: the mean and the squares of what has been read, tile by tile.
    mean = tl.zeros([INNER], tl.float32)
    squares = tl.zeros([INNER], tl.float32)
    for start in tl.range(first, stop, LENGTH):
        tile, keep, _ = _tile(base, start, stop, column, inner, LENGTH)
        count = tl.minimum(stop - start, LENGTH) * 1.0
        own = tl.sum(tile, 0) / count
        apart = tl.where(keep, tile - own[None, :], 0.0)
        before = (start - first) * 1.0
        shift = own - mean
        mean += shift * (count / (before + count))
        squares += tl.sum(apart * apart, 0) + shift * shift * (before * count / (before + count))
    at = parts + 4 * part.to(tl.int64) * columns + pair * inner + column
    tl.store(at, mean, mask=column < inner)
    tl.store(at + columns, squares, mask=column < inner)


@triton.jit
def _sums_kernel(
    x, precision, moment, parts, saved, length, inner, heads, columns, eps, size, num_parts,
    LENGTH: tl.constexpr, INNER: tl.constexpr, LOG2: tl.constexpr,
):  # fmt: skip
    pair, column = _columns(inner, INNER)
    part = tl.program_id(1)
    inside = column < inner
    at = pair * inner + column
    mean = tl.zeros([INNER], tl.float32)
    squares = tl.zeros([INNER], tl.float32)
    for i in tl.range(0, num_parts):
        own = tl.load(parts + 4 * i * columns + at, mask=inside, other=0.0)
        before = i * size * 1.0
        count = tl.minimum(length - i * size, size) * 1.0
        shift = own - mean
        mean += shift * (count / (before + count))
        squares += tl.load(parts + (4 * i + 1) * columns + at, mask=inside, other=0.0)
        squares += shift * shift * (before * count / (before + count))
    variance = squares / (length - 1) + eps
    a, b = tl.load(precision + pair % heads), tl.load(moment + pair % heads)
    factor = LOG2 / (2 * variance)
    base = x + pair * length * inner
    first, stop = part * size, tl.minimum((part + 1) * size, length)
    top = tl.full([INNER], float("-inf"), tl.float32)
    total = tl.zeros([INNER], tl.float32)
    for start in tl.range(first, stop, LENGTH):
        tile, keep, _ = _tile(base, start, stop, column, inner, LENGTH)
        y = tile - mean[None, :]
        logit = tl.where(keep, -y * (a * y - 2 * b) * factor[None, :], float("-inf"))
        # Columns beyond the last have no logit at all.
        new = tl.where(inside, tl.maximum(top, tl.max(logit, 0)), 0.0)
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(logit - new[None, :]), 0)
        top = new
    own = parts + 4 * part.to(tl.int64) * columns + at
    tl.store(own + 2 * columns, top, mask=inside)
    tl.store(own + 3 * columns, total, mask=inside)
    tl.store(saved + at, mean, mask=inside & (part == 0))
    tl.store(saved + columns + at, variance, mask=inside & (part == 0))


@triton.jit
def _gate_kernel(
    x, precision, moment, parts, saved, out, length, inner, heads, columns, size, num_parts,
    LENGTH: tl.constexpr, INNER: tl.constexpr, LOG2: tl.constexpr,
):  # fmt: skip
    pair, column = _columns(inner, INNER)
    part = tl.program_id(1)
    inside = column < inner
    at = pair * inner + column
    mean = tl.load(saved + at, mask=inside, other=0.0)
    variance = tl.load(saved + columns + at, mask=inside, other=1.0)
    top = tl.full([INNER], float("-inf"), tl.float32)
    total = tl.zeros([INNER], tl.float32)
    for i in tl.range(0, num_parts):
        own = tl.load(parts + (4 * i + 2) * columns + at, mask=inside, other=0.0)
        new = tl.maximum(top, own)
        total = total * tl.exp2(top - new)
        total += tl.load(parts + (4 * i + 3) * columns + at, mask=inside, other=1.0) * tl.exp2(own - new)
        top = new
    a, b = tl.load(precision + pair % heads), tl.load(moment + pair % heads)
    factor, share = LOG2 / (2 * variance), 1.0 / total
    base = x + pair * length * inner
    first, stop = part * size, tl.minimum((part + 1) * size, length)
    for start in tl.range(first, stop, LENGTH):
        tile, keep, offset = _tile(base, start, stop, column, inner, LENGTH)
        y = tile - mean[None, :]
        weight = tl.exp2(-y * (a * y - 2 * b) * factor[None, :] - top[None, :]) * share[None, :]
        tl.store(out + pair * length * inner + offset, (tile * weight).to(out.dtype.element_ty), mask=keep)
    tl.store(saved + 2 * columns + at, top, mask=inside & (part == 0))
    tl.store(saved + 3 * columns + at, total, mask=inside & (part == 0))


def is_long(length: int) -> bool:
    """Whether an axis is cut."""
    return length > _PART


def forward(x, precision, moment, eps):
    """Returns the result and, of every column, mean, variance, maximum and sum."""
    outer, heads, length, inner = x.shape
    out = torch.empty_like(x)
    size = max(_PART, triton.cdiv(triton.cdiv(length, _MOST), _LENGTH) * _LENGTH)
    num_parts = triton.cdiv(length, size)
    columns = outer * heads * inner
    saved = x.new_empty(4, outer, heads, inner, dtype=torch.float32)
    parts = x.new_empty(num_parts, 4, outer, heads, inner, dtype=torch.float32)
    width = min(_INNER, triton.next_power_of_2(inner))
    grid = (outer * heads * triton.cdiv(inner, width), num_parts)
    cut = {"LENGTH": _LENGTH, "INNER": width, "num_warps": _WARPS}
    _moments_kernel[grid](x, parts, length, inner, columns, size, **cut)
    _sums_kernel[grid](
        x, precision, moment, parts, saved, length, inner, heads, columns, eps, size, num_parts, LOG2=LOG2E, **cut
    )  # fmt: skip
    _gate_kernel[grid](
        x, precision, moment, parts, saved, out, length, inner, heads, columns, size, num_parts, LOG2=LOG2E, **cut
    )  # fmt: skip
    return out, saved
