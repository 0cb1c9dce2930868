"""Latent attention as split-key decode kernels for Hopper, in Gluon: explicit warpgroups, copies, barriers.

Where 64 or more rows (query heads x queries) share a latent head, two warpgroups must overlap what a plain
Triton program does in turn, or the tensor cores and not the memory are the bottleneck. In all kernels blocks
of cache rows come through the bulk tensor copy engine, and two warpgroups compute.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from undivided.ops.latent_decode._splits import allocate, choose_splits, merge_splits, multiprocessors
from undivided.ops.latent_decode.hopper_fp8 import fp8_kernel
from undivided.ops.latent_decode.hopper_separate import separate_kernel
from undivided.ops.latent_decode.hopper_shared import shared_kernel

_LOG2E = 1.4426950408889634


# Keys of a block, blocks of float16, blocks of float8, registers of a computing thread, by the latent's width. The
# converting threads have what is left of the registers; with more or fewer one side spills.
_FP8 = {512: (32, 3, 2, 200), 256: (64, 3, 2, 176)}


def _flat(cache: torch.Tensor, columns: int, block_rows: int = 64) -> tuple[TensorDescriptor, int, int, int]:
    """The cache `[batch or pages, heads, rows, dim]` as one matrix of rows for the copy engine.

    Returns:
        The descriptor of blocks of so many rows; rows between batch entries (or pages), between heads, in all.
    """
    stride_b, stride_h, stride_m = cache.stride()[:3]
    rows = (cache.shape[0] - 1) * stride_b + (cache.shape[1] - 1) * stride_h
    rows = rows // stride_m + cache.shape[2]
    itemsize = cache.element_size()
    layout = gl.NVMMASharedLayout(min(128, columns * itemsize), 8 * itemsize, 2)
    descriptor = TensorDescriptor(cache, [rows, cache.shape[3]], [stride_m, 1], [block_rows, columns], layout)
    return descriptor, stride_b // stride_m, stride_h // stride_m, rows


def latent_attention_forward(
    query_latent: torch.Tensor,
    query_rope: torch.Tensor | None,
    latent: torch.Tensor,
    rope_key: torch.Tensor | None,
    scale: float,
    cache_seqlens: torch.Tensor | None,
    block_table: torch.Tensor | None,
    latent_scale: torch.Tensor | None,
    softcap: None,
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
    page_size = 0 if block_table is None else latent.shape[2]
    num_keys = latent.shape[2] if block_table is None else block_table.shape[1] * page_size
    rows = heads // latent_heads * num_queries

    shared = latent_scale is not None or latent_dim == 512 or (rows <= 64 and latent_dim >= 128)
    row_tiles = triton.cdiv(rows, 64 if shared else 128)
    if num_splits is None:
        tiles = row_tiles * batch * latent_heads
        num_splits = choose_splits(tiles, triton.cdiv(num_keys, 64), multiprocessors(query_latent.device))
    out, lse, partial, partial_lse = allocate(query_latent, num_splits)
    if out.numel() == 0:
        return out, lse

    options = {
        "BLOCKS_PER_PAGE": page_size // 64, "HAS_ROPE": rope_key is not None,
        "IS_CAUSAL": is_causal and num_queries > 1, "HAS_LENGTHS": cache_seqlens is not None,
        "IS_FINAL": num_splits == 1, "LATENT_DIM": latent_dim, "num_warps": 4,
    }  # fmt: skip
    sizes = (
        scale * _LOG2E, num_keys, num_queries, heads // latent_heads, latent_heads, num_splits,
        batch * heads * num_queries,
        *query_latent.stride()[:3], *((0, 0, 0) if query_rope is None else query_rope.stride()[:3]),
    )  # fmt: skip
    table_stride_b = 0 if block_table is None else block_table.stride(0)
    grid = (row_tiles, num_splits, batch * latent_heads)
    if latent_scale is not None:
        keys, stages, ring, registers = _FP8[latent_dim]
        latent_desc, latent_rows_b, latent_rows_h, _ = _flat(latent, latent_dim, keys)
        rope_desc, rope_rows_b, _, _ = _flat(latent if rope_key is None else rope_key, 64, keys)
        fp8_kernel[grid](
            latent_desc, rope_desc, query_latent, query_rope, cache_seqlens, block_table, latent_scale,
            partial, partial_lse, *sizes, latent_rows_b, latent_rows_h, rope_rows_b, latent_scale.stride(0),
            table_stride_b, KEYS=keys, STAGES=stages, RING=ring, REGISTERS=registers, **options,
        )  # fmt: skip
    else:
        latent_desc, latent_rows_b, latent_rows_h, latent_end = _flat(
            latent, latent_dim // 2 if shared else latent_dim
        )
        rope_desc, rope_rows_b, _, rope_end = _flat(latent if rope_key is None else rope_key, 64)
        kernel = shared_kernel if shared else separate_kernel
        kernel[grid](
            latent_desc, rope_desc, query_latent, query_rope, cache_seqlens, block_table, partial, partial_lse,
            *sizes, latent_rows_b, latent_rows_h, rope_rows_b, latent_end, rope_end, table_stride_b,
            STAGES=3 if not shared else 2 if latent_dim == 512 else 4, **options,
        )  # fmt: skip
    if num_splits > 1:
        merge_splits(partial, partial_lse, out, lse, overlaps=query_latent.is_cuda)
    return out, lse
