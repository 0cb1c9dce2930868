"""The generalised mean in Triton: a logarithm and an exponential of each token, which is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_N, BLOCK_C, WARPS = 64, 64, 4


# One program: BLOCK_C channels of one image, all tokens. In registers: a largest logarithm and a sum a channel. It
# reads its tokens once and writes one number a channel, and with WITH_LOG another, for the backward.
@triton.jit(do_not_specialize=("tokens",))
def _forward_kernel(
    x, power, out, log_out, eps, tokens, channels, stride_b, stride_n, stride_c,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, WITH_LOG: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    p = tl.load(power + column, mask=inside, other=1.0)
    x += batch * stride_b
    # int64: a map's channels may lie a whole map apart.
    offset = column.to(tl.int64) * stride_c
    top = tl.full([BLOCK_C], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in tl.range(0, tokens, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        present = (row < tokens)[:, None]
        entry = tl.load(
            x + row[:, None] * stride_n + offset[None, :], mask=present & inside[None, :], other=1.0
        )
        logs = tl.log2(tl.maximum(entry.to(tl.float32), eps)) * p[None, :]
        logs = tl.where(present, logs, float("-inf"))
        new_top = tl.maximum(top, tl.max(logs, 0))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logs - new_top[None, :]), 0)
        top = new_top
    log_mean = (top + tl.log2(total / tokens)) / p
    place = batch * channels + column
    tl.store(out + place, tl.exp2(log_mean).to(out.dtype.element_ty), mask=inside)
    if WITH_LOG:
        tl.store(log_out + place, log_mean, mask=inside)


# One program: as above. It reads each token once and writes its gradient, `dout / N (x / f)^(p - 1)`, and one number a
# channel for the exponent: `dout f / p (sum_i w_i ln x_i - ln f)` with `w_i = (x_i / f)^p / N`.
@triton.jit(do_not_specialize=("tokens",))
def _backward_kernel(
    dout, x, power, log_out, dx, dpower, eps, tokens, channels, stride_b, stride_n, stride_c,
    dx_stride_b, dx_stride_n, dx_stride_c, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    p = tl.load(power + column, mask=inside, other=1.0)
    place = batch * channels + column
    log_mean = tl.load(log_out + place, mask=inside, other=0.0)
    gradient = tl.load(dout + place, mask=inside, other=0.0).to(tl.float32)
    x += batch * stride_b
    dx += batch * dx_stride_b
    offset = column.to(tl.int64) * stride_c
    dx_offset = column.to(tl.int64) * dx_stride_c
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in tl.range(0, tokens, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        mask = (row < tokens)[:, None] & inside[None, :]
        entry = tl.load(x + row[:, None] * stride_n + offset[None, :], mask=mask, other=1.0).to(tl.float32)
        relative = tl.log2(tl.maximum(entry, eps)) - log_mean[None, :]
        total += tl.sum(tl.where(mask, tl.exp2(p[None, :] * relative) * relative, 0.0), 0)
        share = tl.exp2((p[None, :] - 1.0) * relative)
        slope = tl.where(entry > eps, share, 0.0) * (gradient / tokens)[None, :]
        tl.store(
            dx + row[:, None] * dx_stride_n + dx_offset[None, :], slope.to(dx.dtype.element_ty), mask=mask
        )
    # Logarithms are in base 2.
    dp = gradient * tl.exp2(log_mean) / p * total / tokens * 0.6931471805599453
    tl.store(dpower + place, dp, mask=inside)


def forward(x, power, eps, *, with_log=True):
    """Returns the mean `[batch, channels]` and its logarithm in base 2, float32 (empty unless `with_log`)."""
    batch, tokens, channels = x.shape
    out = x.new_empty((batch, channels))
    log_out = x.new_empty((batch, channels) if with_log else 0, dtype=torch.float32)
    _forward_kernel[batch, triton.cdiv(channels, BLOCK_C)](
        x, power.float().contiguous(), out, log_out, eps, tokens, channels, *x.stride(),
        BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, WITH_LOG=with_log, num_warps=WARPS,
    )  # fmt: skip
    return out, log_out


def backward(dout, x, power, log_out, eps):
    """Returns the gradients of x and of the power, the latter in float32."""
    batch, tokens, channels = x.shape
    dx = torch.empty_like(x)
    dpower = torch.empty_like(log_out)
    _backward_kernel[batch, triton.cdiv(channels, BLOCK_C)](
        dout.contiguous(), x, power.float().contiguous(), log_out, dx, dpower, eps, tokens, channels,
        *x.stride(), *dx.stride(), BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, num_warps=WARPS,
    )  # fmt: skip
    return dx, dpower.sum(0)
