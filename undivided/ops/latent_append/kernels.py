"""The kernel as an operator of torch that changes the cache, and what it accepts; nothing here imports Triton."""

from __future__ import annotations

import torch

from undivided.ops._triton import availability, capability, has_capability, interprets

torch.library.define(
    "undivided::latent_append",
    "(Tensor row, Tensor? cos, Tensor? sin, Tensor? norm_weight, Tensor(a!) cache, Tensor lengths, float eps, "
    "bool interleaved, Tensor? block_table, Tensor? counts, Tensor? shard_scale, Tensor(b!)? latent_scale, "
    "Tensor(c!)? query_rope) -> ()",
)


@torch.library.impl("undivided::latent_append", "default")
def _triton(*arguments):
    from undivided.ops.latent_append.triton import append

    append(*arguments)


@torch.library.register_fake("undivided::latent_append")
def _fake(*_):
    return None


def append_triton(**arguments):
    """One kernel: a program a token, and one for each sixteen of its query heads."""
    torch.ops.undivided.latent_append(*arguments.values())


def reasons(
    row, cos, sin, norm_weight, cache, lengths, eps, interleaved, block_table, counts, shard_scale, latent_scale,
    query_rope,
) -> list[str]:  # fmt: skip
    missing = availability()
    if missing:
        return missing
    found = []
    device = row.device
    if device.type != "cuda" and not (device.type == "cpu" and interprets()):
        found.append(f"row is on {device.type}")
    elif device.type == "cuda" and latent_scale is not None and not has_capability(device.index, 8, 9):
        found.append(f"compute capability {capability(device.index)} is too low for an fp8 cache (8.9)")
    if row.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"row is {str(row.dtype).removeprefix('torch.')}")
    beside = {
        "cos": cos,
        "sin": sin,
        "norm_weight": norm_weight,
        "cache": cache,
        "lengths": lengths,
        "block_table": block_table,
        "counts": counts,
        "shard_scale": shard_scale,
        "latent_scale": latent_scale,
        "query_rope": query_rope,
    }
    for name, tensor in {"row": row, **beside}.items():
        if tensor is not None and tensor.device != device:
            found.append(f"{name} is on {tensor.device}, row on {device}")
        strided = tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1
        if strided and name not in ("cos", "sin"):
            found.append(f"the last axis of {name} has stride {tensor.stride(-1)} (needs 1)")
    if row.shape[2] > 4096:
        found.append(f"the width is {row.shape[2]} (at most 4096)")
    return found
