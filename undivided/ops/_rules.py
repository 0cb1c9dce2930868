"""Meaning shared by the attention operators: which key a query may see, and the checks of their inputs."""

from __future__ import annotations

import torch


def causal_mask(
    num_queries: int, num_keys: int, device: torch.device, window: int | None = None
) -> torch.Tensor:
    """Returns the boolean `[num_queries, num_keys]` mask, True where query n sees key m.

    The triangle is aligned bottom right: the last query sees the last key, as it must with a cache. With `window`
    a query sees itself and the `window - 1` keys before it.
    """
    last = torch.arange(num_queries, device=device)[:, None] + (num_keys - num_queries)
    key = torch.arange(num_keys, device=device)[None, :]
    mask = key <= last
    if window is not None:
        mask = mask & (key > last - window)
    return mask


def combined_mask(
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    window: int | None,
    num_queries: int,
    num_keys: int,
    device: torch.device,
) -> torch.Tensor | None:
    """Returns one mask for `attn_mask` and causality together: boolean, or additive when `attn_mask` is; or None."""
    if not is_causal or (num_queries == 1 and window is None):
        return attn_mask
    triangle = causal_mask(num_queries, num_keys, device, window)
    if attn_mask is None:
        return triangle
    if attn_mask.dtype == torch.bool:
        return attn_mask & triangle
    return attn_mask.masked_fill(~triangle, float("-inf"))


def masked_softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the last axis and its log-sum-exp; a row of -inf has zero weights, lse -inf, zero gradient."""
    empty = (logits == float("-inf")).all(dim=-1, keepdim=True)
    # The empty rows are replaced before the softmax, not after: a NaN times zero would stay in the gradient.
    safe = logits.masked_fill(empty, 0.0)
    weights = torch.softmax(safe, dim=-1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(safe, dim=-1).masked_fill(empty.squeeze(-1), float("-inf"))
    return weights, lse


def zero_rows_without_keys(output: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zeroes what scaled_dot_product_attention gives the queries that see no key; `mask` is boolean or additive.

    On the CPU it gives zeros itself; its cuDNN kernel gives the mean of the values.
    """
    if mask is None or output.device.type != "cuda":
        return output
    seen = mask if mask.dtype == torch.bool else mask > float("-inf")
    return output.masked_fill(~seen.any(dim=-1, keepdim=True), 0.0)


def check_floating(**tensors: torch.Tensor | None) -> None:
    """Raises a TypeError or ValueError unless all tensors are floating, of one dtype and on one device."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; attention needs a floating-point dtype.")
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, but {first_name} has {first.dtype}; use one dtype."
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but {first_name} is on {first.device}; use one device."
            )


def check_rank(rank: int, layout: str, **tensors: torch.Tensor | None) -> None:
    """Raises a ValueError unless every tensor has `rank` axes; `layout` says which."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dim() != rank:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it needs {rank} axes, {layout}.")


def check_mask(
    attn_mask: torch.Tensor | None, batch: int, heads: int, num_queries: int, num_keys: int
) -> None:
    """Raises unless `attn_mask` is boolean or floating and broadcasts to `[batch, heads, queries, keys]`."""
    if attn_mask is None:
        return
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(
            f"attn_mask has dtype {attn_mask.dtype}; use bool (True = seen) or a floating-point bias."
        )
    target = (batch, heads, num_queries, num_keys)
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(shape) != 4 or any(size not in (1, want) for size, want in zip(shape, target, strict=True)):
        raise ValueError(f"attn_mask has shape {list(attn_mask.shape)}; it must broadcast to {list(target)}.")
