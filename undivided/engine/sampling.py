"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen.

    Args:
        temperature: divides the logits; 0 takes the most probable token.
        top_p: only the most probable tokens that together have at least this probability are drawn from.
        seed: of the request's own random numbers.

    Raises:
        ValueError: a number is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; use 0 or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not above 0 and at most 1.")

    def uniforms(self, count: int) -> torch.Tensor:
        """Returns the request's random numbers in [0, 1), one a token.

        They depend on the seed alone, so that neither the batch nor the place in it changes what is drawn.
        """
        return torch.rand(count, generator=torch.Generator().manual_seed(self.seed))


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """Draws one token a row by inverting the cumulative distribution.

    Over the tokens in falling order of probability, those before which less than `top_p` has accumulated are kept,
    and the first one whose accumulated share of their sum exceeds `uniform` is drawn.

    Args:
        logits: `[batch, vocabulary]`.
        temperature: `[batch]`; rows of 0 take the most probable token.
        top_p: `[batch]`.
        uniform: `[batch]`, in [0, 1).

    Returns:
        Token ids `[batch]`.

    Source: The Curious Case of Neural Text Degeneration (arXiv 1904.09751), section 3.1.
    """
    greedy = logits.argmax(dim=-1)
    warm = temperature > 0
    scaled = logits.float() / torch.where(warm, temperature, 1.0)[:, None]
    probability, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    reached = probability.cumsum(dim=-1)
    kept = reached - probability < top_p[:, None]
    target = uniform[:, None] * probability.masked_fill(~kept, 0.0).sum(dim=-1, keepdim=True)
    # Rounding may put the target at or behind the last kept token, which is then drawn; logits of NaN keep none.
    last = kept.sum(dim=-1).clamp(min=1) - 1
    index = torch.minimum((reached <= target).sum(dim=-1), last)
    return torch.where(warm, order.gather(1, index[:, None])[:, 0], greedy)
