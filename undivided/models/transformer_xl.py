"""A language model that reads a text in segments and remembers the inputs of earlier ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from undivided.layers.rcmha import RelativeConvAttention


class TransformerXLLayer(nn.Module):
    """`x <- x + attention(LN x, LN memory)`, `x <- x + W_2 relu(W_1 LN x)`; one norm for segment and memory.

    Args:
        hidden_size: width C.
        num_heads: heads.
        feedforward_size: width of the MLP.
        halo: as in `RelativeConvAttention.with_memory`.
        options: of `RelativeConvAttention`, such as `variant`.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, feedforward_size: int, *, halo: bool = True, **options: Any
    ) -> None:
        super().__init__()
        self.halo = halo
        self.norm_attention, self.norm_feedforward = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.attention = RelativeConvAttention(hidden_size, num_heads, **options)
        self.feedforward = nn.Sequential(
            nn.Linear(hidden_size, feedforward_size), nn.ReLU(), nn.Linear(feedforward_size, hidden_size)
        )

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Returns `[B, N, C]`; the memory `[B, M, C]` holds earlier inputs of this layer, not normalised."""
        known = None if memory is None else self.norm_attention(memory)
        x = x + self.attention.with_memory(self.norm_attention(x), known, self.halo)
        return x + self.feedforward(self.norm_feedforward(x))


class TransformerXL(nn.Module):
    """The character model of RCMHA, with any of its four attentions.

    Defaults are the authors' configuration. "mha" has absolute positions, added to the embedding; with a memory these
    would repeat, so it takes none.

    Args:
        vocab_size: characters.
        hidden_size, num_heads, feedforward_size, num_layers: sizes.
        variant: "rcmha", "rmha", "mdha" or "mha".
        memory_length: steps of the memory; 0 for none.
        max_distance: of the tables, at least segment and memory together.
        halo: whether the queries' convolution reads the memory, which makes segments equal one pass as far as the
            memory reaches; the authors' code has none.

    Raises:
        ValueError: "mha" with a memory.

    Source: RCMHA (arXiv 2308.03429) and the authors' repository; Transformer-XL (arXiv 1901.02860).
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        hidden_size: int = 128,
        num_heads: int = 8,
        feedforward_size: int = 256,
        num_layers: int = 6,
        variant: str = "rcmha",
        memory_length: int = 128,
        max_distance: int = 4096,
        halo: bool = True,
    ) -> None:
        super().__init__()
        if variant == "mha" and memory_length:
            raise ValueError(
                f"memory_length={memory_length} with variant='mha': absolute positions repeat in every segment; use 0."
            )
        self.memory_length, self.variant = memory_length, variant
        self.embed = nn.Embedding(vocab_size, hidden_size)
        if variant == "mha":
            self.positions = nn.Embedding(max_distance, hidden_size)
        self.layers = nn.ModuleList(
            TransformerXLLayer(
                hidden_size,
                num_heads,
                feedforward_size,
                halo=halo,
                variant=variant,
                max_distance=max_distance,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size)

    def forward(
        self, ids: torch.Tensor, memory: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns logits `[B, N, vocab]` and the memory for the next segment, one tensor a layer, without history.

        Args:
            ids: the segment `[B, N]`.
            memory: what the segment before gave; None at the beginning of a text. Keep one for each text that is read.
        """
        x = self.embed(ids)
        if self.variant == "mha":
            x = x + self.positions(torch.arange(ids.shape[1], device=ids.device))
        kept = []
        for index, layer in enumerate(self.layers):
            old = None if memory is None else memory[index]
            whole = x if old is None else torch.cat([old, x], dim=1)
            kept.append(whole.detach()[:, max(whole.shape[1] - self.memory_length, 0) :])
            x = layer(x, old if old is not None and old.shape[1] else None)
        return self.head(self.norm(x)), kept
