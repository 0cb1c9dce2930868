"""What the latent mechanisms share: projections named as in DeepSeek's checkpoints, attention over latent heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from undivided.layers._base import CausalAttention, additive_or_boolean, check_arguments, filled_keys
from undivided.layers.paged import PagedRows, paged_rows
from undivided.layers.rotary import PositionEmbeddings, apply_rotary, rotary_tables
from undivided.ops import append_latent, dense_attention, latent_attention

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec


class LatentNorm(nn.Module):
    """RMS normalisation of a latent as a whole, or of each of its shards alone.

    `c_j <- weight_j * c_j / sqrt(shard_scale_j * |c_j|^2 / dim + eps)` over equal shards j, in at least float32. With
    one shard of scale 1 this is RMSNorm; with `shard_scale_j = E|c|^2 / E|c_j|^2` a shard estimates the energy of the
    whole latent from its own.

    Args:
        dim: width R of the whole latent.
        eps: added to the mean square.

    Source: TPLA (arXiv 2508.15881).
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(
        self,
        latent: torch.Tensor,
        shard_scale: torch.Tensor | None = None,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Normalises `[..., width]`; `reduce` sums the energy over the ranks that hold the rest of the latent."""
        whole = shard_scale is None and reduce is None and latent.shape[-1] == self.dim
        if whole and latent.dtype == self.weight.dtype:
            return nn.functional.rms_norm(latent, (self.dim,), self.weight, self.eps)
        wide = latent.to(torch.promote_types(latent.dtype, torch.float32))
        shards = wide.unflatten(-1, (1 if shard_scale is None else len(shard_scale), -1))
        energy = shards.pow(2).sum(dim=-1, keepdim=True)
        if shard_scale is not None:
            energy = energy * shard_scale[:, None]
        if reduce is not None:
            energy = reduce(energy)
        shards = shards * torch.rsqrt(energy / self.dim + self.eps)
        return self.weight * shards.flatten(-2).to(latent.dtype)


class LatentAttention(CausalAttention):
    """Base of MLA, GLA and TPLA: queries, the cached row `[latent, rope key]`, and the output projection.

    Weights have the names of DeepSeek's checkpoints: `q_proj` or `q_a_proj`, `q_a_layernorm`, `q_b_proj`;
    `kv_a_proj_with_mqa` (latent rows, then rope rows); `kv_a_layernorm`; `kv_b_proj` (a head: `nope_dim` key rows,
    then `value_dim` value rows); `o_proj`.

    Args:
        hidden_size: width C of the model.
        num_attention_heads: query heads H.
        latent_dim: width R of the latent.
        rope_dim: width of the shared rotary key; a multiple of 2, 0 for none.
        nope_dim: width of a head's key without rotary positions; 0 for none.
        value_dim: width of a head's value.
        query_latent_dim: width of the query's latent; None for a plain query projection.
        latent_norm, query_latent_norm: whether the latents are normalised (DeepSeek: yes; converted models: no).
        norm_eps: epsilon of the normalisations.
        query_bias, key_value_bias, output_bias: whether the projections have a bias (on `q_a_proj` when there is a
            query latent).
        scale: factor of the logits; default `(nope_dim + rope_dim) ** -0.5`, whatever R is.
        softcap: bound of the logits; default none.
        rope_interleaved: layout of the rotary pairs, DeepSeek's `(x0, x1), (x2, x3), ...` or Llama's halves.
        rope_stride: use every `rope_stride`-th frequency of the base model.
        rope_repeats: how often that list of frequencies is repeated along `rope_dim`.
        layer_idx: index of the layer, which names its place in a cache.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        latent_dim: int,
        rope_dim: int,
        nope_dim: int,
        value_dim: int,
        *,
        query_latent_dim: int | None = None,
        latent_norm: bool = True,
        query_latent_norm: bool = True,
        norm_eps: float = 1e-6,
        query_bias: bool = False,
        key_value_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        rope_interleaved: bool = True,
        rope_stride: int = 1,
        rope_repeats: int = 1,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        if latent_dim < 1 or value_dim < 1:
            raise ValueError(f"latent_dim={latent_dim} and value_dim={value_dim} must be at least 1.")
        if nope_dim < 0 or rope_dim < 0 or rope_dim % 2:
            raise ValueError(f"nope_dim={nope_dim} and rope_dim={rope_dim} must be 0 or more, rope_dim even.")
        if nope_dim + rope_dim < 1:
            raise ValueError("nope_dim and rope_dim are both 0; a key needs at least one dimension.")
        self.num_heads = num_attention_heads
        self.latent_dim = latent_dim
        self.rope_dim = rope_dim
        self.nope_dim = nope_dim
        self.value_dim = value_dim
        self.scale = (nope_dim + rope_dim) ** -0.5 if scale is None else scale
        self.softcap = softcap
        self.rope_interleaved = rope_interleaved
        self.rope_stride = rope_stride
        self.rope_repeats = rope_repeats
        self.layer_idx = layer_idx

        query_dim = num_attention_heads * (nope_dim + rope_dim)
        if query_latent_dim is None:
            self.q_proj = nn.Linear(hidden_size, query_dim, bias=query_bias)
        else:
            self.q_a_proj = nn.Linear(hidden_size, query_latent_dim, bias=query_bias)
            self.q_a_layernorm = (
                LatentNorm(query_latent_dim, norm_eps) if query_latent_norm else nn.Identity()
            )
            self.q_b_proj = nn.Linear(query_latent_dim, query_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, latent_dim + rope_dim, bias=key_value_bias)
        self.kv_a_layernorm = LatentNorm(latent_dim, norm_eps) if latent_norm else nn.Identity()
        self.kv_b_proj = nn.Linear(latent_dim, num_attention_heads * (nope_dim + value_dim), bias=False)
        self.o_proj = nn.Linear(num_attention_heads * value_dim, hidden_size, bias=output_bias)

    # Layers that approximate set it; the others have nothing to be exact about.
    prefill = "sliced"

    @classmethod
    def native_dimensions(cls, config: Any) -> dict[str, Any]:
        return latent_dimensions(config)

    def up_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the key and the value up-projection, `[H, nope_dim, rank]` and `[H, value_dim, rank]`."""
        per_head = self.kv_b_proj.weight.unflatten(0, (self.num_heads, self.nope_dim + self.value_dim))
        return per_head[:, : self.nope_dim], per_head[:, self.nope_dim :]

    def queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the queries `[B, H, N, nope_dim + rope_dim]`, not yet rotated."""
        if hasattr(self, "q_proj"):
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        return query.unflatten(-1, (self.num_heads, self.nope_dim + self.rope_dim)).transpose(1, 2)

    def rotate(self, x: torch.Tensor, position_embeddings: PositionEmbeddings | None) -> torch.Tensor:
        """Rotates `[B, heads, N, rope_dim]` by this layer's selection of the base model's frequencies."""
        if self.rope_dim == 0:
            return x
        return apply_rotary(x, *self.selected_tables(position_embeddings), self.rope_interleaved)

    def selected_tables(
        self, position_embeddings: PositionEmbeddings | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cos and sin `[B, N, rope_dim / 2]` of this layer's selection of the base model's frequencies."""
        cos, sin = rotary_tables(position_embeddings)
        if self.rope_stride > 1:
            cos, sin = cos[..., :: self.rope_stride], sin[..., :: self.rope_stride]
        if self.rope_repeats > 1:
            cos, sin = (x.repeat(1, 1, self.rope_repeats) for x in (cos, sin))
        if 2 * cos.shape[-1] != self.rope_dim:
            raise ValueError(
                f"rope_dim={self.rope_dim} does not fit the base model's rotary frequencies: rope_stride="
                f"{self.rope_stride} and rope_repeats={self.rope_repeats} select {2 * cos.shape[-1]} dimensions."
            )
        return cos, sin

    def normalise(self, latent: torch.Tensor, exact: bool) -> torch.Tensor:
        """Normalises `[B, N, latent_dim]`; `exact` is meant for layers whose normalisation approximates another."""
        return self.kv_a_layernorm(latent)

    def attend(
        self,
        query_nope: torch.Tensor,
        query_rope: torch.Tensor,
        latent: torch.Tensor,
        rope_key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        exact: bool,
    ) -> torch.Tensor:
        """Returns the heads' outputs `[B, H, N, value_dim]`; latent and rope key are `[B, 1, M, .]`."""
        up_key, up_value = self.up_projections()
        return grouped_latent_attention(
            query_nope, query_rope, latent, rope_key, up_key, up_value,
            scale=self.scale, softcap=self.softcap, attention_mask=attention_mask,
        )  # fmt: skip

    def shard_energies(self) -> torch.Tensor | None:
        """Returns the factor of each shard's energy in the normalisation of a decoding step; None for no shards."""
        return None

    def attend_rows(
        self, query_nope: torch.Tensor, query_rope: torch.Tensor, rows: PagedRows
    ) -> torch.Tensor:
        """As `attend`, for the last rows of sequences whose cache is in pages."""
        up_key, up_value = self.up_projections()
        return grouped_latent_attention(
            query_nope, query_rope, *rows.parts(self.latent_dim), up_key, up_value,
            scale=self.scale, softcap=self.softcap, rows=rows, backend=rows.backend,
        )  # fmt: skip

    def decode(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None, rows: PagedRows
    ) -> torch.Tensor:
        """Returns `[B, N, C]` for the next tokens of sequences whose cache is in pages, and adds their rows to it."""
        query_nope, query_rope = self.queries(hidden_states).split([self.nope_dim, self.rope_dim], dim=-1)
        cos = sin = rotated = None
        if self.rope_dim > 0:
            cos, sin = self.selected_tables(position_embeddings)
            if torch.is_grad_enabled() and query_rope.requires_grad:
                query_rope = apply_rotary(query_rope, cos, sin, self.rope_interleaved)
            else:
                # In place, by the kernel that appends; a gradient would not see it.
                rotated = query_rope
        normalised = isinstance(self.kv_a_layernorm, LatentNorm)
        append_latent(
            self.kv_a_proj_with_mqa(hidden_states), cos, sin,
            self.kv_a_layernorm.weight if normalised else None, rows.cache, rows.lengths,
            eps=self.kv_a_layernorm.eps if normalised else 0.0, interleaved=self.rope_interleaved,
            block_table=rows.block_table, counts=rows.counts,
            shard_scale=self.shard_energies() if normalised else None,
            query_rope=rotated,
            backend="reference" if rows.backend == "reference" else "auto",
        )  # fmt: skip
        return self.project_output(self.mix(self.attend_rows(query_nope, query_rope, rows), hidden_states))

    def mix(self, heads: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns what is projected of the heads' outputs `[B, H, N, value_dim]`: here, all as they are."""
        return heads

    def project_output(self, heads: torch.Tensor) -> torch.Tensor:
        """Returns `[B, N, C]` from the heads' outputs `[B, H, N, value_dim]`."""
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def is_exact(self, past_key_values: Any | None) -> bool:
        """Whether this forward is computed without the layer's approximation: a prefill that is to be exact."""
        if self.prefill == "sliced":
            return False
        return past_key_values is None or int(past_key_values.get_seq_length(self.layer_idx)) == 0

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: PositionEmbeddings | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        check_arguments(self.mechanism, **kwargs)
        rows = paged_rows(past_key_values, self.layer_idx)
        if rows is not None:
            return self.decode(hidden_states, position_embeddings, rows), None
        exact = self.is_exact(past_key_values)
        query_nope, query_rope, latent, rope_key = self.projected(hidden_states, position_embeddings, exact)
        if past_key_values is not None:
            latent, rope_key = past_key_values.update(latent, rope_key, self.layer_idx)
            latent, rope_key = filled_keys(attention_mask, past_key_values, self.layer_idx, latent, rope_key)
        mask = additive_or_boolean(attention_mask, latent.shape[2])
        heads = self.attend(query_nope, query_rope, latent, rope_key, mask, exact)
        return self.project_output(self.mix(heads, hidden_states)), None

    def projected(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None, exact: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns both parts of the queries `[B, H, N, .]`, the normalised latent and the rope key `[B, 1, N, .]`."""
        query_nope, query_rope = self.queries(hidden_states).split([self.nope_dim, self.rope_dim], dim=-1)
        latent, rope_key = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.latent_dim, self.rope_dim], dim=-1
        )
        query_rope = self.rotate(query_rope, position_embeddings)
        rope_key = self.rotate(rope_key[:, None], position_embeddings)
        return query_nope, query_rope, self.normalise(latent, exact)[:, None], rope_key

    @property
    def spec(self) -> AttentionSpec:
        from undivided.spec.systems import mla

        return mla(1, self.nope_dim, self.rope_dim, self.scale, self.softcap)

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        query, query_rope, latent, rope_key = self.projected(
            hidden_states, position_embeddings, self.is_exact(None)
        )
        up_key, up_value = self.up_projections()
        named = {
            "query": query, "query_rope": query_rope, "latent": latent, "rope_key": rope_key,
            "key_up": up_key, "value_up": up_value.transpose(1, 2),
        }  # fmt: skip
        # Without rotary, or without other dimensions the specification has no such term.
        absent = {"query_rope", "rope_key"} if self.rope_dim == 0 else set()
        absent |= {"query", "key_up"} if self.nope_dim == 0 else set()
        return {name: tensor for name, tensor in named.items() if name not in absent}


def grouped_latent_attention(
    query_nope: torch.Tensor,
    query_rope: torch.Tensor,
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    up_key: torch.Tensor,
    up_value: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    attention_mask: torch.Tensor | None = None,
    rows: PagedRows | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of H heads over G latent heads, expanded or absorbed.

    `s_hnm = scale * (q_hn . U_h c_gm + r_hn . k_m)`, `out_hn = sum_m softmax_m(s_hnm) V_h c_gm`, `g = h // (H // G)`.
    Expanded, the keys `[U_h c, k]` and values `V_h c` are formed and attended densely; absorbed, `U_h` moves to the
    query and `V_h` behind the sum, and the latent itself is key and value. Both are the same function.

    Args:
        query_nope: `[B, H, N, nope_dim]`.
        query_rope: `[B, H, N, rope_dim]`, rotated.
        latent: `[B, G, M, rank]`.
        rope_key: `[B, 1, M, rope_dim]`, rotated.
        up_key: `[H, nope_dim, rank]`, the U_h.
        up_value: `[H, value_dim, rank]`, the V_h.
        scale: factor of the logits.
        softcap: bound of the logits; default none.
        attention_mask: broadcasts to `[B, H, N, M]`; default causal, aligned bottom right.
        rows: where the cache is in pages: latent and rope key are views of its pool, `[pages, G or 1, page_size, .]`.
        form: "expanded", "absorbed", or "auto": the one with fewer multiplications; a cache in pages is absorbed.
        backend: of the operator underneath.

    Returns:
        `[B, H, N, value_dim]`.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2; GLA (arXiv 2505.21487).
    """
    groups, num_queries, num_keys = latent.shape[1], query_nope.shape[2], latent.shape[2]
    causal = attention_mask is None
    if form == "auto" and rows is not None:
        form = "absorbed"
    elif form == "auto":
        form = _cheaper_form(num_queries, num_keys, up_key, up_value)
    if form == "absorbed":
        absorbed = torch.einsum("bhnd,hdr->bhnr", query_nope, up_key)
        with_rope = query_rope.shape[-1] > 0
        out = latent_attention(
            absorbed, query_rope if with_rope else None, latent, rope_key if with_rope else None,
            scale=scale, attn_mask=attention_mask, is_causal=causal, softcap=softcap, backend=backend,
            cache_seqlens=None if rows is None else rows.filled,
            block_table=None if rows is None else rows.block_table,
        )  # fmt: skip
        return torch.einsum("bhnr,hvr->bhnv", out, up_value)
    if form != "expanded":
        raise ValueError(f'form={form!r} is not one of "auto", "expanded", "absorbed".')
    if rows is not None:
        raise ValueError('form="expanded" does not attend over a cache in pages; use "absorbed" or "auto".')
    per_group = (groups, up_key.shape[0] // groups)
    key_nope = torch.einsum("bgmr,ghdr->bghmd", latent, up_key.unflatten(0, per_group)).flatten(1, 2)
    value = torch.einsum("bgmr,ghvr->bghmv", latent, up_value.unflatten(0, per_group)).flatten(1, 2)
    key = torch.cat([key_nope, rope_key.expand(-1, key_nope.shape[1], -1, -1)], dim=-1)
    query = torch.cat([query_nope, query_rope], dim=-1)
    return dense_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=causal,
        scale=scale,
        softcap=softcap,
        backend=backend,
    )


def split_latent(latent: torch.Tensor, num_shards: int) -> torch.Tensor:
    """Returns `[B, num_shards, M, latent_dim / num_shards]`, a view of `[B, 1, M, latent_dim]`."""
    return latent.squeeze(1).unflatten(-1, (num_shards, -1)).transpose(1, 2)


def _cheaper_form(num_queries: int, num_keys: int, up_key: torch.Tensor, up_value: torch.Tensor) -> str:
    """Compares the multiplications a head: expanded up-projects every key, absorbed attends at the latent's width."""
    nope_dim, rank = up_key.shape[1:]
    up = nope_dim + up_value.shape[1]
    expanded = num_keys * rank * up + num_queries * num_keys * up
    absorbed = num_queries * rank * up + num_queries * num_keys * 2 * rank
    return "absorbed" if absorbed < expanded else "expanded"


def latent_dimensions(config: Any) -> dict[str, Any]:
    """Returns the sizes of the native latent attention of a DeepSeek config, in the constructor's words."""
    if not hasattr(config, "kv_lora_rank"):
        return {}
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" and rope.get("mscale_all_dim"):
        # YaRN sharpens the softmax: the factor stands in the scale, squared because it is q's and k's.
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(max(rope["factor"], 1.0)) + 1.0) ** 2
    return {
        "latent_dim": config.kv_lora_rank,
        "rope_dim": config.qk_rope_head_dim,
        "nope_dim": config.qk_nope_head_dim,
        "value_dim": config.v_head_dim,
        "query_latent_dim": config.q_lora_rank,
        "query_bias": config.attention_bias if config.q_lora_rank is not None else False,
        "key_value_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "scale": scale,
        "rope_interleaved": config.model_type == "deepseek_v2" or getattr(config, "rope_interleave", True),
    }
