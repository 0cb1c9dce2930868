"""Where the texts of a padded or packed batch begin, for layers that count positions themselves."""

from __future__ import annotations

import torch

from undivided.layers._base import additive_or_boolean


def padding_before(
    attention_mask: torch.Tensor | None, queries: int, keys: int, window: int | None = None
) -> torch.Tensor | None:
    """Returns how many columns of padding stand before each text, int64 `[batch]`; None if there are none.

    Args:
        attention_mask: `[batch, 1, queries, keys or more]`, boolean or additive; None for texts without padding.
        queries, keys: how many there are; the queries are the last.
        window: keys that a query sees, itself included, where the base model's mask has a window.

    Raises:
        TypeError: the mask is of a kind made for another attention implementation.
        ValueError: it is no causal mask of texts with padding on their left.
    """
    mask = additive_or_boolean(attention_mask, keys)
    if mask is None:
        return None
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    column = torch.arange(keys, device=mask.device)
    # A token sees itself and not the next one; padding sees nothing, or everything.
    after = torch.nn.functional.pad(seen.diagonal(keys - queries + 1, 1, 2), (0, 1))
    is_token = seen.diagonal(keys - queries, 1, 2) & ~after
    # The last query sees every token, but in a window it does not.
    visible = seen[:, -1] if window is None else is_token
    padding = visible.shape[1] - visible.sum(dim=-1)
    if torch.compiler.is_compiling():
        return padding
    row = keys - queries + torch.arange(queries, device=mask.device)
    expected = (column <= row[:, None]) & (column >= padding[:, None, None])
    if window is not None:
        expected = expected & (column > row[:, None] - window)
    is_padding = row < padding[:, None]
    if not ((seen == expected) | is_padding[..., None]).all() or (is_token & is_padding).any():
        raise ValueError(
            "attention_mask is not that of one causal text a row with padding on its left; packed texts, windows and "
            "padding on the right are not supported. Give one text a row."
        )
    return padding if padding.any() else None


def packed_texts(attention_mask: torch.Tensor | None, length: int) -> list[list[int]] | None:
    """Returns the columns at which the texts of each row begin, if some row has several; None for any other mask.

    Args:
        attention_mask: `[batch, 1, length, length]`, boolean or additive; None for texts without padding. It waits for
            the device; while torch.compile looks on nothing is read, and None returned.
        length: tokens of a row.

    Raises:
        TypeError: the mask is of a kind made for another attention implementation.
    """
    mask = additive_or_boolean(attention_mask, length)
    if mask is None or mask.shape[2] != length or torch.compiler.is_compiling():
        return None
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    column = torch.arange(length, device=mask.device)
    # The first column that a token sees: where its text begins.
    start = seen.int().argmax(-1)
    begins = start == column
    is_packed = (
        (seen == ((column <= column[:, None]) & (column >= start[..., None]))).all()
        & (start == column.where(begins, 0).cummax(-1).values).all()
        & (begins.sum(-1) > 1).any()
    )
    if not is_packed:
        return None
    return [row.nonzero().flatten().tolist() for row in begins]
