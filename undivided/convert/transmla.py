"""TransMLA: a checkpoint with grouped-query attention becomes one with multi-head latent attention.

The stages are the paper's: all key heads are seen as one (`merge_heads`) and rotated so that few dimensions
carry the positions (`key_axes`); keys are brought to the length of values (`balance_keys`); keys and values
are compressed together (`compress_latent`), and if wanted the queries (`compress_queries`). Every stage is a
model to be evaluated.

Source: TransMLA (arXiv 2502.07864).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undivided.convert._host import native_model
from undivided.convert._latent import latent_options, rotate_latent, truncate_latent
from undivided.convert._merged_heads import (
    all_key_axes,
    key_moments,
    linear_from_rows,
    merge_heads,
    merged_layer,
    query_rope_map,
    rows_with_bias,
)
from undivided.convert._moments import Progress, no_progress, observe, principal_axes, second_moments
from undivided.convert._report import ConversionLog, Report
from undivided.layers._base import grouped_query_dimensions
from undivided.layers.latent import LatentNorm
from undivided.layers.mla import MLAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undivided.models.causal_lm import UndividedForCausalLM
    from undivided.models.checkpoint import WorkFolder

# Samples of the calibration that choose the fold when no `evaluate` does.
_SEARCH_SAMPLES = 8


def convert_transmla(
    model: PreTrainedModel,
    calibration: Tensor | None,
    *,
    latent_dim: int = 512,
    rope_dim: int = 64,
    query_latent_dim: int | None = None,
    freqfold: int | str = "auto",
    balance_kv_ratio: float | None = 1.0,
    latent_norm: bool = False,
    rank: str = "pca",
    evaluate: Callable[[Any], float] | None = None,
    work: WorkFolder | None = None,
    progress: Progress = no_progress,
) -> tuple[UndividedForCausalLM, Report]:
    """Converts the grouped-query attention of a model to multi-head latent attention, without training.

    With G key heads of D dimensions, `2 G D` cached numbers a token and layer become `latent_dim + rope_dim`.
    With a small G the heads have little in common, and the same ratio costs more than with many. The model
    given stays as it is; what the conversion does not change is shared with it.

    Args:
        model: a causal language model of a supported type, or an `UndividedForCausalLM` with no layer
            exchanged.
        calibration: token ids `[samples, length]` without padding, whose activations decide the axes; may be
            None with `rank="full"`.
        latent_dim: width r of the latent, at most `2 G D - rope_dim`, where nothing is cut.
        rope_dim: key dimensions that keep their rotary positions: even, a divisor of D.
        query_latent_dim: width of a latent of the queries; None for a plain projection. Their bias then
            stands before the latent, as in DeepSeek's checkpoints, and is cut with it.
        freqfold: how many neighbouring frequencies the rotation of the keys treats as one: a multiple of
            `D / rope_dim` that divides `D / 2`. "auto" starts at `D / rope_dim` and doubles as long as the
            model with partial positions gets better.
        balance_kv_ratio: length that keys without positions get before the compression, in units of the
            values'; None leaves them as they are.
        latent_norm: whether the latents get an RMS normalisation, as in DeepSeek's checkpoints, with the
            constant weight that keeps their mean length.
        rank: "pca", as described; "full", the exact rewriting as MLA with `rope_dim = G D`, where the latent
            is the
            values and the cache is what it was: the options above are then not used.
        evaluate: returns the perplexity of a model. It fills the report and decides `freqfold="auto"`;
            without it the first samples of the calibration decide.
        work: keeps the slow stages, so that a killed conversion resumes; its key names the model and the
        calibration.
        progress: wraps the long loops; called with an iterable and a description.

    Returns:
        The converted model and the report. Its stages are "original", "partial_rope", "mla" and, with
        `latent_norm`, "latent_norm"; with `rank="full"` they are "original" and "lossless".

    Raises:
        ValueError: the model is not supported or has latent attention already, an option does not fit its
            sizes, or the calibration is missing, empty or of a larger vocabulary.
        TypeError: the calibration does not hold token ids.

    Source: TransMLA (arXiv 2502.07864).
    """
    source = native_model(model)
    config, sizes = source.config, grouped_query_dimensions(source.config)
    log = ConversionLog(evaluate, work, progress)
    if rank == "full":
        log.evaluate("original", model)
        host = merge_heads(source)
        log.evaluate("lossless", host)
        return host, log.report("transmla", {"rank": rank}, _cache_bytes(host))
    if rank != "pca":
        raise ValueError(f'rank={rank!r} is not one of "pca", "full".')
    head_dim, key_dim = sizes["head_dim"], sizes["num_key_value_heads"] * sizes["head_dim"]
    folds = _allowed_folds(head_dim, rope_dim, freqfold)
    _check_widths(config, sizes, latent_dim, rope_dim, query_latent_dim, balance_kv_ratio)
    calibration = _checked_calibration(calibration, config.vocab_size)
    log.evaluate("original", model)

    moments = log.keep("transmla-keys", {}, lambda: key_moments(source, calibration, progress))
    fold = folds[0] if freqfold != "auto" else _best_fold(source, moments, rope_dim, folds, calibration, log)
    axes = all_key_axes(source, moments, rope_dim, fold)
    host = merge_heads(source, axes, rope_dim)
    log.evaluate("partial_rope", host)
    log.approximate(f"{rope_dim} of {key_dim} key dimensions keep positions ({fold} frequencies folded)")

    queries = query_latent_dim is not None
    key = {"rope_dim": rope_dim, "fold": fold, "queries": queries}
    moments = log.keep("transmla-latents", key, lambda: latent_moments(host, calibration, queries, progress))
    kept = compress_layers(
        host, source, axes, moments, latent_dim,
        query_latent_dim=query_latent_dim, balance_kv_ratio=balance_kv_ratio, progress=progress,
    )  # fmt: skip
    log.evaluate("mla", host)
    widths = {"latent": 2 * key_dim - rope_dim, "query latent": config.num_attention_heads * head_dim}
    cuts = [_cut(name, *kept[name], widths[name]) for name in kept if kept[name][0] < widths[name]]
    if cuts:
        log.approximate("; ".join(cuts))

    if latent_norm:
        normalise_latents(host, calibration, progress)
        log.evaluate("latent_norm", host)
        log.approximate("latents are normalised to their mean length")
    options = {
        "rank": rank,
        "latent_dim": latent_dim,
        "rope_dim": rope_dim,
        "query_latent_dim": query_latent_dim,
        "freqfold": fold,
        "balance_kv_ratio": balance_kv_ratio,
        "latent_norm": latent_norm,
    }
    return host, log.report("transmla", options, _cache_bytes(host))


def latent_moments(
    host: UndividedForCausalLM, calibration: Tensor, queries: bool = False, progress: Progress = no_progress
) -> dict[str, Tensor]:
    """Returns the second moments of the merged layers' latents, and with `queries` of their queries.

    Their names are `"0.latent"`, `"0.query"`, `"1.latent"`, ... The activations are those of the model whose
    positions are partial already, not of the original.
    """
    modules = {}
    for index, layer in enumerate(host.attention_layers()):
        modules[f"{index}.latent"] = layer.kv_a_proj_with_mqa
        if queries:
            modules[f"{index}.query"] = layer.q_proj
    moments = second_moments(host, modules, calibration, progress=progress, description="calibrating latents")
    for index, layer in enumerate(host.attention_layers()):
        latent = moments[f"{index}.latent"]
        moments[f"{index}.latent"] = latent[: layer.latent_dim, : layer.latent_dim].clone()
    return moments


def compress_layers(
    host: UndividedForCausalLM,
    source: PreTrainedModel,
    axes: Sequence[Tensor],
    moments: dict[str, Tensor],
    latent_dim: int,
    *,
    query_latent_dim: int | None = None,
    balance_kv_ratio: float | None = 1.0,
    progress: Progress = no_progress,
) -> dict[str, tuple[int, list[float]]]:
    """Puts layers with a compressed latent in the place of the merged layers of a host.

    Args:
        host: what `merge_heads` made of `source` with these axes.
        source: the native model.
        axes: the key axes of every layer.
        moments: as `latent_moments` gives them.
        latent_dim: axes of the latent to keep.
        query_latent_dim: axes of the queries to keep; None for a plain projection.
        balance_kv_ratio: as in `balance_keys`; None for no balancing.
        progress: wraps the loop over the layers.

    Returns:
        Of "latent" and, if there is one, "query latent": the width, and each layer's share of the mean
        square that is kept.
    """
    shares: list[float] = []
    query_shares: list[float] = []
    rope_dim = host.attention_layers()[0].rope_dim
    for index in progress(range(len(axes)), "compressing"):
        # Anew from the source: what the host holds is rounded to the dtype of the model.
        layer = merged_layer(source, index, axes[index], rope_dim)
        moment = moments[f"{index}.latent"]
        if balance_kv_ratio is not None:
            moment = balance_keys(layer, moment, balance_kv_ratio)
        shares.append(compress_latent(layer, moment, latent_dim))
        if query_latent_dim is not None:
            moment, to_rope = moments[f"{index}.query"], query_rope_map(source, axes[index], rope_dim)
            query_shares.append(compress_queries(layer, moment, query_latent_dim, to_rope))
        host.set_attention(index, layer, **latent_options(layer))
    kept = {"latent": (latent_dim, shares)}
    return kept if query_latent_dim is None else kept | {"query latent": (query_latent_dim, query_shares)}


@torch.no_grad()
def balance_keys(layer: MLAttention, moment: Tensor, ratio: float = 1.0) -> Tensor:
    """Makes the keys in the latent `ratio` times as long as the values; the layer computes the same.

    The `kv_a` rows of keys are divided and the `kv_b` columns multiplied by
    `f = mean_i rms(k_i) / mean_i rms(v_i) / ratio`, over channels i without the first `rope_dim` of the
    values. The compression then sees keys and values alike.

    Args:
        layer: a merged layer, changed in place.
        moment: second moment of its latent.
        ratio: wanted length of the keys in units of the values'.

    Returns:
        The second moment of the new latent.

    Source: TransMLA (arXiv 2502.07864); the number as in the authors' code.
    """
    # Values are as many as all keys, and the rotary ones are not in the latent.
    num_keys = (layer.latent_dim - layer.rope_dim) // 2
    lengths = moment.diagonal().sqrt()
    keys, values = lengths[:num_keys], lengths[num_keys + layer.rope_dim :]
    if keys.sum() == 0 or values.sum() == 0:
        return moment
    factor = (keys.mean() / values.mean() / ratio).item()
    down = layer.kv_a_proj_with_mqa
    down.weight[:num_keys] /= factor
    if down.bias is not None:
        down.bias[:num_keys] /= factor
    layer.kv_b_proj.weight[:, :num_keys] *= factor
    lengths = torch.ones_like(lengths)
    lengths[:num_keys] /= factor
    return lengths[:, None] * moment * lengths


def compress_latent(layer: MLAttention, moment: Tensor, latent_dim: int) -> float:
    """Rotates the latent to its principal axes and keeps the first `latent_dim` of them.

    Args:
        layer: a merged layer, changed in place.
        moment: second moment of its latent.
        latent_dim: axes to keep.

    Returns:
        Their share of the latent's mean square.

    Source: TransMLA (arXiv 2502.07864).
    """
    vectors, values = principal_axes(moment)
    rotate_latent(layer, vectors)
    truncate_latent(layer, latent_dim)
    return (values[:latent_dim].sum() / values.sum()).item()


@torch.no_grad()
def compress_queries(layer: MLAttention, moment: Tensor, query_latent_dim: int, rope_map: Tensor) -> float:
    """Replaces the query projection by two, through a latent of the principal axes of the queries.

    Args:
        layer: a merged layer, changed in place.
        moment: second moment of the outputs of its query projection.
        query_latent_dim: axes to keep.
        rope_map: `[H, rope_dim, nope_dim]`, which gives the rotary part of a head's query from the other; not
            used where the queries have only a rotary part.

    Returns:
        Their share of the queries' mean square.

    Source: TransMLA (arXiv 2502.07864).
    """
    rows = torch.arange(layer.q_proj.out_features).unflatten(0, (layer.num_heads, -1))
    rows = (rows[:, : layer.nope_dim] if layer.nope_dim else rows).flatten()
    vectors, values = principal_axes(moment[rows][:, rows])
    kept = vectors[:, :query_latent_dim].to(layer.q_proj.weight.device)
    up = kept.unflatten(0, (layer.num_heads, -1))
    if layer.nope_dim:
        up = torch.cat([up, rope_map.to(up.device) @ up], dim=1)
    has_bias = layer.q_proj.bias is not None
    layer.q_a_proj = linear_from_rows(kept.T @ rows_with_bias(layer.q_proj)[rows], has_bias)
    layer.q_a_layernorm = nn.Identity()
    layer.q_b_proj = linear_from_rows(F.pad(up.flatten(0, 1), (0, 1)), False)
    del layer.q_proj
    return (values[:query_latent_dim].sum() / values.sum()).item()


@torch.no_grad()
def normalise_latents(
    host: UndividedForCausalLM, calibration: Tensor, progress: Progress = no_progress
) -> None:
    """Gives the latents of every layer an RMS normalisation that keeps their mean length.

    The weight is the constant `E[rms(c)]`: of all constants w, `E |w c / rms(c) - c|^2` is least for it. The
    mean is over the latent alone, without the rotary key, in the model without normalisations.
    """
    eps = host.config.base_config.rms_norm_eps
    sums: dict[str, Tensor] = {}
    positions = calibration.numel()

    def receive(name: str, output: Tensor) -> None:
        width = layers[int(name.split(".")[0])].latent_dim if name.endswith("latent") else None
        rms = (output[..., :width].double().pow(2).mean(dim=-1) + eps).sqrt()
        sums[name] = sums.get(name, 0.0) + rms.sum()

    layers = host.attention_layers()
    modules = {f"{index}.latent": layer.kv_a_proj_with_mqa for index, layer in enumerate(layers)}
    modules |= {f"{i}.query": layer.q_a_proj for i, layer in enumerate(layers) if hasattr(layer, "q_a_proj")}
    observe(host, modules, calibration, receive, progress=progress, description="calibrating norms")
    for index, layer in enumerate(layers):
        layer.kv_a_layernorm = LatentNorm(layer.latent_dim, eps)
        layer.kv_a_layernorm.weight.fill_(sums[f"{index}.latent"].item() / positions)
        if hasattr(layer, "q_a_proj"):
            layer.q_a_layernorm = LatentNorm(layer.q_a_proj.out_features, eps)
            layer.q_a_layernorm.weight.fill_(sums[f"{index}.query"].item() / positions)
        host.set_attention(index, layer, **latent_options(layer))


def _best_fold(
    source: PreTrainedModel,
    moments: dict[str, Tensor],
    rope_dim: int,
    folds: Sequence[int],
    calibration: Tensor,
    log: ConversionLog,
) -> int:
    """Doubles the fold as long as the model with partial positions gets better."""
    score = log.evaluator or (lambda host: _negative_log_likelihood(host, calibration[:_SEARCH_SAMPLES]))

    def search() -> dict[str, Tensor]:
        best = (float("inf"), folds[0])
        for fold in log.progress(folds, "choosing the fold of frequencies"):
            found = score(merge_heads(source, all_key_axes(source, moments, rope_dim, fold), rope_dim))
            if not found < best[0]:
                break
            best = (found, fold)
        return {"score": torch.tensor(best[0], dtype=torch.float64), "fold": torch.tensor(best[1])}

    # The original's perplexity tells one evaluation from another.
    found = log.keep("transmla-fold", {"rope_dim": rope_dim, **log.perplexity}, search)
    if log.evaluator is not None:
        log.perplexity["partial_rope"] = found["score"].item()
    return int(found["fold"])


@torch.no_grad()
def _negative_log_likelihood(model: nn.Module, input_ids: Tensor) -> float:
    """Mean over the tokens of every sample but its first, in nats."""
    total = 0.0
    for sample in input_ids.to(next(model.parameters()).device):
        logits = model(input_ids=sample[None], use_cache=False).logits[0, :-1]
        total += F.cross_entropy(logits.float(), sample[1:], reduction="sum").item()
    return total / max(input_ids[:, 1:].numel(), 1)


def _allowed_folds(head_dim: int, rope_dim: int, freqfold: int | str) -> list[int]:
    """The folds to try, doubling, or the one that was asked for."""
    halves = [width for width in range(2, head_dim + 1, 2) if head_dim % width == 0]
    if rope_dim not in halves:
        raise ValueError(
            f"rope_dim={rope_dim} does not fit head_dim={head_dim}: it must be even and divide it; "
            f"{', '.join(map(str, halves))} would."
        )
    stride, frequencies = head_dim // rope_dim, head_dim // 2
    allowed = [fold for fold in range(stride, frequencies + 1, stride) if frequencies % fold == 0]
    if freqfold == "auto":
        return [fold for fold in allowed if (fold // stride).bit_count() == 1]
    if freqfold not in allowed:
        raise ValueError(
            f"freqfold={freqfold!r} is not a multiple of head_dim / rope_dim = {stride} that divides "
            f'head_dim / 2 = {frequencies}; {", ".join(map(str, allowed))} or "auto" would do.'
        )
    return [int(freqfold)]


def _check_widths(
    config: Any,
    sizes: dict[str, Any],
    latent_dim: int,
    rope_dim: int,
    query_latent_dim: int | None,
    balance_kv_ratio: float | None,
) -> None:
    num_groups, head_dim = sizes["num_key_value_heads"], sizes["head_dim"]
    widest = 2 * num_groups * head_dim - rope_dim
    if not 1 <= latent_dim <= widest:
        raise ValueError(
            f"latent_dim={latent_dim} is not in 1 to {widest}: keys and values of {num_groups} heads with "
            f"head_dim={head_dim} are {2 * num_groups * head_dim} numbers, {rope_dim} of them the rotary key."
        )
    widest = config.num_attention_heads * head_dim
    if query_latent_dim is not None and not 1 <= query_latent_dim <= widest:
        raise ValueError(
            f"query_latent_dim={query_latent_dim} is not in 1 to {widest}, the width of all queries; "
            "None leaves them a plain projection."
        )
    if balance_kv_ratio is not None and not balance_kv_ratio > 0:
        raise ValueError(
            f"balance_kv_ratio={balance_kv_ratio} must be above 0, or None to leave the keys as they are."
        )


def _checked_calibration(calibration: Tensor | None, vocab_size: int) -> Tensor:
    if calibration is None:
        raise ValueError('calibration is None; rank="pca" needs token ids [samples, length].')
    if calibration.is_floating_point() or calibration.dtype == torch.bool:
        raise TypeError(f"calibration is {calibration.dtype}; token ids are integers.")
    if calibration.dim() != 2 or calibration.numel() == 0:
        raise ValueError(
            f"calibration is {list(calibration.shape)}; give token ids [samples, length], not empty."
        )
    lowest, highest = int(calibration.min()), int(calibration.max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"calibration has the token ids {lowest} to {highest}, the model has 0 to {vocab_size - 1}; "
            "tokenise the text with the model's own tokenizer."
        )
    return calibration


def _cut(name: str, kept: int, shares: list[float], width: int) -> str:
    least = min(range(len(shares)), key=shares.__getitem__)
    return (
        f"the {name} keeps {kept} of {width} axes and {sum(shares) / len(shares):.2%} of its mean square "
        f"(least: {shares[least]:.2%} in layer {least})"
    )


def _cache_bytes(host: UndividedForCausalLM) -> int:
    layers = host.attention_layers()
    return sum(
        (layer.latent_dim + layer.rope_dim) * layer.kv_b_proj.weight.element_size() for layer in layers
    )
