"""Latent attention as split-key decode kernels in Triton, for every CUDA device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from undivided.ops.latent_decode._splits import allocate, choose_splits, merge_splits, multiprocessors

_LOG2E = 1.4426950408889634
# Sizes that change from call to call: one compiled kernel serves them all.
_RUNTIME = [
    "num_keys", "num_queries", "heads_per_latent", "latent_heads", "num_splits", "num_rows", "table_stride_b",
    "row_scale_stride_b",
]  # fmt: skip


# Bytes of float8_e4m3fn as bfloat16: the exponent and the mantissa move into place, and 2**120 makes up for the
# difference of the exponents' biases (of subnormal numbers too). Five instructions a pair; with the compiler's
# own conversion the kernel took 2 to 24 % longer on an H100. A NaN of float8 becomes 480.
@triton.jit
def _as_bfloat16(block):
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 low, high, number, two_to_120, zero;
        mov.b32 two_to_120, 0x7b807b80;
        mov.b32 zero, 0x80008000;
        prmt.b32 low, $2, 0, 0x1404;
        prmt.b32 high, $2, 0, 0x3424;
        shr.b32 number, low, 4;
        and.b32 number, number, 0x07f007f0;
        lop3.b32 low, low, 0x80008000, number, 0xea;
        fma.rn.bf16x2 $0, low, two_to_120, zero;
        shr.b32 number, high, 4;
        and.b32 number, number, 0x07f007f0;
        lop3.b32 high, high, 0x80008000, number, 0xea;
        fma.rn.bf16x2 $1, high, two_to_120, zero;
        }
        """,
        "=r,=r,r",
        [block.to(tl.uint8, bitcast=True)],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _widened(block, like, BITS: tl.constexpr):
    if BITS:
        return _as_bfloat16(block)
    else:
        return block.to(like.dtype)


# One program: BLOCK_ROWS rows (the queries and heads that share a latent head; row = head * queries + query)
# against one part of the keys of one sequence. In registers: the accumulator [BLOCK_ROWS, latent_dim] in
# float32, running maximum and sum of each row, and the scores of one block of keys. The query stays in shared
# memory, where the loads of the next blocks of keys land too. It must move `keys * (latent_dim + rope_dim)`
# elements of cache, once: a block is loaded once and serves as key and as value. Row tiles of one sequence
# are neighbours in the grid and run at the same time, so a second tile finds its keys in the L2 cache.
@triton.jit(do_not_specialize=_RUNTIME)
def _attend_kernel(
    query_latent, query_rope, latent, rope_key, cache_seqlens, block_table, row_scale, out, lse,
    scale, softcap, num_keys, num_queries, heads_per_latent, latent_heads, num_splits, num_rows,
    query_latent_stride_b, query_latent_stride_h, query_latent_stride_n,
    query_rope_stride_b, query_rope_stride_h, query_rope_stride_n,
    latent_stride_b, latent_stride_h, latent_stride_m,
    rope_stride_b, rope_stride_m,
    table_stride_b, row_scale_stride_b,
    LATENT_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, LATENT_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, PAGE_SIZE: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_FINAL: tl.constexpr,
    PRECISION: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    batch = (tl.program_id(2) // latent_heads).to(tl.int64)
    latent_head = tl.program_id(2) % latent_heads

    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_inside = rows < heads_per_latent * num_queries
    head = latent_head * heads_per_latent + rows // num_queries
    query = rows % num_queries
    columns = tl.arange(0, LATENT_BLOCK)
    column_inside = columns < LATENT_DIM
    q_offset = batch * query_latent_stride_b + head * query_latent_stride_h + query * query_latent_stride_n
    q = tl.load(
        query_latent + q_offset[:, None] + columns[None, :],
        mask=row_inside[:, None] & column_inside[None, :],
        other=0.0,
    )
    if ROPE_DIM > 0:
        rope_columns = tl.arange(0, ROPE_BLOCK)
        rope_inside = rope_columns < ROPE_DIM
        q_offset = batch * query_rope_stride_b + head * query_rope_stride_h + query * query_rope_stride_n
        q_rope = tl.load(
            query_rope + q_offset[:, None] + rope_columns[None, :],
            mask=row_inside[:, None] & rope_inside[None, :],
            other=0.0,
        )

    length = num_keys
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(cache_seqlens + batch), num_keys)
    blocks = tl.cdiv(length, BLOCK_KEYS)
    # Parts differ by at most one block, and depend on this sequence and num_splits alone: batch invariance.
    first = (split * blocks // num_splits) * BLOCK_KEYS
    last = tl.minimum(((split + 1) * blocks // num_splits) * BLOCK_KEYS, length)
    # Query n of N sees the keys before this limit.
    limit = length + tl.zeros_like(query)
    if IS_CAUSAL:
        limit = limit - num_queries + 1 + query

    key = tl.arange(0, BLOCK_KEYS)
    latent += latent_head * latent_stride_h
    if PAGE_SIZE > 0:
        block_table += batch * table_stride_b
        # The page of a block is fetched one block ahead: its load must not stand before the loads of the
        # block. A block within one page needs one number, others one for each key.
        at = first if PAGE_SIZE % BLOCK_KEYS == 0 else first + key
        page = tl.load(block_table + at // PAGE_SIZE, mask=at < last, other=0)

    # Finite, so that differences of maxima are never NaN; the exponential of -inf minus it is 0.
    top = tl.full([BLOCK_ROWS], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    accumulator = tl.zeros([BLOCK_ROWS, LATENT_BLOCK], tl.float32)
    for start in range(first, last, BLOCK_KEYS):
        inside = start + key < last
        if PAGE_SIZE > 0:
            ahead = start + BLOCK_KEYS if PAGE_SIZE % BLOCK_KEYS == 0 else start + BLOCK_KEYS + key
            next_page = tl.load(block_table + ahead // PAGE_SIZE, mask=ahead < last, other=0)
            # int64: page * stride passes 2**31 with a few million rows.
            memory_block = page.to(tl.int64)
            position = (start + key) % PAGE_SIZE
        else:
            next_page = 0
            memory_block = batch
            position = (start + key).to(tl.int64)

        row_offset = memory_block * latent_stride_b + position * latent_stride_m
        block = tl.load(
            latent + row_offset[:, None] + columns[None, :],
            mask=inside[:, None] & column_inside[None, :],
            other=0.0,
        )
        block = _widened(block, q, BITS)
        scores = tl.dot(q, tl.trans(block), input_precision=PRECISION)
        if ROPE_DIM > 0:
            row_offset = memory_block * rope_stride_b + position * rope_stride_m
            rope_block = tl.load(
                rope_key + row_offset[:, None] + rope_columns[None, :],
                mask=inside[:, None] & rope_inside[None, :],
                other=0.0,
            )
            rope_block = _widened(rope_block, q, BITS)
            scores = tl.dot(q_rope, tl.trans(rope_block), scores, input_precision=PRECISION)
        if HAS_ROW_SCALE:
            factor = tl.load(row_scale + memory_block * row_scale_stride_b + position, mask=inside, other=0.0)
            scores *= factor[None, :]
        scores *= scale
        if HAS_SOFTCAP:
            # tanh, by an exponential that cannot overflow to inf / inf.
            scores = softcap * (1 - 2 / (tl.exp2(scores) + 1))
        scores = tl.where((start + key)[None, :] < tl.minimum(limit, last)[:, None], scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        if HAS_ROW_SCALE:
            weights *= factor[None, :]
        accumulator = tl.dot(
            weights.to(block.dtype), block, accumulator * decay[:, None], input_precision=PRECISION
        )
        if PAGE_SIZE > 0:
            page = next_page

    accumulator *= tl.where(total > 0, 1 / tl.where(total > 0, total, 1), 0)[:, None]
    log = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1)), float("-inf"))
    if IS_FINAL:
        log *= 0.6931471805599453
    out_row = (
        split.to(tl.int64) * num_rows + (batch * latent_heads * heads_per_latent + head) * num_queries + query
    )
    tl.store(
        out + out_row[:, None] * LATENT_DIM + columns[None, :],
        accumulator.to(out.dtype.element_ty),
        mask=row_inside[:, None] & column_inside[None, :],
    )
    tl.store(lse + out_row, log, mask=row_inside)


@dataclass(frozen=True)
class Tiling:
    """How the kernel is cut: rows and keys of a tile, warps of a program, blocks of keys in flight."""

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int


# Measured on an H100 (the first of each number of rows), then smaller ones for devices with less shared
# memory.
_TILINGS = {
    512: (
        Tiling(64, 64, 8, 2),
        Tiling(64, 32, 8, 2),
        Tiling(32, 64, 8, 3),
        Tiling(32, 32, 8, 3),
        Tiling(32, 32, 8, 2),
        Tiling(16, 64, 4, 3),
        Tiling(16, 32, 4, 3),
        Tiling(16, 32, 4, 2),
    ),
    256: (
        Tiling(128, 64, 8, 3),
        Tiling(128, 32, 8, 2),
        Tiling(64, 64, 4, 3),
        Tiling(64, 32, 4, 2),
        Tiling(32, 64, 4, 4),
        Tiling(32, 32, 4, 3),
        Tiling(16, 64, 4, 3),
        Tiling(16, 32, 4, 3),
    ),
}


@functools.cache
def choose_tiling(rows: int, width: int, cache_bytes: int, shared_memory: int, has_wgmma: bool) -> Tiling:
    """Returns the tiling for `rows` queries x heads that share a latent head.

    Args:
        rows: query heads of a latent head x queries.
        width: elements of a padded cache row.
        cache_bytes: bytes of an element of the cache; those of the query are 2.
        shared_memory: bytes a program may use.
        has_wgmma: whether products of 64 rows and more take their operands from shared memory (Hopper), so
            that the block in use is kept beside those in flight.
    """
    candidates = _TILINGS[512 if width > 512 else 256]
    fitting = [t for t in candidates if _shared_memory(t, width, cache_bytes, has_wgmma) <= shared_memory]
    fitting = fitting or [candidates[-1]]
    enough = [t for t in fitting if t.block_rows >= rows]
    least = min((t.block_rows for t in enough), default=fitting[0].block_rows)
    return next(t for t in fitting if t.block_rows == least)


def _shared_memory(tiling: Tiling, width: int, cache_bytes: int, has_wgmma: bool) -> int:
    kept = tiling.num_stages if has_wgmma and tiling.block_rows >= 64 else tiling.num_stages - 1
    # An fp8 block is widened before it is multiplied.
    widened = 2 * tiling.block_keys * width if cache_bytes == 1 else 0
    query = 2 * tiling.block_rows * (width + tiling.block_keys)
    return kept * tiling.block_keys * width * cache_bytes + widened + query


@functools.cache
def _limits(device: torch.device) -> tuple[int, bool]:
    if device.type != "cuda":
        return 227 * 1024, True
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin, properties.major == 9


def latent_attention_forward(
    query_latent: torch.Tensor,
    query_rope: torch.Tensor | None,
    latent: torch.Tensor,
    rope_key: torch.Tensor | None,
    scale: float,
    cache_seqlens: torch.Tensor | None,
    block_table: torch.Tensor | None,
    latent_scale: torch.Tensor | None,
    softcap: float | None,
    is_causal: bool,
    num_splits: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `out` and `lse` of `latent_attention`, whose checked arguments these are."""
    if query_latent.stride(3) != 1:
        query_latent = query_latent.contiguous()
    if query_rope is not None and query_rope.stride(3) != 1:
        query_rope = query_rope.contiguous()
    batch, heads, num_queries, latent_dim = query_latent.shape
    latent_heads = latent.shape[1]
    rope_dim = 0 if query_rope is None else query_rope.shape[3]
    page_size = 0 if block_table is None else latent.shape[2]
    num_keys = latent.shape[2] if block_table is None else block_table.shape[1] * page_size
    rows = heads // latent_heads * num_queries
    latent_block = triton.next_power_of_2(latent_dim)
    rope_block = max(16, triton.next_power_of_2(rope_dim))

    width = latent_block + (rope_block if rope_dim else 0)
    tiling = choose_tiling(rows, width, min(latent.element_size(), 2), *_limits(query_latent.device))
    row_tiles = triton.cdiv(rows, tiling.block_rows)
    if num_splits is None:
        tiles = row_tiles * batch * latent_heads
        num_splits = choose_splits(
            tiles, triton.cdiv(num_keys, tiling.block_keys), multiprocessors(query_latent.device)
        )
    out, lse, partial, partial_lse = allocate(query_latent, num_splits)
    if out.numel() == 0:
        return out, lse

    factor = scale * _LOG2E if softcap is None else 2 * scale / softcap * _LOG2E
    _attend_kernel[row_tiles, num_splits, batch * latent_heads](
        query_latent, query_rope, latent, rope_key, cache_seqlens, block_table, latent_scale,
        partial, partial_lse,
        factor, 0.0 if softcap is None else softcap * _LOG2E,
        num_keys, num_queries, heads // latent_heads, latent_heads, num_splits, batch * heads * num_queries,
        *query_latent.stride()[:3], *((0, 0, 0) if query_rope is None else query_rope.stride()[:3]),
        *latent.stride()[:3], *((0, 0) if rope_key is None else (rope_key.stride(0), rope_key.stride(2))),
        0 if block_table is None else block_table.stride(0),
        0 if latent_scale is None else latent_scale.stride(0),
        LATENT_DIM=latent_dim, ROPE_DIM=rope_dim, LATENT_BLOCK=latent_block, ROPE_BLOCK=rope_block,
        BLOCK_ROWS=tiling.block_rows, BLOCK_KEYS=tiling.block_keys, PAGE_SIZE=page_size,
        IS_CAUSAL=is_causal and num_queries > 1, HAS_LENGTHS=cache_seqlens is not None,
        HAS_ROW_SCALE=latent_scale is not None, HAS_SOFTCAP=softcap is not None, IS_FINAL=num_splits == 1,
        PRECISION="ieee" if query_latent.dtype == torch.float32 else "tf32",
        BITS=latent_scale is not None and query_latent.dtype == torch.bfloat16,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    if num_splits > 1:
        merge_splits(partial, partial_lse, out, lse)
    return out, lse
