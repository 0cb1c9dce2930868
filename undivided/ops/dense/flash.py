"""Dense attention in a sliding window through torch's flash kernels for packed sequences."""

from __future__ import annotations

import inspect

import torch
from torch.nn.attention.varlen import varlen_attn

from undivided.ops._triton import capability, has_capability

# Torch 2.11 takes fewer key heads without being asked; later versions want to be.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@torch.compiler.assume_constant_result
def availability() -> list[str]:
    """Sentences that say why these kernels cannot run on this machine; empty when they can."""
    if not torch.cuda.is_available():
        return ["there is no CUDA device"]
    if not has_capability(None, 8, 0):
        return [f"the compute capability is {capability(None)} (needs 8.0)"]
    return []


def reasons(query, key, value, attn_mask, is_causal, window, scale, softcap, return_lse) -> list[str]:
    found = availability()
    if found:
        return found
    found = []
    if query.device.type != "cuda":
        found.append(f"query is on {query.device.type}")
    if window is None:
        found.append("window is None (without one scaled_dot_product_attention has the same kernels)")
    for name, given in (("attn_mask", attn_mask), ("softcap", softcap)):
        if given is not None:
            found.append(f"{name} is given")
    if return_lse:
        found.append("return_lse is True")
    if query.dtype not in (torch.float16, torch.bfloat16):
        found.append(f"query is {query.dtype} (needs float16 or bfloat16)")
    head_dim, value_dim = query.shape[3], value.shape[3]
    if head_dim != value_dim or head_dim % 8 or head_dim > 256:
        found.append(
            f"head_dim is {head_dim} and value_dim {value_dim} (needs the same, a multiple of 8 up to 256)"
        )
    if query.shape[2] > key.shape[2]:
        found.append("there are more queries than keys")
    return found


def attend(query, key, value, attn_mask, is_causal, window, scale, softcap, return_lse):
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    starts = [
        torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=query.device)
        for length in (num_queries, num_keys)
    ]
    # Aligned bottom right where there are more keys than queries.
    out = varlen_attn(
        *rows, *starts, num_queries, num_keys, scale=scale, window_size=(window - 1, 0),
        **(_GROUPED if heads != key.shape[1] else {}),
    )  # fmt: skip
    return out.unflatten(0, (batch, num_queries)).transpose(1, 2)
