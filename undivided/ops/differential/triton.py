"""Differential attention in Triton: both maps with their wide values, the mix and the norm in the epilogue.

A whole group in one program would need `(g + 1) * BLOCK_M * value_dim` float32 accumulators, more than a
multiprocessor has registers for from 64 queries on at head_dim 128, and prompts are bound by products, not by loads.
So a program computes one head; noise heads run first, and a signal program subtracts what its noise head left.
Decoding, where loading the cache is all, does keep the group together: `decode.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import (
    LOG2E,
    add_keys,
    block_width,
    forward_tiling,
    load_tile,
    precision,
    rows_contiguous,
    shared_memory,
)

# Sizes that change from call to call and speed nothing up: a kernel is not compiled anew for each.
RUNTIME = ("num_queries", "num_keys", "heads", "noise_heads", "lam_stride_b", "lam_stride_h", "lam_stride_n")


# One program: BLOCK_M queries of one head against all keys they see. In registers: the float32 accumulator
# [BLOCK_M, value_dim], a maximum and a sum a row, and the scores of one block of keys. It does
# `2 * (head_dim + value_dim)` operations a pair; it moves its queries, its output and, mostly from the L2 cache, the
# keys and values. A noise program writes its float32 output and log-sums; a signal program reads the output of its
# noise head, and writes the mixed and normalised result, and with WITH_MIXED also what was normalised.
@triton.jit(do_not_specialize=RUNTIME[:3] + RUNTIME[4:])
def _forward_kernel(
    query, key, value, lam, norm_weight, noise_out, out, mixed, lse,
    scale, norm_eps, out_scale, num_queries, num_keys, heads, key_group, value_group, noise_group,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, lam_stride_b, lam_stride_h, lam_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_NOISE: tl.constexpr,
    HAS_NORM: tl.constexpr, WITH_MIXED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    # The longest rows first: what runs last is short.
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_inside = rows < num_queries
    columns = tl.arange(0, BLOCK_V)
    column_inside = columns < VALUE_DIM

    query += batch * query_stride_b + head * query_stride_h
    q = load_tile(query, first_row, query_stride_n, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // value_group) * value_stride_h

    # Query n sees the keys before `limit`; all rows of the block see those before `common`.
    limit = num_keys + tl.zeros_like(rows)
    common = num_keys
    last = num_keys
    if IS_CAUSAL:
        limit = tl.minimum(rows + (num_keys - num_queries + 1), num_keys)
        common = tl.minimum(tl.maximum(first_row + num_keys - num_queries + 1, 0), num_keys)
        last = tl.minimum(tl.maximum(first_row + BLOCK_M + num_keys - num_queries, 0), num_keys)
    common = common // BLOCK_N * BLOCK_N

    # Finite, so that differences of maxima are never NaN; the exponential of -inf minus it is 0.
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    accumulator, top, total = add_keys(
        accumulator, top, total, q, key, value, 0, common, limit, num_keys, scale, key_stride_m, value_stride_m,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    accumulator, top, total = add_keys(
        accumulator, top, total, q, key, value, common, last, limit, num_keys, scale, key_stride_m, value_stride_m,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, True, PRECISION,
    )  # fmt: skip

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    accumulator *= tl.where(seen, 1.0 / total, 0.0)[:, None]
    row = (batch * heads + head) * num_queries + rows
    # +inf for a row without keys: every weight that a backward pass recomputes with it is 0.
    tl.store(lse + row, tl.where(seen, top + tl.log2(total), float("inf")), mask=row_inside)
    inside = row_inside[:, None] & column_inside[None, :]
    if IS_NOISE:
        tl.store(noise_out + row[:, None] * VALUE_DIM + columns[None, :], accumulator, mask=inside)
    else:
        noise_row = (batch * (heads // noise_group) + head // noise_group) * num_queries + rows
        noise = tl.load(noise_out + noise_row[:, None] * VALUE_DIM + columns[None, :], mask=inside, other=0.0)
        factor = tl.load(
            lam + batch * lam_stride_b + head * lam_stride_h + rows * lam_stride_n, mask=row_inside, other=0.0
        )
        accumulator -= factor[:, None] * noise
        # [batch, queries, heads, value_dim] in memory: what follows reads the heads of a token side by side.
        out_row = (batch * num_queries + rows) * heads + head
        out_offset = out_row[:, None] * VALUE_DIM + columns[None, :]
        if WITH_MIXED:
            tl.store(mixed + out_offset, accumulator.to(mixed.dtype.element_ty), mask=inside)
        if HAS_NORM:
            square = tl.sum(accumulator * accumulator, 1) / VALUE_DIM
            weight = tl.load(norm_weight + columns, mask=column_inside, other=0.0).to(tl.float32)
            accumulator = accumulator * (1.0 / tl.sqrt(square + norm_eps))[:, None] * weight[None, :]
        accumulator *= out_scale
        tl.store(out + out_offset, accumulator.to(out.dtype.element_ty), mask=inside)


# One program: BLOCK_R queries of one group. It goes back through norm and mix: from the gradient of the output to that
# of each signal head's and of the noise head's own output, with their row sums `delta = dout . out` that the softmax
# backward needs. It moves each of `dout, mixed, dsignal` once for g heads and `noise_out, dnoise` once.
@triton.jit(do_not_specialize=RUNTIME[:1] + RUNTIME[2:])
def _mix_backward_kernel(
    dout, mixed, noise_out, lam, norm_weight, dsignal, dnoise, delta, noise_delta, dlam, dweight,
    norm_eps, out_scale, num_queries, heads, noise_heads,
    dout_stride_b, dout_stride_h, dout_stride_n, lam_stride_b, lam_stride_h, lam_stride_n,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    noise_head = tl.program_id(1) % noise_heads
    batch = (tl.program_id(1) // noise_heads).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_inside = rows < num_queries
    columns = tl.arange(0, BLOCK_V)
    inside = row_inside[:, None] & (columns < VALUE_DIM)[None, :]
    noise_row = (batch * noise_heads + noise_head) * num_queries + rows
    noise_offset = noise_row[:, None] * VALUE_DIM + columns[None, :]
    noise = tl.load(noise_out + noise_offset, mask=inside, other=0.0)
    noise_gradient = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    if HAS_NORM:
        weight = tl.load(norm_weight + columns, mask=columns < VALUE_DIM, other=0.0).to(tl.float32)
        weight_gradient = tl.zeros([BLOCK_V], tl.float32)

    for i in range(GROUP):
        head = noise_head * GROUP + i
        gradient = tl.load(
            dout
            + batch * dout_stride_b
            + head * dout_stride_h
            + rows[:, None].to(tl.int64) * dout_stride_n
            + columns[None, :],
            mask=inside,
            other=0.0,
        ).to(tl.float32)
        gradient *= out_scale
        out_row = (batch * num_queries + rows) * heads + head
        offset = out_row[:, None] * VALUE_DIM + columns[None, :]
        z = tl.load(mixed + offset, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            inverse = 1.0 / tl.sqrt(tl.sum(z * z, 1) / VALUE_DIM + norm_eps)
            weight_gradient += tl.sum(gradient * z * inverse[:, None], 0)
            gradient *= weight[None, :]
            projected = tl.sum(gradient * z, 1) / VALUE_DIM * inverse * inverse
            gradient = inverse[:, None] * (gradient - z * projected[:, None])
        row = (batch * heads + head) * num_queries + rows
        tl.store(dlam + row, -tl.sum(gradient * noise, 1), mask=row_inside)
        # Rounded here, so that the products and delta see the same gradient.
        rounded = gradient.to(dsignal.dtype.element_ty)
        tl.store(dsignal + offset, rounded, mask=inside)
        gradient = rounded.to(tl.float32)
        factor = tl.load(
            lam + batch * lam_stride_b + head * lam_stride_h + rows * lam_stride_n, mask=row_inside, other=0.0
        )
        tl.store(delta + row, tl.sum(gradient * (z + factor[:, None] * noise), 1), mask=row_inside)
        noise_gradient -= factor[:, None] * gradient

    rounded = noise_gradient.to(dnoise.dtype.element_ty)
    tl.store(dnoise + noise_offset, rounded, mask=inside)
    tl.store(noise_delta + noise_row, tl.sum(rounded.to(tl.float32) * noise, 1), mask=row_inside)
    if HAS_NORM:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        # One row a program and a sum afterwards: atomics would change the order of the sum from run to run.
        tl.store(dweight + program * VALUE_DIM + columns, weight_gradient, mask=columns < VALUE_DIM)


def forward(
    query, noise_query, key, noise_key, value, lam, norm_weight, norm_eps, out_scale, is_causal, scale, with_mixed,
):  # fmt: skip
    """Returns out, mixed, the noise heads' output, and the base-2 log-sums of both maps."""
    batch, heads, num_queries, head_dim = query.shape
    noise_heads, value_dim = noise_query.shape[1], value.shape[3]
    query, noise_query, key, noise_key, value = map(
        rows_contiguous, (query, noise_query, key, noise_key, value)
    )
    out, mixed, noise_out, lse, noise_lse = empty_outputs(query, noise_query, value, with_mixed)
    if query.numel() == 0:
        return out, mixed, noise_out, lse, noise_lse
    tiling = forward_tiling(
        block_width(head_dim), block_width(value_dim), query.element_size(), shared_memory(query.device)
    )
    for q, k, sums, is_noise in ((noise_query, noise_key, noise_lse, True), (query, key, lse, False)):
        _forward_kernel[batch * q.shape[1], triton.cdiv(num_queries, tiling.rows)](
            q, k, value, lam, norm_weight, noise_out, out, mixed, sums,
            scale * LOG2E, norm_eps, out_scale, num_queries, key.shape[2], q.shape[1],
            q.shape[1] // k.shape[1], q.shape[1] // value.shape[1], heads // noise_heads,
            *q.stride()[:3], *k.stride()[:3], *value.stride()[:3], *lam.stride(),
            HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim), BLOCK_V=block_width(value_dim),
            BLOCK_M=tiling.rows, BLOCK_N=tiling.keys, IS_CAUSAL=is_causal, IS_NOISE=is_noise,
            HAS_NORM=norm_weight is not None, WITH_MIXED=with_mixed, PRECISION=precision(query),
            num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        )  # fmt: skip
    return out, mixed, noise_out, lse, noise_lse


def infer(*arguments):
    """Returns the output alone."""
    return forward(*arguments, with_mixed=False)[0]


def empty_outputs(query, noise_query, value, with_mixed):
    """Returns the tensors that `forward` fills."""
    batch, heads, num_queries, _ = query.shape
    value_dim = value.shape[3]
    by_token = (batch, num_queries, heads, value_dim)
    return (
        query.new_empty(by_token).transpose(1, 2),
        query.new_empty(by_token if with_mixed else (0, 0, 0, value_dim)).transpose(1, 2),
        query.new_empty((batch, noise_query.shape[1], num_queries, value_dim), dtype=torch.float32),
        query.new_empty((batch, heads, num_queries), dtype=torch.float32),
        query.new_empty((batch, noise_query.shape[1], num_queries), dtype=torch.float32),
    )


def mix_backward(dout, mixed, noise_out, lam, norm_weight, norm_eps, out_scale):
    """Returns the gradients of both maps' outputs, their row sums, and those of lam and of the norm's weight."""
    batch, heads, num_queries, value_dim = dout.shape
    noise_heads = noise_out.shape[1]
    dout = rows_contiguous(dout)
    dsignal = torch.empty_like(mixed)
    dnoise = mixed.new_empty(noise_out.shape)
    delta, dlam = (noise_out.new_empty((batch, heads, num_queries)) for _ in range(2))
    noise_delta = noise_out.new_empty((batch, noise_heads, num_queries))
    block_rows = 16
    grid = (triton.cdiv(num_queries, block_rows), batch * noise_heads)
    dweight = noise_out.new_empty((grid[0] * grid[1], value_dim)) if norm_weight is not None else None
    _mix_backward_kernel[grid](
        dout, mixed, noise_out, lam, norm_weight, dsignal, dnoise, delta, noise_delta, dlam, dweight,
        norm_eps, out_scale, num_queries, heads, noise_heads, *dout.stride()[:3], *lam.stride(),
        GROUP=heads // noise_heads, VALUE_DIM=value_dim, BLOCK_V=block_width(value_dim), BLOCK_R=block_rows,
        HAS_NORM=norm_weight is not None, num_warps=4,
    )  # fmt: skip
    if dweight is not None:
        dweight = dweight.sum(0).to(norm_weight.dtype)
    return dsignal, dnoise, delta, noise_delta, dlam, dweight
