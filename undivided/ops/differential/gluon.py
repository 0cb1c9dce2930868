"""The forward of differential attention for Hopper, in Gluon: explicit warpgroups, copies and barriers.

The same cut as in `triton.py`: a program computes one head, noise heads first. Here one warp loads keys and values
through the bulk tensor copy engine, and two warpgroups compute, each with its own 64 queries: while the tensor cores
multiply the weights of one block by its values, the warpgroup computes the softmax of the next.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from undivided.ops._flash import LOG2E
from undivided.ops.differential.triton import RUNTIME, empty_outputs

# Queries of a warpgroup.
_ROWS: gl.constexpr = gl.constexpr(64)
# Renamed between Triton 3.6 and 3.8.
_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def _load(
    query_desc, key_desc, value_desc, queries, keys, values, query_full, key_full, key_empty, value_full, value_empty,
    batch, head, key_head, value_head, first_row, num_blocks, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: both tiles of queries, then keys and values in turn, STAGES blocks ahead."""
    query_bytes: gl.constexpr = 2 * 2 * _ROWS * query_desc.block_shape[3]
    key_bytes: gl.constexpr = 2 * BLOCK_N * key_desc.block_shape[3]
    value_bytes: gl.constexpr = 2 * BLOCK_N * value_desc.block_shape[3]
    mbarrier.expect(query_full.index(0), query_bytes)
    for i in gl.static_range(2):
        tma.async_copy_global_to_shared(
            query_desc, [batch, head, first_row + i * _ROWS, 0], query_full.index(0), queries.index(i)
        )
    for i in range(num_blocks):
        stage = i % STAGES
        free = (i // STAGES & 1) ^ 1
        mbarrier.wait(key_empty.index(stage), free)
        mbarrier.expect(key_full.index(stage), key_bytes)
        tma.async_copy_global_to_shared(
            key_desc, [batch, key_head, i * BLOCK_N, 0], key_full.index(stage), keys.index(stage)
        )
        mbarrier.wait(value_empty.index(stage), free)
        mbarrier.expect(value_full.index(stage), value_bytes)
        tma.async_copy_global_to_shared(
            value_desc, [batch, value_head, i * BLOCK_N, 0], value_full.index(stage), values.index(stage)
        )


@gluon.jit
def _weigh(scores, top, limit, first_key, scale, BLOCK_N: gl.constexpr, MASKED: gl.constexpr):
    """Softmax of one block of scores: its weights, the new maxima, and the factor of what was summed before."""
    layout: gl.constexpr = scores.type.layout
    if MASKED:
        key = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        scores = gl.where(key[None, :] < limit[:, None], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_top[:, None])
    return weights, new_top, gl.exp2(top - new_top)


@gluon.jit
def _add_blocks(
    first, last, accumulator, operand, top, total, query, keys, values,
    key_full, key_empty, value_full, value_empty, limit, scale,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Blocks `first .. last - 1`: scores of a block are multiplied while the weights before them meet their values."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    head_dim: gl.constexpr = query.shape[3]
    value_dim: gl.constexpr = values.shape[4]
    for i in range(first, last):
        stage = i % STAGES
        before = (i - 1) % STAGES
        mbarrier.wait(key_full.index(stage), i // STAGES & 1)
        key = keys.index(stage).reshape([BLOCK_N, head_dim])
        scores = gl.zeros([_ROWS, BLOCK_N], gl.float32, scores_layout)
        scores = warpgroup_mma(
            query.reshape([_ROWS, head_dim]), key.permute((1, 0)), scores, use_acc=False, is_async=True
        )
        mbarrier.wait(value_full.index(before), (i - 1) // STAGES & 1)
        value = values.index(before).reshape([BLOCK_N, value_dim])
        accumulator = warpgroup_mma(operand, value, accumulator, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        mbarrier.arrive(key_empty.index(stage))
        weights, top, decay = _weigh(scores, top, limit, i * BLOCK_N, scale, BLOCK_N, MASKED)
        total = total * decay + gl.sum(weights, 1)
        weights = weights.to(operand.dtype)
        accumulator = warpgroup_mma_wait(0, [accumulator])
        mbarrier.arrive(value_empty.index(before))
        operand = gl.convert_layout(weights, operand.type.layout)
        accumulator *= gl.convert_layout(decay, gl.SliceLayout(1, accumulator.type.layout))[:, None]
    return accumulator, operand, top, total


@gluon.jit
def _compute(
    queries, keys, values, query_full, key_full, key_empty, value_full, value_empty,
    lam, norm_weight, noise_out, out, mixed, lse, scale, norm_eps, out_scale,
    batch, head, heads, noise_group, num_queries, num_keys, first_row, lam_stride_n,
    WARPGROUP: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr,
    IS_NOISE: gl.constexpr, HAS_NORM: gl.constexpr, WITH_MIXED: gl.constexpr,
):  # fmt: skip
    """A computing warpgroup: 64 queries. Each thread holds half a row's accumulator of 256 columns, 128 registers."""
    head_dim: gl.constexpr = queries.shape[4]
    value_dim: gl.constexpr = values.shape[4]
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, value_dim, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    query = queries.index(WARPGROUP)
    first_row += WARPGROUP * _ROWS
    rows = first_row + gl.arange(0, _ROWS, gl.SliceLayout(1, scores_layout))
    limit = num_keys + gl.zeros_like(rows)
    common = num_keys
    last = num_keys
    if IS_CAUSAL:
        limit = gl.minimum(rows + (num_keys - num_queries + 1), num_keys)
        common = gl.minimum(gl.maximum(first_row + num_keys - num_queries + 1, 0), num_keys)
        last = gl.minimum(gl.maximum(first_row + _ROWS + num_keys - num_queries, 1), num_keys)

    mbarrier.wait(query_full.index(0), 0)
    mbarrier.wait(key_full.index(0), 0)
    scores = gl.zeros([_ROWS, BLOCK_N], gl.float32, scores_layout)
    scores = warpgroup_mma(
        query.reshape([_ROWS, head_dim]),
        keys.index(0).reshape([BLOCK_N, head_dim]).permute((1, 0)),
        scores,
        use_acc=False,
        is_async=True,
    )
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(key_empty.index(0))
    # Finite, so that differences of maxima are never NaN; the exponential of -inf minus it is 0.
    top = gl.full([_ROWS], -1.0e30, gl.float32, gl.SliceLayout(1, scores_layout))
    weights, top, decay = _weigh(scores, top, limit, 0, scale, BLOCK_N, True)
    total = gl.sum(weights, 1)
    operand = gl.convert_layout(weights.to(keys.dtype), operand_layout)
    accumulator = gl.zeros([_ROWS, value_dim], gl.float32, layout)
    blocks = gl.cdiv(last, BLOCK_N)
    # The loop without a mask has no branch: between two products of a warpgroup a branch would serialise them.
    plain = gl.maximum(common // BLOCK_N, 1)
    accumulator, operand, top, total = _add_blocks(
        1, plain, accumulator, operand, top, total, query, keys, values,
        key_full, key_empty, value_full, value_empty, limit, scale, BLOCK_N, STAGES, False,
    )  # fmt: skip
    accumulator, operand, top, total = _add_blocks(
        plain, blocks, accumulator, operand, top, total, query, keys, values,
        key_full, key_empty, value_full, value_empty, limit, scale, BLOCK_N, STAGES, True,
    )  # fmt: skip
    final = (blocks - 1) % STAGES
    mbarrier.wait(value_full.index(final), (blocks - 1) // STAGES & 1)
    value = values.index(final).reshape([BLOCK_N, value_dim])
    accumulator = warpgroup_mma(operand, value, accumulator, is_async=True)
    accumulator = warpgroup_mma_wait(0, [accumulator])

    seen = total > 0
    total = gl.where(seen, total, gl.full_like(total, 1.0))
    row = (batch * heads + head) * num_queries + rows
    gl.store(
        lse + row,
        gl.where(seen, top + gl.log2(total), gl.full_like(total, float("inf"))),
        mask=rows < num_queries,
    )
    inverse = gl.where(seen, 1.0 / total, gl.zeros_like(total))
    accumulator *= gl.convert_layout(inverse, gl.SliceLayout(1, layout))[:, None]

    rows = first_row + gl.arange(0, _ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, value_dim, gl.SliceLayout(0, layout))
    inside = (rows < num_queries)[:, None]
    if IS_NOISE:
        row = (batch * heads + head) * num_queries + rows
        gl.store(noise_out + row[:, None] * value_dim + columns[None, :], accumulator, mask=inside)
    else:
        noise_row = (batch * (heads // noise_group) + head // noise_group) * num_queries + rows
        noise = gl.load(noise_out + noise_row[:, None] * value_dim + columns[None, :], mask=inside, other=0.0)
        factor = gl.load(lam + rows * lam_stride_n, mask=rows < num_queries, other=0.0)
        accumulator -= factor[:, None] * noise
        out_row = (batch * num_queries + rows) * heads + head
        out_offset = out_row[:, None] * value_dim + columns[None, :]
        if WITH_MIXED:
            gl.store(mixed + out_offset, accumulator.to(mixed.dtype.element_ty), mask=inside)
        if HAS_NORM:
            square = gl.sum(accumulator * accumulator, 1) / value_dim
            weight = gl.load(norm_weight + columns).to(gl.float32)
            accumulator = accumulator * (out_scale / gl.sqrt(square + norm_eps))[:, None] * weight[None, :]
        else:
            accumulator *= out_scale
        gl.store(out + out_offset, accumulator.to(out.dtype.element_ty), mask=inside)


# One program: 128 queries of one head. Shared memory holds them and STAGES blocks of BLOCK_N keys and values.
@gluon.jit(do_not_specialize=RUNTIME[:3] + RUNTIME[4:])
def _hopper_kernel(
    query_desc, key_desc, value_desc, lam, norm_weight, noise_out, out, mixed, lse,
    scale, norm_eps, out_scale, num_queries, num_keys, heads, key_group, value_group, noise_group,
    lam_stride_b, lam_stride_h, lam_stride_n,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, IS_NOISE: gl.constexpr,
    HAS_NORM: gl.constexpr, WITH_MIXED: gl.constexpr,
):  # fmt: skip
    head = gl.program_id(0) % heads
    batch = gl.program_id(0) // heads
    # The longest rows first: what runs last is short.
    first_row = (gl.cdiv(num_queries, 2 * _ROWS) - 1 - gl.program_id(1)) * 2 * _ROWS
    last = num_keys
    if IS_CAUSAL:
        last = gl.minimum(gl.maximum(first_row + 2 * _ROWS + num_keys - num_queries, 1), num_keys)
    num_blocks = gl.cdiv(last, BLOCK_N)

    dtype: gl.constexpr = query_desc.dtype
    queries = gl.allocate_shared_memory(dtype, [2] + query_desc.block_shape, query_desc.layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES] + key_desc.block_shape, key_desc.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES] + value_desc.block_shape, value_desc.layout)
    query_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(query_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(key_full.index(i), count=1)
        mbarrier.init(value_full.index(i), count=1)
        # Both warpgroups read a block. The first may see one block less than the second, never one that is reused.
        mbarrier.init(key_empty.index(i), count=2)
        mbarrier.init(value_empty.index(i), count=2)
    fence_async_shared()
    _barrier()

    batch64 = gl.cast(batch, gl.int64)
    lam += batch64 * lam_stride_b + head * lam_stride_h
    # Written out: a tuple that is given a name loses its compile-time constants.
    gl.warp_specialize(
        [
            (_compute, (
                queries, keys, values, query_full, key_full, key_empty, value_full, value_empty,
                lam, norm_weight, noise_out, out, mixed, lse, scale, norm_eps, out_scale,
                batch64, head, heads, noise_group, num_queries, num_keys, first_row, lam_stride_n,
                0, BLOCK_N, STAGES, IS_CAUSAL, IS_NOISE, HAS_NORM, WITH_MIXED,
            )),
            (_compute, (
                queries, keys, values, query_full, key_full, key_empty, value_full, value_empty,
                lam, norm_weight, noise_out, out, mixed, lse, scale, norm_eps, out_scale,
                batch64, head, heads, noise_group, num_queries, num_keys, first_row, lam_stride_n,
                1, BLOCK_N, STAGES, IS_CAUSAL, IS_NOISE, HAS_NORM, WITH_MIXED,
            )),
            (_load, (
                query_desc, key_desc, value_desc,
                queries, keys, values, query_full, key_full, key_empty, value_full, value_empty,
                batch, head, head // key_group, head // value_group, first_row, num_blocks, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def forward(
    query, noise_query, key, noise_key, value, lam, norm_weight, norm_eps, out_scale, is_causal, scale, with_mixed,
):  # fmt: skip
    """Returns what `triton.forward` returns."""
    query, noise_query, key, noise_key, value = map(_aligned, (query, noise_query, key, noise_key, value))
    outputs = out, mixed, noise_out, lse, noise_lse = empty_outputs(query, noise_query, value, with_mixed)
    batch, heads, num_queries, _ = query.shape
    if query.numel() == 0:
        return outputs
    block_keys, stages = (64, 3) if value.shape[3] > 128 else (128, 3)
    for q, k, sums, is_noise in ((noise_query, noise_key, noise_lse, True), (query, key, lse, False)):
        _hopper_kernel[batch * q.shape[1], triton.cdiv(num_queries, 128)](
            _descriptor(q, 64), _descriptor(k, block_keys), _descriptor(value, block_keys),
            lam, norm_weight, noise_out, out, mixed, sums,
            scale * LOG2E, norm_eps, out_scale, num_queries, key.shape[2], q.shape[1],
            q.shape[1] // k.shape[1], q.shape[1] // value.shape[1], heads // noise_query.shape[1], *lam.stride(),
            BLOCK_N=block_keys, STAGES=stages, IS_CAUSAL=is_causal, IS_NOISE=is_noise,
            HAS_NORM=norm_weight is not None, WITH_MIXED=with_mixed, num_warps=4,
        )  # fmt: skip
    return outputs


def infer(*arguments):
    """Returns the output alone."""
    return forward(*arguments, with_mixed=False)[0]


def _descriptor(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """Blocks of `rows` rows of one head, for the copy engine; rows that do not exist are zero."""
    layout = gl.NVMMASharedLayout(128, 16, 4)
    return TensorDescriptor(
        tensor, list(tensor.shape), list(tensor.stride()), [1, 1, rows, tensor.shape[3]], layout
    )


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the copy engine can address it: a contiguous last axis, all else in steps of 16 bytes."""
    steps = (*tensor.stride()[:3], tensor.storage_offset())
    return tensor if tensor.stride(3) == 1 and all(step % 8 == 0 for step in steps) else tensor.contiguous()
