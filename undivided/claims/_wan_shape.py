"""A transformer of the shape of Wan2.1-1.3B with random weights: what one denoising step of such a model costs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from undivided.convert.sla import rotate_pairs

# Wan2.1-T2V-1.3B: a video of 81 frames at 480 x 832 is 21 x 30 x 52 tokens.
LAYERS, WIDTH, HEADS, MLP, TEXT_TOKENS, GRID = 30, 1536, 12, 8960, 512, (21, 30, 52)


class DenseCore(nn.Module):
    """Softmax attention of all pairs, through scaled_dot_product_attention."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class SelfAttention(nn.Module):
    """Self-attention with norms over all channels and rotations; `core` is what SLA exchanges.

    Args:
        width: channels.
        heads: heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_query, self.norm_key = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.core: nn.Module = DenseCore()

    def forward(self, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        query, key = self.norm_query(self.query(x)), self.norm_key(self.key(x))
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, self.value(x))
        )
        out = self.core(rotate_pairs(query, *tables), rotate_pairs(key, *tables), value)
        return self.out(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of video tokens to the tokens of a text.

    Args:
        width: channels.
        heads: heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_query, self.norm_key = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        parts = self.norm_query(self.query(x)), self.norm_key(self.key(text)), self.value(text)
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer: self-attention and MLP modulated by the time, cross-attention between them.

    Args:
        width: channels.
        heads: heads.
        mlp: channels of the MLP.
    """

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attention, self.cross = SelfAttention(width, heads), CrossAttention(width, heads)
        self.norm1, self.norm3 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(approximate="tanh"), nn.Linear(mlp, width))

    def forward(
        self,
        x: torch.Tensor,
        text: torch.Tensor,
        time: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).chunk(6)
        x = torch.addcmul(x, self.attention(self.norm1(x) * (1 + scale1) + shift1, tables), gate1)
        x = x + self.cross(self.norm2(x), text)
        return torch.addcmul(x, self.mlp(self.norm3(x) * (1 + scale2) + shift2), gate2)


class WanShaped(nn.Module):
    """The layers of the transformer between its embeddings, with random weights.

    Args:
        layers: how many.
        width: channels.
        heads: heads.
        mlp: channels of the MLP.
    """

    def __init__(self, layers: int = LAYERS, width: int = WIDTH, heads: int = HEADS, mlp: int = MLP) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, heads, mlp) for _ in range(layers)])
        self.head_dim = width // heads

    def forward(
        self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor, grid: tuple[int, ...]
    ) -> torch.Tensor:
        tables = self.tables(grid, x.device, x.dtype)
        for block in self.blocks:
            x = block(x, text, time, tables)
        return x

    def tables(
        self, grid: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of a rotation along each axis of the grid, `[1, tokens, 1, head_dim]`."""
        pairs = self.head_dim // 2
        share = pairs // 3
        angles = []
        for axis, count in enumerate((pairs - 2 * share, share, share)):
            frequency = 1e4 ** (-torch.arange(count, device=device, dtype=torch.float32) / max(count, 1))
            shape = [1] * len(grid)
            shape[axis] = grid[axis]
            position = torch.arange(grid[axis], device=device, dtype=torch.float32).view(*shape).expand(grid)
            angles.append(position.flatten()[:, None] * frequency)
        table = torch.cat(angles, 1).repeat_interleave(2, dim=1)[None, :, None]
        return table.cos().to(dtype), table.sin().to(dtype)
