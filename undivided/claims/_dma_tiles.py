"""Which tiles of queries and keys a kernel that skips empty ones would have to compute, and which a rival visits."""

from __future__ import annotations

import heapq
from typing import Any

import torch
import torch.nn.functional as F

from undivided.layers.dma import DynamicMaskAttention


def live_blocks(death: torch.Tensor, length: int, group: int, size: int = 128) -> Any:
    """Returns FlexAttention's mask of the kept keys, without the `length x length` mask that its own builder forms.

    Args:
        death: `[1, key heads, length]`, the first query that each key is lost to.
        length: queries and keys.
        group: query heads of a key head.
        size: queries and keys of a block.
    """
    from torch.nn.attention.flex_attention import BlockMask

    first = torch.arange(0, length, size, device=death.device)
    key = torch.arange(length, device=death.device)
    # A key is attended by one of the queries `first .. first + size - 1`.
    alive = (key < first[:, None] + size) & (death[0, :, None] > torch.maximum(first[:, None], key))
    alive = F.pad(alive, (0, -length % size)).unflatten(-1, (-1, size)).any(-1)
    order = alive.int().argsort(dim=-1, descending=True, stable=True).int()
    counts, order = (x.repeat_interleave(group, dim=0)[None] for x in (alive.sum(-1).int(), order))
    return BlockMask.from_kv_blocks(
        counts.contiguous(), order.contiguous(), BLOCK_SIZE=size,
        mask_mod=lambda b, h, n, m: (m <= n) & (n < death[b, h // group, m]), seq_lengths=(length, length),
    )  # fmt: skip


def deaths(key_bias: torch.Tensor, keep: int) -> torch.Tensor:
    """Returns the first query that each key of one head is lost to, int64 `[keys]`; of equal keys the oldest goes."""
    lost_to = torch.full((len(key_bias),), len(key_bias))
    kept: list[tuple[float, int]] = []
    for query, bias in enumerate(key_bias.tolist()):
        heapq.heappush(kept, (bias, query))
        if len(kept) > keep:
            lost_to[heapq.heappop(kept)[1]] = query
    return lost_to


def share_of_tiles(key_bias: torch.Tensor, keep: int, size: int) -> float:
    """Returns the share of causal tiles that hold a key which one of their queries keeps.

    Args:
        key_bias: of one head, `[keys]`.
        keep: keys that a query keeps.
        size: queries and keys of a tile.
    """
    length = len(key_bias)
    tiles = -(-length // size)
    mask = live_blocks(deaths(key_bias, keep)[None, None], length, 1, size)
    return mask.kv_num_blocks.sum().item() / (tiles * (tiles + 1) / 2)


@torch.no_grad()
def trained_share(model: torch.nn.Module, ids: torch.Tensor, size: int) -> float:
    """Returns the mean share of tiles with a kept key over the layers and key heads of a model.

    Args:
        model: its attention layers are `DynamicMaskAttention`.
        ids: one text, `[1, tokens]`.
        size: queries and keys of a tile.
    """
    shares: list[float] = []

    def count(layer: DynamicMaskAttention, inputs: Any, options: dict[str, Any]) -> None:
        hidden = options["hidden_states"] if "hidden_states" in options else inputs[0]
        value = layer.v_proj(hidden).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
        for bias in layer.key_bias(value)[0].cpu():
            shares.append(share_of_tiles(bias, layer.keep_window_size, size))

    hooks = [
        module.register_forward_pre_hook(count, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, DynamicMaskAttention)
    ]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(shares) / len(shares)
