"""Where chunks of a text begin: a small predictor over keys, what it learns from, and how its scores are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

# Gaps between tokens that are worked on at once: their windows are `2 * window` times as large as the keys.
_GAPS = 2048
_EPSILON = 1e-6


class BoundaryPredictor(nn.Module):
    """Scores each gap between two tokens by the keys around it: high where the attention to come tells them apart.

    The `2 * window` keys around a gap attend to each other and are normalised; l and r are the means of the left and of
    the right half; `logit = MLP([l, r, |l - r|, l * r, cos(l, r)])`. Beyond the ends of the text keys are zero.

    Args:
        key_dim: width of a token's keys, heads side by side.
        window: tokens w on each side of a gap.
        num_heads: heads of the attention inside a window.
        hidden: width of the MLP's hidden layer.
        gated: weigh the tokens of a half by a learned softmax instead of alike.

    Raises:
        ValueError: `num_heads` does not divide `key_dim`, or `window` is less than 1.

    Source: Dynamic Hierarchical Sparse Attention (arXiv 2510.24606), boundary prediction; the authors' code.
    """

    def __init__(
        self, key_dim: int, window: int = 4, num_heads: int = 4, hidden: int = 256, *, gated: bool = False
    ) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window={window} must be at least 1.")
        if num_heads < 1 or key_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide key_dim={key_dim}.")
        self.key_dim, self.window, self.num_heads, self.hidden = key_dim, window, num_heads, hidden
        self.attention = nn.MultiheadAttention(key_dim, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(key_dim)
        self.gate = nn.Linear(key_dim, 1, bias=False) if gated else None
        self.mlp = nn.Sequential(nn.Linear(4 * key_dim + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, key: torch.Tensor) -> torch.Tensor:
        """Returns the logit of each gap, `[batch, length - 1]` float32; gap p is before token p + 1.

        Args:
            key: `[batch, heads, length, head_dim]`, with rotary positions, as attention reads them.

        Raises:
            ValueError: the heads are not `key_dim` wide together, or there are fewer than `2 * window` tokens.
        """
        batch, heads, length, head_dim = key.shape
        if heads * head_dim != self.key_dim:
            raise ValueError(f"key has {heads} heads of {head_dim}, but key_dim={self.key_dim}.")
        if length < 2 * self.window:
            raise ValueError(
                f"key has {length} tokens, fewer than the {2 * self.window} of a window of {self.window} on both sides."
            )
        weight = cast(torch.Tensor, self.attention.in_proj_weight)
        x = key.transpose(1, 2).flatten(2).to(weight.dtype)
        x = F.pad(x, (0, 0, self.window - 1, self.window - 1))
        # Windows overlap: each token is projected once.
        projected = F.linear(x, weight, self.attention.in_proj_bias)
        # [batch, gaps, 3 * key_dim, 2 * window], a view.
        windows = projected.unfold(1, 2 * self.window, 1)
        return torch.cat([self._logits(part) for part in windows.split(_GAPS, dim=1)], dim=1)

    def _logits(self, windows: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(3, 4).flatten(0, 1)
            for part in windows.chunk(3, dim=2)
        )
        # As products: windows are far shorter than the tiles of fused kernels.
        logits = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
        mixed = (logits.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        encoded = self.norm(self.attention.out_proj(mixed)).unflatten(0, windows.shape[:2])
        left, right = (self._mean(half) for half in encoded.split(self.window, dim=2))
        likeness = F.cosine_similarity(left, right, dim=-1, eps=_EPSILON)[..., None]
        features = torch.cat([left, right, (left - right).abs(), left * right, likeness], dim=-1)
        logits = self.mlp(features).squeeze(-1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _mean(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return tokens.mean(dim=2)
        return (self.gate(tokens).softmax(dim=2) * tokens).sum(dim=2)

    def load_official(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Loads the weights of the authors' `BoundarySimilarityAttn`.

        Raises:
            RuntimeError: a weight is missing or has another shape.
        """
        names = {"enc.mha.": "attention.", "enc.norm.": "norm.", "pool.gate.": "gate."}
        own = {}
        for name, weight in state_dict.items():
            theirs = next((prefix for prefix in names if name.startswith(prefix)), "")
            own[names.get(theirs, "") + name.removeprefix(theirs)] = weight
        self.load_state_dict(own)


def attention_ratios(
    attention: torch.Tensor, window: int = 4, sliding_window: int | None = None
) -> torch.Tensor:
    """Returns how differently the tokens to come attend to both sides of each gap, float64 `[batch, length - 1]`.

    For the gap before token p: the mass that rows from `p + window - 1` on give to the `window` keys before it, and to
    the `window` keys from it on; the larger over the smaller. 1 within `2 * window` tokens of an end, where nothing is
    told.

    Args:
        attention: weights averaged over heads, `[batch, length, length]`.
        window: keys on each side.
        sliding_window: count only so many rows, for layers with a window.

    Source: Dynamic Hierarchical Sparse Attention (arXiv 2510.24606), training data; the authors' code.
    """
    batch, length, _ = attention.shape
    sums = F.pad(attention.double().cumsum(1).cumsum(2), (1, 0, 1, 0))
    gap = torch.arange(1, length, device=attention.device)
    first = (gap + window - 1).clamp(max=length)
    last = torch.full_like(gap, length)
    if sliding_window is not None:
        last = (first + sliding_window).clamp(max=length)
    low, high = (gap - window).clamp(min=0), (gap + window).clamp(max=length)
    mass = lambda start, stop: (  # noqa: E731
        sums[:, last, stop] - sums[:, first, stop] - sums[:, last, start] + sums[:, first, start]
    )
    past, future = mass(low, gap), mass(gap, high)
    ratio = (torch.maximum(past, future) + _EPSILON) / (torch.minimum(past, future) + _EPSILON)
    return ratio.masked_fill(~inner_gaps(length, window, attention.device), 1.0)


def inner_gaps(length: int, window: int, device: torch.device | None = None) -> torch.Tensor:
    """Returns which gaps are at least `2 * window` tokens from both ends, boolean `[length - 1]`."""
    gap = torch.arange(1, length, device=device)
    return (gap >= 2 * window) & (gap <= length - 2 * window)


def boundary_labels(
    attention: torch.Tensor,
    window: int = 4,
    alpha: float = 2.0,
    beta: float = math.log(2),
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Returns the target of each gap, `sigmoid(alpha * (log ratio - beta))`, float32 `[batch, length - 1]`.

    A gap is a boundary from 0.5 on: with the default beta, where one side gets twice the mass of the other.

    Args:
        attention, window, sliding_window: as in `attention_ratios`.
        alpha, beta: slope and centre.
    """
    ratio = attention_ratios(attention, window, sliding_window)
    return torch.sigmoid(alpha * (ratio.log() - beta)).float()


def boundary_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float = 2.0,
    positive_weight: float = 1.3,
) -> torch.Tensor:
    """Returns the mean focal cross-entropy `(1 - p_t)^gamma * bce` over the gaps of `mask`.

    Args:
        logits, targets: `[batch, gaps]`; targets of 0 and 1.
        mask: boolean, broadcasts to them.
        gamma: how little is learned from what is known.
        positive_weight: factor of the boundaries.
    """
    entropy = F.binary_cross_entropy_with_logits(
        logits, targets, pos_weight=torch.tensor(positive_weight, device=logits.device), reduction="none"
    )
    probability = logits.sigmoid()
    right = probability * targets + (1 - probability) * (1 - targets)
    mask = mask.expand_as(logits)
    return ((1 - right) ** gamma * entropy * mask).sum() / mask.sum().clamp(min=1)


def decode_boundaries(
    logits: torch.Tensor,
    threshold: float = 1.1,
    *,
    max_chunks: int,
    nms: int = 8,
    forced: Sequence[int] = (),
    window: int = 0,
) -> torch.Tensor:
    """Returns where chunks begin, ascending, int64 `[batch, chunks + 1]`: 0, the boundaries, the length.

    Gaps above the threshold, the highest first, unless one within `nms` tokens is a boundary already, until there are
    `max_chunks` boundaries. Rows with fewer end in copies of the length, which are empty chunks.

    Args:
        logits: of the gaps, `[batch, length - 1]`.
        threshold: of the logit, not of a probability.
        max_chunks: most boundaries, forced ones included, the ends of the text not.
        nms: half width of the suppression; 0 for none.
        forced: tokens before which a chunk begins whatever the logits say. Behind the first of them no other does.
        window: gaps nearer to an end of the text than so many tokens are none.

    Raises:
        ValueError: `max_chunks` is less than 1 or than the forced ones, or a forced one is no gap.

    Source: Dynamic Hierarchical Sparse Attention (arXiv 2510.24606); suppression and caps: the authors' code.
    """
    batch, gaps = logits.shape
    length = gaps + 1
    if max_chunks < max(len(forced), 1):
        raise ValueError(f"max_chunks={max_chunks} must be at least {max(len(forced), 1)}.")
    for place in forced:
        if not 1 <= place < length:
            raise ValueError(f"forced has {place}, but gaps are before tokens 1 to {length - 1}.")
    gap = torch.arange(1, length, device=logits.device)
    alive = (logits > threshold) & (gap >= window) & (gap <= length - window)
    chosen = torch.zeros_like(alive)
    for place in forced:
        chosen[:, place - 1] = True
        alive = alive & ((gap - place).abs() > nms)
    if forced:
        alive = alive & (gap <= min(forced))
    scores = logits.masked_fill(~alive, float("-inf"))
    # The greedy choice, all at once: whoever is the highest within its reach is taken, and silences its reach. Of equal
    # ones the first is taken.
    while nms and alive.any():
        top, where = F.max_pool1d(scores, 2 * nms + 1, stride=1, padding=nms, return_indices=True)
        taken = alive & (where == gap - 1) & (top > float("-inf"))
        chosen |= taken
        reach = F.max_pool1d(chosen.float(), 2 * nms + 1, stride=1, padding=nms) > 0
        alive = alive & ~reach
        scores = scores.masked_fill(~alive, float("-inf"))
    chosen = chosen if nms else chosen | alive
    order = logits.masked_fill(~chosen, float("-inf"))
    for place in forced:
        order[:, place - 1] = float("inf")
    count = min(int(chosen.sum(dim=1).max()), max_chunks)
    if count == 0:
        return torch.tensor([0, length], device=logits.device).expand(batch, -1)
    best, places = order.topk(count, dim=1)
    starts = torch.where(best > float("-inf"), places + 1, length).sort(dim=1).values
    ends = torch.tensor([0, length], device=logits.device).expand(batch, -1)
    return torch.cat([ends[:, :1], starts, ends[:, 1:]], dim=1)


def fixed_boundaries(
    length: int, size: int, batch: int = 1, device: torch.device | None = None
) -> torch.Tensor:
    """Returns boundaries every `size` tokens, int64 `[batch, chunks + 1]`."""
    starts = torch.arange(0, length, size, device=device)
    return F.pad(starts, (0, 1), value=length).expand(batch, -1)
