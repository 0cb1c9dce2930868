"""The backward of dynamic mask attention in Triton: one pass for the queries, one for keys, values and their bias.

With `p = exp(s - lse)` recomputed and `delta = dout . out`: `ds = p (dout . v - delta)`, `dq = scale ds k`,
`dk = scale ds^T q`, `dv = p^T dout`, and the bias of a key gets the sum of `ds` over the queries and heads that attend
it. For the second pass the keys are sorted so that those of one program are attended by nearly the same
run of queries. Nothing is added atomically, so that a gradient has the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import (
    LOG2E,
    Tiling,
    block_width,
    first_fitting,
    load_tile,
    precision,
    rows_contiguous,
    shared_memory,
)
from undivided.ops.dynamic_mask.triton import attended, gather_tile, listed, shared, tile_size


# One program: BLOCK_M queries of one head, of a tile of TILE, against the list and the own keys of that tile. In
# registers: the float32 gradient of the queries, the scores and their gradient of one block of keys.
@triton.jit(do_not_specialize=("num_queries", "num_keys", "keep", "num_tiles"))
def _query_kernel(
    query, key, value, bias, kept, death, dout, out, lse, delta, dquery,
    scale, scale_log2, log2e, num_queries, num_keys, keep, num_tiles, heads, group,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, dout_stride_b, dout_stride_h, dout_stride_n,
    out_stride_b, out_stride_h, out_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    first = tl.program_id(1) * BLOCK_M
    tile = first // TILE
    rows = first + tl.arange(0, BLOCK_M)
    row_inside = rows < num_queries
    key_head = batch * (heads // group) + head // group
    # The first key of the tile's own.
    prefix = tile * TILE + num_keys - num_queries
    size = tl.minimum(keep, prefix)

    query += batch * query_stride_b + head * query_stride_h
    dout += batch * dout_stride_b + head * dout_stride_h
    out += batch * out_stride_b + head * out_stride_h
    key += batch * key_stride_b + (head // group) * key_stride_h
    value += batch * value_stride_b + (head // group) * value_stride_h
    bias += key_head * num_keys
    death += key_head * num_keys
    kept += (key_head * num_tiles + tile) * keep
    q = load_tile(query, first, query_stride_n, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    gradient = load_tile(dout, first, dout_stride_n, num_queries, VALUE_DIM, BLOCK_M, BLOCK_V, True)
    result = load_tile(out, first, out_stride_n, num_queries, VALUE_DIM, BLOCK_M, BLOCK_V, True)
    row_delta = tl.sum(gradient.to(tl.float32) * result.to(tl.float32), 1)
    row = (batch * heads + head) * num_queries + rows
    tl.store(delta + row, row_delta, mask=row_inside)
    log_sum = tl.load(lse + row, mask=row_inside, other=float("inf"))

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    common = shared(size, TILE, BLOCK_N)
    end = tl.minimum(first + BLOCK_M, num_queries) - tile * TILE
    for start in tl.range(common, size + end, BLOCK_N):
        index, inside, seen = attended(kept, death, start, size, prefix, rows, num_keys, num_queries, BLOCK_N)
        k = gather_tile(key, index, inside, key_stride_m, HEAD_DIM, BLOCK_D, True)
        v = gather_tile(value, index, inside, value_stride_m, VALUE_DIM, BLOCK_V, True)
        b = tl.load(bias + index, mask=inside, other=0.0) * log2e
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + b[None, :]
        weights = tl.where(seen, tl.exp2(scores - log_sum[:, None]), 0.0)
        dweights = tl.dot(gradient, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - row_delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    following = listed(kept, 0, common, BLOCK_N)
    for start in tl.range(0, common, BLOCK_N):
        # As in the forward, a round ahead.
        index = following
        following = listed(kept, start + BLOCK_N, common, BLOCK_N)
        k = gather_tile(key, index, index >= 0, key_stride_m, HEAD_DIM, BLOCK_D, False)
        v = gather_tile(value, index, index >= 0, value_stride_m, VALUE_DIM, BLOCK_V, False)
        b = tl.load(bias + index) * log2e
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + b[None, :]
        weights = tl.exp2(scores - log_sum[:, None])
        dweights = tl.dot(gradient, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - row_delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    column = tl.arange(0, BLOCK_D)
    tl.store(
        dquery + row[:, None] * HEAD_DIM + column[None, :],
        (dq * scale).to(dquery.dtype.element_ty),
        mask=row_inside[:, None] & (column < HEAD_DIM)[None, :],
    )


# One program: BLOCK_N keys of one key head, in the order of `order`, against all queries of its heads from the first
# that attends one of them to the last. In registers: the float32 gradients of keys and values. The first `num_long`
# blocks, whose keys are attended longest, are shared by PARTS programs, which write sums of their own: one alone would
# run on when all others are done.
@triton.jit(do_not_specialize=("num_queries", "num_keys", "num_long"))
def _key_kernel(
    query, key, value, bias, order, death, dout, lse, delta, dkey, dvalue, dbias, part_key, part_value, part_bias,
    scale, scale_log2, log2e, num_queries, num_keys, num_long, heads, group,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m, dout_stride_b, dout_stride_h, dout_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key_heads = heads // group
    local_head = tl.program_id(0) % key_heads
    batch = (tl.program_id(0) // key_heads).to(tl.int64)
    key_head = batch * key_heads + local_head
    # The keys that are lost last come first, among them those attended longest: what runs last is short.
    is_part = tl.program_id(1) < num_long * PARTS
    part = tl.where(is_part, tl.program_id(1) % PARTS, 0)
    block = tl.where(is_part, tl.program_id(1) // PARTS, tl.program_id(1) - num_long * (PARTS - 1))
    place = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < num_keys
    index = tl.load(order + key_head * num_keys + place, mask=inside, other=0)
    born = index - (num_keys - num_queries)
    lost_to = tl.load(death + key_head * num_keys + index, mask=inside, other=0)
    is_kept = inside & (lost_to > born)
    lost_to = tl.where(is_kept, lost_to, 0)
    first = tl.maximum(tl.min(tl.where(is_kept, born, num_queries), 0), 0) // BLOCK_M * BLOCK_M
    last = tl.max(lost_to, 0)
    if is_part:
        rounds = tl.maximum(tl.cdiv(last - first, BLOCK_M), 0)
        last = tl.minimum(first + rounds * (part + 1) // PARTS * BLOCK_M, last)
        first += rounds * part // PARTS * BLOCK_M

    key += batch * key_stride_b + local_head * key_stride_h
    value += batch * value_stride_b + local_head * value_stride_h
    k = gather_tile(key, index, inside, key_stride_m, HEAD_DIM, BLOCK_D, True)
    v = gather_tile(value, index, inside, value_stride_m, VALUE_DIM, BLOCK_V, True)
    b = tl.load(bias + key_head * num_keys + index, mask=inside, other=0.0) * log2e
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    db = tl.zeros([BLOCK_N], tl.float32)
    for i in range(group):
        head = local_head * group + i
        head_query = query + batch * query_stride_b + head * query_stride_h
        head_dout = dout + batch * dout_stride_b + head * dout_stride_h
        row = (batch * heads + head) * num_queries
        for start in tl.range(first, last, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            row_inside = rows < num_queries
            q = load_tile(head_query, start, query_stride_n, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D, True)
            gradient = load_tile(
                head_dout, start, dout_stride_n, num_queries, VALUE_DIM, BLOCK_M, BLOCK_V, True
            )
            # Rows that do not exist get +inf, and so weights of zero.
            log_sum = tl.load(lse + row + rows, mask=row_inside, other=float("inf"))
            row_delta = tl.load(delta + row + rows, mask=row_inside, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 + b[:, None]
            weights = tl.exp2(scores - log_sum[None, :])
            seen = (born[:, None] <= rows[None, :]) & (rows[None, :] < lost_to[:, None])
            weights = tl.where(seen, weights, 0.0)
            dv = tl.dot(weights.to(gradient.dtype), gradient, dv, input_precision=PRECISION)
            dweights = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
            dscores = weights * (dweights - row_delta[None, :])
            db += tl.sum(dscores, 1)
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)

    dk *= scale
    if is_part:
        # PARTS x batch x key heads x the keys of the long blocks, in their order.
        rows = (part * tl.num_programs(0) + key_head) * num_long * BLOCK_N + place
        tl.store(part_bias + rows, db)
        store_rows(part_key, dk, rows, place >= 0, HEAD_DIM, BLOCK_D)
        store_rows(part_value, dv, rows, place >= 0, VALUE_DIM, BLOCK_V)
    else:
        rows = key_head * num_keys + index
        tl.store(dbias + rows, db, mask=inside)
        store_rows(dkey, dk, rows, inside, HEAD_DIM, BLOCK_D)
        store_rows(dvalue, dv, rows, inside, VALUE_DIM, BLOCK_V)


@triton.jit
def store_rows(base, tile, row, inside, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores a tile as the rows `row` that are `inside`."""
    column = tl.arange(0, COLUMNS)
    tl.store(
        base + row[:, None] * WIDTH + column[None, :],
        tile.to(base.dtype.element_ty),
        mask=inside[:, None] & (column < WIDTH)[None, :],
    )


# Programs that share a block of keys.
PARTS = 4
# Keys of nearly one death that are sorted by birth.
RUN = 256

_QUERY = (Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 1), Tiling(32, 16, 4, 1))
# Measured on an H100 at head_dim 128, where longer groups of keys would pass more queries that do not attend them.
_KEY = (Tiling(32, 64, 4, 2), Tiling(32, 32, 4, 2), Tiling(16, 16, 4, 1))
_QUERY_FLOAT32 = (Tiling(16, 32, 8, 1), Tiling(16, 16, 4, 1))
_KEY_FLOAT32 = (Tiling(16, 16, 8, 1),)


def query_tiling(head_dim: int, value_dim: int, element_size: int, shared_memory: int) -> Tiling:
    """Returns the tiling of the kernel for the gradient of the queries."""
    width = head_dim + value_dim
    return first_fitting(
        _QUERY if element_size == 2 else _QUERY_FLOAT32,
        lambda t: (t.rows + t.num_stages * t.keys) * width,
        shared_memory // element_size,
    )


def key_tiling(head_dim: int, value_dim: int, element_size: int, shared_memory: int) -> Tiling:
    """Returns the tiling of the kernel for the gradients of keys, values and bias."""
    width = head_dim + value_dim
    # The gradients of 64 keys of 256 channels do not fit the registers of four warps.
    candidates = _KEY if width <= 256 else _KEY[1:]
    return first_fitting(
        candidates if element_size == 2 else _KEY_FLOAT32,
        lambda t: (t.keys + t.num_stages * t.rows) * width,
        shared_memory // element_size,
    )


def lifetime_order(death: torch.Tensor, num_queries: int) -> torch.Tensor:
    """Returns the keys, int32, so that neighbours are attended by nearly the same queries; those of none come last.

    They are sorted by their deaths, the last first, and runs of `RUN` keys of nearly one death by their births. Groups
    of 64 then pass 1.2 to 1.5 times the queries that attend a key; sorted by death alone it were 1.2 to 2.5 times.

    Args:
        death: `[batch, heads, keys]`, the first query that each key is lost to.
        num_queries: the last positions of the keys.
    """
    num_keys = death.shape[-1]
    position = torch.arange(num_keys, device=death.device)
    is_kept = death > position - (num_keys - num_queries)
    order = death.masked_fill(~is_kept, -1).argsort(dim=-1, descending=True, stable=True)
    runs = position // RUN * num_keys + order
    return (runs.sort(dim=-1).values % num_keys).to(torch.int32)


def backward(dout, out, lse, query, key, value, key_bias, kept, death, scale):
    """Returns the gradients of query, key, value and key_bias."""
    dout, query, key, value = map(rows_contiguous, (dout, query, key, value))
    batch, heads, num_queries, head_dim = query.shape
    key_heads, num_keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    inputs = (query, key, value, key_bias)
    if query.numel() == 0:
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    dquery, dkey, dvalue, dbias = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    delta = torch.empty_like(lse)
    sizes = block_width(head_dim), block_width(value_dim), query.element_size(), shared_memory(query.device)
    constants = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": block_width(head_dim),
        "BLOCK_V": block_width(value_dim),
        "PRECISION": precision(query),
    }
    tiling = query_tiling(*sizes)
    tile = tile_size(query.element_size())
    _query_kernel[batch * heads, triton.cdiv(num_queries, tiling.rows)](
        query, key, value, key_bias, kept, death, dout, out, lse, delta, dquery,
        scale, scale * LOG2E, LOG2E, num_queries, num_keys, kept.shape[3], kept.shape[2], heads, heads // key_heads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *dout.stride()[:3], *out.stride()[:3],
        TILE=tile, BLOCK_M=tiling.rows, BLOCK_N=tiling.keys, num_warps=tiling.num_warps,
        num_stages=tiling.num_stages, **constants,
    )  # fmt: skip
    tiling = key_tiling(*sizes)
    order = lifetime_order(death, num_queries)
    blocks = triton.cdiv(num_keys, tiling.keys)
    # The keys that are left at the end, and as many that were lost before; of ranks that do not depend on time the last
    # of them are attended for a third of the text.
    num_long = (
        min(triton.cdiv(2 * kept.shape[3], tiling.keys), blocks) if num_queries > 2 * kept.shape[3] else 0
    )
    parts = tuple(
        torch.empty(
            (PARTS, batch, key_heads, num_long * tiling.keys, *width), dtype=torch.float32, device=key.device
        )
        for width in ((head_dim,), (value_dim,), ())
    )
    _key_kernel[batch * key_heads, blocks + num_long * (PARTS - 1)](
        query, key, value, key_bias, order, death, dout, lse, delta, dkey, dvalue, dbias, *parts,
        scale, scale * LOG2E, LOG2E, num_queries, num_keys, num_long, heads, heads // key_heads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *dout.stride()[:3],
        BLOCK_M=tiling.rows, BLOCK_N=tiling.keys, PARTS=PARTS, num_warps=tiling.num_warps,
        num_stages=tiling.num_stages, **constants,
    )  # fmt: skip
    index = order[..., : num_long * tiling.keys].long()
    for gradient, part in zip((dkey, dvalue, dbias), parts, strict=True):
        total = part.sum(0)[:, :, : index.shape[2]].to(gradient.dtype)
        gradient.scatter_(2, index if part.dim() == 4 else index[..., None].expand(total.shape), total)
    return dquery, dkey, dvalue, dbias
