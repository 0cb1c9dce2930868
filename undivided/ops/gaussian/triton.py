"""Kernels of Gaussian gates: a program has a few columns, and goes along the axis once a sum, once for the result.

The floor is reading x and writing out. Statistics take one pass of their own (x is read three times forward, where the
softmax runs along with its sum), and what is read again comes from the L2 cache while a column block fits there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import LOG2E
from undivided.ops.gaussian import split

_LENGTH, _INNER, _WARPS = 64, 32, 4


@triton.jit
def _tile(base, start, length, column, INNER: tl.constexpr, LENGTH: tl.constexpr, inner):
    row = start + tl.arange(0, LENGTH)
    keep = (row < length)[:, None] & (column < inner)[None, :]
    return tl.load(base + row[:, None] * inner + column[None, :], mask=keep, other=0.0).to(tl.float32), keep


@triton.jit
def _forward_kernel(
    x, precision, moment, out, saved, length, inner, heads, columns, eps,
    LENGTH: tl.constexpr, INNER: tl.constexpr, LOG2: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * INNER + tl.arange(0, INNER)
    head = pair % heads
    a, b = tl.load(precision + head), tl.load(moment + head)
    base = x + pair * length * inner
    # Chan's update: the mean and the squares of what has been read, tile by tile.
    mean = tl.zeros([INNER], tl.float32)
    squares = tl.zeros([INNER], tl.float32)
    for start in tl.range(0, length, LENGTH):
        tile, keep = _tile(base, start, length, column, INNER, LENGTH, inner)
        count = tl.minimum(length - start, LENGTH) * 1.0
        own = tl.sum(tile, 0) / count
        apart = tl.where(keep, tile - own[None, :], 0.0)
        before = start * 1.0
        shift = own - mean
        mean += shift * (count / (before + count))
        squares += tl.sum(apart * apart, 0) + shift * shift * (before * count / (before + count))
    factor = LOG2 / (2 * (squares / (length - 1) + eps))
    top = tl.full([INNER], float("-inf"), tl.float32)
    total = tl.zeros([INNER], tl.float32)
    for start in tl.range(0, length, LENGTH):
        tile, keep = _tile(base, start, length, column, INNER, LENGTH, inner)
        y = tile - mean[None, :]
        logit = tl.where(keep, -y * (a * y - 2 * b) * factor[None, :], float("-inf"))
        new = tl.maximum(top, tl.max(logit, 0))
        # Columns beyond the last have no logit at all.
        new = tl.where(column < inner, new, 0.0)
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(logit - new[None, :]), 0)
        top = new
    total = tl.where(column < inner, total, 1.0)
    for start in tl.range(0, length, LENGTH):
        tile, keep = _tile(base, start, length, column, INNER, LENGTH, inner)
        y = tile - mean[None, :]
        weight = tl.exp2(-y * (a * y - 2 * b) * factor[None, :] - top[None, :]) / total[None, :]
        row = start + tl.arange(0, LENGTH)
        place = out + pair * length * inner + row[:, None] * inner + column[None, :]
        tl.store(place, (tile * weight).to(out.dtype.element_ty), mask=keep)
    at = saved + pair * inner + column
    inside = column < inner
    tl.store(at, mean, mask=inside)
    tl.store(at + columns, squares / (length - 1) + eps, mask=inside)
    tl.store(at + 2 * columns, top, mask=inside)
    tl.store(at + 3 * columns, total, mask=inside)


@triton.jit
def _backward_kernel(
    dout, x, precision, moment, saved, dx, parts, length, inner, heads, columns,
    LENGTH: tl.constexpr, INNER: tl.constexpr, LOG2: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * INNER + tl.arange(0, INNER)
    inside = column < inner
    head = pair % heads
    a, b = tl.load(precision + head), tl.load(moment + head)
    at = saved + pair * inner + column
    mean = tl.load(at, mask=inside, other=0.0)
    variance = tl.load(at + columns, mask=inside, other=1.0)
    top = tl.load(at + 2 * columns, mask=inside, other=0.0)
    total = tl.load(at + 3 * columns, mask=inside, other=1.0)
    factor = LOG2 / (2 * variance)
    base, gradient = x + pair * length * inner, dout + pair * length * inner
    # With d_i = g_i x_i: sums of m d, m d y, m d y^2, m y, m y^2, of which every sum of m (d - S) f is made.
    s0 = tl.zeros([INNER], tl.float32)
    s1 = tl.zeros([INNER], tl.float32)
    s2 = tl.zeros([INNER], tl.float32)
    m1 = tl.zeros([INNER], tl.float32)
    m2 = tl.zeros([INNER], tl.float32)
    for start in tl.range(0, length, LENGTH):
        tile, keep = _tile(base, start, length, column, INNER, LENGTH, inner)
        g, _ = _tile(gradient, start, length, column, INNER, LENGTH, inner)
        y = tile - mean[None, :]
        weight = tl.exp2(-y * (a * y - 2 * b) * factor[None, :] - top[None, :]) / total[None, :]
        weight = tl.where(keep, weight, 0.0)
        d = weight * g * tile
        s0 += tl.sum(d, 0)
        s1 += tl.sum(d * y, 0)
        s2 += tl.sum(d * y * y, 0)
        m1 += tl.sum(weight * y, 0)
        m2 += tl.sum(weight * y * y, 0)
    e1, e2 = s1 - s0 * m1, s2 - s0 * m2
    # logit = -(a y^2 - 2 b y) / (2 variance)
    dvariance = (a * e2 - 2 * b * e1) / (2 * variance * variance)
    mean_gradient = -(a * e1) / (variance * length)
    tl.store(parts + pair * inner + column, -e2 / (2 * variance), mask=inside)
    tl.store(parts + columns + pair * inner + column, e1 / variance, mask=inside)
    for start in tl.range(0, length, LENGTH):
        tile, keep = _tile(base, start, length, column, INNER, LENGTH, inner)
        g, _ = _tile(gradient, start, length, column, INNER, LENGTH, inner)
        y = tile - mean[None, :]
        weight = tl.exp2(-y * (a * y - 2 * b) * factor[None, :] - top[None, :]) / total[None, :]
        dlogit = weight * (g * tile - s0[None, :])
        dy = -dlogit * (a * y - b) / variance[None, :] + dvariance[None, :] * 2 * y / (length - 1)
        found = g * weight + dy - mean_gradient[None, :]
        row = start + tl.arange(0, LENGTH)
        place = dx + pair * length * inner + row[:, None] * inner + column[None, :]
        tl.store(place, found.to(dx.dtype.element_ty), mask=keep)


def _grid(x: torch.Tensor) -> tuple[int, int]:
    outer, heads, _, inner = x.shape
    return outer * heads, triton.cdiv(inner, _inner(inner))


def _inner(inner: int) -> int:
    return min(_INNER, triton.next_power_of_2(inner))


def forward(x, precision, moment, eps):
    outer, heads, length, inner = x.shape
    precision, moment = precision.float().contiguous(), moment.float().contiguous()
    if split.is_long(length):
        return split.forward(x, precision, moment, eps)
    out = torch.empty_like(x)
    saved = x.new_empty(4, outer, heads, inner, dtype=torch.float32)
    _forward_kernel[_grid(x)](
        x, precision, moment, out, saved, length, inner, heads,
        outer * heads * inner, eps, LENGTH=_LENGTH, INNER=_inner(inner), LOG2=LOG2E, num_warps=_WARPS,
    )  # fmt: skip
    return out, saved


def backward(dout, x, precision, moment, saved, eps):
    outer, heads, length, inner = x.shape
    dx = torch.empty_like(x)
    parts = x.new_empty(2, outer, heads, inner, dtype=torch.float32)
    _backward_kernel[_grid(x)](
        dout, x, precision.float().contiguous(), moment.float().contiguous(), saved, dx, parts, length, inner, heads,
        outer * heads * inner, LENGTH=_LENGTH, INNER=_inner(inner), LOG2=LOG2E, num_warps=_WARPS,
    )  # fmt: skip
    return dx, parts
