"""Grouped-query attention written with one head of keys and values, and the rotation of its keys (RoRoPE).

Source: TransMLA (arXiv 2502.07864).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undivided.convert._host import host_sharing_weights
from undivided.convert._latent import latent_options
from undivided.convert._moments import Progress, no_progress, principal_axes, second_moments
from undivided.layers._base import grouped_query_dimensions
from undivided.layers.mla import MLAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undivided.models.causal_lm import UndividedForCausalLM


def key_moments(
    source: PreTrainedModel, calibration: Tensor, progress: Progress = no_progress
) -> dict[str, Tensor]:
    """Returns the second moment `[G D, G D]` of every layer's keys before their rotary positions.

    Their names are the layers' indices.
    """
    layers = source.get_decoder().layers
    projections = {str(index): layer.self_attn.k_proj for index, layer in enumerate(layers)}
    return second_moments(source, projections, calibration, progress=progress, description="calibrating keys")


def key_axes(
    moment: Tensor | None, num_key_value_heads: int, head_dim: int, rope_dim: int, freqfold: int
) -> Tensor:
    """Rotation of the merged keys that gathers in few dimensions what positions matter for (RoRoPE).

    Rotary positions turn the pair (real, imaginary) of one frequency by the same angle in every head, so an
    orthogonal matrix that mixes the heads, the same for real and imaginary parts, commutes with them. In each
    group of `freqfold` neighbouring frequencies, taken as one frequency, it is the principal axes U of the
    keys: `k <- U^T k`. With `freqfold > 1` it also mixes the frequencies of the group: attention with
    positions on all dimensions is then no longer the same, but fewer dimensions hold more of the keys
    (FreqFold).

    Args:
        moment: second moment of the keys `[G D, G D]`, before their positions, halves of a head being real
            and imaginary parts; None for no rotation, so that the first dimensions are frequencies of the
            first head.
        num_key_value_heads: key heads G.
        head_dim: width D of a head.
        rope_dim: dimensions to be gathered, `D / c`.
        freqfold: frequencies in a group, a multiple of c and a divisor of `D / 2`.

    Returns:
        `[G D, G D]`, orthogonal, float64; its columns are the new dimensions. The first `rope_dim` are the
        leading axes of all groups, interleaved as (real, imaginary), of frequencies 0, c, 2c, ...

    Source: TransMLA (arXiv 2502.07864).
    """
    stride = head_dim // rope_dim
    groups, within = head_dim // 2 // freqfold, freqfold // stride
    size, width = num_key_value_heads * head_dim, num_key_value_heads * freqfold
    device = None if moment is None else moment.device
    dims = torch.arange(size, device=device)
    # A frequency is (group * within + p) * stride + s. Both become [part, group, axis], the axes counted over
    # (s, head, p): the first of a group have s = 0, and fill the first rope_dim columns.
    rows = dims.view(num_key_value_heads, 2, groups, within, stride).permute(1, 2, 4, 0, 3)
    columns = dims.view(stride, num_key_value_heads, groups, within, 2).permute(4, 2, 0, 1, 3)
    rows, columns = rows.reshape(2, groups, width), columns.reshape(2, groups, width)
    axes = torch.zeros(size, size, dtype=torch.float64, device=device)
    for group in range(groups):
        vectors = torch.eye(width, dtype=torch.float64)
        if moment is not None:
            vectors, _ = principal_axes(sum(moment[part[group]][:, part[group]] for part in rows))
        for row, column in zip(rows[:, group], columns[:, group], strict=True):
            axes[row[:, None], column] = vectors
    return axes


def all_key_axes(
    source: PreTrainedModel, moments: dict[str, Tensor], rope_dim: int, freqfold: int
) -> list[Tensor]:
    """Returns the `key_axes` of every layer from its key moment."""
    sizes = grouped_query_dimensions(source.config)
    shape = sizes["num_key_value_heads"], sizes["head_dim"], rope_dim, freqfold
    return [key_axes(moments[str(index)], *shape) for index in range(len(moments))]


def merge_heads(
    source: PreTrainedModel, axes: Sequence[Tensor] | None = None, rope_dim: int | None = None
) -> UndividedForCausalLM:
    """Returns the model with every layer as `merged_layer`; weights that stay are shared with `source`.

    Args:
        source: a native model with grouped-query attention.
        axes: the key axes of every layer; None for no rotation.
        rope_dim: as in `merged_layer`.
    """
    host = host_sharing_weights(source)
    for layer_idx in range(len(host.decoder_layers)):
        layer = merged_layer(source, layer_idx, None if axes is None else axes[layer_idx], rope_dim)
        host.set_attention(layer_idx, layer, **latent_options(layer))
    return host


@torch.no_grad()
def merged_layer(
    source: PreTrainedModel, layer_idx: int, axes: Tensor | None = None, rope_dim: int | None = None
) -> MLAttention:
    """One layer's attention as MLA with a single head of keys and values, in float64.

    For orthogonal axes O and the rows `O_g` of head g: `q_h . k_g = (O_g^T q_h) . (O^T k)`. The first
    `rope_dim` dimensions of `O^T k` become the rotary key, the others and all values the latent; `kv_b` holds
    the rest of `O_g` and selects the head's value. Exact if all dimensions keep positions and the axes
    commute with them; otherwise the positions of the other dimensions are lost.

    Args:
        source: a native model with grouped-query attention.
        layer_idx: the layer.
        axes: `[G D, G D]`, as `key_axes` gives them; None for no rotation.
        rope_dim: dimensions that keep positions, those the axes were made for; None for all `G D`, whose axes
            have `rope_dim = D` and `freqfold = 1`.

    Returns:
        The layer; its output projection is shared with the source.

    Source: TransMLA (arXiv 2502.07864).
    """
    config, attention = source.config, source.get_decoder().layers[layer_idx].self_attn
    sizes = grouped_query_dimensions(config)
    num_heads, head_dim = config.num_attention_heads, sizes["head_dim"]
    num_groups = sizes["num_key_value_heads"]
    key_dim = num_groups * head_dim
    rope_dim = key_dim if rope_dim is None else rope_dim
    stride, repeats = max(head_dim // rope_dim, 1), max(rope_dim // head_dim, 1)
    if axes is None:
        axes = key_axes(None, num_groups, head_dim, head_dim // stride, stride)
    axes = axes.to(attention.k_proj.weight.device)
    # Without a key dimension that has no position there is nothing for a query without positions to meet.
    nope_rank = key_dim - rope_dim
    nope_dim = head_dim if nope_rank else 0
    with torch.device("meta"):
        layer = MLAttention(
            config.hidden_size,
            num_heads,
            latent_dim=nope_rank + key_dim,
            rope_dim=rope_dim,
            nope_dim=nope_dim,
            value_dim=head_dim,
            latent_norm=False,
            query_latent_norm=False,
            softcap=getattr(config, "attn_logit_softcapping", None),
            rope_stride=stride,
            rope_repeats=repeats,
            layer_idx=layer_idx,
        )

    # The layer's scale is that of DeepSeek's checkpoints; the ratio to the old one goes into the queries.
    query = rows_with_bias(attention.q_proj).unflatten(0, (num_heads, head_dim))
    query = query * (sizes["scale"] / layer.scale)
    up = axes.unflatten(0, (num_groups, head_dim)).repeat_interleave(num_heads // num_groups, dim=0)
    query_rope = up[..., :rope_dim].mT @ query
    # Scaled rotary tables (YaRN) lengthen query and key; where they no longer stand, the query makes it up.
    query_nope = query[:, :nope_dim] * position_scale(source) ** 2
    rows = torch.cat([query_nope, query_rope], dim=1).flatten(0, 1)
    layer.q_proj = linear_from_rows(rows, attention.q_proj.bias is not None)

    key_rope, key_nope = (axes.T @ rows_with_bias(attention.k_proj)).split([rope_dim, nope_rank])
    rows = torch.cat([key_nope, rows_with_bias(attention.v_proj), key_rope])
    has_bias = attention.k_proj.bias is not None or attention.v_proj.bias is not None
    layer.kv_a_proj_with_mqa = linear_from_rows(rows, has_bias)

    up_key = F.pad(up[:, :nope_dim, rope_dim:], (0, key_dim))
    select = torch.eye(key_dim, dtype=axes.dtype, device=axes.device).unflatten(0, (num_groups, head_dim))
    up_value = F.pad(select.repeat_interleave(num_heads // num_groups, dim=0), (nope_rank, 0))
    layer.kv_b_proj.weight = nn.Parameter(torch.cat([up_key, up_value], dim=1).flatten(0, 1))
    layer.o_proj.weight, layer.o_proj.bias = attention.o_proj.weight, attention.o_proj.bias
    return layer.train(attention.training)


def query_rope_map(source: PreTrainedModel, axes: Tensor, rope_dim: int) -> Tensor:
    """Returns `[H, rope_dim, D]`: a merged layer's rotary query from its query without positions."""
    sizes = grouped_query_dimensions(source.config)
    up = axes[:, :rope_dim].unflatten(0, (sizes["num_key_value_heads"], sizes["head_dim"]))
    up = up.repeat_interleave(source.config.num_attention_heads // sizes["num_key_value_heads"], dim=0)
    return up.mT / position_scale(source) ** 2


def position_scale(source: PreTrainedModel) -> float:
    """Returns the length of the rotary tables' (cos, sin): 1 but for some scaled embeddings, such as YaRN."""
    return float(getattr(source.get_decoder().rotary_emb, "attention_scaling", 1.0))


def rows_with_bias(linear: nn.Linear) -> Tensor:
    """Returns `[out, in + 1]`: the weight in float64, with the bias (or zero) as a last column."""
    bias = torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias
    return torch.cat([linear.weight, bias[:, None]], dim=1).double()


def linear_from_rows(rows: Tensor, bias: bool) -> nn.Linear:
    """Returns the projection with the given `rows_with_bias`; without `bias` their last column is dropped."""
    linear = nn.Linear(rows.shape[1] - 1, rows.shape[0], bias=bias, device="meta")
    linear.weight = nn.Parameter(rows[:, :-1].contiguous())
    if bias:
        linear.bias = nn.Parameter(rows[:, -1].contiguous())
    return linear
