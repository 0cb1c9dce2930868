"""Head maps: which key head, and which value head, a query head reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def heads_by_map(tensor: torch.Tensor, head_map: torch.Tensor) -> torch.Tensor:
    """Returns a copy `[batch, heads, length, dim]` of the heads `[batch, key_heads, length, dim]` that a map names.

    Args:
        tensor: heads of keys or values.
        head_map: `[heads]`, or `[batch, heads]` where samples differ.
    """
    # On a GPU faster than index_select, also where all samples have the same map.
    index = head_map.expand(tensor.shape[0], -1)[:, :, None, None].expand(-1, -1, *tensor.shape[2:])
    return tensor.gather(1, index)


def by_copies(run: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a backend head maps: it gets a key head and a value head for each query head, copied.

    A single query, as in decoding, would read less than the copies write: there all query heads meet every key head,
    as rows of one product, and each keeps the output of its own.
    """

    @functools.wraps(run)
    def attend(key, value, key_head_map, value_head_map, **arguments):
        if key_head_map is value_head_map is not None and _has_one_query(arguments):
            return _by_rows(run, key, value, key_head_map, arguments)
        if key_head_map is not None:
            key = heads_by_map(key, key_head_map)
        if value_head_map is not None:
            value = heads_by_map(value, value_head_map)
        # With one map alone the other side is grouped as ever.
        if key.shape[1] < value.shape[1]:
            key = key.repeat_interleave(value.shape[1] // key.shape[1], dim=1)
        elif value.shape[1] < key.shape[1]:
            value = value.repeat_interleave(key.shape[1] // value.shape[1], dim=1)
        return run(key=key, value=value, **arguments)

    return attend


def _has_one_query(arguments: dict[str, Any]) -> bool:
    mask = arguments["attn_mask"]
    same_for_heads = mask is None or mask.dim() < 3 or mask.shape[-3] == 1
    return arguments["query"].shape[2] == 1 and arguments["window"] is None and same_for_heads


def _by_rows(run, key, value, head_map, arguments):
    rows = arguments["query"].transpose(1, 2).expand(-1, key.shape[1], -1, -1)
    # The one query sees all keys, so that nothing is causal about its rows.
    done = run(key=key, value=value, **{**arguments, "query": rows, "is_causal": False})
    if not arguments["return_lse"]:
        return _own_rows(done, head_map)
    out, lse = done
    return _own_rows(out, head_map), _own_rows(lse[..., None], head_map)[..., 0]


def _own_rows(rows: torch.Tensor, head_map: torch.Tensor) -> torch.Tensor:
    """From `[batch, key_heads, heads, dim]`, row h of the key head of query head h: `[batch, heads, 1, dim]`."""
    index = head_map.expand(rows.shape[0], -1)[:, None, :, None].expand(-1, -1, -1, rows.shape[3])
    return rows.gather(1, index).transpose(1, 2)


def without_maps(reasons: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """The reasons of a backend made for maps by `by_copies`: maps are none."""

    @functools.wraps(reasons)
    def ask(key_head_map=None, value_head_map=None, **arguments):
        return reasons(**arguments)

    return ask


def check_maps(
    batch: int,
    heads: int,
    device: torch.device,
    key_head_map: torch.Tensor | None,
    value_head_map: torch.Tensor | None,
) -> None:
    """Raises unless every map given is `[heads]` or `[batch, heads]`, of int64 and on the device."""
    for name, head_map in (("key_head_map", key_head_map), ("value_head_map", value_head_map)):
        if head_map is None:
            continue
        if head_map.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {head_map.dtype}; it names heads and must be torch.int64.")
        if tuple(head_map.shape) not in ((heads,), (batch, heads)):
            raise ValueError(
                f"{name} has shape {list(head_map.shape)}; it must be [heads={heads}] or "
                f"[batch={batch}, heads={heads}]."
            )
        if head_map.device != device:
            raise ValueError(f"{name} is on {head_map.device}, but query is on {device}; use one device.")
