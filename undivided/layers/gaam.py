"""Gaussian adaptive attention: features are weighed by densities of their own normalised values, at linear cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from undivided.layers.gqa import GQAttention
from undivided.ops.gaussian import EPS, gaussian_gate, gaussian_weights

if TYPE_CHECKING:
    from undivided.layers.rotary import PositionEmbeddings
    from undivided.spec import AttentionSpec


class GaussianAdaptiveAttention(nn.Module):
    """The published layer: `out = x * m`, with m a product of Gaussian densities of x, normalised along an axis.

    The axis is cut into heads of equal length (the last takes the remainder), each with statistics, offsets and widths
    of its own: see `gaussian_gate`. Its `2 H J` parameters are all there are.

    Args:
        axis: of statistics, normalisation and heads; not the batch.
        num_heads: H; the axis is at least `2 H` long.
        num_gaussians: densities J of a head.
        eps: added to the variance.
        padding_value: values equal to it are padding: zero in the statistics, and returned as they are. Their own
            densities count in the normalisation, as in the authors' layer.
        masked_stats: leave padding out of statistics and normalisation, which the authors' layer does not.
        generator: of the first widths, `exp` of normal numbers.

    Raises:
        TypeError: `axis` is no integer.
        ValueError: a number is less than 1.

    Source: Gaussian Adaptive Attention (arXiv 2401.11143), section 3, and the authors' GaussianBlock.py.
    """

    def __init__(
        self,
        axis: int,
        num_heads: int = 1,
        num_gaussians: int = 1,
        *,
        eps: float = EPS,
        padding_value: float | None = None,
        masked_stats: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(axis, int) or isinstance(axis, bool):
            raise TypeError(f"axis={axis!r} must be an integer.")
        if num_heads < 1 or num_gaussians < 1:
            raise ValueError(f"num_heads={num_heads} and num_gaussians={num_gaussians} must be at least 1.")
        if masked_stats and padding_value is None:
            raise ValueError("masked_stats=True needs padding_value.")
        self.axis, self.num_heads, self.eps = axis, num_heads, eps
        self.padding_value, self.masked_stats = padding_value, masked_stats
        self.offset = nn.Parameter(torch.zeros(num_heads, num_gaussians))
        self.width = nn.Parameter(torch.randn(num_heads, num_gaussians, generator=generator).exp())

    def forward(
        self, x: torch.Tensor, need_weights: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Gates a tensor of two or more axes; with `need_weights` also returns m, of its shape.

        Raises:
            ValueError: x has fewer than two axes, the axis is out of range, or it is too short for the heads.
        """
        axis = self._checked_axis(x)
        outs, weights, start = [], [], 0
        for first, heads, length in self._chunks(x.shape[axis]):
            part = x.narrow(axis, start, heads * length).movedim(axis, 1)
            start += heads * length
            # [outer, heads, length, inner]
            rows = (
                part.unflatten(1, (heads, length)).flatten(3)
                if x.dim() > 2
                else part.unflatten(1, (heads, length))[..., None]
            )
            own = slice(first, first + heads)
            out, weight = self._gate(rows, self.offset[own], self.width[own], need_weights)
            outs.append(out.reshape(part.shape).movedim(1, axis))
            if weight is not None:
                weights.append(weight.reshape(part.shape).movedim(1, axis))
        out = torch.cat(outs, dim=axis)
        return (out, torch.cat(weights, dim=axis)) if need_weights else out

    def _gate(
        self, rows: torch.Tensor, offset: torch.Tensor, width: torch.Tensor, need_weights: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.padding_value is None:
            weight = gaussian_weights(rows, offset, width, eps=self.eps) if need_weights else None
            return gaussian_gate(rows, offset, width, eps=self.eps), weight
        real = rows != self.padding_value
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        known = wide * real
        count = (
            real.sum(2, keepdim=True)
            if self.masked_stats
            else torch.full_like(real[:, :, :1], rows.shape[2], dtype=torch.long)
        )
        mean = known.sum(2, keepdim=True) / count.clamp(min=1)
        apart = known - mean if not self.masked_stats else (wide - mean) * real
        variance = apart.square().sum(2, keepdim=True) / (count - 1).clamp(min=1) + self.eps
        offset, width = (p.to(wide.dtype)[..., None, None].transpose(0, 1) for p in (offset, width))
        logits = -((wide[:, None] - mean[:, None] - offset).square() / (2 * width.square())).sum(1) / variance
        if self.masked_stats:
            # A row of padding alone has no weights.
            logits = logits.masked_fill(~real, float("-inf")).masked_fill(count == 0, 0.0)
        weight = torch.softmax(logits, dim=2)
        return torch.where(real, (wide * weight).to(rows.dtype), rows), weight

    def _checked_axis(self, x: torch.Tensor) -> int:
        if x.dim() < 2 or not -x.dim() <= self.axis < x.dim() or self.axis % x.dim() == 0:
            raise ValueError(
                f"x {list(x.shape)} has no axis {self.axis} that could be weighed; it needs two or more axes, of which "
                "the first is the batch."
            )
        axis = self.axis % x.dim()
        if x.shape[axis] < 2 * self.num_heads:
            raise ValueError(
                f"x {list(x.shape)} is {x.shape[axis]} long on axis {self.axis}; {self.num_heads} heads need at least "
                f"{2 * self.num_heads}, two values each."
            )
        return axis

    def _chunks(self, length: int) -> list[tuple[int, int, int]]:
        """First head, number of heads and length of each run of heads of equal length."""
        size, rest = divmod(length, self.num_heads)
        if rest == 0:
            return [(0, self.num_heads, size)]
        runs = [(0, self.num_heads - 1, size), (self.num_heads - 1, 1, size + rest)]
        return [run for run in runs if run[1]]


class GaussianAdaptiveBlock(nn.Module):
    """Layers of Gaussian adaptive attention, each added to its input: `x <- x + layer(x)`.

    Args:
        axes, num_heads, num_gaussians: one number a layer, or one for all of `num_layers`.
        num_layers: how many; default the length of the lists.
        options: as in `GaussianAdaptiveAttention`.

    Raises:
        ValueError: the lists differ in length.

    Source: Gaussian Adaptive Attention (arXiv 2401.11143), and the authors' GaussianBlock.py.
    """

    def __init__(
        self,
        axes: int | Sequence[int],
        num_heads: int | Sequence[int] = 4,
        num_gaussians: int | Sequence[int] = 5,
        num_layers: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        lists = [x for x in (axes, num_heads, num_gaussians) if not isinstance(x, int)]
        count = num_layers if num_layers is not None else len(lists[0]) if lists else 3
        rows = [[x] * count if isinstance(x, int) else list(x) for x in (axes, num_heads, num_gaussians)]
        if any(len(row) != count for row in rows):
            raise ValueError(
                f"axes, num_heads and num_gaussians have {', '.join(str(len(row)) for row in rows)} entries; they need "
                f"{count} each, one a layer."
            )
        self.layers = nn.ModuleList(
            GaussianAdaptiveAttention(*row, **options) for row in zip(*rows, strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class DensityAdaptiveAttention(nn.Module):
    """The form of the experiments: features of an encoder's layers are weighed by densities over the layers.

    With y the mean over time of `x [B, layers, time, d]`, mean and biased variance over a head's layers, and
    `t = (y - (mean + delta)) / sqrt(variance + 1e-5)`: `out = x * exp(-t^2 / (2 c))`. Heads cut the layers, H of them
    with `2 H d` parameters. c stands for a variance: it is not squared, and nothing is normalised to a sum of one. A
    head of a single layer weighs it with 1: there is nothing to compare it with.

    Args:
        hidden_size: width d.
        num_heads: H, a divisor of the number of layers; 8 in the authors' first version, 1 in their second.

    Raises:
        ValueError: a number is less than 1.

    Source: Gaussian Adaptive Attention (arXiv 2401.11143), experiments, and the authors' CIFAR100/DAAMv1.py.
    """

    def __init__(self, hidden_size: int, num_heads: int = 8) -> None:
        super().__init__()
        if hidden_size < 1 or num_heads < 1:
            raise ValueError(f"hidden_size={hidden_size} and num_heads={num_heads} must be at least 1.")
        self.num_heads = num_heads
        self.delta = nn.Parameter(torch.zeros(num_heads, 1, hidden_size))
        self.c = nn.Parameter(torch.full((num_heads, 1, hidden_size), 2.0))

    def forward(
        self, x: torch.Tensor, need_weights: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Weighs `[B, layers, time, d]`, or `[B, layers, d]`; weights are `[B, layers, d]`.

        Raises:
            ValueError: the shape does not fit, H does not divide the layers, or a c is not positive (on a CPU).
        """
        if x.dim() not in (3, 4) or x.shape[-1] != self.delta.shape[-1]:
            raise ValueError(
                f"x {list(x.shape)} must be [batch, layers, {self.delta.shape[-1]}] or [batch, layers, time, "
                f"{self.delta.shape[-1]}]."
            )
        if x.shape[1] % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide the {x.shape[1]} layers of x.")
        # On a GPU the check would wait for the device.
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((self.c > 0).all()):
            raise ValueError(
                "c has values that are not positive, and the density divides by it; lower the learning rate."
            )
        pooled = x.mean(2) if x.dim() == 4 else x
        rows = pooled.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (self.num_heads, -1))
        mean = rows.mean(2, keepdim=True)
        variance = (rows.square().mean(2, keepdim=True) - mean.square()).abs() + EPS
        t = (rows - (mean + self.delta)) / (variance + 1e-5).sqrt()
        weights = torch.exp(-t.square() / (2 * self.c)).flatten(1, 2)
        out = x * (weights[:, :, None] if x.dim() == 4 else weights).to(x.dtype)
        return (out, weights) if need_weights else out


class GaussianGQAttention(GQAttention):
    """Grouped-query attention behind a Gaussian gate of each token's features: `y = GQA(x + x * m(x))`.

    The gate looks at one token at a time, so that the mechanism is causal and caches what grouped-query attention
    does.

    Args:
        gate_heads, num_gaussians: of the gate over the features.
        hidden_size, num_attention_heads, num_key_value_heads, head_dim: as in `GQAttention`, with the other options.

    Source: Gaussian Adaptive Attention (arXiv 2401.11143), section on use with dot-product attention.
    """

    mechanism = "gaam"

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        gate_heads: int = 4,
        num_gaussians: int = 5,
        query_bias: bool = False,
        key_value_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
        super().__init__(
            hidden_size, num_attention_heads, num_key_value_heads, head_dim, query_bias=query_bias,
            key_value_bias=key_value_bias, output_bias=output_bias, scale=scale, softcap=softcap, layer_idx=layer_idx,
        )  # fmt: skip
        self.gate = GaussianAdaptiveAttention(-1, gate_heads, num_gaussians)

    def heads(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return super().heads(hidden_states + self.gate(hidden_states), position_embeddings)

    @property
    def spec(self) -> AttentionSpec:
        """That of grouped-query attention: the gate stands before the projections."""
        return super().spec
