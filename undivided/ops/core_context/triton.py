"""Core context attention in Triton: one running softmax over two streams of keys, the single ones and the core tokens.

A program's work is the window, the same for all, and the core tokens, `group_size` times fewer than the tokens before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import (
    LOG2E,
    Tiling,
    block_width,
    forward_tiling,
    load_tile,
    precision,
    rows_contiguous,
    shared_memory,
    store_tile,
)

# Sizes that change from call to call and speed nothing up: a kernel is not compiled anew for each.
RUNTIME = (
    "num_queries",
    "num_keys",
    "before_queries",
    "before_keys",
    "group_size",
    "window",
    "heads",
)


@triton.jit
def _add_seen(
    accumulator, top, total, q, key, value, first, last, low, limit, num_keys, scale, bias, key_stride, value_stride,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds keys `first .. last - 1` to a running softmax in base 2; with MASKED of them `low .. limit - 1` of a row."""
    for start in tl.range(first, last, BLOCK_N):
        k = load_tile(key, start, key_stride, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            column = start + tl.arange(0, BLOCK_N)
            inside = (column[None, :] < limit[:, None]) & (column[None, :] >= low[:, None])
            scores = tl.where(inside, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale + bias)
        weights = tl.exp2(scores * scale - (new_top - bias)[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        v = load_tile(value, start, value_stride, num_keys, VALUE_DIM, BLOCK_N, BLOCK_V, MASKED)
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision=PRECISION)
    return accumulator, top, total


@triton.jit
def place(tiles, heads):
    """The batch, the head and the tile of a program: one head after the other.

    All heads at once would read the core tokens of all, which at 64K tokens do not stay in the L2 cache together.
    """
    pair = tl.program_id(0) // tiles
    return (pair // heads).to(tl.int64), pair % heads, tl.program_id(0) % tiles


@triton.jit
def spans(
    first_row, before_queries, before_keys, num_queries, group_size, window, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which keys a tile of queries reaches, and which of them all its queries see.

    Returns of each query the core tokens it sees and its first and last single key; of the tile the blocks of single
    keys `first .. low` that some queries do not see any more, `low .. high` that all see, `high .. last` that some do
    not see yet, and the core tokens that all queries and that some see.
    """
    rows = first_row + tl.arange(0, BLOCK_M)
    seen = before_queries + rows + 1
    cores = tl.maximum(seen - window, 0) // group_size
    least_seen = before_queries + first_row + 1
    most_seen = before_queries + tl.minimum(first_row + BLOCK_M, num_queries)
    all_cores = tl.maximum(least_seen - window, 0) // group_size
    some_cores = tl.maximum(most_seen - window, 0) // group_size
    first = all_cores * group_size - before_keys
    last = most_seen - before_keys
    low = first + tl.cdiv(some_cores * group_size - before_keys - first, BLOCK_N) * BLOCK_N
    high = low + tl.maximum(least_seen - before_keys - low, 0) // BLOCK_N * BLOCK_N
    # A narrow window: no key is seen by all, and the blocks before `low` reach beyond the last one.
    low = tl.minimum(low, last)
    high = tl.minimum(high, last)
    return (
        cores,
        cores * group_size - before_keys,
        seen - before_keys,
        first,
        low,
        high,
        last,
        all_cores,
        some_cores,
    )


# One program: BLOCK_M queries of one head against all they see. In registers: the float32 accumulator
# [BLOCK_M, value_dim], a maximum and a sum a row, and the scores of one block of keys. It moves its queries and its
# output, and, mostly from the L2 cache, `window + group_size + BLOCK_M` keys and values and the core tokens before.
@triton.jit(do_not_specialize=RUNTIME)
def _forward_kernel(
    query, key, value, core_key, core_value, out, lse,
    scale, bias, num_queries, num_keys, before_queries, before_keys, group_size, window, heads,
    key_group, core_group,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, core_key_stride_b, core_key_stride_h, core_key_stride_m,
    core_value_stride_b, core_value_stride_h, core_value_stride_m,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(num_queries, BLOCK_M)
    batch, head, tile = place(tiles, heads)
    # The longest rows first: what runs last is short.
    first_row = (tiles - 1 - tile) * BLOCK_M
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + (head // key_group) * key_stride_h
    value += batch * value_stride_b + (head // key_group) * value_stride_h
    core_key += batch * core_key_stride_b + (head // core_group) * core_key_stride_h
    core_value += batch * core_value_stride_b + (head // core_group) * core_value_stride_h
    q = load_tile(query, first_row, query_stride_n, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    cores, start, limit, first, low, high, last, all_cores, some_cores = spans(
        first_row, before_queries, before_keys, num_queries, group_size, window, BLOCK_M, BLOCK_N
    )

    # Finite, so that differences of maxima are never NaN; the exponential of -inf minus it is 0.
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    accumulator, top, total = _add_seen(
        accumulator, top, total, q, key, value, first, low, start, limit, num_keys, scale, 0.0, key_stride_m,
        value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    accumulator, top, total = _add_seen(
        accumulator, top, total, q, key, value, low, high, start, limit, num_keys, scale, 0.0, key_stride_m,
        value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    accumulator, top, total = _add_seen(
        accumulator, top, total, q, key, value, high, last, start, limit, num_keys, scale, 0.0, key_stride_m,
        value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    common = all_cores // BLOCK_N * BLOCK_N
    accumulator, top, total = _add_seen(
        accumulator, top, total, q, core_key, core_value, 0, common, start, cores, common, scale, bias,
        core_key_stride_m, core_value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    accumulator, top, total = _add_seen(
        accumulator, top, total, q, core_key, core_value, common, some_cores, tl.zeros_like(cores), cores, some_cores,
        scale, bias, core_key_stride_m, core_value_stride_m, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, True,
        PRECISION,
    )  # fmt: skip

    rows = first_row + tl.arange(0, BLOCK_M)
    # Every query sees itself; rows behind the last query may see nothing.
    total = tl.where(total > 0, total, 1.0)
    accumulator *= (1.0 / total)[:, None]
    tl.store(lse + (batch * heads + head) * num_queries + rows, top + tl.log2(total), mask=rows < num_queries)
    # [batch, queries, heads, value_dim] in memory: what follows reads the heads of a token side by side.
    columns = tl.arange(0, BLOCK_V)
    offset = ((batch * num_queries + rows) * heads + head)[:, None] * VALUE_DIM + columns[None, :]
    inside = (rows < num_queries)[:, None] & (columns < VALUE_DIM)[None, :]
    tl.store(out + offset, accumulator.to(out.dtype.element_ty), mask=inside)


# Measured on an H100 at head_dim 128 and 32768 tokens: 3.10 ms, against 3.55 for 128 x 128 keys with 8 warps. Two such
# programs share a multiprocessor, and one multiplies while the other takes its softmax.
_PAIRED = Tiling(64, 64, 4, 3)


def _tiling(head_dim: int, value_dim: int, element_size: int, shared_memory: int) -> Tiling:
    """Returns how the forward is cut: in pairs of programs where two fit, else as other forwards are."""
    elements = _PAIRED.rows * head_dim + _PAIRED.num_stages * _PAIRED.keys * (head_dim + value_dim)
    if element_size == 2 and 2 * elements * element_size <= shared_memory:
        return _PAIRED
    return forward_tiling(head_dim, value_dim, element_size, shared_memory)


def constants(query, value) -> dict[str, object]:
    """What all kernels are compiled for."""
    return {
        "HEAD_DIM": query.shape[3],
        "VALUE_DIM": value.shape[3],
        "BLOCK_D": block_width(query.shape[3]),
        "BLOCK_V": block_width(value.shape[3]),
        "PRECISION": precision(query),
    }


def sizes(query, key, core_key, num_tokens, group_size, window) -> tuple[int, ...]:
    """The runtime sizes of all kernels, from `num_queries` to `core_group`."""
    heads, num_queries, num_keys = query.shape[1], query.shape[2], key.shape[2]
    return (
        num_queries, num_keys, num_tokens - num_queries, num_tokens - num_keys, group_size, window,
        heads, heads // key.shape[1], heads // core_key.shape[1],
    )  # fmt: skip


def forward(query, key, value, core_key, core_value, num_tokens, group_size, window, scale, core_logit_bias):
    """Returns the output and the log-sum-exp in base 2."""
    batch, heads, num_queries, head_dim = query.shape
    value_dim = value.shape[3]
    query, key, value, core_key, core_value = map(rows_contiguous, (query, key, value, core_key, core_value))
    out = query.new_empty((batch, num_queries, heads, value_dim)).transpose(1, 2)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    tiling = _tiling(
        block_width(head_dim), block_width(value_dim), query.element_size(), shared_memory(query.device)
    )
    if out.numel():
        _forward_kernel[(batch * heads * triton.cdiv(num_queries, tiling.rows),)](
            query, key, value, core_key, core_value, out, lse,
            scale * LOG2E, core_logit_bias * LOG2E, *sizes(query, key, core_key, num_tokens, group_size, window),
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *core_key.stride()[:3],
            *core_value.stride()[:3], BLOCK_M=tiling.rows, BLOCK_N=tiling.keys, num_warps=tiling.num_warps,
            num_stages=tiling.num_stages, **constants(query, value),
        )  # fmt: skip
    return out, lse


# One program: ROWS groups of one head. In registers: their keys, then their values, and the weights. It reads keys and
# values once (those of a shared key head again for each core head, from the L2 cache) and writes a g-th of them.
@triton.jit(do_not_specialize=("num_groups", "core_heads"))
def _pool_kernel(
    query, key, value, core_key, core_value, scale, num_groups, group_size, core_heads, copies,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % core_heads
    batch = (tl.program_id(0) // core_heads).to(tl.int64)
    first = tl.program_id(1) * ROWS
    q = load_tile(
        query + batch * query_stride_b + head * query_stride_h, first, query_stride_n, num_groups, HEAD_DIM, ROWS,
        BLOCK_D, True,
    ).to(tl.float32)  # fmt: skip
    key_head = head // copies
    k = load_groups(
        key + batch * key_stride_b + key_head * key_stride_h, first, group_size, key_stride_m, num_groups,
        HEAD_DIM, ROWS, MEMBERS, BLOCK_D,
    )  # fmt: skip
    weights = member_weights(q, k, scale, group_size, MEMBERS)
    row = batch * core_heads + head
    store_tile(core_key, tl.sum(weights[:, :, None] * k, 1), row, first, num_groups, HEAD_DIM, ROWS, BLOCK_D)
    v = load_groups(
        value + batch * value_stride_b + key_head * value_stride_h, first, group_size, value_stride_m, num_groups,
        VALUE_DIM, ROWS, MEMBERS, BLOCK_V,
    )  # fmt: skip
    store_tile(
        core_value, tl.sum(weights[:, :, None] * v, 1), row, first, num_groups, VALUE_DIM, ROWS, BLOCK_V
    )


@triton.jit
def load_groups(
    base, first, group_size, stride, num_groups, WIDTH: tl.constexpr, ROWS: tl.constexpr, MEMBERS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The rows of groups `first .. first + ROWS - 1`, float32 `[ROWS, MEMBERS, COLUMNS]`; zero where there are none."""
    group = tl.arange(0, ROWS)
    member = tl.arange(0, MEMBERS)
    column = tl.arange(0, COLUMNS)
    # int64: a token's stride times a million tokens passes 2**31. Within a tile it does not.
    base += tl.cast(first, tl.int64) * group_size * stride
    row = group[:, None] * group_size + member[None, :]
    inside = ((first + group < num_groups)[:, None] & (member < group_size)[None, :])[:, :, None]
    return tl.load(
        base + row[:, :, None] * stride + column[None, None, :],
        mask=inside & (column < WIDTH)[None, None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def member_weights(q, k, scale, group_size, MEMBERS: tl.constexpr):
    """The softmax over the members of each group, `[ROWS, MEMBERS]`."""
    logits = tl.sum(q[:, None, :] * k, 2) * scale
    logits = tl.where((tl.arange(0, MEMBERS) < group_size)[None, :], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


def pool_tile(group_size: int, head_dim: int, value_dim: int, elements: int) -> dict[str, int]:
    """Returns how many groups a program pools, padded to a power of two, so that a tile has about `elements`."""
    members = triton.next_power_of_2(group_size)
    width = members * max(block_width(head_dim), block_width(value_dim))
    rows = max(elements // width, 1)
    return {"ROWS": rows, "MEMBERS": members, "num_warps": min(max(rows * width // 2048, 1), 8)}


def pool(query, key, value, group_size, scale):
    """Returns the core keys and values of the groups whose last queries are given."""
    batch, core_heads, num_groups, head_dim = query.shape
    value_dim = value.shape[3]
    query, key, value = map(rows_contiguous, (query, key, value))
    core_key, core_value = (
        query.new_empty((batch, core_heads, num_groups, width)) for width in (head_dim, value_dim)
    )
    if core_key.numel():
        # Measured on an H100 at head_dim 128, groups of 16: a group a program takes 0.51 ms, four 0.73.
        tile = pool_tile(group_size, head_dim, value_dim, 2048)
        _pool_kernel[batch * core_heads, triton.cdiv(num_groups, tile["ROWS"])](
            query, key, value, core_key, core_value, scale, num_groups, group_size, core_heads,
            core_heads // key.shape[1], *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim), BLOCK_V=block_width(value_dim),
            **tile,
        )  # fmt: skip
    return core_key, core_value
