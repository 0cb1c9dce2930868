"""Convolved heads in Triton: convolutions, mean, norm, temperature and rotation in one pass.

Two convolutions in a row are one: `conv1(conv0(x))_t = sum_d M_d x_(t-d) + bias`, with a matrix a head for each of the
`kernel_size0 + kernel_size1 - 1` delays. That is half as many products again as the grouped convolution alone, but
their operands come from memory as they are, where a depthwise convolution before them would hold each row of a head in
registers in float32. Where a rotation needs both halves of a head, the channels are computed in two tiles, so that
column p of one is rotated with column p of the other; channels that are not rotated are split in halves too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Sizes that change from call to call: a kernel is not compiled anew for each.
RUNTIME = ("length", "prefix", "history_stride_b", "num_heads", "num_key_heads")


# One program: OUT output channels of one head. It writes their rows of the matrices of all delays and their bias.
@triton.jit
def _merge_kernel(
    depthwise_weight, depthwise_bias, grouped_weight, grouped_bias, matrices, bias,
    HEAD_DIM: tl.constexpr, TAPS0: tl.constexpr, TAPS1: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """`M_d = sum over d0 + d1 = d of W1_d1 diag(w0_d0)`, `bias = b1 + sum_d1 W1_d1 b0`; delays count backwards."""
    heads = tl.num_programs(0)
    head = tl.program_id(0)
    row = tl.program_id(1) * OUT + tl.arange(0, OUT)
    column = tl.arange(0, HEAD_DIM)
    channel = head * HEAD_DIM + column
    grouped = grouped_weight + ((head * HEAD_DIM + row)[:, None] * HEAD_DIM + column[None, :]) * TAPS1
    total = tl.load(grouped_bias + head * HEAD_DIM + row).to(tl.float32)
    for delay in tl.static_range(TAPS0 + TAPS1 - 1):
        matrix = tl.zeros([OUT, HEAD_DIM], tl.float32)
        for tap in tl.static_range(TAPS1):
            if delay - tap >= 0 and delay - tap < TAPS0:
                depthwise = tl.load(depthwise_weight + channel * TAPS0 + (TAPS0 - 1 - (delay - tap)))
                weight = tl.load(grouped + (TAPS1 - 1 - tap)).to(tl.float32)
                matrix += weight * depthwise.to(tl.float32)[None, :]
        place = ((delay * heads + head) * HEAD_DIM + row)[:, None] * HEAD_DIM + column[None, :]
        tl.store(matrices + place, matrix.to(matrices.dtype.element_ty))
    first = tl.load(depthwise_bias + channel).to(tl.float32)
    for tap in tl.static_range(TAPS1):
        total += tl.sum(tl.load(grouped + tap).to(tl.float32) * first[None, :], 1)
    tl.store(bias + head * HEAD_DIM + row, total)


@triton.jit
def halves(HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr):
    """The channels of the two tiles: column p of one is rotated with column p of the other."""
    column = tl.arange(0, HEAD_DIM // 2)
    pairs: tl.constexpr = ROTARY_DIM // 2
    if ROTARY_DIM == 0 or ROTARY_DIM == HEAD_DIM:
        first = column
        second = column + HEAD_DIM // 2
    else:
        first = tl.where(column < pairs, column, column + pairs)
        second = tl.where(column < pairs, first + pairs, first + (HEAD_DIM - ROTARY_DIM) // 2)
        if pairs % 8 == 0:
            first = tl.max_contiguous(tl.multiple_of(first, 8), 8)
            second = tl.max_contiguous(tl.multiple_of(second, 8), 8)
    return first, second


@triton.jit
def role(head, num_heads, num_key_heads):
    """A head's first partner in the mean and their number: the key head of a group, or the queries of a group."""
    group = num_heads // num_key_heads
    partner = num_heads + head // group
    count = 1
    if head >= num_heads:
        partner = (head - num_heads) * group
        count = group
    return partner, count


@triton.jit
def limits(row, length, prefix, history, HAS_HISTORY: tl.constexpr):
    """How many rows before its own each row may read; -1 for rows that are none."""
    limit = row + prefix
    if HAS_HISTORY:
        limit = tl.minimum(limit, tl.load(history + row, mask=row < length, other=0).to(tl.int32))
    return tl.where(row < length, limit, -1)


@triton.jit
def convolve(
    latents, matrices, bias, row, limit, head, first, second, row_stride,
    num_heads, num_key_heads, HEAD_DIM: tl.constexpr, TAPS: tl.constexpr, HAS_MEAN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Both tiles of a head before the norm; `latents` begins at the row of token 0."""
    # int64: a row's stride times a million tokens passes 2**31.
    base = latents + row.to(tl.int64)[:, None] * row_stride
    inside = (limit >= 0)[:, None]
    own = head * HEAD_DIM
    if TAPS > 0:
        parts: tl.constexpr = HEAD_DIM // BLOCK_K
        a = tl.zeros([row.shape[0], HEAD_DIM // 2], tl.float32)
        b = tl.zeros([row.shape[0], HEAD_DIM // 2], tl.float32)
        for step in tl.range(TAPS * parts):
            delay = step // parts
            channel = step % parts * BLOCK_K + tl.arange(0, BLOCK_K)
            offset = own + channel - delay * row_stride
            x = tl.load(base + offset[None, :], mask=(limit >= delay)[:, None], other=0.0)
            matrix = (
                matrices
                + (delay * (num_heads + num_key_heads) + head) * HEAD_DIM * HEAD_DIM
                + channel[None, :]
            )
            a = tl.dot(x, tl.trans(tl.load(matrix + first[:, None] * HEAD_DIM)), a, input_precision=PRECISION)
            b = tl.dot(
                x, tl.trans(tl.load(matrix + second[:, None] * HEAD_DIM)), b, input_precision=PRECISION
            )
        a += tl.load(bias + own + first)[None, :]
        b += tl.load(bias + own + second)[None, :]
    else:
        a = tl.load(base + (own + first)[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(base + (own + second)[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_MEAN:
        a += 0.5 * tl.load(base + (own + first)[None, :], mask=inside, other=0.0).to(tl.float32)
        b += 0.5 * tl.load(base + (own + second)[None, :], mask=inside, other=0.0).to(tl.float32)
        partner, count = role(head, num_heads, num_key_heads)
        share = 0.5 / count
        for i in range(count):
            other = (partner + i) * HEAD_DIM
            a += share * tl.load(base + (other + first)[None, :], mask=inside, other=0.0).to(tl.float32)
            b += share * tl.load(base + (other + second)[None, :], mask=inside, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def angles(table, row, length, stride, pair_stride, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
           OTHER: tl.constexpr):  # fmt: skip
    """Cosines or sines of the columns of a tile; OTHER, those of angle 0, where nothing is rotated."""
    column = tl.arange(0, HEAD_DIM // 2)
    inside = (row < length)[:, None] & (column < ROTARY_DIM // 2)[None, :]
    offset = row[:, None] * stride + column[None, :] * pair_stride
    return tl.load(table + offset, mask=inside, other=OTHER).to(tl.float32)


@triton.jit
def _copy_values(
    latents, value, row, limit, local, batch, length, row_stride, num_heads, num_key_heads,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One head of values: of all their channels side by side, the second half is that of the row before."""
    channel = local * HEAD_DIM + tl.arange(0, HEAD_DIM)
    delay = (channel >= num_key_heads * HEAD_DIM // 2).to(tl.int32)
    base = latents + row.to(tl.int64)[:, None] * row_stride
    offset = (num_heads + num_key_heads) * HEAD_DIM + channel - delay * row_stride
    x = tl.load(base + offset[None, :], mask=limit[:, None] >= delay[None, :], other=0.0)
    out = value + (batch * length + row)[:, None] * (num_key_heads * HEAD_DIM) + channel[None, :]
    tl.store(out, x, mask=(row < length)[:, None])


# One program: BLOCK rows of one head. Of a query or key it moves the latents of the head, from the caches once a delay,
# those of its partners, and the head itself: `2 + partners` times rows * head_dim elements; and the matrices, from the
# L2 cache. A head of values is copied.
@triton.jit(do_not_specialize=RUNTIME)
def _forward_kernel(
    latents, matrices, bias, temperature, cos, sin, history, query, key, value,
    batch_stride, row_stride, length, prefix, table_stride_b, table_stride_n, table_stride_p, history_stride_b, eps,
    num_heads, num_key_heads, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    TAPS: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_NORM: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    HAS_HISTORY: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    latents += batch * batch_stride + prefix * row_stride
    limit = limits(row, length, prefix, history + batch * history_stride_b, HAS_HISTORY)
    if head >= num_heads + num_key_heads:
        local = head - (num_heads + num_key_heads)
        _copy_values(
            latents, value, row, limit, local, batch, length, row_stride, num_heads, num_key_heads, HEAD_DIM
        )
    else:
        first, second = halves(HEAD_DIM, ROTARY_DIM)
        a, b = convolve(
            latents, matrices, bias, row, limit, head, first, second, row_stride, num_heads, num_key_heads, HEAD_DIM,
            TAPS, HAS_MEAN, PRECISION, BLOCK_K,
        )  # fmt: skip
        is_key = head >= num_heads
        factor = 1.0
        if HAS_TEMPERATURE:
            factor = tl.load(temperature + head - num_heads, mask=is_key, other=1.0)
        if HAS_NORM:
            norm = tl.sqrt(tl.sum(a * a, 1) + tl.sum(b * b, 1))
            scale = (factor * HEAD_DIM**0.5 / tl.maximum(norm, eps))[:, None]
            a *= scale
            b *= scale
        else:
            a *= factor
            b *= factor
        if ROTARY_DIM > 0:
            table = batch * table_stride_b
            c = angles(cos + table, row, length, table_stride_n, table_stride_p, HEAD_DIM, ROTARY_DIM, 1.0)
            s = angles(sin + table, row, length, table_stride_n, table_stride_p, HEAD_DIM, ROTARY_DIM, 0.0)
            a, b = a * c - b * s, b * c + a * s
        out = query
        local = head
        heads = num_heads
        if is_key:
            out = key
            local = head - num_heads
            heads = num_key_heads
        base = out + ((batch * length + row) * heads + local)[:, None] * HEAD_DIM
        inside = (row < length)[:, None]
        tl.store(base + first[None, :], a.to(out.dtype.element_ty), mask=inside)
        tl.store(base + second[None, :], b.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Tiling:
    """How a kernel is cut: rows of a block, channels of a product's step, warps, and steps in flight."""

    rows: int
    depth: int
    num_warps: int
    num_stages: int

    def options(self, head_dim: int) -> dict[str, int]:
        """Returns the launch options that the kernels with products share."""
        return {
            "BLOCK": self.rows,
            "BLOCK_K": min(self.depth, head_dim),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def tiling_of(head_dim: int, rows: int) -> Tiling:
    """Returns the tiling of a kernel with products: blocks of as many rows as there are, at most 64."""
    return Tiling(16 if rows <= 16 else 64, 64, 4 if head_dim <= 128 else 8, 3)


def forward(
    latents, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias, temperature, cos, sin, history, prefix,
    num_heads, num_key_value_heads, qk_mean, qk_norm, value_shift, tiling=None,
):  # fmt: skip
    """Returns query, key and value, `[batch, heads, length, head_dim]`, the heads of a token side by side in memory.

    Without `value_shift` the value has no heads.
    """
    batch, rows, channels = latents.shape
    value_heads = num_key_value_heads if value_shift else 0
    all_heads = num_heads + num_key_value_heads + value_heads
    length, head_dim = rows - prefix, channels // all_heads
    outputs = [
        latents.new_empty(batch, length, heads, head_dim)
        for heads in (num_heads, num_key_value_heads, value_heads)
    ]
    if batch * length > 0:
        tiling = tiling or tiling_of(head_dim, length)
        inputs, sizes, words = launch(
            with_rows(latents), depthwise_weight, depthwise_bias, grouped_weight, grouped_bias, temperature, cos, sin,
            history, prefix, num_heads, num_key_value_heads, qk_mean, qk_norm, head_dim,
        )  # fmt: skip
        _forward_kernel[all_heads, triton.cdiv(length, tiling.rows), batch](
            *inputs, *outputs, *sizes, **words, **tiling.options(head_dim)
        )
    return tuple(heads.transpose(1, 2) for heads in outputs)


def with_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its last axis contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def launch(
    latents, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias, temperature, cos, sin, history, prefix,
    num_heads, num_key_value_heads, qk_mean, qk_norm, head_dim,
):  # fmt: skip
    """Returns the tensors, the sizes and the constants that the kernels share."""
    matrices = bias = latents
    if grouped_weight is not None:
        heads = num_heads + num_key_value_heads
        matrices, bias = merge(heads, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias)
    table_strides = (0, 0, 0)
    if cos is not None:
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        table_strides = (cos.stride(0) if cos.shape[0] > 1 else 0, *cos.stride()[1:])
    history_stride = 0
    if history is not None:
        history = history.contiguous()
        history_stride = history.shape[1] if history.shape[0] > 1 else 0
    # What is absent is never read; any tensor stands in its place.
    inputs = (
        latents, matrices, bias, latents if temperature is None else temperature.float(),
        *(latents if table is None else table for table in (cos, sin, history)),
    )  # fmt: skip
    sizes = (
        *latents.stride()[:2], latents.shape[1] - prefix, prefix, *table_strides, history_stride,
        torch.finfo(latents.dtype).eps,
    )  # fmt: skip
    words = {
        "num_heads": num_heads,
        "num_key_heads": num_key_value_heads,
        "HEAD_DIM": head_dim,
        "ROTARY_DIM": 0 if cos is None else 2 * cos.shape[2],
        "TAPS": 0 if grouped_weight is None else matrices.shape[0],
        "HAS_MEAN": qk_mean,
        "HAS_NORM": qk_norm,
        "HAS_TEMPERATURE": temperature is not None,
        "HAS_HISTORY": history is not None,
        "PRECISION": "ieee" if latents.dtype == torch.float32 else "tf32",
    }
    return inputs, sizes, words


def merge(heads, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias):
    """Returns matrices `[delays, heads, head_dim, head_dim]` and bias, float32, of both convolutions in a row."""
    channels, head_dim, taps = grouped_weight.shape
    if depthwise_weight is None:
        matrices = grouped_weight.view(heads, head_dim, head_dim, taps).permute(3, 0, 1, 2).flip(0)
        return matrices.contiguous(), grouped_bias.float()
    before = depthwise_weight.shape[2]
    matrices = grouped_weight.new_empty(before + taps - 1, heads, head_dim, head_dim)
    bias = grouped_bias.new_empty(channels, dtype=torch.float32)
    _merge_kernel[heads, head_dim // 8](
        depthwise_weight.contiguous(), depthwise_bias, grouped_weight.contiguous(), grouped_bias, matrices, bias,
        HEAD_DIM=head_dim, TAPS0=before, TAPS1=taps, OUT=8,
    )  # fmt: skip
    return matrices, bias
