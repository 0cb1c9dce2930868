"""Attention to listed keys in Triton, forward alone."""

from __future__ import annotations

import triton
import triton.language as tl

from undivided.ops._flash import LOG2E, block_width


# One program: one query of one head, in one warp. It reads its list, `BLOCK` entries at a time, and a row of keys and
# of values for each; it shares with the queries beside it what the caches hold, and no tensor core has work.
@triton.jit
def _kernel(
    query, key, value, indices, out, scale, heads, num_queries, budget,
    query_strides, key_strides, value_strides, index_strides, out_strides,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) % num_queries
    head = tl.program_id(0) // num_queries
    batch = (head // heads).to(tl.int64)
    head = head % heads
    lane_d, lane_v, entry = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK)
    query += batch * query_strides[0] + head * query_strides[1] + row.to(tl.int64) * query_strides[2]
    key += batch * key_strides[0] + head * key_strides[1]
    value += batch * value_strides[0] + head * value_strides[1]
    indices += batch * index_strides[0] + head * index_strides[1] + row.to(tl.int64) * index_strides[2]
    q = tl.load(query + lane_d, mask=lane_d < HEAD_DIM, other=0.0).to(tl.float32) * scale

    top = tl.full([1], -1.0e30, tl.float32)
    total = tl.zeros([1], tl.float32)
    accumulator = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, budget, BLOCK):
        exists = start + entry < budget
        place = tl.load(indices + start + entry, mask=exists, other=0).to(tl.int64)
        k = tl.load(
            key + place[:, None] * key_strides[2] + lane_d[None, :],
            mask=exists[:, None] & (lane_d < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        scores = tl.where(exists, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        weights = tl.exp2(scores - new_top)
        decay = tl.exp2(top - new_top)
        v = tl.load(
            value + place[:, None] * value_strides[2] + lane_v[None, :],
            mask=exists[:, None] & (lane_v < VALUE_DIM)[None, :], other=0.0,
        )  # fmt: skip
        accumulator = accumulator * decay + tl.sum(weights[:, None] * v.to(tl.float32), 0)
        total = total * decay + tl.sum(weights, 0)
        top = new_top
    out += batch * out_strides[0] + head * out_strides[1] + row.to(tl.int64) * out_strides[2]
    tl.store(out + lane_v, (accumulator / total).to(out.dtype.element_ty), mask=lane_v < VALUE_DIM)


def forward(query, key, value, indices, scale):
    """Returns out `[batch, heads, queries, value_dim]`."""
    query, key, value, indices = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, indices)
    )
    batch, heads, num_queries, budget = indices.shape
    out = query.new_empty((batch, heads, num_queries, value.shape[-1]))
    if out.numel() == 0:
        return out
    _kernel[batch * heads * num_queries,](
        query, key, value, indices, out, scale * LOG2E, heads, num_queries, budget,
        *(x.stride()[:3] for x in (query, key, value, indices, out)),
        HEAD_DIM=query.shape[-1], VALUE_DIM=value.shape[-1],
        BLOCK_D=block_width(query.shape[-1]), BLOCK_V=block_width(value.shape[-1]),
        BLOCK=16, num_warps=1,
    )  # fmt: skip
    return out
