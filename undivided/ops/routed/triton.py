"""Routed attention in Triton: a program takes a tile of the queries that chose its head, and no other.

Each (batch, head) has a list of its queries: those that chose the head, in order of position, and behind them the
others. Lists are built on the device and have a fixed size, so that the host never waits to learn how many there are.
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
    precision,
    rows_contiguous,
    shared_memory,
)

# Sizes that change from call to call and speed nothing up: a kernel is not compiled anew for each.
RUNTIME = ("num_queries", "num_keys", "heads")
# Every so many positions it is kept how many queries before it chose the head.
RANK_STEP = 16


# One program: the list of one head. It reads a byte and writes four a query, and four more every RANK_STEP queries.
@triton.jit(do_not_specialize=("num_queries", "heads"))
def _list_kernel(
    selected, index, count, rank, num_queries, heads, stride_b, stride_h, stride_n,
    BLOCK: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    selected += (row // heads) * stride_b + (row % heads) * stride_h
    index += row * num_queries
    rank += row * tl.cdiv(num_queries, RANK_STEP)
    found = 0
    for first in range(0, num_queries, BLOCK):
        position = first + tl.arange(0, BLOCK)
        inside = position < num_queries
        chosen = tl.load(selected + position.to(tl.int64) * stride_n, mask=inside, other=0).to(tl.int32)
        before = found + tl.cumsum(chosen, 0) - chosen
        tl.store(rank + position // RANK_STEP, before, mask=inside & (position % RANK_STEP == 0))
        # Those that did not choose the head fill the list from its end.
        place = tl.where(chosen > 0, before, num_queries - 1 - (position - before))
        tl.store(index + place, position, mask=inside)
        found += tl.sum(chosen, 0)
    tl.store(count + row, found)


# One program: BLOCK_M queries of one list against all keys they see. In registers: the float32 accumulator
# [BLOCK_M, value_dim], a maximum and a sum a row, and the scores of one block of keys. It does
# `2 * (head_dim + value_dim)` operations a pair; it moves its queries and its output, a row at a time, and, mostly from
# the L2 cache, the keys and values. A program whose queries did not choose the head writes their zeros.
@triton.jit(do_not_specialize=RUNTIME)
def _forward_kernel(
    query, key, value, gates, index, count, out, unscaled, lse,
    scale, num_queries, num_keys, heads, key_group,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, gates_stride_b, gates_stride_h, gates_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_GATES: tl.constexpr,
    WITH_UNSCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    list_base = (batch * heads + head) * num_queries
    chosen = tl.load(count + batch * heads + head)
    first_row = list_tile(chosen, BLOCK_M) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_inside = rows < num_queries
    position = tl.load(index + list_base + rows, mask=row_inside, other=0)
    columns = tl.arange(0, BLOCK_V)
    inside = row_inside[:, None] & (columns < VALUE_DIM)[None, :]
    # [batch, queries, heads, value_dim] in memory: what follows reads the heads of a token side by side.
    out_row = (batch * num_queries + position) * heads + head
    out_offset = out_row[:, None] * VALUE_DIM + columns[None, :]
    if first_row >= chosen:
        tl.store(out + out_offset, tl.zeros([BLOCK_M, BLOCK_V], out.dtype.element_ty), mask=inside)
        return

    is_chosen = rows < chosen
    query += batch * query_stride_b + head * query_stride_h
    q = gather(query, position, is_chosen, query_stride_n, HEAD_DIM, BLOCK_D, True)
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // key_group) * value_stride_h
    limit, common, last = visible(
        index + list_base, position, first_row, chosen, num_queries, num_keys, BLOCK_M, BLOCK_N, IS_CAUSAL
    )

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

    seen = (total > 0) & is_chosen
    total = tl.where(seen, total, 1.0)
    # In the order of the list. +inf for a row without keys: every weight recomputed with it is 0.
    tl.store(lse + list_base + rows, tl.where(seen, top + tl.log2(total), float("inf")), mask=is_chosen)
    accumulator *= tl.where(seen, 1.0 / total, 0.0)[:, None]
    if WITH_UNSCALED:
        tl.store(unscaled + out_offset, accumulator.to(unscaled.dtype.element_ty), mask=inside)
    if HAS_GATES:
        gates += batch * gates_stride_b + head * gates_stride_h
        gate = tl.load(gates + position.to(tl.int64) * gates_stride_n, mask=is_chosen, other=0.0)
        accumulator *= gate[:, None]
    tl.store(out + out_offset, accumulator.to(out.dtype.element_ty), mask=inside)


@triton.jit
def list_tile(chosen, BLOCK_M: tl.constexpr):
    """The tile of this program: those of queries that chose the head first, the longest rows before all others."""
    step = tl.program_id(1)
    working = tl.cdiv(chosen, BLOCK_M)
    return tl.where(step < working, working - 1 - step, step)


@triton.jit
def visible(
    index, position, first_row, chosen, num_queries, num_keys,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """A row sees the keys before its limit; all rows of a tile see those before the second, none from the third on."""
    limit = num_keys + tl.zeros_like(position)
    common = num_keys
    last = num_keys
    if IS_CAUSAL:
        beyond = num_keys - num_queries + 1
        limit = position + beyond
        common = tl.maximum(tl.load(index + first_row) + beyond, 0)
        last = tl.maximum(tl.load(index + tl.minimum(first_row + BLOCK_M, chosen) - 1) + beyond, 0)
    return limit, common // BLOCK_N * BLOCK_N, last


@triton.jit
def gather(base, position, present, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """Rows at the given positions; with MASKED those that are not present are zero, without it all are read."""
    column = tl.arange(0, COLUMNS)
    # int64: a token's stride times a million tokens passes 2**31.
    pointers = base + position.to(tl.int64)[:, None] * stride + column[None, :]
    if MASKED:
        rows = tl.load(pointers, mask=present[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif WIDTH < COLUMNS:
        rows = tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        rows = tl.load(pointers)
    return rows


def build_lists(selected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns for every (batch, head) its list of queries, how many chose the head, and how many did so before.

    Args:
        selected: boolean `[batch, heads, queries]`.

    Returns:
        `index` `[batch, heads, queries]`, positions: first, in order, those that are selected; `count`
        `[batch, heads]`; `rank` `[batch, heads, ceil(queries / RANK_STEP)]`, selected ones before each RANK_STEP-th
        position. All int32.
    """
    batch, heads, num_queries = selected.shape
    index = selected.new_empty((batch, heads, num_queries), dtype=torch.int32)
    count = selected.new_empty((batch, heads), dtype=torch.int32)
    rank = selected.new_empty((batch, heads, triton.cdiv(num_queries, RANK_STEP)), dtype=torch.int32)
    _list_kernel[(batch * heads,)](
        selected, index, count, rank, num_queries, heads, *selected.stride(),
        BLOCK=min(1024, max(RANK_STEP, triton.next_power_of_2(num_queries))), RANK_STEP=RANK_STEP, num_warps=4,
    )  # fmt: skip
    return index, count, rank


def forward(query, key, value, selected, gates, is_causal, scale, *, with_unscaled=True, tiling=None):
    """Returns out, the output before the gates, base-2 log-sums in the order of the lists, and the lists."""
    batch, heads, num_queries, head_dim = query.shape
    key_heads, num_keys, value_dim = value.shape[1:]
    query, key, value = map(rows_contiguous, (query, key, value))
    with_unscaled = with_unscaled and gates is not None
    out, unscaled, lse = empty_outputs(query, value, with_unscaled)
    index, count, rank = build_lists(selected)
    widths = block_width(head_dim), block_width(value_dim)
    if tiling is None:
        tiling = forward_tiling(*widths, query.element_size(), shared_memory(query.device))
    _forward_kernel[batch * heads, triton.cdiv(num_queries, tiling.rows)](
        query, key, value, gates, index, count, out, unscaled, lse,
        scale * LOG2E, num_queries, num_keys, heads, heads // key_heads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *gate_strides(gates),
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=widths[0], BLOCK_V=widths[1],
        BLOCK_M=tiling.rows, BLOCK_N=tiling.keys, IS_CAUSAL=is_causal, HAS_GATES=gates is not None,
        WITH_UNSCALED=with_unscaled, PRECISION=precision(query),
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return out, unscaled, lse, index, count, rank


def empty_outputs(query, value, with_unscaled):
    """Returns the tensors that `forward` fills: out, the output before the gates, and log-sums."""
    batch, heads, num_queries, _ = query.shape
    by_token = (batch, num_queries, heads, value.shape[3])
    return (
        query.new_empty(by_token).transpose(1, 2),
        query.new_empty(by_token if with_unscaled else (0, 0, 0, value.shape[3])).transpose(1, 2),
        query.new_empty((batch, heads, num_queries), dtype=torch.float32),
    )


def gate_strides(gates: torch.Tensor | None) -> tuple[int, ...]:
    """The strides of the gates, zeros without them."""
    return (0, 0, 0) if gates is None else gates.stride()
