"""The decode kernels as operators of torch: what they accept, and how they are called.

Nothing here imports Triton: where it is missing, the backends say so and the others go on.
"""

from __future__ import annotations

import torch

from undivided.ops._triton import (
    availability,
    capability,
    has_capability,
    hopper_availability,
    interprets,
    is_hopper,
)

_ARGUMENTS = (
    "(Tensor query_latent, Tensor? query_rope, Tensor latent, Tensor? rope_key, float scale, "
    "Tensor? cache_seqlens, Tensor? block_table, Tensor? latent_scale, float? softcap, bool is_causal, "
    "int? num_splits) -> (Tensor, Tensor)"
)
torch.library.define("undivided::latent_decode", _ARGUMENTS)
torch.library.define("undivided::latent_decode_hopper", _ARGUMENTS)


@torch.library.impl("undivided::latent_decode", "default")
def _triton(*arguments):
    from undivided.ops.latent_decode.triton import latent_attention_forward

    return latent_attention_forward(*arguments)


@torch.library.impl("undivided::latent_decode_hopper", "default")
def _gluon(*arguments):
    from undivided.ops.latent_decode.gluon import latent_attention_forward

    return latent_attention_forward(*arguments)


@torch.library.register_fake("undivided::latent_decode")
@torch.library.register_fake("undivided::latent_decode_hopper")
def _fake(query_latent, *_):
    out = torch.empty_like(query_latent, memory_format=torch.contiguous_format)
    return out, query_latent.new_empty(query_latent.shape[:3], dtype=torch.float32)


def _attend(
    op, query_latent, query_rope, latent, rope_key, scale, is_causal, cache_seqlens, softcap, block_table,
    latent_scale, num_splits, return_lse,
):  # fmt: skip
    out, lse = op(
        query_latent, query_rope, latent, rope_key, scale, cache_seqlens, block_table, latent_scale, softcap,
        is_causal, num_splits,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attend_triton(*, attn_mask, **arguments):
    """Split-key decode kernels in Triton, for every CUDA device; fp8 caches and soft caps."""
    return _attend(torch.ops.undivided.latent_decode, **arguments)


def attend_gluon(*, attn_mask, **arguments):
    """Split-key decode kernels in Gluon, for Hopper: copies beside two warpgroups that share the latent's tiles."""
    return _attend(torch.ops.undivided.latent_decode_hopper, **arguments)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _common_reasons(
    query_latent, query_rope, latent, rope_key, attn_mask, cache_seqlens, block_table
) -> list[str]:
    found = []
    if attn_mask is not None:
        found.append("attn_mask is given (the kernels know is_causal and cache_seqlens)")
    tensors = [x for x in (query_latent, query_rope, latent, rope_key) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        found.append("a gradient is needed (the kernels are for decoding)")
    for name, tensor in (("latent", latent), ("rope_key", rope_key)):
        if tensor is not None and tensor.stride(3) != 1:
            found.append(f"the last axis of {name} has stride {tensor.stride(3)} (needs 1)")
    for name, tensor in (("cache_seqlens", cache_seqlens), ("block_table", block_table)):
        if tensor is not None and (tensor.dtype != torch.int32 or tensor.device != query_latent.device):
            found.append(
                f"{name} is {_name(tensor.dtype)} on {tensor.device} (needs int32 beside the queries)"
            )
    if block_table is not None and block_table.stride(1) != 1:
        found.append(f"the last axis of block_table has stride {block_table.stride(1)} (needs 1)")
    return found


def triton_reasons(
    query_latent, query_rope, latent, rope_key, scale, attn_mask, is_causal, cache_seqlens, softcap,
    block_table, latent_scale, num_splits, return_lse,
) -> list[str]:  # fmt: skip
    missing = availability()
    if missing:
        return missing
    found = _common_reasons(query_latent, query_rope, latent, rope_key, attn_mask, cache_seqlens, block_table)
    device, dtype = query_latent.device, query_latent.dtype
    interpreted = device.type == "cpu" and interprets()
    if device.type != "cuda" and not interpreted:
        found.append(f"query_latent is on {device.type}")
    elif interpreted and dtype == torch.bfloat16:
        found.append("query_latent is bfloat16 (Triton's interpreter multiplies it wrongly)")
    elif not interpreted and not has_capability(device.index, 8, 9 if latent_scale is not None else 0):
        found.append(f"compute capability {capability(device.index)} is too low (8.0; 8.9 for an fp8 cache)")
    if dtype not in (torch.float16, torch.bfloat16) and not (interpreted and dtype == torch.float32):
        found.append(f"query_latent is {_name(dtype)} (needs float16 or bfloat16)")
    latent_dim = query_latent.shape[3]
    if latent_dim % 16 or not 16 <= latent_dim <= 512:
        found.append(f"latent_dim is {latent_dim} (needs a multiple of 16, at most 512)")
    if query_rope is not None and query_rope.shape[3] > 64:
        found.append(f"rope_dim is {query_rope.shape[3]} (at most 64)")
    return found


def gluon_reasons(
    query_latent, query_rope, latent, rope_key, scale, attn_mask, is_causal, cache_seqlens, softcap,
    block_table, latent_scale, num_splits, return_lse,
) -> list[str]:  # fmt: skip
    missing = hopper_availability()
    if missing:
        return missing
    found = _common_reasons(query_latent, query_rope, latent, rope_key, attn_mask, cache_seqlens, block_table)
    device, dtype = query_latent.device, query_latent.dtype
    if device.type != "cuda":
        found.append(f"query_latent is on {device.type}")
    elif not is_hopper(device.index):
        found.append(f"compute capability is {capability(device.index)} (needs 9.0)")
    if dtype not in (torch.float16, torch.bfloat16):
        found.append(f"query_latent is {_name(dtype)} (needs float16 or bfloat16)")
    if softcap is not None:
        found.append('softcap is given (backend "triton" can)')
    if scale <= 0:
        found.append(f"scale is {scale} (needs a positive one)")
    if query_latent.shape[3] not in (64, 128, 256, 512):
        found.append(f"latent_dim is {query_latent.shape[3]} (needs 64, 128, 256 or 512)")
    if latent_scale is not None:
        if query_latent.shape[3] not in (256, 512):
            found.append(f"latent_dim is {query_latent.shape[3]} (an fp8 cache needs 256 or 512)")
        if latent_scale.dtype != torch.float32 or latent_scale.stride(1) != 1:
            found.append(
                f"latent_scale is {_name(latent_scale.dtype)} with stride {latent_scale.stride(1)} (needs float32, 1)"
            )
    if query_rope is not None and query_rope.shape[3] != 64:
        found.append(f"rope_dim is {query_rope.shape[3]} (needs 64, or none)")
    if latent.shape[2] == 0:
        found.append("latent has no positions")
    if block_table is not None and latent.shape[2] % 64:
        found.append(f"page_size is {latent.shape[2]} (needs a multiple of 64)")
    for name, tensor in (("latent", latent), ("rope_key", rope_key)):
        if tensor is not None and not _is_matrix_of_rows(tensor):
            found.append(
                f"{name} has strides {tensor.stride()} and offset {tensor.storage_offset()} (the copy engine "
                "needs rows at multiples of 16 bytes and every other stride a multiple of a row)"
            )
    return found


def _is_matrix_of_rows(cache: torch.Tensor) -> bool:
    """Whether the copy engine can address all rows of `[batch or pages, heads, rows, dim]` as one matrix."""
    stride_b, stride_h, stride_m = cache.stride()[:3]
    per_16_bytes = 16 // cache.element_size()
    if stride_m < cache.shape[3] or stride_m % per_16_bytes or cache.storage_offset() % per_16_bytes:
        return False
    for size, stride in ((cache.shape[0], stride_b), (cache.shape[1], stride_h)):
        if size > 1 and stride % stride_m:
            return False
    return (cache.shape[0] * stride_b + cache.shape[1] * stride_h) // stride_m + cache.shape[2] < 2**31
