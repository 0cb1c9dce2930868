"""FIT's parts: layers of groups of tokens and of latents, the cross-attention between them, and how data is grouped."""

from __future__ import annotations

import math
import re
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from undivided.ops import dense_attention

_EPSILON = 1e-6
# Coordinates of fixed positions run from 0 to this.
_COORDINATES = 1000.0


def parse_layers(layers: str) -> tuple[tuple[int, int], ...]:
    """Returns the (local, global) layers of each block: "(2)4(2)" is ((2, 4), (2, 0)).

    Raises:
        ValueError: it is no such string, or a block before the last has no global layers.
    """
    given = f"{layers}0" if layers.endswith(")") else layers
    if not re.fullmatch(r"(\(\d+\)\d+)+", given):
        raise ValueError(
            f'layers="{layers}" must be local layers in brackets and global layers after them, such as "(2)4(2)".'
        )
    blocks = tuple((int(a), int(b)) for a, b in re.findall(r"\((\d+)\)(\d+)", given))
    for index, (_, latent) in enumerate(blocks[:-1]):
        if latent == 0:
            raise ValueError(
                f'layers="{layers}" has no global layers in block {index}; only the last block may have none.'
            )
    return blocks


def chunk_causal_mask(num_groups: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """Returns the boolean `[num_groups * size] x 2`: each group sees itself whole, and the groups before it."""
    group = torch.arange(num_groups, device=device).repeat_interleave(size)
    return group[:, None] >= group[None, :]


def shift_groups(latents: torch.Tensor) -> torch.Tensor:
    """Returns latents `[B, T, m, C]` of the group before each, zeros for the first."""
    return F.pad(latents[:, :-1], (0, 0, 0, 0, 1, 0))


def group_image(images: torch.Tensor, patch_size: int, num_groups: int) -> torch.Tensor:
    """Cuts images into square groups of square patches, both in row-major order.

    Args:
        images: `[B, C, H, W]`.
        patch_size: pixels of a patch's side.
        num_groups: T, a square; its root groups stand along each side.

    Returns:
        `[B, T, n, patch_size ** 2 * C]`, the pixels of a patch in row-major order, their channels last.

    Raises:
        ValueError: `num_groups` is no square, or does not divide the sides.
    """
    side = math.isqrt(num_groups)
    if num_groups < 1 or side * side != num_groups:
        raise ValueError(f"num_groups={num_groups} must be a square: groups stand in rows and columns.")
    for name, length in (("height", images.shape[2]), ("width", images.shape[3])):
        if length % (patch_size * side):
            raise ValueError(
                f"the {name} of images is {length}, which patch_size * sqrt(num_groups) = {patch_size * side} does "
                "not divide."
            )
    batch, channels, height, width = images.shape
    rows, columns = height // (patch_size * side), width // (patch_size * side)
    x = images.reshape(batch, channels, side, rows, patch_size, side, columns, patch_size)
    x = x.permute(0, 2, 5, 3, 6, 4, 7, 1)
    return x.reshape(batch, num_groups, rows * columns, patch_size**2 * channels)


def snake_order(rows: int, columns: int) -> torch.Tensor:
    """Returns the indices `[rows * columns]` of a grid row by row, every other row backwards."""
    order = torch.arange(rows * columns).view(rows, columns)
    order[1::2] = order[1::2].flip(1)
    return order.flatten()


def sines(coordinates: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns `[..., dim]`: the sines of all frequencies `10000^(-2 i / dim)`, then their cosines."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=coordinates.device) / dim)
    angle = coordinates.float()[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()[..., : dim // 2]], dim=-1)


def fixed_positions(rows: int, columns: int, dim: int) -> torch.Tensor:
    """Returns `[rows * columns, dim]`: sines of the row, then of the column; of one line, of the place alone."""

    def along(length: int, width: int) -> torch.Tensor:
        return sines(torch.arange(length) / max(length - 1, 1) * _COORDINATES, width)

    if 1 in (rows, columns):
        return along(rows * columns, dim)
    y, x = along(rows, dim // 2), along(columns, dim // 2)
    grid = (y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1))
    return torch.cat(grid, dim=-1).flatten(0, 1)


def drop_path(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Returns x with whole samples of axis 0 set to zero at this rate, the others divided by what is kept."""
    if not rate or not training:
        return x
    keep = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) >= rate
    return x * (keep / (1 - rate)).to(x.dtype)


def glorot(module: nn.Module) -> None:
    """Draws the weights of linear layers from Glorot's uniform distribution and sets their biases to zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class KeyValueCache:
    """Keys and values `[B, H, length, head_dim]` of one layer, which grow by what it computes."""

    def __init__(self) -> None:
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns all keys and values, the new ones last."""
        if self.key is not None and self.value is not None:
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        self.key, self.value = key, value
        return key, value


class MultiHeadAttention(nn.Module):
    """`proj(softmax(q k^T / sqrt(head_dim)) v)` with queries of x and keys and values of a source.

    Args:
        dim: width of x and of the output.
        source_dim: width of the source.
        inner_dim: width of all heads together.
        num_heads: they divide `inner_dim`.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, dim: int, source_dim: int, inner_dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or inner_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the width {inner_dim}.")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, inner_dim)
        self.k = nn.Linear(source_dim, inner_dim)
        self.v = nn.Linear(source_dim, inner_dim)
        self.proj = nn.Linear(inner_dim, dim)

    def forward(
        self,
        x: torch.Tensor,
        source: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        is_causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        query, key, value = (
            layer(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.q, x), (self.k, source), (self.v, source))
        )
        if cache is not None:
            key, value = cache.append(key, value)
        out = cast(torch.Tensor, dense_attention(query, key, value, attn_mask=mask, is_causal=is_causal))
        return self.proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """`W_2 dropout(GELU(W_1 x))`, the exact GELU."""

    def __init__(self, dim: int, ratio: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim * ratio)
        self.fc2 = nn.Linear(dim * ratio, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.drop(F.gelu(self.fc1(x))))


class TransformerLayer(nn.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`; attention among the tokens of each row of the batch.

    Args:
        dim: width C.
        num_heads: they divide `dim`.
        mlp_ratio: width of the MLP over that of the tokens.
        drop: dropout inside the MLP.
        drop_path: rate at which a residual branch of a row of the batch is left out.
        self_attention: without it there is the MLP alone.

    Shape:
        `forward(x [B, N, C])` gives `[B, N, C]`.

    Source: FIT (arXiv 2305.12689), section 3, and the authors' code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: int = 4,
        drop: float = 0.0,
        drop_path: float = 0.0,
        self_attention: bool = True,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, _EPSILON) if self_attention else None
        self.attn = MultiHeadAttention(dim, dim, dim, num_heads) if self_attention else None
        self.norm2 = nn.LayerNorm(dim, _EPSILON)
        self.mlp = MLP(dim, mlp_ratio, drop)

    def forward(
        self,
        x: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        is_causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        if self.attn is not None and self.norm1 is not None:
            y = self.norm1(x)
            y = self.attn(y, y, mask=mask, is_causal=is_causal, cache=cache)
            x = x + drop_path(y, self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)


class CrossLayer(nn.Module):
    """`x + attn(norm(x), source_norm(source))`: tokens x read a source; there is no MLP unless asked for.

    Latents read tokens, and tokens latents, by the same layer with the roles exchanged. Its inner width is the smaller
    of both, its heads are the fewer of both.

    Args:
        dim: width of x.
        source_dim: width of the source.
        num_heads: they divide the smaller width.
        mlp_ratio: of an MLP after it; 0 for none.
        source_norm: normalise the source.

    Shape:
        `forward(x [B, N, dim], source [B, M, source_dim])` gives `[B, N, dim]`.

    Source: FIT (arXiv 2305.12689), section 3, and the authors' code.
    """

    def __init__(
        self, dim: int, source_dim: int, num_heads: int, *, mlp_ratio: int = 0, source_norm: bool = True
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, _EPSILON)
        self.source_norm = nn.LayerNorm(source_dim, _EPSILON) if source_norm else nn.Identity()
        self.attn = MultiHeadAttention(dim, source_dim, min(dim, source_dim), num_heads)
        self.mlp_norm = nn.LayerNorm(dim, _EPSILON) if mlp_ratio else None
        self.mlp = MLP(dim, mlp_ratio) if mlp_ratio else None

    def forward(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm(x), self.source_norm(source))
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x
