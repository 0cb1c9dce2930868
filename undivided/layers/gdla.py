"""Grouped differential latent attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from undivided.layers.gda import differential_heads, split_heads
from undivided.layers.gda_v2 import check_groups, token_factor
from undivided.layers.latent import LatentAttention
from undivided.ops import dense_attention

if TYPE_CHECKING:
    from undivided.layers.rotary import PositionEmbeddings
    from undivided.spec import AttentionSpec


class GDLAttention(LatentAttention):
    """Latent attention whose noise heads are subtracted from the signal heads that they serve.

    All heads read the latent c and the rotary key k of MLA, `A_h = softmax(scale * (q_h . U_u c + r_h . k))`, and
    `O_h = A_h V_u c - sigmoid(x w_h) * A'_j V_u c`, `j = h // g`, `y = concat_h(O_h) W_O`. The up-projections U_u and
    V_u are shared by the heads of a group u, the noise heads included. With `output_gate`, each channel of O_h is
    multiplied by `sigmoid(W_G c_q)` of the query's latent c_q. Cached a token: `latent_dim + rope_dim` numbers.

    Heads are striped in the weights: queries as `[noise heads, (g signal, 1 noise)]`. `kv_b_proj` has rows for the
    groups only, and `o_proj` reads the signal heads only.

    Args:
        num_attention_heads: signal and noise heads together.
        num_noise_heads: noise heads. Default: half of the heads.
        num_signal_heads: signal heads g * num_noise_heads. Default: the heads that are not noise heads; given, it
            stands in place of `num_attention_heads`.
        num_key_value_heads: groups that share an up-projection, a divisor of `num_noise_heads`. Default: as many as
            noise heads.
        output_gate: whether the outputs are gated; it needs `query_latent_dim`.
        The others are those of `LatentAttention`.

    Raises:
        ValueError: head counts that do not divide each other, or a gate without a query latent.

    Source: Motif 3 (arXiv 2608.09119), figure 1, whose layers have the gate; Differential Transformer V2
    (microsoft/unilm, Diff-Transformer-V2) for the factor; DeepSeek-V2 (arXiv 2405.04434), section 2.1, for the latent.
    """

    mechanism = "gdla"

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        latent_dim: int,
        rope_dim: int,
        nope_dim: int,
        value_dim: int,
        *,
        num_noise_heads: int | None = None,
        num_signal_heads: int | None = None,
        num_key_value_heads: int | None = None,
        output_gate: bool = False,
        **latent: Any,
    ) -> None:
        signal, noise = differential_heads(num_attention_heads, num_signal_heads, num_noise_heads)
        groups = noise if num_key_value_heads is None else num_key_value_heads
        check_groups(noise, groups)
        query_latent_dim = latent.get("query_latent_dim")
        if output_gate and query_latent_dim is None:
            raise ValueError("output_gate=True reads the latent of the query; set query_latent_dim.")
        super().__init__(hidden_size, signal + noise, latent_dim, rope_dim, nope_dim, value_dim, **latent)
        self.num_signal_heads = signal
        self.num_noise_heads = noise
        self.num_key_value_heads = groups
        self.kv_b_proj = nn.Linear(latent_dim, groups * (nope_dim + value_dim), bias=False)
        self.lambda_proj = nn.Linear(hidden_size, signal, bias=False)
        self.o_proj = nn.Linear(signal * value_dim, hidden_size, bias=self.o_proj.bias is not None)
        self.q_b_gate_proj = (
            nn.Linear(query_latent_dim, signal * value_dim, bias=False) if output_gate else None
        )

    def shared_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the up-projections of the groups, `[groups, nope_dim, R]` and `[groups, value_dim, R]`."""
        per_group = self.kv_b_proj.weight.unflatten(0, (self.num_key_value_heads, -1))
        return per_group[:, : self.nope_dim], per_group[:, self.nope_dim :]

    def up_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        up_key, up_value = self.shared_projections()
        share = self.num_heads // self.num_key_value_heads
        return up_key.repeat_interleave(share, dim=0), up_value.repeat_interleave(share, dim=0)

    def attend(
        self,
        query_nope: torch.Tensor,
        query_rope: torch.Tensor,
        latent: torch.Tensor,
        rope_key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        exact: bool,
    ) -> torch.Tensor:
        # One query attends the latent itself; for several, keys and values are formed once a group.
        if query_nope.shape[2] == 1:
            return super().attend(query_nope, query_rope, latent, rope_key, attention_mask, exact)
        up_key, up_value = self.shared_projections()
        key = torch.einsum("bmr,gdr->bgmd", latent[:, 0], up_key)
        value = torch.einsum("bmr,gvr->bgmv", latent[:, 0], up_value)
        key = torch.cat([key, rope_key.expand(-1, key.shape[1], -1, -1)], dim=-1)
        return dense_attention(
            torch.cat([query_nope, query_rope], dim=-1), key, value, attn_mask=attention_mask,
            is_causal=attention_mask is None, scale=self.scale, softcap=self.softcap,
        )  # fmt: skip

    def mix(self, heads: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns `[B, signal heads, N, value_dim]`: signal heads minus what they have of their noise head, gated."""
        signal, noise = split_heads(heads, self.num_noise_heads)
        lam = token_factor(self.lambda_proj, hidden_states)[..., None]
        noise = noise.repeat_interleave(self.num_signal_heads // self.num_noise_heads, dim=1)
        # The two are close where both maps are: the difference is taken in the dtype of lam and rounded once.
        mixed = (signal - lam * noise).to(heads.dtype)
        gate = self.gate(hidden_states)
        return mixed if gate is None else mixed * gate

    def gate(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Returns the gate of the outputs, `[B, signal heads, N, value_dim]`; None for none."""
        if self.q_b_gate_proj is None:
            return None
        logits = self.q_b_gate_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        return torch.sigmoid(logits).unflatten(-1, (self.num_signal_heads, -1)).transpose(1, 2)

    @property
    def spec(self) -> AttentionSpec:
        from undivided.spec.systems import gdla

        return gdla(self.nope_dim, self.rope_dim, self.scale, self.softcap, self.q_b_gate_proj is not None)

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        named = super().spec_inputs(hidden_states, position_embeddings)
        for name, heads_at in (("query", 1), ("query_rope", 1), ("key_up", 0), ("value_up", 0)):
            if name in named:
                named[name], named[f"{name}_noise"] = split_heads(named[name], self.num_noise_heads, heads_at)
        named["lambda"] = token_factor(self.lambda_proj, hidden_states)
        gate = self.gate(hidden_states)
        return named if gate is None else named | {"gate": gate}
