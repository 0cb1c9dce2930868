"""Attention by strips in Triton: one pass over the map for the means of its strips, one for the products.

A program has some channels of one image and goes down the rows, so that what belongs to the columns stays in
registers. Channels lie side by side (channels last) or a map apart: the tile `[channels, rows, columns]` is cut so
that what lies side by side in memory is read together.

The gates need all channels of a group of the norm. Where these are few enough, one program has them all and the
forward is one launch, in which the second pass finds the map in the L2 cache; else it is one launch a step.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

# Elements of a tile of the map, where several small maps make it up, and of a strip's group that one program norms,
# alone and between the two passes.
_TILE, _SMALL_TILE, _LARGEST_GROUP, _LARGEST_FUSED = 4096, 2048, 16384, 4096
# Channels side by side that a program of the single launch has at least.
_FEWEST_CHANNELS = 32
_SIZES = ("height", "width")


def cut(x: torch.Tensor, channels: int) -> dict[str, int]:
    """Returns how channels of a map are cut: whole rows, of many channels where these lie side by side or are small.

    With it what width, stride of a channel and stride of a row can be divided by, up to 16, which decides how much is
    read at once.
    """
    columns, rows, channels = (triton.next_power_of_2(size) for size in (x.shape[3], x.shape[2], channels))
    if x.stride(1) == 1:
        channels = min(64, channels)
        rows = min(rows, max(1, _TILE // (channels * columns)))
    else:
        rows = min(rows, max(1, _TILE // columns))
        channels = min(channels, max(1, _SMALL_TILE // (rows * columns)))
    aligned = {
        "ALIGN": math.gcd(x.shape[3], 16),
        "ALIGN_C": math.gcd(x.stride(1), 16),
        "ALIGN_H": math.gcd(x.stride(2), 16),
    }
    return {"BLOCK_C": channels, "BLOCK_H": rows, "BLOCK_W": columns, "num_warps": 4, **aligned}


@triton.jit
def channel_offsets(
    first, channels, width, stride_c, stride_w, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, ALIGN: tl.constexpr,
    ALIGN_C: tl.constexpr,
):  # fmt: skip
    """Offsets and presence of channels and columns, both `[BLOCK_C, 1, BLOCK_W]`."""
    channel = first + tl.arange(0, BLOCK_C)
    column = tl.arange(0, BLOCK_W)
    # Divided and multiplied again: the compiler then knows that entries of a row can be read together.
    stride_c = stride_c // ALIGN_C * ALIGN_C
    limit = width // ALIGN * ALIGN
    offset = channel[:, None, None] * stride_c + column[None, None, :] * stride_w
    return offset, (channel < channels)[:, None, None] & (column < limit)[None, None, :]


@triton.jit
def load_strip(strip, first_channel, channels, first, length, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):
    """Positions `first ...` of strips `[channels, length]`, in float32; those that do not exist are zero."""
    channel = first_channel + tl.arange(0, BLOCK_C)
    place = first + tl.arange(0, BLOCK)
    mask = (channel < channels)[:, None] & (place < length)[None, :]
    return tl.load(strip + channel[:, None] * length + place[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_strip(
    strip, values, first_channel, channels, first, length, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr
):
    """Stores positions `first ...` of strips `[channels, length]`."""
    channel = first_channel + tl.arange(0, BLOCK_C)
    place = first + tl.arange(0, BLOCK)
    mask = (channel < channels)[:, None] & (place < length)[None, :]
    tl.store(strip + channel[:, None] * length + place[None, :], values, mask=mask)


@triton.jit
def _sums(
    x, dout, row_gate, column_gate, row_out, column_out, first_channel, end, height, width,
    stride_c, stride_h, stride_w,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ALIGN: tl.constexpr, ALIGN_C: tl.constexpr,
    ALIGN_H: tl.constexpr, IS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """The means of the strips of channels `first_channel ... end - 1` of an image, which are read once.

    With IS_GRADIENT the gradient is read too, and what is written are the gradients of both gates, sums of
    `dout * x` times the other gate.
    """
    offset, own = channel_offsets(
        first_channel, end, width, stride_c, stride_w, BLOCK_C, BLOCK_W, ALIGN, ALIGN_C
    )
    stride_h = stride_h // ALIGN_H * ALIGN_H
    if IS_GRADIENT:
        of_columns = load_strip(column_gate, first_channel, end, 0, width, BLOCK_C, BLOCK_W)
    total = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
    for first in tl.range(0, height, BLOCK_H):
        row = (first + tl.arange(0, BLOCK_H))[None, :, None]
        inside = own & (row < height)
        tile = tl.load(x + offset + row * stride_h, mask=inside, other=0.0).to(tl.float32)
        if IS_GRADIENT:
            tile *= tl.load(dout + offset + row * stride_h, mask=inside, other=0.0).to(tl.float32)
            of_rows = load_strip(row_gate, first_channel, end, first, height, BLOCK_C, BLOCK_H)
            total += tl.sum(tile * of_rows[:, :, None], 1)
            along = tl.sum(tile * of_columns[:, None, :], 2)
        else:
            total += tl.sum(tile, 1)
            along = tl.sum(tile, 2) / width
        store_strip(row_out, along, first_channel, end, first, height, BLOCK_C, BLOCK_H)
    if not IS_GRADIENT:
        total /= height
    store_strip(column_out, total, first_channel, end, 0, width, BLOCK_C, BLOCK_W)


@triton.jit
def _multiply(
    x, row_gate, column_gate, row_add, column_add, out, first_channel, end, height, width,
    stride_c, stride_h, stride_w, out_stride_c, out_stride_h, out_stride_w,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ALIGN: tl.constexpr, ALIGN_C: tl.constexpr,
    ALIGN_H: tl.constexpr, IS_GRADIENT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Channels `first_channel ... end - 1` of an image times both gates, read once and written once.

    With IS_GRADIENT what is read is the gradient, and to the product comes what strips add, a number a row and a
    number a column.
    """
    offset, own = channel_offsets(
        first_channel, end, width, stride_c, stride_w, BLOCK_C, BLOCK_W, ALIGN, ALIGN_C
    )
    out_offset, _ = channel_offsets(
        first_channel, end, width, out_stride_c, out_stride_w, BLOCK_C, BLOCK_W, ALIGN, ALIGN_C
    )
    stride_h = stride_h // ALIGN_H * ALIGN_H
    out_stride_h = out_stride_h // ALIGN_H * ALIGN_H
    of_columns = load_strip(column_gate, first_channel, end, 0, width, BLOCK_C, BLOCK_W)
    if IS_GRADIENT:
        add_columns = load_strip(column_add, first_channel, end, 0, width, BLOCK_C, BLOCK_W) / height
    for first in tl.range(0, height, BLOCK_H):
        row = (first + tl.arange(0, BLOCK_H))[None, :, None]
        inside = own & (row < height)
        tile = tl.load(x + offset + row * stride_h, mask=inside, other=0.0).to(tl.float32)
        of_rows = load_strip(row_gate, first_channel, end, first, height, BLOCK_C, BLOCK_H)
        found = tile * (of_rows[:, :, None] * of_columns[:, None, :])
        if RESIDUAL:
            found += tile
        if IS_GRADIENT:
            add_rows = load_strip(row_add, first_channel, end, first, height, BLOCK_C, BLOCK_H)
            found += (add_rows / width)[:, :, None] + add_columns[:, None, :]
        # What is written is not read again here: it should not push the map out of the cache.
        tl.store(
            out + out_offset + row * out_stride_h, found.to(out.dtype.element_ty), mask=inside,
            cache_modifier=".cs",
        )  # fmt: skip


@triton.jit
def _gate(
    strip, conv, norm, bias, out, first_channel, eps, length, group_channels,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, TAPS: tl.constexpr, MIXED: tl.constexpr,
    IS_CIRCULAR: tl.constexpr,
):  # fmt: skip
    """The gate of the channels of one group of the norm, of one image's strip.

    The strip is read once for each tap and each channel that the convolution mixes, mostly from the L1 cache.
    """
    own = tl.arange(0, BLOCK_C)
    channel = first_channel + own
    place = tl.arange(0, BLOCK_L)
    inside = (own < group_channels)[:, None] & (place < length)[None, :]
    total = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
    for mixed in tl.range(0, MIXED):
        source = channel // MIXED * MIXED + mixed
        for tap in tl.static_range(0, TAPS):
            seen = place + tap - TAPS // 2
            if IS_CIRCULAR:
                seen = (seen + length) % length
            mask = inside & ((seen >= 0) & (seen < length))[None, :]
            entry = tl.load(strip + source[:, None] * length + seen[None, :], mask=mask, other=0.0)
            weight = tl.load(
                conv + (channel * MIXED + mixed) * TAPS + tap, mask=own < group_channels, other=0.0
            )
            total += entry * weight.to(tl.float32)[:, None]
    count = group_channels * length
    mean = tl.sum(tl.sum(total, 1), 0) / count
    centred = tl.where(inside, total - mean, 0.0)
    variance = tl.sum(tl.sum(centred * centred, 1), 0) / count
    scale = tl.load(norm + channel, mask=own < group_channels, other=0.0).to(tl.float32) / tl.sqrt(
        variance + eps
    )
    shift = tl.load(bias + channel, mask=own < group_channels, other=0.0).to(tl.float32)
    gate = 1.0 / (1.0 + tl.exp(-(centred * scale[:, None] + shift[:, None])))
    tl.store(out + channel[:, None] * length + place[None, :], gate.to(out.dtype.element_ty), mask=inside)


# One program: BLOCK_C channels of one image.
@triton.jit(do_not_specialize=_SIZES)
def _sum_kernel(
    x, dout, row_gate, column_gate, row_out, column_out, channels, height, width,
    stride_b, stride_c, stride_h, stride_w,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ALIGN: tl.constexpr, ALIGN_C: tl.constexpr,
    ALIGN_H: tl.constexpr, IS_GRADIENT: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    rows, columns = batch * channels * height, batch * channels * width
    _sums(
        x + batch * stride_b, dout + batch * stride_b, row_gate + rows, column_gate + columns, row_out + rows,
        column_out + columns, tl.program_id(1) * BLOCK_C, channels, height, width, stride_c, stride_h, stride_w,
        BLOCK_C, BLOCK_H, BLOCK_W, ALIGN, ALIGN_C, ALIGN_H, IS_GRADIENT,
    )  # fmt: skip


# One program: BLOCK_C channels of one image.
@triton.jit(do_not_specialize=_SIZES)
def _product_kernel(
    x, row_gate, column_gate, row_add, column_add, out, channels, height, width,
    stride_b, stride_c, stride_h, stride_w, out_stride_b, out_stride_c, out_stride_h, out_stride_w,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ALIGN: tl.constexpr, ALIGN_C: tl.constexpr,
    ALIGN_H: tl.constexpr, IS_GRADIENT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    rows, columns = batch * channels * height, batch * channels * width
    _multiply(
        x + batch * stride_b, row_gate + rows, column_gate + columns, row_add + rows, column_add + columns,
        out + batch * out_stride_b, tl.program_id(1) * BLOCK_C, channels, height, width, stride_c, stride_h, stride_w,
        out_stride_c, out_stride_h, out_stride_w, BLOCK_C, BLOCK_H, BLOCK_W, ALIGN, ALIGN_C, ALIGN_H, IS_GRADIENT,
        RESIDUAL,
    )  # fmt: skip


# One program: one group of the norm of one image's strip.
@triton.jit(do_not_specialize=("length",))
def _gate_kernel(
    strip, conv, norm, bias, out, eps, channels, length, group_channels,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, TAPS: tl.constexpr, MIXED: tl.constexpr,
    IS_CIRCULAR: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64) * channels * length
    _gate(
        strip + image, conv, norm, bias, out + image, tl.program_id(1) * group_channels, eps, length, group_channels,
        BLOCK_C, BLOCK_L, TAPS, MIXED, IS_CIRCULAR,
    )  # fmt: skip


# One program: one group of the norm of one image, all three steps. Means and gates pass through memory, each written
# and read by this program alone, so that a barrier of its threads is enough between two steps.
@triton.jit(do_not_specialize=_SIZES)
def _attend_kernel(
    x, row_mean, column_mean, row_gate, column_gate, out, conv, norm, bias, column_conv, column_norm, column_bias,
    eps, channels, group_channels, height, width,
    stride_b, stride_c, stride_h, stride_w, out_stride_b, out_stride_c, out_stride_h, out_stride_w,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ALIGN: tl.constexpr, ALIGN_C: tl.constexpr,
    ALIGN_H: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr, MIXED: tl.constexpr, IS_CIRCULAR: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    first_channel = tl.program_id(1) * group_channels
    end = first_channel + group_channels
    x += batch * stride_b
    rows, columns = batch * channels * height, batch * channels * width
    row_mean += rows
    row_gate += rows
    column_mean += columns
    column_gate += columns
    for start in tl.range(first_channel, end, BLOCK_C):
        _sums(
            x, x, row_gate, column_gate, row_mean, column_mean, start, end, height, width, stride_c, stride_h,
            stride_w, BLOCK_C, BLOCK_H, BLOCK_W, ALIGN, ALIGN_C, ALIGN_H, False,
        )  # fmt: skip
    tl.debug_barrier()
    _gate(
        row_mean, conv, norm, bias, row_gate, first_channel, eps, height, group_channels, GROUP, HEIGHT, TAPS, MIXED,
        IS_CIRCULAR,
    )  # fmt: skip
    _gate(
        column_mean, column_conv, column_norm, column_bias, column_gate, first_channel, eps, width, group_channels,
        GROUP, WIDTH, COLUMN_TAPS, MIXED, IS_CIRCULAR,
    )  # fmt: skip
    tl.debug_barrier()
    for start in tl.range(first_channel, end, BLOCK_C):
        _multiply(
            x, row_gate, column_gate, row_gate, column_gate, out + batch * out_stride_b, start, end, height, width,
            stride_c, stride_h, stride_w, out_stride_c, out_stride_h, out_stride_w, BLOCK_C, BLOCK_H, BLOCK_W, ALIGN,
            ALIGN_C, ALIGN_H, False, RESIDUAL,
        )  # fmt: skip


def _programs(x: torch.Tensor, cuts: dict[str, int]) -> tuple[int, int]:
    return x.shape[0], triton.cdiv(x.shape[1], cuts["BLOCK_C"])


def _cut_for_both(x: torch.Tensor, out: torch.Tensor, channels: int) -> dict[str, int]:
    found = cut(out, channels)
    return found if x.stride() == out.stride() else found | {"ALIGN_C": 1, "ALIGN_H": 1}


def strip_means(x):
    """Returns the means of rows `[B, C, H]` and of columns `[B, C, W]`, float32."""
    batch, channels, height, width = x.shape
    rows, columns = (
        x.new_empty((batch, channels, length), dtype=torch.float32) for length in (height, width)
    )
    cuts = cut(x, channels)
    _sum_kernel[_programs(x, cuts)](
        x, x, rows, columns, rows, columns, channels, height, width, *x.stride(), IS_GRADIENT=False, **cuts
    )
    return rows, columns


def gate_gradients(dout, x, row_gate, column_gate):
    """Returns the gradients of the gates of rows and of columns, float32."""
    channels, height, width = x.shape[1:]
    rows, columns = (torch.empty_like(gate, dtype=torch.float32) for gate in (row_gate, column_gate))
    if dout.stride() != x.stride():
        # Such as the gradient of a sum, one number for all.
        x, dout = x.contiguous(), dout.contiguous()
    cuts = cut(x, channels)
    _sum_kernel[_programs(x, cuts)](
        x, dout, row_gate, column_gate, rows, columns, channels, height, width, *x.stride(), IS_GRADIENT=True, **cuts
    )  # fmt: skip
    return rows, columns


def products(x, row_gate, column_gate, residual):
    """Returns the map times both gates, in its memory format."""
    out = torch.empty_like(x)
    _product(x, row_gate, column_gate, row_gate, column_gate, out, residual, False)
    return out


def map_gradient(dout, row_gate, column_gate, row_add, column_add, residual, x):
    """Returns the gradient of a map x from that of the products and those of the means of its strips."""
    out = torch.empty_like(x)
    _product(dout, row_gate, column_gate, row_add, column_add, out, residual, True)
    return out


def _product(x, row_gate, column_gate, row_add, column_add, out, residual, is_gradient):
    channels, height, width = x.shape[1:]
    cuts = _cut_for_both(x, out, channels)
    _product_kernel[_programs(x, cuts)](
        x, row_gate, column_gate, row_add, column_add, out, channels, height, width, *x.stride(), *out.stride(),
        RESIDUAL=residual, IS_GRADIENT=is_gradient, **cuts,
    )  # fmt: skip


def has_gate_kernel(channels: int, norm_groups: int, length: int) -> bool:
    """Whether a group of the norm is small enough for one program."""
    return triton.next_power_of_2(channels // norm_groups) * triton.next_power_of_2(length) <= _LARGEST_GROUP


def is_one_launch(x: torch.Tensor, conv_groups: int, norm_groups: int) -> bool:
    """Whether one program can have all channels of a group of the norm, and all that the convolution mixes there.

    Where channels lie side by side, few of them are too short a stretch of memory: 16 in bfloat16 took 1.39 ms on an
    H100 for maps of 56 x 56, a launch a step 0.87 ms; 32 at 28 x 28 were faster in one launch.
    """
    channels = x.shape[1] // norm_groups
    fits = triton.next_power_of_2(channels) * triton.next_power_of_2(max(x.shape[2:])) <= _LARGEST_FUSED
    is_read_well = x.stride(1) != 1 or channels >= _FEWEST_CHANNELS
    return fits and is_read_well and channels % (x.shape[1] // conv_groups) == 0


def attend(x, weights, conv_groups, norm_groups, eps, is_circular, residual):
    """Returns the products, both means (float32) and both gates, in one launch."""
    batch, channels, height, width = x.shape
    of_group = channels // norm_groups
    means = [x.new_empty((batch, channels, length), dtype=torch.float32) for length in (height, width)]
    gates = [x.new_empty((batch, channels, length)) for length in (height, width)]
    out = torch.empty_like(x)
    group, rows, columns = (triton.next_power_of_2(size) for size in (of_group, height, width))
    _attend_kernel[batch, norm_groups](
        x, *means, *gates, out, *(weight.contiguous() for weight in weights), eps, channels, of_group, height, width,
        *x.stride(), *out.stride(), **_cut_for_both(x, out, of_group), GROUP=group, HEIGHT=rows, WIDTH=columns,
        TAPS=weights[0].shape[2], COLUMN_TAPS=weights[3].shape[2], MIXED=channels // conv_groups,
        IS_CIRCULAR=is_circular, RESIDUAL=residual,
    )  # fmt: skip
    return out, *means, *gates


def strip_gate(strip, conv, norm, bias, conv_groups, norm_groups, eps, is_circular, dtype):
    """Returns the gate of a strip `[B, C, L]`, of a given type."""
    batch, channels, length = strip.shape
    of_group = channels // norm_groups
    out = torch.empty_like(strip, dtype=dtype)
    block = triton.next_power_of_2(of_group), triton.next_power_of_2(length)
    _gate_kernel[batch, norm_groups](
        strip, conv.contiguous(), norm.contiguous(), bias.contiguous(), out, eps, channels, length, of_group,
        BLOCK_C=block[0], BLOCK_L=block[1], TAPS=conv.shape[2], MIXED=channels // conv_groups, IS_CIRCULAR=is_circular,
        num_warps=4 if block[0] * block[1] <= 4096 else 8,
    )  # fmt: skip
    return out
