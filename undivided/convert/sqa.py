"""Sparse query attention out of a checkpoint: keep some of its query heads, drop the others.

The model of the kept heads computes what the whole model computes with zeros in the columns of its output projections
that the other heads enter. Which heads stay is given, or chosen in each group that shares a key head by how much a
head adds to the output of its layer; the output projection may then be fitted anew to the outputs of all heads. The
paper trains its models from scratch: the conversion is a start for training on, not a substitute.

Source: SQA (arXiv 2510.01817) for the layer; the score is the mean square of a head's part of the output, the fit least
squares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from undivided.convert._host import host_sharing_weights, native_model
from undivided.convert._moments import Progress, no_progress, observe
from undivided.convert._report import ConversionLog, Report
from undivided.layers._base import grouped_query_dimensions
from undivided.layers.sqa import SQAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undivided.models.causal_lm import UndividedForCausalLM
    from undivided.models.checkpoint import WorkFolder

# Of the mean of the diagonal, added to it: activations leave directions in which the fit is not determined.
_DAMPING = 1e-6


def convert_sqa(
    model: PreTrainedModel,
    calibration: Tensor | None = None,
    *,
    num_query_heads: int | None = None,
    num_key_value_heads: int | None = None,
    keep_heads: Sequence[int] | Sequence[Sequence[int]] | None = None,
    refit: bool = False,
    evaluate: Callable[[Any], float] | None = None,
    work: WorkFolder | None = None,
    progress: Progress = no_progress,
) -> tuple[UndividedForCausalLM, Report]:
    """Drops query heads of a model with multi-head or grouped-query attention, without training.

    The model given stays as it is; what the conversion does not change is shared with it.

    Args:
        model: a causal language model of a supported type, or an `UndividedForCausalLM` with no layer exchanged.
        calibration: token ids `[samples, length]` without padding. The score of a head is the mean of `|W_O o|^2` over
            its outputs o; without calibration it is `|W_O W_V|_F^2`, which needs no data.
        num_query_heads: query heads to keep in every layer, those with the highest scores.
        num_key_value_heads: key/value heads to keep, those whose best query heads add up to the highest score.
            Default: all, or `num_query_heads` where that is less.
        keep_heads: the query heads to keep, in place of a number: indices for every layer, or one list a layer. Each
            key head must keep equally many query heads, or none: then it is dropped too.
        refit: fit the output projection to the outputs of all heads by least squares on the calibration, instead of
            taking its columns as they are.
        evaluate: returns the perplexity of a model; it fills the report.
        work: keeps the moments, so that a killed conversion resumes.
        progress: wraps the long loops; called with an iterable and a description.

    Returns:
        The converted model and the report. Its stages are "original" and "sqa"; its options name the heads kept.

    Raises:
        ValueError: the model is not supported or not grouped-query; neither or both of `num_query_heads` and
            `keep_heads` are given; heads do not fit the groups; or `refit` has no calibration.

    Source: SQA (arXiv 2510.01817).
    """
    source = native_model(model)
    sizes, heads = grouped_query_dimensions(source.config), source.config.num_attention_heads
    groups, head_dim = sizes["num_key_value_heads"], sizes["head_dim"]
    layers = list(source.get_decoder().layers)
    if (num_query_heads is None) == (keep_heads is None):
        raise ValueError(
            f"num_query_heads={num_query_heads} and keep_heads={keep_heads}: give one of the two."
        )
    if refit and calibration is None:
        raise ValueError("refit=True needs a calibration: the fit is to the outputs of heads.")
    if keep_heads is not None and num_key_value_heads is not None:
        raise ValueError(
            f"num_key_value_heads={num_key_value_heads} is decided by keep_heads already; leave it None."
        )
    kept: list[list[int]] = []
    if keep_heads is not None:
        kept = _given_heads(keep_heads, len(layers), heads, groups)
    else:
        counts = _target_counts(num_query_heads or 0, num_key_value_heads, heads, groups)

    log = ConversionLog(evaluate, work, progress)
    log.evaluate("original", model)
    moments: dict[str, Tensor] = {}
    if calibration is not None and (refit or not kept):
        key = {"refit": refit, "calibration": list(calibration.shape)}
        moments = log.keep(
            "sqa-outputs",
            key,
            lambda: output_moments(source, calibration, None if refit else head_dim, progress),
        )
    if not kept:
        for index, layer in enumerate(layers):
            scores = head_scores(layer.self_attn, heads, groups, moments.get(str(index)))
            kept.append(best_heads(scores, *counts, groups))

    host = host_sharing_weights(source)
    for index, attention in enumerate(host.attention_layers()):
        moment = moments[str(index)] if refit else None
        layer = pruned_layer(attention, source.config, index, kept[index], moment)
        host.set_attention(
            index,
            layer,
            num_query_heads=layer.num_query_heads,
            num_key_value_heads=layer.num_key_value_heads,
        )
    log.evaluate("sqa", host)
    dropped = heads * len(layers) - sum(map(len, kept))
    if dropped:
        fitted = "; the output projections are fitted to all heads" if refit else ""
        log.approximate(f"{dropped} of {heads * len(layers)} query heads are dropped{fitted}")
    options = {"keep_heads": kept, "refit": refit, "calibrated": calibration is not None}
    cached = sum(
        2 * layer.k_proj.out_features * layer.k_proj.weight.element_size()
        for layer in host.attention_layers()
    )
    return host, log.report("sqa", options, cached)


@torch.no_grad()
def output_moments(
    model: PreTrainedModel, calibration: Tensor, block: int | None = None, progress: Progress = no_progress
) -> dict[str, Tensor]:
    """Returns `E[o o^T]`, float64, of what enters the output projection of each layer, by the layer's index.

    Args:
        model: a model of transformers.
        calibration: token ids `[samples, length]`.
        block: width of the diagonal blocks wanted, `[heads, block, block]`; None for all, `[H D, H D]`.
        progress: wraps the loop over batches.
    """
    sums: dict[str, Tensor] = {}

    def receive(name: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2).double()
            if block is None:
                moment = rows.T @ rows
            else:
                parts = rows.unflatten(-1, (-1, block))
                moment = torch.einsum("nhi,nhj->hij", parts, parts)
            sums[name] = moment + sums.get(name, 0.0)

        return add

    with ExitStack() as stack:
        for index, layer in enumerate(model.get_decoder().layers):
            handle = layer.self_attn.o_proj.register_forward_pre_hook(receive(str(index)))
            stack.callback(handle.remove)
        observe(model, {}, calibration, lambda name, output: None, progress=progress)
    return {name: total / calibration.numel() for name, total in sums.items()}


@torch.no_grad()
def head_scores(attention: nn.Module, heads: int, groups: int, moment: Tensor | None = None) -> Tensor:
    """Returns the score of each query head, float64 `[heads]`: the mean square of its part of the layer's output.

    Args:
        attention: a layer with `o_proj` and `v_proj`.
        heads, groups: query heads and key/value heads.
        moment: of the outputs of heads, `[heads, D, D]` or `[heads D, heads D]`; None to score the weights,
            `|W_O W_V|_F^2`, as if the layer's inputs were white.
    """
    out = attention.o_proj.weight.double().unflatten(1, (heads, -1)).movedim(1, 0)
    if moment is None:
        value = attention.v_proj.weight.double().unflatten(0, (groups, -1))
        moment = (value @ value.transpose(1, 2)).repeat_interleave(heads // groups, dim=0)
    elif moment.dim() == 2:
        blocks = moment.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))
        moment = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return torch.einsum("hci,hij,hcj->h", out, moment.to(out), out)


def best_heads(scores: Tensor, query_heads: int, key_heads: int, groups: int) -> list[int]:
    """Returns the query heads to keep, ascending: the best of each group, in the groups whose best add up to most.

    Args:
        scores: of every query head.
        query_heads, key_heads: how many to keep of each kind.
        groups: key heads of the model.
    """
    best, places = scores.view(groups, -1).topk(query_heads // key_heads, dim=1)
    chosen = best.sum(1).topk(key_heads).indices
    width = scores.numel() // groups
    return sorted((chosen[:, None] * width + places[chosen]).flatten().tolist())


@torch.no_grad()
def pruned_layer(
    attention: nn.Module, config: Any, layer_idx: int, kept: list[int], moment: Tensor | None = None
) -> SQAttention:
    """Returns sparse query attention of the kept heads of a native layer.

    Args:
        attention: the native layer.
        config: of the base model.
        layer_idx: index of the layer.
        kept: query heads to keep, ascending, equally many in each group or none.
        moment: of the outputs of all heads, `[H D, H D]`, to fit the output projection to; None to take its columns.
    """
    sizes, heads = grouped_query_dimensions(config), config.num_attention_heads
    groups, head_dim = sizes["num_key_value_heads"], sizes["head_dim"]
    kept_groups = sorted({head * groups // heads for head in kept})
    with torch.device("meta"):
        layer = SQAttention.from_config(
            config, layer_idx, num_query_heads=len(kept), num_key_value_heads=len(kept_groups)
        )
    queries, keys = (
        _places(which, head_dim, attention.o_proj.weight.device) for which in (kept, kept_groups)
    )
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        native = getattr(attention, name)
        if len(rows) < native.out_features:
            bias = None if native.bias is None else native.bias[rows]
            native = _linear(native.weight[rows], bias)
        setattr(layer, name, native)
    weight = attention.o_proj.weight[:, queries] if moment is None else _fitted(attention, queries, moment)
    layer.o_proj = _linear(weight, attention.o_proj.bias)
    return layer


def _fitted(attention: nn.Module, kept: Tensor, moment: Tensor) -> Tensor:
    """Returns the `W` that minimises `E|W_O o - W o_kept|^2`: `W_O M[:, kept] M[kept, kept]^-1`."""
    weight = attention.o_proj.weight
    moment = moment.to(weight.device, torch.float64)
    inner = moment[kept][:, kept]
    inner = inner + _DAMPING * inner.diagonal().mean() * torch.eye(len(kept)).to(inner)
    fitted = torch.linalg.solve(inner, moment[kept] @ weight.double().T).T
    return fitted.to(weight.dtype)


def _places(blocks: list[int], width: int, device: torch.device) -> Tensor:
    return (torch.tensor(blocks)[:, None] * width + torch.arange(width)).flatten().to(device)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


def _target_counts(queries: int, keys: int | None, heads: int, groups: int) -> tuple[int, int]:
    width = heads // groups
    if not 1 <= queries <= heads:
        raise ValueError(f"num_query_heads={queries} is not in 1 to {heads}, the query heads of the model.")
    keys = min(queries, groups) if keys is None else keys
    if not 1 <= keys <= groups:
        raise ValueError(
            f"num_key_value_heads={keys} is not in 1 to {groups}, the key/value heads of the model."
        )
    if queries % keys or queries // keys > width:
        able = sorted({n * keys for n in range(1, width + 1)})
        raise ValueError(
            f"num_query_heads={queries} on {keys} key/value heads, of groups of {width}, cannot be kept: each group "
            f"keeps equally many; {', '.join(map(str, able))} can."
        )
    return queries, keys


def _given_heads(keep_heads: Sequence[Any], layers: int, heads: int, groups: int) -> list[list[int]]:
    each = [list(keep_heads)] * layers if all(isinstance(head, int) for head in keep_heads) else keep_heads
    if len(each) != layers:
        raise ValueError(
            f"keep_heads has {len(each)} lists, but the model has {layers} layers; give one each."
        )
    kept = []
    for index, given in enumerate(each):
        chosen = sorted(given)
        if not chosen or len(set(chosen)) < len(chosen) or not 0 <= chosen[0] <= chosen[-1] < heads:
            raise ValueError(
                f"keep_heads of layer {index} is {list(given)}; give different query heads of 0 to {heads - 1}."
            )
        members = [head * groups // heads for head in chosen]
        counts = {group: members.count(group) for group in members}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"keep_heads of layer {index} keeps {', '.join(map(str, counts.values()))} query heads of key heads "
                f"{', '.join(map(str, counts))}; keep equally many of each, or none."
            )
        kept.append(chosen)
    return kept
