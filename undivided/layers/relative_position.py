"""A learned bias for each head and each offset between two places of a window."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from undivided.layers._vision import Size, as_pair


class RelativePositionBias(nn.Module):
    """Gives `bias[h, t, u] = table[index(t - u), h]` for the places t of queries and u of keys in a window.

    Args:
        num_heads: heads H.
        window_size: `(height, width)` of a window, or one number for both.
        device, dtype: of the table.

    Shape:
        `forward()` gives `[H, n, n]`, n places in row-major order; `table` is
        `[(2 * height - 1) * (2 * width - 1), H]`, offsets in row-major order from the most negative one.

    Source: Swin Transformer (arXiv 2103.14030), section 3.2.
    """

    undecayed = ("table",)
    index: torch.Tensor

    def __init__(
        self,
        num_heads: int,
        window_size: int | Size,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.window_size = height, width = as_pair("window_size", window_size)
        self.table = nn.Parameter(
            torch.empty((2 * height - 1) * (2 * width - 1), num_heads, device=device, dtype=dtype)
        )
        row = torch.arange(height, device=device).repeat_interleave(width)
        column = torch.arange(width, device=device).repeat(height)
        offset = (row[:, None] - row + height - 1) * (2 * width - 1) + (column[:, None] - column + width - 1)
        self.register_buffer("index", offset, persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Draws the table from a truncated normal distribution of standard deviation 0.02."""
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self) -> torch.Tensor:
        return self.table[self.index].permute(2, 0, 1)

    def resized(self, table: torch.Tensor) -> torch.Tensor:
        """Returns the table of another square window, resized to this one's by bicubic interpolation.

        Raises:
            ValueError: the table is not that of a square window with as many heads.
        """
        side = math.isqrt(table.shape[0])
        if side * side != table.shape[0] or side % 2 == 0 or table.shape[1] != self.table.shape[1]:
            raise ValueError(
                f"table has shape {list(table.shape)}; it must be [(2 * window - 1) ** 2, {self.table.shape[1]}]."
            )
        height, width = self.window_size
        image = table.T.unflatten(1, (side, side))[None]
        image = F.interpolate(image, size=(2 * height - 1, 2 * width - 1), mode="bicubic")
        return image[0].flatten(1).T.contiguous()
