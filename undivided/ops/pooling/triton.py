"""The generalised mean in Triton: a logarithm and an exponential of each token, which is read once.

A thread keeps to its channels and to every so-many-th token, with a maximum and a sum of its own; threads meet once,
at the end. The two functions of an entry take as long as reading it, so that nothing else may be dear: in 16 bits the
logarithm is the hardware's, of an error of 2**-22, in place of a dozen instructions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._triton import interprets

# Entries of a tile. The forward takes four tiles in a step.
_ENTRIES, _WARPS = 1024, 4
# Programs that fill a GPU; with fewer, fewer channels go to one.
_MANY_PROGRAMS = 1024


@triton.jit
def _log2(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def _logarithms(
    x, p, eps, first, tokens, stride_n, offset, inside, ROWS: tl.constexpr, APPROXIMATE: tl.constexpr
):
    """`p log2(max(x, eps))` of tokens `first ...`, `[ROWS, channels]`; -inf for those that do not exist."""
    row = first + tl.arange(0, ROWS)
    present = (row < tokens)[:, None]
    entry = tl.load(x + row[:, None] * stride_n + offset[None, :], mask=present & inside[None, :], other=1.0)
    logs = _log2(tl.maximum(entry.to(tl.float32), eps), APPROXIMATE) * p[None, :]
    return tl.where(present, logs, float("-inf"))


# One program: BLOCK_C channels of one image, all tokens. In registers: of each of ROWS tokens and of each channel a
# largest logarithm and a sum. It reads its tokens once and writes one number a channel, and with WITH_LOG another,
# for the backward.
@triton.jit(do_not_specialize=("tokens",))
def _forward_kernel(
    x, power, out, log_out, eps, tokens, channels, stride_b, stride_n, stride_c,
    BLOCK_C: tl.constexpr, ROWS: tl.constexpr, APPROXIMATE: tl.constexpr, WITH_LOG: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    p = tl.load(power + column, mask=inside, other=1.0)
    x += batch * stride_b
    # int64: a map's channels may lie a whole map apart.
    offset = column.to(tl.int64) * stride_c
    # Finite, so that a thread without tokens subtracts no infinities.
    top = tl.full([ROWS, BLOCK_C], -1e30, tl.float32)
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in tl.range(0, tokens, 4 * ROWS):
        # Four tiles at once: four loads are under way, and what was summed before is scaled once.
        first = _logarithms(x, p, eps, start, tokens, stride_n, offset, inside, ROWS, APPROXIMATE)
        second = _logarithms(x, p, eps, start + ROWS, tokens, stride_n, offset, inside, ROWS, APPROXIMATE)
        third = _logarithms(x, p, eps, start + 2 * ROWS, tokens, stride_n, offset, inside, ROWS, APPROXIMATE)
        fourth = _logarithms(x, p, eps, start + 3 * ROWS, tokens, stride_n, offset, inside, ROWS, APPROXIMATE)
        new_top = tl.maximum(top, tl.maximum(tl.maximum(first, second), tl.maximum(third, fourth)))
        total = total * tl.exp2(top - new_top) + (
            (tl.exp2(first - new_top) + tl.exp2(second - new_top))
            + (tl.exp2(third - new_top) + tl.exp2(fourth - new_top))
        )
        top = new_top
    largest = tl.max(top, 0)
    whole = tl.sum(total * tl.exp2(top - largest[None, :]), 0)
    log_mean = (largest + tl.log2(whole / tokens)) / p
    place = batch * channels + column
    tl.store(out + place, tl.exp2(log_mean).to(out.dtype.element_ty), mask=inside)
    if WITH_LOG:
        tl.store(log_out + place, log_mean, mask=inside)


# One program: as above. It reads each token once and writes its gradient, `dout / N (x / f)^(p - 1)`, and one number a
# channel for the exponent: `dout f / p (sum_i w_i ln x_i - ln f)` with `w_i = (x_i / f)^p / N`.
@triton.jit(do_not_specialize=("tokens",))
def _backward_kernel(
    dout, x, power, log_out, dx, dpower, eps, tokens, channels, stride_b, stride_n, stride_c,
    dx_stride_b, dx_stride_n, dx_stride_c, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    p = tl.load(power + column, mask=inside, other=1.0)
    place = batch * channels + column
    log_mean = tl.load(log_out + place, mask=inside, other=0.0)
    slope = tl.load(dout + place, mask=inside, other=0.0).to(tl.float32) / tokens
    over_mean = tl.exp2(-log_mean)
    x += batch * stride_b
    dx += batch * dx_stride_b
    offset = column.to(tl.int64) * stride_c
    dx_offset = column.to(tl.int64) * dx_stride_c
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in tl.range(0, tokens, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < tokens)[:, None] & inside[None, :]
        entry = tl.load(x + row[:, None] * stride_n + offset[None, :], mask=mask, other=1.0).to(tl.float32)
        above = tl.maximum(entry, eps)
        relative = _log2(above, APPROXIMATE) - log_mean[None, :]
        share = tl.exp2((p - 1.0)[None, :] * relative)
        total += tl.where(mask, share * above * over_mean[None, :] * relative, 0.0)
        gradient = tl.where(entry > eps, share, 0.0) * slope[None, :]
        tl.store(
            dx + row[:, None] * dx_stride_n + dx_offset[None, :], gradient.to(dx.dtype.element_ty), mask=mask
        )
    # Logarithms are in base 2.
    dp = slope * tl.exp2(log_mean) / p * tl.sum(total, 0) * 0.6931471805599453
    tl.store(dpower + place, dp, mask=inside)


def _cut(x: torch.Tensor) -> dict[str, int]:
    """Returns how tokens are cut: what lies side by side in memory goes to the threads of a warp."""
    batch, _, channels = x.shape
    if x.stride(2) != 1:
        block = 8
    else:
        block = 128 if batch * triton.cdiv(channels, 128) >= _MANY_PROGRAMS else 64
    # The interpreter knows no assembly.
    approximate = x.dtype != torch.float32 and not interprets()
    return {
        "BLOCK_C": block,
        "ROWS": _ENTRIES // block,
        "APPROXIMATE": approximate,
        "num_warps": _WARPS,
    }


def forward(x, power, eps, *, with_log=True):
    """Returns the mean `[batch, channels]` and its logarithm in base 2, float32 (empty unless `with_log`)."""
    batch, tokens, channels = x.shape
    out = x.new_empty((batch, channels))
    log_out = x.new_empty((batch, channels) if with_log else 0, dtype=torch.float32)
    cut = _cut(x)
    _forward_kernel[batch, triton.cdiv(channels, cut["BLOCK_C"])](
        x,
        power.float().contiguous(),
        out,
        log_out,
        eps,
        tokens,
        channels,
        *x.stride(),
        WITH_LOG=with_log,
        **cut,
    )
    return out, log_out


def backward(dout, x, power, log_out, eps):
    """Returns the gradients of x and of the power, the latter in float32."""
    batch, tokens, channels = x.shape
    dx = torch.empty_like(x)
    dpower = torch.empty_like(log_out)
    cut = _cut(x)
    _backward_kernel[batch, triton.cdiv(channels, cut["BLOCK_C"])](
        dout.contiguous(), x, power.float().contiguous(), log_out, dx, dpower, eps, tokens, channels,
        *x.stride(), *dx.stride(), **cut,
    )  # fmt: skip
    return dx, dpower.sum(0)
