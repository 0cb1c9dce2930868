"""Dense attention with head maps in one kernel of Triton, forward only: no key or value is copied."""

from __future__ import annotations

import torch

from undivided.ops._triton import availability, interprets

torch.library.define(
    "undivided::mapped_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor key_head_map, Tensor value_head_map, bool is_causal, "
    "float scale, bool with_lse) -> (Tensor, Tensor)",
)


@torch.library.impl("undivided::mapped_attention", "default")
def _forward(*arguments):
    from undivided.ops.dense import triton

    return triton.forward(*arguments)


@torch.library.register_fake("undivided::mapped_attention")
def _forward_fake(query, key, value, key_head_map, value_head_map, is_causal, scale, with_lse):
    batch, heads, num_queries, _ = query.shape
    out = query.new_empty((batch, num_queries, heads, value.shape[3])).transpose(1, 2)
    shape = (batch, heads, num_queries) if with_lse else (0,)
    return out, query.new_empty(shape, dtype=torch.float32)


def reasons(
    query, key, value, key_head_map, value_head_map, attn_mask, is_causal, window, scale, softcap, return_lse
) -> list[str]:
    found = availability()
    if found:
        return found
    found = []
    if key_head_map is None and value_head_map is None:
        found.append("no head map is given (the kernel is for head maps)")
    for name, given in (("attn_mask", attn_mask), ("window", window), ("softcap", softcap)):
        if given is not None:
            found.append(f"{name} is given (the kernel knows is_causal only)")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        found.append("an input needs a gradient (the kernel has no backward)")
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"query is {str(query.dtype).removeprefix('torch.')}")
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[3] > 256:
            found.append(f"the last axis of {name} is {tensor.shape[3]} (at most 256)")
    if query.shape[2] == 1:
        found.append('query has one position (backend "sdpa" reads each key head once for all query heads)')
    if key.shape[2] == 0:
        found.append("key has no positions")
    if query.device.type != "cuda" and not interprets():
        found.append(f"query is on {query.device.type}")
    elif query.device.type != "cuda" and query.dtype == torch.bfloat16:
        found.append("query is bfloat16 (Triton's interpreter multiplies it wrongly)")
    return found


def attend(
    query, key, value, key_head_map, value_head_map, attn_mask, is_causal, window, scale, softcap, return_lse
):
    maps = [
        _uniform(query, heads) if head_map is None else head_map.contiguous()
        for head_map, heads in ((key_head_map, key), (value_head_map, value))
    ]
    out, lse = torch.ops.undivided.mapped_attention(
        query, key, value, *maps, bool(is_causal), float(scale), return_lse
    )
    return (out, lse) if return_lse else out


def _uniform(query: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    return torch.arange(query.shape[1], device=query.device) // (query.shape[1] // heads.shape[1])
