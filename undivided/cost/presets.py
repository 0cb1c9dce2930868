"""Shapes of published models, from their public configurations.

Only what the cost model counts is here; any other model is read from its `config.json`
(`undivided.cost.config`).
"""

from __future__ import annotations

from dataclasses import dataclass

from undivided.cost.attention import AttentionShape, GroupedShape, LatentShape


@dataclass(frozen=True)
class ExpertShape:
    """The mixture-of-experts blocks of a model, gated (three matrices an expert).

    Args:
        num_experts: routed experts a layer.
        experts_per_token: routed experts that a token passes.
        num_shared_experts: experts that every token passes.
        intermediate_size: hidden width of one expert.
        first_dense_layers: leading layers that have a dense block instead.
    """

    num_experts: int
    experts_per_token: int
    num_shared_experts: int
    intermediate_size: int
    first_dense_layers: int

    def touched(self, tokens: float) -> float:
        """Distinct experts that n tokens reach when each picks t of E evenly: `E (1 - (1 - t/E)^n)`."""
        return self.num_experts * (1 - (1 - self.experts_per_token / self.num_experts) ** tokens)


@dataclass(frozen=True)
class ModelShape:
    """What the cost model needs to know of a decoder-only language model.

    Args:
        name: how reports call it.
        attention: the attention of every layer, first to last.
        intermediate_size: hidden width of a dense gated MLP (three matrices).
        vocab_size: rows of the embedding.
        tie_word_embeddings: the output head shares the embedding's matrix.
        experts: mixture-of-experts blocks; None for a dense model.
        norms_per_layer: vectors of `hidden_size` a layer.
        base_attention: the attention of every layer before a conversion; None if the model is not a converted
            one.
    """

    name: str
    attention: tuple[AttentionShape, ...]
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = False
    experts: ExpertShape | None = None
    norms_per_layer: int = 2
    base_attention: tuple[AttentionShape, ...] | None = None

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.attention[0].hidden_size

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.attention)

    @property
    def num_heads(self) -> int:
        """Query heads of a layer."""
        return self.attention[0].num_heads


PRESETS = {
    model.name: model
    for model in (
        ModelShape(
            name="DeepSeek-V2-Lite",
            attention=(LatentShape(2048, 16, latent_dim=512, rope_dim=64, nope_dim=128, value_dim=128),) * 27,
            intermediate_size=10944,
            vocab_size=102400,
            experts=ExpertShape(64, 6, 2, intermediate_size=1408, first_dense_layers=1),
        ),
        ModelShape(
            name="DeepSeek-V3",
            attention=(LatentShape(7168, 128, 512, 64, 128, 128, query_latent_dim=1536),) * 61,
            intermediate_size=18432,
            vocab_size=129280,
            experts=ExpertShape(256, 8, 1, intermediate_size=2048, first_dense_layers=3),
        ),
        ModelShape(
            name="Kimi-K2",
            attention=(LatentShape(7168, 64, 512, 64, 128, 128, query_latent_dim=1536),) * 61,
            intermediate_size=18432,
            vocab_size=163840,
            experts=ExpertShape(384, 8, 1, intermediate_size=2048, first_dense_layers=1),
        ),
        ModelShape(
            name="Llama-3-8B",
            attention=(GroupedShape(4096, num_heads=32, num_key_value_heads=8, head_dim=128),) * 32,
            intermediate_size=14336,
            vocab_size=128256,
        ),
        ModelShape(
            name="Llama-2-7B",
            attention=(GroupedShape(4096, num_heads=32, num_key_value_heads=32, head_dim=128),) * 32,
            intermediate_size=11008,
            vocab_size=32000,
        ),
        ModelShape(
            name="Qwen2.5-7B",
            attention=(GroupedShape(3584, 28, 4, 128, qkv_bias=True),) * 28,
            intermediate_size=18944,
            vocab_size=152064,
        ),
        ModelShape(
            name="SmolLM2-135M",
            attention=(GroupedShape(576, num_heads=9, num_key_value_heads=3, head_dim=64),) * 30,
            intermediate_size=1536,
            vocab_size=49152,
            tie_word_embeddings=True,
        ),
    )
}
