"""Models of the shape of NAT-Tiny and DiNAT-Tiny with random weights: what a form of the attention is worth in one."""

from __future__ import annotations

import torch
from torch import nn

from undivided.layers.gna import NeighborhoodAttention

# NAT-Tiny: windows of 7 x 7, heads of 32 channels; DiNAT has every second block of a level dilated.
DEPTHS, WIDTH, WINDOW, MLP_RATIO = (3, 4, 18, 5), 64, 7, 3
DILATIONS = (8, 4, 2, 1)


class Block(nn.Module):
    """Neighborhood attention and an MLP, on maps `[batch, height, width, channels]`.

    Args:
        width: channels.
        dilation: of the windows.
    """

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = NeighborhoodAttention(width, width // 32, WINDOW, dilation=dilation)
        hidden = MLP_RATIO * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = (x.shape[1], x.shape[2])
        x = x + self.attention(self.norm1(x).flatten(1, 2), size).unflatten(1, size)
        return x + self.mlp(self.norm2(x))


class NATShaped(nn.Module):
    """The classifier: a stem of two convolutions, four levels, a mean.

    Args:
        is_dilated: DiNAT instead of NAT.
        depths: blocks of each level.
    """

    def __init__(self, is_dilated: bool = False, depths: tuple[int, ...] = DEPTHS) -> None:
        super().__init__()

        def halved(narrow: int, wide: int) -> nn.Conv2d:
            return nn.Conv2d(narrow, wide, 3, stride=2, padding=1)

        layers: list[nn.Module] = [halved(3, WIDTH // 2)]
        for level, (depth, step) in enumerate(zip(depths, DILATIONS, strict=True)):
            width = WIDTH * 2**level
            layers.append(halved(width // 2, width))
            layers += [Block(width, step if is_dilated and block % 2 else 1) for block in range(depth)]
        self.layers = nn.ModuleList(layers)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.permute(0, 2, 3, 1)
        for layer in self.layers:
            x = layer(x) if isinstance(layer, Block) else layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.head(self.norm(x).mean((1, 2)))


def attend_by(model: nn.Module, backend: str) -> None:
    """Sets the backend of all neighborhood attention in a model.

    Args:
        model: it is changed.
        backend: of `neighborhood_attention`.
    """
    for module in model.modules():
        if isinstance(module, NeighborhoodAttention):
            module.backend = backend
