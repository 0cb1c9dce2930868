"""What the flash kernels in Triton share: tiles of rows, the loop over keys, and how a kernel is cut."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@triton.jit
def load_tile(
    base, first, stride, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Rows `first .. first + ROWS - 1`; rows from `count` on and columns from WIDTH on are zero."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    # int64: a token's stride times a million tokens passes 2**31. Within a tile it does not.
    base += tl.cast(first, tl.int64) * stride
    offset = row[:, None] * stride + column[None, :]
    if MASKED:
        tile = tl.load(
            base + offset, mask=(first + row < count)[:, None] & (column < WIDTH)[None, :], other=0.0
        )
    elif WIDTH < COLUMNS:
        tile = tl.load(base + offset, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(base + offset)
    return tile


@triton.jit
def store_tile(
    base, tile, head, first, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Stores rows of one head of a contiguous `[..., count, WIDTH]`."""
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    offset = (head * count + row)[:, None] * WIDTH + column[None, :]
    tl.store(
        base + offset, tile.to(base.dtype.element_ty), mask=(row < count)[:, None] & (column < WIDTH)[None, :]
    )


@triton.jit
def running_softmax(scores, top, total, scale):
    """Weights of a tile beside a running softmax, its new maximum and sum, and the factor of what was summed before.

    `scale` is positive, in base 2; so are the maximum and the sum.
    """
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    decay = tl.exp2(top - new_top)
    return weights, new_top, total * decay + tl.sum(weights, 1), decay


@triton.jit
def add_keys(
    accumulator, top, total, q, key, value, first, last, limit, num_keys, scale, key_stride, value_stride,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds keys `first .. last - 1` to the running softmax of a tile of queries; `scale` is positive, in base 2."""
    for start in tl.range(first, last, BLOCK_N):
        k = load_tile(key, start, key_stride, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            column = start + tl.arange(0, BLOCK_N)
            scores = tl.where(column[None, :] < limit[:, None], scores, float("-inf"))
        weights, top, total, decay = running_softmax(scores, top, total, scale)
        v = load_tile(value, start, value_stride, num_keys, VALUE_DIM, BLOCK_N, BLOCK_V, MASKED)
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision=PRECISION)
    return accumulator, top, total


@triton.jit
def add_key_gradients(
    dq, q, gradient, log_sum, delta, key, value, first, last, limit, num_keys, scale_log2, key_stride, value_stride,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what keys `first .. last - 1` contribute to the gradient of a tile of queries, without the scale."""
    for start in tl.range(first, last, BLOCK_N):
        k = load_tile(key, start, key_stride, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
        v = load_tile(value, start, value_stride, num_keys, VALUE_DIM, BLOCK_N, BLOCK_V, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        weights = tl.exp2(scores * scale_log2 - log_sum[:, None])
        if MASKED:
            column = start + tl.arange(0, BLOCK_N)
            weights = tl.where(column[None, :] < limit[:, None], weights, 0.0)
        dweights = tl.dot(gradient, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@dataclass(frozen=True)
class Tiling:
    """How a kernel is cut: rows and keys of a program's tile, its warps, and the blocks in flight."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# Measured on an H100 (the first), then smaller ones for wider heads and devices with less memory.
_FORWARD = (Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2), Tiling(32, 32, 4, 1))
# Without tensor cores a product is written out, and a large one takes minutes to compile.
_FORWARD_FLOAT32 = (Tiling(32, 32, 8, 1), Tiling(16, 16, 4, 1))


def forward_tiling(head_dim: int, value_dim: int, element_size: int, shared_memory: int) -> Tiling:
    """Returns the tiling of a forward kernel: the first whose queries, and keys and values in flight, fit.

    Args:
        head_dim: width of a query.
        value_dim: width of a value.
        element_size: bytes of an element.
        shared_memory: bytes a program may use.
    """
    return first_fitting(
        _FORWARD if element_size == 2 else _FORWARD_FLOAT32,
        lambda t: t.rows * head_dim + t.num_stages * t.keys * (head_dim + value_dim),
        shared_memory // element_size,
    )


def first_fitting(candidates: tuple[Tiling, ...], elements: Callable[[Tiling], int], limit: int) -> Tiling:
    """Returns the first tiling that keeps at most `limit` elements in shared memory, or the last, the smallest."""
    return next((t for t in candidates if elements(t) <= limit), candidates[-1])


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Returns how many bytes of shared memory a program may use on a device."""
    if device.type != "cuda":
        return 227 * 1024
    # What a kernel keeps beside its tiles.
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin - 1024


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its last axis contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def block_width(width: int) -> int:
    """The columns of a tile that holds rows of this width."""
    return max(16, triton.next_power_of_2(width))


def precision(tensor: torch.Tensor) -> str:
    """How products of this tensor are rounded."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"
