"""Normalise, rotate and append in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_RUNTIME = ["tokens", "capacity"]
# Query heads that one program rotates.
_HEADS = 16


# One program: one token of one sequence, or HEAD_BLOCK of its query heads. In registers: its row [latent, rope]
# in float32. It reads the row and the tables once and writes the row of the cache once, about
# `2 * (latent_dim + rope_dim)` elements; between them the eager composition would go through memory five times,
# in as many launches, and seven times for the queries.
@triton.jit(do_not_specialize=_RUNTIME)
def _append_kernel(
    row, cos, sin, norm_weight, cache, lengths, block_table, counts, shard_scale, latent_scale, query,
    eps, tokens, capacity,
    row_stride_b, row_stride_t, cos_stride_b, cos_stride_t, cos_stride_p, sin_stride_b, sin_stride_t, sin_stride_p,
    cache_stride_b, cache_stride_m, table_stride_b, latent_scale_stride_b, query_stride_b, query_stride_h,
    query_stride_t,
    LATENT_DIM: tl.constexpr, PAIRS: tl.constexpr, SHARDS: tl.constexpr, SHARD_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr, PAIR_BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_COUNTS: tl.constexpr, HAS_SHARD_SCALE: tl.constexpr, IS_FP8: tl.constexpr,
    HEADS: tl.constexpr, HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    # int64: rows of a long prompt, and pages of a large cache, pass 2**31 elements.
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    if PAIRS > 0:
        pair = tl.arange(0, PAIR_BLOCK)
        is_pair = pair < PAIRS
        cos += batch * cos_stride_b + token * cos_stride_t
        sin += batch * sin_stride_b + token * sin_stride_t
        c = tl.load(cos + pair * cos_stride_p, mask=is_pair, other=0.0).to(tl.float32)
        s = tl.load(sin + pair * sin_stride_p, mask=is_pair, other=0.0).to(tl.float32)
        first = 2 * pair if INTERLEAVED else pair
        second = first + (1 if INTERLEAVED else PAIRS)
    if HEADS > 0 and tl.program_id(1) > 0:
        head = (tl.program_id(1) - 1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
        heads = query + batch * query_stride_b + token * query_stride_t + head[:, None] * query_stride_h
        inside = (head < HEADS)[:, None] & is_pair[None, :]
        a = tl.load(heads + first[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(heads + second[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(heads + first[None, :], (a * c - b * s).to(query.dtype.element_ty), mask=inside)
        tl.store(heads + second[None, :], (b * c + a * s).to(query.dtype.element_ty), mask=inside)
    position = tl.load(lengths + batch).to(tl.int64) + token
    live = (tl.program_id(1) == 0) & (position >= 0) & (position < capacity)
    if HAS_COUNTS:
        live = live & (token < tl.load(counts + batch))
    if live:
        block = batch
        if PAGE_SIZE > 0:
            block = tl.load(block_table + batch * table_stride_b + position // PAGE_SIZE).to(tl.int64)
            position = position % PAGE_SIZE
        row += batch * row_stride_b + token * row_stride_t
        cache += block * cache_stride_b + position * cache_stride_m

        WIDTH: tl.constexpr = LATENT_DIM // SHARDS
        shard = tl.arange(0, SHARD_BLOCK)
        column = tl.arange(0, WIDTH_BLOCK)
        inside = (shard < SHARDS)[:, None] & (column < WIDTH)[None, :]
        at = shard[:, None] * WIDTH + column[None, :]
        latent = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            mean_square = tl.sum(latent * latent, 1) / LATENT_DIM
            if HAS_SHARD_SCALE:
                mean_square *= tl.load(shard_scale + shard, mask=shard < SHARDS, other=0.0).to(tl.float32)
            weight = tl.load(norm_weight + at, mask=inside, other=0.0).to(tl.float32)
            latent = weight * latent * tl.rsqrt(mean_square + eps)[:, None]
        if PAIRS > 0:
            a = tl.load(row + LATENT_DIM + first, mask=is_pair, other=0.0).to(tl.float32)
            b = tl.load(row + LATENT_DIM + second, mask=is_pair, other=0.0).to(tl.float32)
            a, b = a * c - b * s, b * c + a * s
        if IS_FP8:
            top = tl.max(tl.max(tl.abs(latent), 1), 0)
            if PAIRS > 0:
                top = tl.maximum(top, tl.max(tl.maximum(tl.abs(a), tl.abs(b)), 0))
            factor = tl.where(top > 0, top / 448.0, 1.0)
            tl.store(latent_scale + block * latent_scale_stride_b + position, factor)
            latent = latent / factor
            if PAIRS > 0:
                a = a / factor
                b = b / factor
        tl.store(cache + at, latent.to(cache.dtype.element_ty), mask=inside)
        if PAIRS > 0:
            tl.store(cache + LATENT_DIM + first, a.to(cache.dtype.element_ty), mask=is_pair)
            tl.store(cache + LATENT_DIM + second, b.to(cache.dtype.element_ty), mask=is_pair)


def append(
    row: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    cache: torch.Tensor,
    lengths: torch.Tensor,
    eps: float,
    interleaved: bool,
    block_table: torch.Tensor | None,
    counts: torch.Tensor | None,
    shard_scale: torch.Tensor | None,
    latent_scale: torch.Tensor | None,
    query_rope: torch.Tensor | None,
) -> None:
    """Changes `cache`, `latent_scale` and `query_rope` as `append_latent` says, whose checked arguments these are."""
    batch, tokens, width = row.shape
    if batch * tokens == 0:
        return
    pairs = 0 if cos is None else cos.shape[2]
    latent_dim = width - 2 * pairs
    shards = 1 if shard_scale is None else len(shard_scale)
    page_size = 0 if block_table is None else cache.shape[1]
    capacity = cache.shape[1] if block_table is None else page_size * block_table.shape[1]
    # A table of one batch entry serves all.
    strides = [
        step
        for table in (cos, sin)
        for step in (
            (0, 0, 0) if table is None else (table.stride(0) * (table.shape[0] > 1), *table.stride()[1:])
        )
    ]
    heads = 0 if query_rope is None else query_rope.shape[1]
    _append_kernel[batch * tokens, 1 + triton.cdiv(heads, _HEADS)](
        row, cos, sin, norm_weight, cache, lengths, block_table, counts, shard_scale, latent_scale, query_rope,
        eps, tokens, capacity,
        row.stride(0), row.stride(1), *strides, cache.stride(0), cache.stride(1),
        0 if block_table is None else block_table.stride(0),
        0 if latent_scale is None else latent_scale.stride(0),
        *((0, 0, 0) if query_rope is None else query_rope.stride()[:3]),
        LATENT_DIM=latent_dim, PAIRS=pairs, SHARDS=shards, SHARD_BLOCK=triton.next_power_of_2(shards),
        WIDTH_BLOCK=triton.next_power_of_2(latent_dim // shards),
        PAIR_BLOCK=triton.next_power_of_2(max(pairs, 1)), PAGE_SIZE=page_size, INTERLEAVED=interleaved,
        HAS_NORM=norm_weight is not None, HAS_COUNTS=counts is not None,
        HAS_SHARD_SCALE=shard_scale is not None, IS_FP8=latent_scale is not None,
        HEADS=heads, HEAD_BLOCK=_HEADS,
        # Measured on an H100 from 1 to 16384 tokens: two and four warps are slower at all of them.
        num_warps=1,
    )  # fmt: skip
