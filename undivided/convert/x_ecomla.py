"""X-EcoMLA: grouped-query attention becomes multi-head latent attention by SVD of its weights, to be trained after.

The rotary half of a key is the mean over heads of half of its dimensions, rotated as other pairs than it was trained
with, so the model does not work before it is distilled (`undivided heal`): read no quality from it before.

Source: X-EcoMLA (arXiv 2503.11132), sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from undivided.convert._host import host_sharing_weights, native_model
from undivided.convert._latent import latent_options
from undivided.convert._merged_heads import linear_from_rows, rows_with_bias
from undivided.convert._moments import Progress, no_progress
from undivided.convert._report import ConversionLog, Report
from undivided.layers._base import grouped_query_dimensions
from undivided.layers.mla import MLAttention
from undivided.models.evaluation import cache_bytes_per_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undivided.models.causal_lm import UndividedForCausalLM
    from undivided.models.checkpoint import WorkFolder

INITIALISATIONS = ("svd", "random")
VARIANTS = ("paper", "released")
# Ranks found by energy are rounded up to a multiple of it, as the release does.
_RANK_MULTIPLE = 8


def convert_x_ecomla(
    model: PreTrainedModel,
    *,
    latent_dim: int | None = None,
    latent_energy: float | None = None,
    query_latent_dim: int | None = None,
    query_energy: float | None = None,
    rope_dim: int | None = None,
    layers: Sequence[int] | None = None,
    init: str = "svd",
    latent_norm: bool = False,
    variant: str = "paper",
    seed: int = 0,
    evaluate: Callable[[Any], float] | None = None,
    work: WorkFolder | None = None,
    progress: Progress = no_progress,
) -> tuple[UndividedForCausalLM, Report]:
    """Replaces grouped-query attention by latent attention whose weights come from an SVD of the old ones.

    `W_Q = U S V^T` gives the queries' latent; one SVD of `[W_K; W_V]`, each head as often as it is used, gives the
    latent of keys and values. Of a head, the first `head_dim - rope_dim` dimensions go without positions and the last
    `rope_dim` keep them; the rotary key is the mean of those of all key heads. With G key heads of D dimensions,
    `2 G D` cached numbers a token and layer become `latent_dim + rope_dim`. What is not replaced is shared with the
    model given, which stays as it is.

    Args:
        model: a causal language model with grouped-query attention, or a host of one with no layer exchanged.
        latent_dim: width of the latent, the same in every layer; or give `latent_energy`.
        latent_energy: share of the squared singular values of `[W_K; W_V]` that each layer's latent keeps, above 0 to
            1; widths then differ by layer, rounded up to multiples of 8.
        query_latent_dim: width of the queries' latent; default the one that leaves the number of weights as it was.
        query_energy: the same share for `W_Q`, in place of a width.
        rope_dim: dimensions with positions, an even divisor of the head's width; default half of it. The
            frequencies are those of a rotary embedding of this width over the base model's own (and its scaling, where
            the release takes YaRN).
        layers: indices of the layers to replace; default all.
        init: "svd", or "random": new weights but for the output projection, to compare with.
        latent_norm: whether the latents are normalised. A norm of weight 1 destroys what the SVD gave, so leave it
            out unless `init` is "random".
        variant: "paper" takes the smallest rank that reaches the share, and puts the singular values on the side
            after the latent; "released" counts the singular values up to the share, which may stop one short before
            rounding, and puts them before the latent. The products are the same.
        seed: of `init="random"`.
        evaluate: returns the perplexity of a model; it fills the report.
        work: not needed: nothing here is slow.
        progress: wraps the loop over layers.

    Returns:
        The model and the report. Its stages are "original" and "x_ecomla".

    Raises:
        ValueError: the model is not supported, a width or a share does not fit, both a width and a share are given
            for one latent, or a layer is out of range.

    Source: X-EcoMLA (arXiv 2503.11132), section 3.2, equations 8 to 12.
    """
    source = native_model(model)
    sizes = _sizes(source, rope_dim)
    _check(
        source, sizes, latent_dim, latent_energy, query_latent_dim, query_energy, init, latent_norm, variant
    )
    replaced = _chosen(layers, source.config.num_hidden_layers)
    log = ConversionLog(evaluate, work, progress)
    log.evaluate("original", model)
    host = host_sharing_weights(source)
    generator = torch.Generator().manual_seed(seed)
    ranks: dict[str, list[int]] = {"latent_dim": [], "query_latent_dim": []}
    # New weights of given widths need no singular values, which take minutes of a large model.
    decomposed = init == "svd" or latent_energy is not None or query_energy is not None
    widest = min(sizes.heads * sizes.head_dim, source.config.hidden_size)
    for layer_idx in progress(replaced, "singular values"):
        attention = host.attention_layers()[layer_idx]
        factors = _factors(attention, sizes) if decomposed else {}
        latent = _rank(factors, "latent", latent_dim, latent_energy, variant)
        if query_latent_dim is None and query_energy is None:
            query_rank = min(_matching_rank(source, sizes, latent), widest)
        else:
            query_rank = _rank(factors, "query", query_latent_dim, query_energy, variant)
        layer = _latent_layer(source, attention, sizes, layer_idx, latent, query_rank, latent_norm)
        if init == "svd":
            _fill(layer, attention, factors, sizes, variant)
        else:
            _draw(layer, generator)
        host.set_attention(layer_idx, layer.train(attention.training), **latent_options(layer))
        for name, rank in zip(ranks, (latent, query_rank), strict=True):
            ranks[name].append(rank)
    log.evaluate("x_ecomla", host)
    log.approximate(f"{len(replaced)} layers are latent attention that is not trained yet ({init} weights)")
    options = {
        "latent_dim": latent_dim, "latent_energy": latent_energy, "query_latent_dim": query_latent_dim,
        "query_energy": query_energy, "rope_dim": sizes.rope_dim, "layers": replaced, "init": init,
        "latent_norm": latent_norm, "variant": variant, "seed": seed, "ranks": ranks,
    }  # fmt: skip
    return host, log.report("x-ecomla", options, round(cache_bytes_per_token(host)))


@dataclass(frozen=True)
class _Sizes:
    """Head counts and widths of the source, with the split of a head's width."""

    heads: int
    key_heads: int
    head_dim: int
    rope_dim: int
    scale: float

    @property
    def nope_dim(self) -> int:
        return self.head_dim - self.rope_dim


@dataclass(frozen=True)
class _Factors:
    """A singular value decomposition `left @ diag(values) @ right` of rows with their bias."""

    left: Tensor
    values: Tensor
    right: Tensor


def _sizes(source: PreTrainedModel, rope_dim: int | None) -> _Sizes:
    found = grouped_query_dimensions(source.config)
    head_dim = found["head_dim"]
    rope_dim = head_dim // 2 if rope_dim is None else rope_dim
    # Zero is the exact rewriting of a model without positions.
    if rope_dim and (rope_dim % 2 or rope_dim < 0 or head_dim % rope_dim):
        fits = [width for width in range(2, head_dim + 1, 2) if head_dim % width == 0]
        raise ValueError(
            f"rope_dim={rope_dim} is not an even divisor of head_dim={head_dim}; use one of {fits}."
        )
    heads = source.config.num_attention_heads
    return _Sizes(heads, found["num_key_value_heads"], head_dim, rope_dim, found["scale"])


def _check(
    source: PreTrainedModel,
    sizes: _Sizes,
    latent_dim: int | None,
    latent_energy: float | None,
    query_latent_dim: int | None,
    query_energy: float | None,
    init: str,
    latent_norm: bool,
    variant: str,
) -> None:
    for name, value, allowed in (("init", init, INITIALISATIONS), ("variant", variant, VARIANTS)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")
    if latent_norm and init == "svd":
        raise ValueError(
            'latent_norm=True with init="svd": a norm of weight 1 rescales the latent that the SVD made; leave it out.'
        )
    if (latent_dim is None) == (latent_energy is None):
        raise ValueError("give latent_dim or latent_energy, and one of the two alone.")
    if query_latent_dim is not None and query_energy is not None:
        raise ValueError("give query_latent_dim or query_energy, or neither, but not both.")
    columns = source.config.hidden_size
    largest = {
        "latent_dim": min(2 * sizes.key_heads * sizes.head_dim, columns),
        "query_latent_dim": min(sizes.heads * sizes.head_dim, columns),
    }
    for name, width in (("latent_dim", latent_dim), ("query_latent_dim", query_latent_dim)):
        if width is not None and not 1 <= width <= largest[name]:
            raise ValueError(f"{name}={width} is not in 1 to {largest[name]}, the rank of the weights.")
    for name, share in (("latent_energy", latent_energy), ("query_energy", query_energy)):
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"{name}={share} must be above 0 and at most 1.")


def _chosen(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    strange = [index for index in layers if not 0 <= index < count]
    if strange or not layers:
        raise ValueError(f"layers={list(layers)} must name layers of 0 to {count - 1}, at least one.")
    return sorted(set(layers))


def _factors(attention: nn.Module, sizes: _Sizes) -> dict[str, _Factors]:
    """The decompositions of a layer's queries, and of its keys and values, each head as often as it is used."""
    keys, values = (
        rows_with_bias(projection)
        .unflatten(0, (sizes.key_heads, sizes.head_dim))
        .repeat_interleave(sizes.heads // sizes.key_heads, dim=0)
        .flatten(0, 1)
        for projection in (attention.k_proj, attention.v_proj)
    )
    rows = {"query": rows_with_bias(attention.q_proj), "latent": torch.cat([keys, values])}
    return {name: _Factors(*torch.linalg.svd(x, full_matrices=False)) for name, x in rows.items()}


def _rank(
    factors: dict[str, _Factors], name: str, width: int | None, share: float | None, variant: str
) -> int:
    if width is not None:
        return width
    return energy_rank(factors[name].values, share or 0.0, variant)


def energy_rank(singular_values: Tensor, share: float, variant: str = "paper") -> int:
    """Returns how many singular values hold a share of the sum of their squares, rounded up to a multiple of 8.

    Args:
        singular_values: in descending order.
        share: above 0 to 1.
        variant: "paper" takes the smallest number that reaches the share, "released" as many as do not exceed it, at
            least one.

    Source: X-EcoMLA (arXiv 2503.11132), section 3.2, dynamic rank selection.
    """
    energy = singular_values.double().square().cumsum(0)
    energy = energy / energy[-1]
    if variant == "paper":
        # A sum of rounded numbers may end a little below the share of 1.
        count = int((energy < share - 1e-12).sum()) + 1
    else:
        count = max(int((energy <= share).sum()), 1)
    rounded = -(-count // _RANK_MULTIPLE) * _RANK_MULTIPLE
    return min(rounded, len(singular_values))


def _matching_rank(source: PreTrainedModel, sizes: _Sizes, latent: int) -> int:
    """The queries' latent with which the layer has as many weights as before, or a little fewer."""
    width, rows = source.config.hidden_size, sizes.heads * sizes.head_dim
    before = width * rows + 2 * sizes.key_heads * sizes.head_dim * width
    others = width * (latent + sizes.rope_dim) + latent * sizes.heads * (sizes.nope_dim + sizes.head_dim)
    return max((before - others) // (width + rows), 1)


def _latent_layer(
    source: PreTrainedModel,
    attention: nn.Module,
    sizes: _Sizes,
    layer_idx: int,
    latent: int,
    query_rank: int,
    latent_norm: bool,
) -> MLAttention:
    """The layer with empty weights, but for the output projection, which is the old one."""
    with torch.device("meta"):
        layer = MLAttention(
            source.config.hidden_size, sizes.heads, latent, sizes.rope_dim, sizes.nope_dim, sizes.head_dim,
            query_latent_dim=query_rank, latent_norm=latent_norm, query_latent_norm=latent_norm,
            query_bias=attention.q_proj.bias is not None, key_value_bias=attention.k_proj.bias is not None,
            output_bias=attention.o_proj.bias is not None,
            softcap=getattr(source.config, "attn_logit_softcapping", None),
            rope_stride=sizes.head_dim // sizes.rope_dim if sizes.rope_dim else 1, layer_idx=layer_idx,
        )  # fmt: skip
    layer.to_empty(device=attention.o_proj.weight.device)
    layer.to(attention.o_proj.weight.dtype)
    layer.o_proj.weight, layer.o_proj.bias = attention.o_proj.weight, attention.o_proj.bias
    return layer


@torch.no_grad()
def _fill(
    layer: MLAttention, attention: nn.Module, factors: dict[str, _Factors], sizes: _Sizes, variant: str
) -> None:
    nope, rope = sizes.nope_dim, sizes.rope_dim
    up, down = _cut(factors["query"], layer.q_a_proj.out_features, variant)
    # The layer's own scale is that of its width; where the model has another, the queries make it up.
    up = (up * (sizes.scale / layer.scale)).unflatten(0, (sizes.heads, sizes.head_dim))
    _set(layer.q_a_proj, down)
    layer.q_b_proj.weight.copy_(torch.cat([up[:, :nope], up[:, sizes.head_dim - rope :]], 1).flatten(0, 1))

    up, down = _cut(factors["latent"], layer.latent_dim, variant)
    keys, values = up.unflatten(0, (2, sizes.heads, sizes.head_dim))
    layer.kv_b_proj.weight.copy_(torch.cat([keys[:, :nope], values], 1).flatten(0, 1))
    mean = rows_with_bias(attention.k_proj).unflatten(0, (sizes.key_heads, sizes.head_dim)).mean(0)
    _set(layer.kv_a_proj_with_mqa, torch.cat([down, mean[sizes.head_dim - rope :]]))


def _cut(factors: _Factors, rank: int, variant: str) -> tuple[Tensor, Tensor]:
    """The factors after and before a latent of `rank` dimensions, with the singular values on one side."""
    left, values, right = factors.left[:, :rank], factors.values[:rank], factors.right[:rank]
    return (left, values[:, None] * right) if variant == "released" else (left * values, right)


def _set(linear: nn.Linear, rows: Tensor) -> None:
    filled = linear_from_rows(rows, linear.bias is not None)
    linear.weight.copy_(filled.weight)
    if linear.bias is not None:
        linear.bias.copy_(filled.bias)


@torch.no_grad()
def _draw(layer: MLAttention, generator: torch.Generator) -> None:
    """New weights of the size of a fan-in, but for the output projection."""
    for name, parameter in layer.named_parameters():
        if name.startswith("o_proj."):
            continue
        if name.endswith("layernorm.weight"):
            parameter.fill_(1.0)
        elif parameter.dim() == 1:
            parameter.zero_()
        else:
            drawn = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
            parameter.copy_(drawn)
