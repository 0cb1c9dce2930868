"""Grouped latent attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from undivided.layers.latent import LatentAttention, grouped_latent_attention, split_latent
from undivided.layers.paged import PagedRows

if TYPE_CHECKING:
    from undivided.layers.rotary import PositionEmbeddings
    from undivided.spec import AttentionSpec


class GLAttention(LatentAttention):
    """Grouped latent attention: the heads are cut into groups, and each group has a latent of its own.

    `c_j = norm_j(x W_DKV,j)` for j of `num_latent_heads`; head h reads only latent `j = h // (H // num_latent_heads)`:
    `s_h = scale * (q_h . U_h c_j + RoPE(r_h) . k)`, `y = concat_h(softmax(s_h) V_h c_j) W_O`. So the latents can be
    spread over ranks without approximation. Cached a token: `latent_dim + rope_dim` numbers over all groups.

    Args:
        latent_dim: width of all latents together; `kv_b_proj` acts on `latent_dim / num_latent_heads` columns.
        num_latent_heads: number of groups, a divisor of `latent_dim` and of `num_attention_heads`.
        The others are those of `LatentAttention`.

    Raises:
        ValueError: `num_latent_heads` does not divide `latent_dim` or `num_attention_heads`.

    Source: Hardware-Efficient Attention for Fast Decoding (arXiv 2505.21487).
    """

    mechanism = "gla"

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        latent_dim: int,
        rope_dim: int,
        nope_dim: int,
        value_dim: int,
        *,
        num_latent_heads: int = 2,
        **latent: Any,
    ) -> None:
        super().__init__(
            hidden_size, num_attention_heads, latent_dim, rope_dim, nope_dim, value_dim, **latent
        )
        for name, total in (("latent_dim", latent_dim), ("num_attention_heads", num_attention_heads)):
            if num_latent_heads < 1 or total % num_latent_heads:
                raise ValueError(f"num_latent_heads={num_latent_heads} does not divide {name}={total}.")
        self.num_latent_heads = num_latent_heads
        self.kv_b_proj = nn.Linear(latent_dim // num_latent_heads, self.kv_b_proj.out_features, bias=False)

    def normalise(self, latent: torch.Tensor, exact: bool) -> torch.Tensor:
        if isinstance(self.kv_a_layernorm, nn.Identity):
            return latent
        return self.kv_a_layernorm(latent, self.shard_energies())

    def shard_energies(self) -> torch.Tensor:
        # Scaled by the number of groups, the energy of one group stands for the whole: each is normalised alone.
        groups = self.num_latent_heads
        return self.kv_b_proj.weight.new_full((groups,), groups, dtype=torch.float32)

    def attend(
        self,
        query_nope: torch.Tensor,
        query_rope: torch.Tensor,
        latent: torch.Tensor,
        rope_key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        exact: bool,
    ) -> torch.Tensor:
        up_key, up_value = self.up_projections()
        return grouped_latent_attention(
            query_nope, query_rope, split_latent(latent, self.num_latent_heads), rope_key, up_key, up_value,
            scale=self.scale, softcap=self.softcap, attention_mask=attention_mask,
        )  # fmt: skip

    def attend_rows(
        self, query_nope: torch.Tensor, query_rope: torch.Tensor, rows: PagedRows
    ) -> torch.Tensor:
        up_key, up_value = self.up_projections()
        latent, rope_key = rows.parts(self.latent_dim)
        return grouped_latent_attention(
            query_nope, query_rope, split_latent(latent, self.num_latent_heads), rope_key, up_key, up_value,
            scale=self.scale, softcap=self.softcap, rows=rows, backend=rows.backend,
        )  # fmt: skip

    @property
    def spec(self) -> AttentionSpec:
        from undivided.spec.systems import gla

        return gla(self.num_latent_heads, self.nope_dim, self.rope_dim, self.scale, self.softcap)

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        named = super().spec_inputs(hidden_states, position_embeddings)
        return named | {"latent": split_latent(named["latent"], self.num_latent_heads)}
