"""A head for classification on all hidden layers of a frozen encoder, with a choice of attention over the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from undivided.layers.gaam import DensityAdaptiveAttention, GaussianAdaptiveBlock
from undivided.ops import dense_attention

ATTENTIONS = ("daam", "gaam", "gqdaam", "mha", "mha_bn", "none")


class LayerwiseGAT(nn.Module):
    """Classifies by an encoder's hidden layers: mean over time, attention over layers, two convolutions, a linear map.

    Each layer's d features are an image, square where d is (else of the two factors of d that are nearest, at most 1 to
    2), and the layers are its channels: `Conv(L -> 512) -> ReLU -> Conv(512 -> L) -> ReLU -> Linear(L d -> classes)`,
    3 x 3 kernels.

    Args:
        num_layers: encoder layers L, without the embedding.
        hidden_size: width d.
        num_classes: classes.
        attention: over the layers: "daam" (density), "gaam" (published layer, residual), "gqdaam" (density, then
            grouped-query attention of half the width), "mha", "mha_bn" (with batch normalisation) or "none".
        num_heads: of the density, a divisor of L; of "gaam" over the features.
        channels: between the convolutions.

    Raises:
        ValueError: a size does not fit, or `attention` is unknown.

    Source: Gaussian Adaptive Attention (arXiv 2401.11143), experiments, and the authors' CIFAR100 scripts. The grouped-
    query attention there sums queries of a group before the softmax, and its 512 features do not fit the image of
    32 x 32 that follows; here each query has its own softmax, and the image is 16 x 32.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        num_classes: int,
        *,
        attention: str = "daam",
        num_heads: int = 8,
        channels: int = 512,
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention={attention!r} is not one of {', '.join(map(repr, ATTENTIONS))}.")
        if attention == "gqdaam" and hidden_size % 16:
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of 16: eight heads of half of it."
            )
        width = hidden_size if attention != "gqdaam" else hidden_size // 2
        height = max(h for h in range(1, math.isqrt(width) + 1) if width % h == 0)
        if width > 2 * height * height:
            near = math.isqrt(width - 1) + 1
            raise ValueError(f"{width} features make no image of at most 1 to 2; pad them to {near * near}.")
        if attention in ("daam", "gqdaam") and num_layers % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide num_layers={num_layers}.")
        self.attention, self.image = attention, (height, width // height)
        if attention in ("daam", "gqdaam"):
            self.mix: nn.Module = DensityAdaptiveAttention(hidden_size, num_heads)
        elif attention == "gaam":
            self.mix = GaussianAdaptiveBlock(-1, num_heads, 5, 1)
        elif attention in ("mha", "mha_bn"):
            self.mix = nn.MultiheadAttention(hidden_size, 8, batch_first=True)
        else:
            self.mix = nn.Identity()
        if attention == "gqdaam":
            self.reduce = nn.Linear(hidden_size, width)
            self.grouped = _LayerGQA(width)
        if attention == "mha_bn":
            self.norm = nn.BatchNorm1d(num_layers)
        self.conv1 = nn.Conv2d(num_layers, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, num_layers, 3, padding=1)
        self.classifier = nn.Linear(num_layers * width, num_classes)
        for module in (self.conv1, self.conv2, self.classifier):
            nn.init.xavier_uniform_(module.weight)

    def forward(self, hidden_states: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns logits `[B, classes]`.

        Args:
            hidden_states: `[B, L, d]`, or what transformers returns with `output_hidden_states=True`: the embedding
                and L tensors `[B, time, d]`.
        """
        x = hidden_states if isinstance(hidden_states, torch.Tensor) else pooled_layers(hidden_states)
        if self.attention in ("mha", "mha_bn"):
            x = self.mix(x, x, x, need_weights=False)[0]
        else:
            x = self.mix(x)
        if self.attention == "mha_bn":
            x = self.norm(x)
        if self.attention == "gqdaam":
            x = self.grouped(self.reduce(x))
        x = x.unflatten(-1, self.image)
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.classifier(x.flatten(1))


class _LayerGQA(nn.Module):
    """Grouped-query attention over layers: eight query heads, two key heads, a norm before the output projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head_dim = width // 8
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, 2 * self.head_dim)
        self.v_proj = nn.Linear(width, 2 * self.head_dim)
        self.norm = nn.LayerNorm(width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = cast(torch.Tensor, dense_attention(query, key, value))
        return self.o_proj(self.norm(out.transpose(1, 2).flatten(2)))


def pooled_layers(hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns `[B, L, d]` from the tuple of transformers: the embedding left out, the mean over time of the others.

    Raises:
        ValueError: there is only the embedding.
    """
    if len(hidden_states) < 2:
        raise ValueError(
            "hidden_states has no layer beside the embedding; ask the encoder for output_hidden_states=True."
        )
    return torch.stack([layer.mean(1) for layer in hidden_states[1:]], dim=1)
