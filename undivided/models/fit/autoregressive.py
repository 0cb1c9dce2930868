"""FIT as an autoregressive model, with generation from caches."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from undivided.layers.fit import KeyValueCache, glorot, parse_layers
from undivided.models.fit._blocks import FIT


@dataclass
class FITState:
    """What generation keeps of one sequence of groups.

    Args:
        position: tokens so far.
        local: a cache for each local layer, of the tokens of the present group.
        latent: a cache for each global layer, of the latents of all groups before.
        previous: for each block with global layers, the latents of the group before, `[B, m, Cz]`.
        tokens: for each such block, the present group's tokens after its local layers, each `[B, 1, C]`.
    """

    position: int = 0
    local: dict[tuple[int, int], KeyValueCache] = field(default_factory=dict)
    latent: dict[tuple[int, int], KeyValueCache] = field(default_factory=dict)
    previous: dict[int, torch.Tensor] = field(default_factory=dict)
    tokens: dict[int, list[torch.Tensor]] = field(default_factory=dict)


class FITAutoregressive(FIT):
    """Predicts the next token: local layers are causal, and tokens read the latents of the group *before* theirs.

    The latents of a group read all of its tokens, so a token that read them would see those after it: they are shifted
    by one group for every write, and the first group reads zeros. Global layers see their own group and those before.
    The logits at a place are those of the token after it.

    Args:
        layers: as in `FITEncoder`; it ends with local layers.
        num_tokens, num_groups, latents_per_group, dim, latent_dim, num_heads, latent_heads, mlp_ratio, drop, drop_path,
            positions: as in `FITEncoder`.
        vocab_size: V.
        tie_embeddings: one table for input and output.

    Shape:
        `forward(ids [B, T, n])` gives logits `[B, T, n, V]`.

    Raises:
        ValueError: as in `FITEncoder`, or layers that end with global ones.

    Source: FIT (arXiv 2305.12689) and the authors' code; generation with caches is this library's.
    """

    def __init__(
        self,
        vocab_size: int,
        layers: str = "(2)4(2)",
        num_tokens: int = 4096,
        num_groups: int = 16,
        latents_per_group: int = 16,
        dim: int = 256,
        latent_dim: int = 768,
        num_heads: int = 8,
        latent_heads: int = 12,
        *,
        mlp_ratio: int = 4,
        drop: float = 0.0,
        drop_path: float = 0.0,
        positions: str = "learned",
        tie_embeddings: bool = True,
    ) -> None:
        if parse_layers(layers)[-1][1]:
            raise ValueError(
                f'layers="{layers}" ends with global layers, which no token of an autoregressive model reads; end '
                "with local layers in brackets."
            )
        super().__init__(
            layers, num_tokens, num_groups, latents_per_group, dim, latent_dim, num_heads, latent_heads,
            mlp_ratio=mlp_ratio, drop=drop, drop_path=drop_path, positions=positions,
        )  # fmt: skip
        self.embedding = nn.Parameter(torch.empty(vocab_size, dim))
        self.head = self.embedding if tie_embeddings else nn.Parameter(torch.empty(vocab_size, dim))
        self.head_bias = nn.Parameter(torch.zeros(vocab_size))
        for table in (self.embedding, self.head):
            nn.init.trunc_normal_(table, std=0.02)
        self.apply(glorot)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.check("ids", ids, 3)
        mask = self.chunk_mask()
        x = F.embedding(ids, self.embedding) + self.position
        x, _ = self.run(x, self.latents(len(ids)), mask, is_causal=True)
        return self.logits(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the logits `[..., V]` of tokens `[..., C]`."""
        return F.linear(self.norm(x), self.head, self.head_bias)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross-entropy of tokens `[B, T, n]` in nats; over ln 2 it is in bits per dimension.

        The input is the sequence one place later, through all groups, with token 0 in front.
        """
        self.check("ids", ids, 3)
        shifted = F.pad(ids.flatten(1)[:, :-1], (1, 0)).view_as(ids)
        return F.cross_entropy(self(shifted).flatten(0, 2), ids.flatten())

    def step(self, ids: torch.Tensor, state: FITState) -> torch.Tensor:
        """Returns the logits `[B, V]` after one more token `[B]` of each sequence; a token costs `O(n)`.

        Raises:
            ValueError: the sequences are as long as the model allows.
        """
        group, place = divmod(state.position, self.group_size)
        if group >= self.num_groups:
            raise ValueError(f"the sequence has {state.position} tokens, as many as the model takes.")
        x = F.embedding(ids[:, None], self.embedding) + self.position[place]
        for index, block in enumerate(self.blocks):
            for number, layer in enumerate(block.local):
                x = layer(x, cache=state.local.setdefault((index, number), KeyValueCache()))
            if block.write is not None:
                state.tokens.setdefault(index, []).append(x)
                x = block.write(x, state.previous.get(index, torch.zeros_like(self.latents(len(ids))[:, 0])))
        state.position += 1
        if place + 1 == self.group_size:
            self._close(group, state, len(ids))
        return self.logits(x[:, 0])

    def _close(self, group: int, state: FITState, batch: int) -> None:
        """Reads a complete group into its latents and runs the global layers on them."""
        z = self.latents(batch)[:, group]
        for index, block in enumerate(self.blocks):
            if block.read is None:
                continue
            z = block.read(z, torch.cat(state.tokens[index], dim=1))
            for number, layer in enumerate(block.global_layers):
                z = layer(z, cache=state.latent.setdefault((index, number), KeyValueCache()))
            state.previous[index] = z
        state.tokens.clear()
        state.local.clear()

    @torch.no_grad()
    def generate(
        self,
        batch: int = 1,
        prompt: torch.Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Returns sequences `[B, T, n]` of which `prompt` is the beginning.

        Args:
            batch: sequences, where there is no prompt.
            prompt: their first tokens `[B, p]`.
            temperature: the logits are divided by it; 0 takes the likeliest token.
            generator: of the draws.

        Raises:
            ValueError: the temperature is negative, or the prompt longer than a sequence.
        """
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must be 0 or more.")
        length = self.num_groups * self.group_size
        device = self.embedding.device
        if prompt is None:
            prompt = torch.empty(batch, 0, dtype=torch.int64, device=device)
        if prompt.shape[1] > length:
            raise ValueError(f"prompt has {prompt.shape[1]} tokens, but a sequence has {length}.")
        found = list(prompt.unbind(1))
        given = len(found)
        token = torch.zeros(len(prompt), dtype=torch.int64, device=device)
        state = FITState()
        for place in range(length):
            logits = self.step(token, state)
            if place >= given:
                found.append(_draw(logits, temperature, generator))
            token = found[place]
        return torch.stack(found, dim=1).view(-1, self.num_groups, self.group_size)


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
