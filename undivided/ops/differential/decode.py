"""Differential attention of few queries against a long cache: the group stays together, the keys are split.

Loading the cache is all the work of a decode step. A program therefore takes every signal and noise row that reads a
value head, and loads each of its keys and values once: `(key heads + noise key heads) * head_dim + value heads *
value_dim` elements a position, half of what four calls of plain attention load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import LOG2E, block_width, load_tile, precision, rows_contiguous
from undivided.ops.differential.triton import RUNTIME
from undivided.ops.latent_decode._splits import choose_splits, multiprocessors


# One program: all rows (signal heads x queries, then noise heads x queries) of one value head against one part of the
# keys. In registers: one accumulator [ROWS, value_dim] for signal and noise together, a maximum and a sum a row.
# Scores are taken against every kind of key, and each row keeps those of its own: products cost nothing here.
@triton.jit(do_not_specialize=("num_queries", "num_keys", "num_splits", "num_rows"))
def _attend_kernel(
    query, noise_query, key, noise_key, value, partial, partial_lse,
    scale, num_queries, num_keys, signal_heads, noise_heads, value_heads, num_splits, num_rows,
    query_stride_b, query_stride_h, query_stride_n, noise_query_stride_b, noise_query_stride_h, noise_query_stride_n,
    key_stride_b, key_stride_h, key_stride_m, noise_key_stride_b, noise_key_stride_h, noise_key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    value_head = tl.program_id(1) % value_heads
    batch = (tl.program_id(1) // value_heads).to(tl.int64)
    own_signals = signal_heads // value_heads
    own_heads = own_signals + noise_heads // value_heads

    row = tl.arange(0, BLOCK_ROWS)
    local_head = row // num_queries
    position = row % num_queries
    is_signal = local_head < own_signals
    inside = local_head < own_heads
    head = value_head * own_signals + local_head
    noise_head = value_head * (own_heads - own_signals) + local_head - own_signals
    column = tl.arange(0, BLOCK_D)
    width = (column < HEAD_DIM)[None, :]
    q = tl.load(
        query
        + batch * query_stride_b
        + (head * query_stride_h + position * query_stride_n)[:, None]
        + column[None, :],
        mask=is_signal[:, None] & width,
        other=0.0,
    )
    q += tl.load(
        noise_query + batch * noise_query_stride_b
        + (noise_head * noise_query_stride_h + position * noise_query_stride_n)[:, None] + column[None, :],
        mask=(inside & (local_head >= own_signals))[:, None] & width,
        other=0.0,
    )  # fmt: skip
    # Which kind of key a row reads: one of the value head's KEYS signal keys, or the noise key.
    kind = tl.where(is_signal, local_head // (own_signals // KEYS), KEYS)

    blocks = tl.cdiv(num_keys, BLOCK_N)
    first = (split * blocks // num_splits) * BLOCK_N
    last = tl.minimum(((split + 1) * blocks // num_splits) * BLOCK_N, num_keys)
    limit = last + tl.zeros_like(row)
    if IS_CAUSAL:
        limit = tl.minimum(position + (num_keys - num_queries + 1), last)
    key += batch * key_stride_b + value_head * KEYS * key_stride_h
    noise_key += batch * noise_key_stride_b + value_head * noise_key_stride_h
    value += batch * value_stride_b + value_head * value_stride_h

    top = tl.full([BLOCK_ROWS], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    accumulator = tl.zeros([BLOCK_ROWS, BLOCK_V], tl.float32)
    for start in tl.range(first, last, BLOCK_N):
        k = load_tile(noise_key, start, noise_key_stride_m, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D, True)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        for i in tl.static_range(KEYS):
            k = load_tile(
                key + i * key_stride_h, start, key_stride_m, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D, True
            )
            scores = tl.where((kind == i)[:, None], tl.dot(q, tl.trans(k), input_precision=PRECISION), scores)
        v = load_tile(value, start, value_stride_m, num_keys, VALUE_DIM, BLOCK_N, BLOCK_V, True)
        seen = (start + tl.arange(0, BLOCK_N))[None, :] < limit[:, None]
        scores = tl.where(seen, scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision=PRECISION)

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    accumulator *= tl.where(seen, 1.0 / total, 0.0)[:, None]
    all_heads = signal_heads + noise_heads
    out_head = tl.where(is_signal, head, signal_heads + noise_head)
    out_row = split.to(tl.int64) * num_rows + (batch * all_heads + out_head) * num_queries + position
    columns = tl.arange(0, BLOCK_V)
    tl.store(
        partial + out_row[:, None] * VALUE_DIM + columns[None, :],
        accumulator,
        mask=inside[:, None] & (columns < VALUE_DIM)[None, :],
    )
    tl.store(partial_lse + out_row, tl.where(seen, top + tl.log2(total), float("-inf")), mask=inside)


# One program: one query of one signal head. It merges the parts of its row and of its noise head's row, which the
# kernel above has just left in the L2 cache, then subtracts, normalises and stores.
@triton.jit(do_not_specialize=("num_queries", "num_splits", "num_rows", *RUNTIME[4:]))
def _mix_kernel(
    partial, partial_lse, lam, norm_weight, out,
    norm_eps, out_scale, num_queries, signal_heads, noise_heads, group, num_splits, num_rows,
    lam_stride_b, lam_stride_h, lam_stride_n,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0)
    head = tl.program_id(1) % signal_heads
    batch = (tl.program_id(1) // signal_heads).to(tl.int64)
    columns = tl.arange(0, BLOCK_V)
    inside = columns < VALUE_DIM
    base = batch * (signal_heads + noise_heads)
    signal = _merge(
        partial,
        partial_lse,
        (base + head) * num_queries + position,
        num_splits,
        num_rows,
        VALUE_DIM,
        BLOCK_V,
        BLOCK_S,
    )
    noise_row = (base + signal_heads + head // group) * num_queries + position
    noise = _merge(partial, partial_lse, noise_row, num_splits, num_rows, VALUE_DIM, BLOCK_V, BLOCK_S)
    mixed = (
        signal - tl.load(lam + batch * lam_stride_b + head * lam_stride_h + position * lam_stride_n) * noise
    )
    if HAS_NORM:
        square = tl.sum(mixed * mixed, 0) / VALUE_DIM
        weight = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
        mixed = mixed * (1.0 / tl.sqrt(square + norm_eps)) * weight
    out_row = (batch * num_queries + position) * signal_heads + head
    tl.store(out + out_row * VALUE_DIM + columns, (mixed * out_scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _merge(
    partial, partial_lse, row, num_splits, num_rows,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_V)
    top = -1.0e30
    total = 0.0
    merged = tl.zeros([BLOCK_V], tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        part_row = part.to(tl.int64) * num_rows + row
        log = tl.load(partial_lse + part_row, mask=part < num_splits, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(log, 0))
        weight = tl.exp2(log - new_top)
        decay = tl.exp2(top - new_top)
        values = tl.load(
            partial + part_row[:, None] * VALUE_DIM + columns[None, :],
            mask=(log > float("-inf"))[:, None] & (columns < VALUE_DIM)[None, :],
            other=0.0,
        )
        merged = merged * decay + tl.sum(weight[:, None] * values, 0)
        total = total * decay + tl.sum(weight, 0)
        top = new_top
    return merged * tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)


def attend(
    query, noise_query, key, noise_key, value, lam, norm_weight, norm_eps, out_scale, is_causal, scale,
    num_splits=None,
):  # fmt: skip
    """Returns the output; `num_splits` is into how many parts the keys are cut, chosen from the shapes by default."""
    query, noise_query, key, noise_key, value = map(
        rows_contiguous, (query, noise_query, key, noise_key, value)
    )
    batch, heads, num_queries, head_dim = query.shape
    noise_heads, value_heads, value_dim = noise_query.shape[1], value.shape[1], value.shape[3]
    num_keys = key.shape[2]
    block_keys, num_warps, num_stages = (32, 4, 3) if query.element_size() == 2 else (16, 8, 1)
    blocks = triton.cdiv(num_keys, block_keys)
    if num_splits is None:
        # Two programs a multiprocessor: one loads while the other computes.
        num_splits = choose_splits(batch * value_heads, blocks, 2 * multiprocessors(query.device))
    num_rows = batch * (heads + noise_heads) * num_queries
    out = query.new_empty((batch, num_queries, heads, value_dim))
    partial = query.new_empty((num_splits, num_rows, value_dim), dtype=torch.float32)
    partial_lse = query.new_empty((num_splits, num_rows), dtype=torch.float32)
    rows = (heads + noise_heads) // value_heads * num_queries
    _attend_kernel[num_splits, batch * value_heads](
        query, noise_query, key, noise_key, value, partial, partial_lse,
        scale * LOG2E, num_queries, num_keys, heads, noise_heads, value_heads, num_splits, num_rows,
        *query.stride()[:3], *noise_query.stride()[:3], *key.stride()[:3], *noise_key.stride()[:3], *value.stride()[:3],
        KEYS=key.shape[1] // value_heads, HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim),
        BLOCK_V=block_width(value_dim), BLOCK_ROWS=block_width(rows), BLOCK_N=block_keys,
        IS_CAUSAL=is_causal and num_queries > 1, PRECISION=precision(query),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    _mix_kernel[num_queries, batch * heads](
        partial, partial_lse, lam, norm_weight, out,
        norm_eps, out_scale, num_queries, heads, noise_heads, heads // noise_heads, num_splits, num_rows,
        *lam.stride(), VALUE_DIM=value_dim, BLOCK_V=block_width(value_dim),
        BLOCK_S=min(32, triton.next_power_of_2(num_splits)),
        HAS_NORM=norm_weight is not None, num_warps=4,
    )  # fmt: skip
    return out.transpose(1, 2)
