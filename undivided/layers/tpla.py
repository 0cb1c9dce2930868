"""Tensor-parallel latent attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from undivided.layers.latent import LatentAttention, grouped_latent_attention, split_latent
from undivided.layers.paged import PagedRows

if TYPE_CHECKING:
    from undivided.layers.rotary import PositionEmbeddings
    from undivided.spec import AttentionSpec


class TPLAttention(LatentAttention):
    """Latent attention whose latent is cut into shards that attend alone; every head uses all of them.

    For shard j of g, with `c_j` the shard's columns of the latent, `a_j` its `norm_scale`, `m_jh` its `logit_scale`:
    `c_j <- c_j / sqrt(a_j |c_j|^2 / R + eps)`, `s_jh = scale * (m_jh q_h . U_jh c_j + RoPE(r_h) . k)`,
    `y = sum_j concat_h(softmax(s_jh) V_jh c_j) W_O`. The rotary term is whole in every shard, and the values are not
    scaled. On g ranks each holds one shard of the latent cache and of the weights, and the sum over j is one
    all-reduce (`undivided.distributed`); this module computes all shards in one process.

    Args:
        num_shards: shards g of the latent, a divisor of `latent_dim`. With one shard this is MLA.
        norm: "local", each shard normalises by its own energy; "exact", by that of the whole latent (one scalar a
            token to reduce).
        softmax: "local", as above; "exact", the logits of all shards are summed first, and the result is MLA's up to
            the normalisation.
        prefill: "sliced", as above; "exact", a forward that starts with an empty cache is computed exactly as MLA
            (separated prefill and decoding: the prompt's rows are cached with the exact normalisation).
        The others are those of `LatentAttention`.

    Raises:
        ValueError: `num_shards` does not divide `latent_dim`, or a mode is not one of those named.

    Source: TPLA (arXiv 2508.15881).
    """

    mechanism = "tpla"

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        latent_dim: int,
        rope_dim: int,
        nope_dim: int,
        value_dim: int,
        *,
        num_shards: int = 2,
        norm: str = "local",
        softmax: str = "local",
        prefill: str = "sliced",
        **latent: Any,
    ) -> None:
        super().__init__(
            hidden_size, num_attention_heads, latent_dim, rope_dim, nope_dim, value_dim, **latent
        )
        check_shards(num_shards, latent_dim)
        for name, value, allowed in (
            ("norm", norm, ("local", "exact")),
            ("softmax", softmax, ("local", "exact")),
            ("prefill", prefill, ("sliced", "exact")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")
        self.num_shards = num_shards
        self.norm = norm
        self.softmax = softmax
        self.prefill = prefill
        self.register_buffer("norm_scale", torch.full((num_shards,), float(num_shards)))
        self.register_buffer("logit_scale", torch.ones(num_shards, num_attention_heads))

    def normalise(self, latent: torch.Tensor, exact: bool) -> torch.Tensor:
        if exact or self.norm == "exact" or isinstance(self.kv_a_layernorm, nn.Identity):
            return self.kv_a_layernorm(latent)
        return self.kv_a_layernorm(latent, self.norm_scale)

    def attend(
        self,
        query_nope: torch.Tensor,
        query_rope: torch.Tensor,
        latent: torch.Tensor,
        rope_key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        exact: bool,
    ) -> torch.Tensor:
        if exact or self.softmax == "exact":
            return super().attend(query_nope, query_rope, latent, rope_key, attention_mask, exact)
        return self._attend_shards(
            query_nope, query_rope, latent, rope_key, _repeat_heads(attention_mask, self.num_shards), None
        )

    def shard_energies(self) -> torch.Tensor | None:
        return None if self.norm == "exact" else self.norm_scale

    def attend_rows(
        self, query_nope: torch.Tensor, query_rope: torch.Tensor, rows: PagedRows
    ) -> torch.Tensor:
        if self.softmax == "exact":
            return super().attend_rows(query_nope, query_rope, rows)
        return self._attend_shards(query_nope, query_rope, *rows.parts(self.latent_dim), None, rows)

    def _attend_shards(
        self,
        query_nope: torch.Tensor,
        query_rope: torch.Tensor,
        latent: torch.Tensor,
        rope_key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rows: PagedRows | None,
    ) -> torch.Tensor:
        up_key, up_value = (_shard_heads(up, self.num_shards) for up in self.up_projections())
        shard_scale = self.logit_scale.to(query_nope.dtype)[:, :, None, None]
        out = grouped_latent_attention(
            (query_nope[:, None] * shard_scale).flatten(1, 2),
            query_rope.repeat(1, self.num_shards, 1, 1),
            split_latent(latent, self.num_shards), rope_key, up_key, up_value,
            scale=self.scale, softcap=self.softcap, attention_mask=attention_mask, rows=rows,
            backend="auto" if rows is None else rows.backend,
        )  # fmt: skip
        return out.unflatten(1, (self.num_shards, self.num_heads)).sum(dim=1)

    @property
    def spec(self) -> AttentionSpec:
        """That of a forward without a cache: MLA's where logits are summed or prompts are read exactly.

        Decoding after an exact prompt is the sliced form, on rows that were normalised exactly.
        """
        from undivided.spec.systems import tpla

        if self.softmax == "exact" or self.is_exact(None):
            return super().spec
        return tpla(self.num_shards, self.nope_dim, self.rope_dim, self.scale, self.softcap)

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        named = super().spec_inputs(hidden_states, position_embeddings)
        if self.softmax == "exact" or self.is_exact(None):
            return named
        latent, up_value = named.pop("latent"), named.pop("value_up")
        up_key = named.pop("key_up", None)
        for shard, part in enumerate(split_latent(latent, self.num_shards).unbind(1)):
            columns = slice(shard * part.shape[-1], (shard + 1) * part.shape[-1])
            named[f"latent_{shard}"] = part[:, None]
            named[f"value_up_{shard}"] = up_value[:, columns]
            if up_key is not None:
                factor = self.logit_scale[shard].to(up_key.dtype)[:, None, None]
                named[f"key_up_{shard}"] = factor * up_key[:, :, columns]
        return named


def _shard_heads(up: torch.Tensor, num_shards: int) -> torch.Tensor:
    """Returns `[num_shards * H, dim, R / num_shards]` from `[H, dim, R]`: TPLA is GLA with every head in each group."""
    return up.unflatten(-1, (num_shards, -1)).permute(2, 0, 1, 3).flatten(0, 1)


def _repeat_heads(mask: torch.Tensor | None, num_shards: int) -> torch.Tensor | None:
    return mask if mask is None or mask.shape[1] == 1 else mask.repeat(1, num_shards, 1, 1)


def check_shards(num_shards: int, latent_dim: int) -> None:
    """Raises a ValueError that says what would work, unless `num_shards` divides `latent_dim`."""
    if num_shards < 1 or latent_dim % num_shards:
        would = [str(d) for d in range(2, latent_dim + 1) if latent_dim % d == 0][:3]
        raise ValueError(
            f"num_shards={num_shards} does not divide latent_dim={latent_dim}; {', '.join(would)}, ... would."
        )
