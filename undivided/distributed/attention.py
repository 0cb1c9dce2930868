"""One rank's part of a latent attention layer."""

from __future__ import annotations

import torch
from torch import nn

from undivided.distributed.collectives import Collectives
from undivided.distributed.layout import Layout
from undivided.layers.gla import GLAttention
from undivided.layers.latent import LatentAttention, LatentNorm, grouped_latent_attention
from undivided.layers.tpla import TPLAttention
from undivided.ops._rules import causal_mask, masked_softmax


class RankLatentAttention(LatentAttention):
    """The shard of the latent and the run of heads that one rank holds of an MLA, GLA or TPLA layer.

    It caches its own columns of the latent and the whole rope key, and its output is summed over all ranks: one
    all-reduce a forward. Exact modes cost more: the energy of the latent (`norm="exact"`, one number a token) and the
    logits (`softmax="exact"`, or a prefill that is to be exact) are summed over the shards too. For inference.

    Args:
        whole: the layer as one process would hold it; may be on the meta device, only its sizes are read.
        layout: which part is this rank's.
        collectives: the sums over ranks.

    Source: TPLA (arXiv 2508.15881).
    """

    mechanism = "rank"

    def __init__(self, whole: LatentAttention, layout: Layout, collectives: Collectives) -> None:
        heads = layout.heads
        bias = whole.o_proj.bias is not None
        low_rank = hasattr(whole, "q_a_proj")
        columns = layout.columns(whole.latent_dim)
        super().__init__(
            whole.o_proj.out_features,
            heads.stop - heads.start,
            columns.stop - columns.start,
            whole.rope_dim,
            whole.nope_dim,
            whole.value_dim,
            query_latent_dim=whole.q_a_proj.out_features if low_rank else None,
            query_bias=(whole.q_a_proj if low_rank else whole.q_proj).bias is not None,
            key_value_bias=whole.kv_a_proj_with_mqa.bias is not None,
            output_bias=bias,
            latent_norm=not isinstance(whole.kv_a_layernorm, nn.Identity),
            query_latent_norm=low_rank and not isinstance(whole.q_a_layernorm, nn.Identity),
            scale=whole.scale,
            softcap=whole.softcap,
            rope_interleaved=whole.rope_interleaved,
            rope_stride=whole.rope_stride,
            rope_repeats=whole.rope_repeats,
            layer_idx=whole.layer_idx,
        )
        self.layout = layout
        self.collectives = collectives
        sliced = isinstance(whole, TPLAttention)
        self.norm = whole.norm if sliced else "exact"
        self.softmax = whole.softmax if sliced else "exact"
        self.prefill = whole.prefill if sliced else "sliced"
        for name in ("kv_a_layernorm", "q_a_layernorm"):
            if isinstance(norm := getattr(whole, name, None), LatentNorm):
                getattr(self, name).eps = norm.eps
        if not layout.grouped and not isinstance(self.kv_a_layernorm, nn.Identity):
            self.kv_a_layernorm.dim = whole.latent_dim
        if sliced:
            self.register_buffer("norm_scale", torch.ones(1))
            self.register_buffer("logit_scale", torch.ones(1, self.num_heads))

    @property
    def alone(self) -> bool:
        """Whether no other rank holds a part of what this rank's heads read."""
        return self.layout.num_shards == 1 or self.layout.grouped

    def normalise(self, latent: torch.Tensor, exact: bool) -> torch.Tensor:
        if isinstance(self.kv_a_layernorm, nn.Identity) or self.alone:
            return self.kv_a_layernorm(latent)
        if exact or self.norm == "exact":
            return self.kv_a_layernorm(latent, reduce=self._sum_energy)
        return self.kv_a_layernorm(latent, self.norm_scale)

    def _sum_energy(self, energy: torch.Tensor) -> torch.Tensor:
        return self.collectives.sum_over_shards(energy, "norm", self.layer_idx)

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
        if not self.alone and (exact or self.softmax == "exact"):
            return self._attend_together(query_nope, query_rope, latent, rope_key, attention_mask)
        if not self.alone:
            query_nope = query_nope * self.logit_scale.to(query_nope.dtype)[:, :, None, None]
        return grouped_latent_attention(
            query_nope, query_rope, latent, rope_key, up_key, up_value,
            scale=self.scale, softcap=self.softcap, attention_mask=attention_mask,
        )  # fmt: skip

    def _attend_together(
        self,
        query_nope: torch.Tensor,
        query_rope: torch.Tensor,
        latent: torch.Tensor,
        rope_key: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Sums the content logits over the shards, so that all of them weigh the keys alike, as MLA would."""
        up_key, up_value = self.up_projections()
        content = torch.einsum("bhnd,hdr->bhnr", query_nope, up_key) @ latent.transpose(-2, -1)
        logits = self.collectives.sum_over_shards(content, "logits", self.layer_idx)
        logits = logits + query_rope @ rope_key.transpose(-2, -1)
        logits = self.scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if attention_mask is None:
            attention_mask = causal_mask(logits.shape[2], logits.shape[3], logits.device)
        if attention_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attention_mask, float("-inf"))
        else:
            logits = logits + attention_mask
        weights, _ = masked_softmax(logits)
        return torch.einsum("bhnr,hvr->bhnv", weights.to(latent.dtype) @ latent, up_value)

    def project_output(self, heads: torch.Tensor) -> torch.Tensor:
        partial = nn.functional.linear(heads.transpose(1, 2).flatten(2), self.o_proj.weight)
        out = self.collectives.sum_over_world(partial, "output", self.layer_idx)
        return out if self.o_proj.bias is None else out + self.o_proj.bias

    def slices(self, whole: LatentAttention) -> dict[str, list[tuple[slice, ...]]]:
        """Returns which parts of each tensor of the whole layer make this rank's, joined along the first axis.

        A tensor that is not named is held whole.
        """
        heads, columns = self.layout.heads, self.layout.columns(whole.latent_dim)
        query, up, value = (
            slice(heads.start * dim, heads.stop * dim)
            for dim in (self.nope_dim + self.rope_dim, self.nope_dim + self.value_dim, self.value_dim)
        )
        shard = slice(self.layout.shard, self.layout.shard + 1)
        row: list[tuple[slice, ...]] = [
            (columns,),
            (slice(whole.latent_dim, whole.latent_dim + whole.rope_dim),),
        ]
        return {
            "q_proj.weight": [(query,)],
            "q_proj.bias": [(query,)],
            "q_b_proj.weight": [(query,)],
            "kv_a_proj_with_mqa.weight": row,
            "kv_a_proj_with_mqa.bias": row,
            "kv_a_layernorm.weight": [(columns,)],
            "kv_b_proj.weight": [(up, slice(None) if isinstance(whole, GLAttention) else columns)],
            "o_proj.weight": [(slice(None), value)],
            "norm_scale": [(shard,)],
            "logit_scale": [(shard, heads)],
        }
