"""Perturbed grouped-query attention: noise is subtracted from what heads give, or from their scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from undivided.layers.vision_gqa import VisionGQA

if TYPE_CHECKING:
    from undivided.layers.rotary import PositionEmbeddings
    from undivided.spec import AttentionSpec

TARGETS = ("output", "scores")


class PerturbedGQA(VisionGQA):
    """PGQA: grouped-query attention from whose outputs noise of their own size is subtracted.

    `out_h <- out_h - (std(out_h) z_h + mean(out_h))` for the flattened output `[N D]` of each head, with noise z shared
    by all images of a batch: uniform, its entry (i, i) zero for the i-th head of a key head, each row standardised.
    In training and in evaluation, as in the authors' code. The abstract speaks of Gaussian noise subtracted from the
    attention maps: with `target="scores"` that is what is done to the logits, `S - std(S_n) z_hn`, z normal with a zero
    diagonal, row by row; it forms the N x N matrices.

    Args:
        dim, num_heads, num_key_value_heads: as in `VisionGQA`; G divides H.
        target: "output" (the authors' code) or "scores" (the abstract).
        generator: of the noise; default torch's.
        options: as in `VisionGQA`.

    Raises:
        ValueError: an unknown target, or G does not divide H.

    Source: Key-Driven Grouped Query Attention (arXiv 2408.08454), abstract, and the authors' code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_key_value_heads: int | None = None,
        *,
        target: str = "output",
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, num_key_value_heads, **options)
        if target not in TARGETS:
            raise ValueError(f"target={target!r} is not one of {', '.join(map(repr, TARGETS))}.")
        if num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide num_heads={num_heads}."
            )
        self.target = target
        self.generator = generator

    def extra_repr(self) -> str:
        return f"target={self.target!r}"

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if self.target == "scores":
            return super().attend(query, key, value, self._noisy(query, key, mask))
        out = super().attend(query, key, value, mask)
        flat = out.flatten(2)
        std, mean = torch.std_mean(flat, dim=-1, keepdim=True)
        noise = self.noise(out.shape[2], value.shape[3]).to(out.device, out.dtype)
        return (flat - (std * noise.flatten(1) + mean)).unflatten(2, out.shape[2:])

    def noise(self, num_tokens: int, width: int) -> torch.Tensor:
        """Draws the standardised noise `[H, N, width]` of one forward, float32, on the generator's device."""
        group = self.num_heads // self.num_key_value_heads
        rows = self._draw(torch.rand, self.num_key_value_heads, group, num_tokens * width)
        return _standardised(_without_diagonal(rows)).flatten(0, 1).unflatten(1, (num_tokens, width))

    def _noisy(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The mask with the noise of the logits; their row means drop out of the softmax."""
        groups = self.num_heads // self.num_key_value_heads
        scores = self.scale * (query @ key.repeat_interleave(groups, dim=1).transpose(-2, -1))
        rows = self._draw(torch.randn, self.num_heads, *scores.shape[2:]).to(scores.device, scores.dtype)
        noise = -scores.std(-1, keepdim=True) * _standardised(_without_diagonal(rows))
        if mask is None:
            return noise
        return noise.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else noise + mask

    def _draw(self, draw: Callable[..., torch.Tensor], *shape: int) -> torch.Tensor:
        device = self.q_proj.weight.device if self.generator is None else self.generator.device
        return draw(shape, generator=self.generator, device=device)

    @property
    def spec(self) -> AttentionSpec:
        """The operator between the projections, as a specification; the noise is an input."""
        from undivided.spec.systems import pgqa

        if self.target == "scores":
            raise ValueError(
                'target="scores" has no specification: its noise is as large as the scores, so a baseline would '
                "depend on the state."
            )
        return pgqa()

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None = None
    ) -> dict[str, torch.Tensor]:
        query, key, value = self.heads(hidden_states)
        noise = self.noise(query.shape[2], value.shape[3]).to(value.device)
        return {"query": query, "key": key, "value": value, "noise": noise}


def _without_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    diagonal = torch.eye(*matrix.shape[-2:], dtype=torch.bool, device=matrix.device)
    return matrix.masked_fill(diagonal, 0.0)


def _standardised(rows: torch.Tensor) -> torch.Tensor:
    std, mean = torch.std_mean(rows, dim=-1, keepdim=True)
    return (rows - mean) / torch.where(std == 0, torch.ones_like(std), std)
