"""The torch operator around the Triton kernel, with a fake."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from undivided.ops._triton import availability, interprets
from undivided.ops.merge import merge_attention

# Places of a part of a list, and programs that keep a device busy.
_PART, _PROGRAMS = 512, 256

torch.library.define(
    "undivided::gathered_forward",
    "(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor counts, int block_size, bool is_causal, "
    "int? window, float scale, float? softcap) -> (Tensor, Tensor)",
)


@torch.library.impl("undivided::gathered_forward", "default")
def _forward(*arguments):
    from undivided.ops.gathered import triton

    return triton.forward(*arguments)


@torch.library.register_fake("undivided::gathered_forward")
def _forward_fake(query, key, value, *arguments):
    batch, heads, num_queries, _ = query.shape
    out = query.new_empty((batch, num_queries, heads, value.shape[3])).transpose(1, 2)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def reasons(
    query, key, value, indices, block_size, is_causal, window, scale, softcap, return_lse
) -> list[str]:
    found = availability()
    if found:
        return found
    if query.device.type != "cuda" and not interprets():
        return [f"query is on {query.device.type}"]
    found = []
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        found.append("a gradient is wanted")
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"query is {query.dtype} (needs float32, float16 or bfloat16)")
    for name, width in (("head_dim", query.shape[3]), ("value_dim", value.shape[3])):
        if width > 256:
            found.append(f"{name} is {width} (needs at most 256)")
    return found


def attend(query, key, value, indices, block_size, is_causal, window, scale, softcap, return_lse):
    """A kernel in Triton: rows are loaded from where the list says.

    Few queries would keep few multiprocessors busy: then parts of their lists are attended to apart, and merged.
    """
    heads, num_queries = query.shape[1:3]
    # A program has at most 128 queries.
    programs = max(query.shape[0] * heads * max(indices.shape[2], -(-num_queries // 128)), 1)
    parts = min(-(-indices.shape[3] // _PART), _PROGRAMS // programs)
    if parts <= 1:
        return _attend(query, key, value, indices, block_size, is_causal, window, scale, softcap)
    size = -(-indices.shape[3] // parts)
    lists = F.pad(indices, (0, parts * size - indices.shape[3]), value=-1).unflatten(3, (parts, size))
    # As if each part had heads of its own: [batch, heads * parts, blocks, size].
    lists = lists.permute(0, 1, 3, 2, 4).expand(-1, heads, -1, -1, -1).flatten(1, 2)
    out, lse = _attend(
        query.repeat_interleave(parts, dim=1),
        key,
        value,
        lists,
        block_size,
        is_causal,
        window,
        scale,
        softcap,
    )
    return merge_attention(
        out.unflatten(1, (heads, parts)).unbind(2), lse.unflatten(1, (heads, parts)).unbind(2)
    )


def _attend(query, key, value, indices, block_size, is_causal, window, scale, softcap):
    # What is behind the last listed place of any row is not read.
    listed = indices >= 0
    place = torch.arange(1, indices.shape[3] + 1, device=indices.device, dtype=torch.int32)
    counts = (listed * place).amax(dim=-1).to(torch.int32)
    return torch.ops.undivided.gathered_forward(
        query, key, value, indices, counts, int(block_size), bool(is_causal), window, float(scale), softcap
    )
