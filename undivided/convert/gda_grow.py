"""Group-differentiated growth: a model with grouped differential attention gets more signal heads, or a greater width.

Only signal heads are replicated; noise heads, keys, values, lam and the norm of heads stay what they are. A copy of a
signal head has the output of its original, so that the copies share its columns of the output projection between
them and the function stays the same. Greater width is HyperCloning: everything of the hidden size is tiled, and what
reads it divides by the number of tiles.

Source: Grouped Differential Attention (arXiv 2510.06949), abstract, names the idea and gives no recipe; the one here is
that of HyperCloning (arXiv 2409.12903), section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from undivided.convert._moments import Progress, no_progress
from undivided.convert._report import ConversionLog, Report
from undivided.layers.gda import GDAttention, split_heads, stripe_heads
from undivided.models.causal_lm import UndividedForCausalLM

if TYPE_CHECKING:
    from undivided.models.checkpoint import WorkFolder

# Base models whose every width is the hidden size, the MLP's or a head's, and that scale no embedding by one.
_WIDENED = ("llama", "qwen2", "mistral")


def convert_gda_grow(
    model: UndividedForCausalLM,
    *,
    signal_factor: int = 2,
    width_factor: int = 1,
    symmetry_break: float = 0.1,
    query_noise: float = 0.0,
    seed: int = 0,
    evaluate: Callable[[Any], float] | None = None,
    work: WorkFolder | None = None,
    progress: Progress = no_progress,
) -> tuple[UndividedForCausalLM, Report]:
    """Grows a model with grouped differential attention; with `query_noise=0` its function stays the same.

    Copies that are equal in every weight have equal gradients and stay equal; `symmetry_break` and `query_noise` let
    them diverge. To continue training, start with fresh optimiser states, a short warm-up and the target rate. The
    model given stays as it is; what is not grown is shared with it.

    Args:
        model: a model with grouped differential attention in one layer or more.
        signal_factor: copies m of each signal head; g signal heads a noise head become `m g`.
        width_factor: copies n of the hidden size and of the MLPs' width; Llama, Qwen2 and Mistral. Tied embeddings
            are untied.
        symmetry_break: standard deviation, in units of that of the weights, of noise that sums to zero over the
            copies of a column. It leaves the function as it is, up to rounding.
        query_noise: standard deviation, in units of that of the weights, of noise on the queries of the copies. It
            changes the function.
        seed: of the noise.
        evaluate: returns the perplexity of a model; it fills the report.
        work: not needed: nothing here is slow.
        progress: wraps the loop over layers.

    Returns:
        The grown model and the report. Its stages are "original" and "grown".

    Raises:
        ValueError: no layer has grouped differential attention, a factor or a deviation is out of range, or the base
            model cannot be widened.

    Source: Grouped Differential Attention (arXiv 2510.06949); HyperCloning (arXiv 2409.12903), section 3.
    """
    _check_growth(signal_factor, symmetry_break, query_noise)
    _check_factor("width_factor", width_factor)
    entries = model.config.attention if isinstance(model, UndividedForCausalLM) else []
    if not any(entry is not None and entry["mechanism"] == "gda" for entry in entries):
        raise ValueError('no layer of the model has the mechanism "gda"; only its signal heads can be grown.')
    log = ConversionLog(evaluate, work, progress)
    log.evaluate("original", model)
    generator = torch.Generator().manual_seed(seed)
    if width_factor > 1:
        host = widen(model, width_factor, symmetry_break=symmetry_break, generator=generator)
    else:
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        host = copy.deepcopy(model, shared)
    for layer_idx in progress(range(len(entries)), "growing"):
        layer = host.attention_layers()[layer_idx]
        if isinstance(layer, GDAttention) and signal_factor > 1:
            grow_signal_heads(
                layer,
                signal_factor,
                symmetry_break=symmetry_break,
                query_noise=query_noise,
                generator=generator,
            )
            options = {name: value for name, value in entries[layer_idx].items() if name != "mechanism"}
            sizes = {"num_signal_heads": layer.num_signal_heads, "num_noise_heads": layer.num_noise_heads}
            host.set_attention(layer_idx, layer, **(options | sizes))
    log.evaluate("grown", host)
    if query_noise:
        log.approximate(f"the queries of copied heads have noise of {query_noise:g} standard deviations")
    options = {
        "signal_factor": signal_factor,
        "width_factor": width_factor,
        "symmetry_break": symmetry_break,
        "query_noise": query_noise,
        "seed": seed,
    }
    return host, log.report("gda-grow", options, _cache_bytes(host))


@torch.no_grad()
def grow_signal_heads(
    layer: GDAttention,
    factor: int,
    *,
    symmetry_break: float = 0.0,
    query_noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> dict[str, tuple[list[int], list[int]]]:
    """Replicates every signal head of a layer in place, within its group.

    `q_proj` gets each signal head's rows `factor` times; `o_proj` its columns `factor` times, their sum unchanged. The
    layer has `num_signal_heads (factor - 1) head_dim (C + 2 C)` parameters more (without biases).

    Args:
        layer: the layer.
        factor: copies of each signal head, the original included.
        symmetry_break, query_noise: as in `convert_gda_grow`.
        generator: of the noise.

    Returns:
        Name of each weight that changed, to its shapes before and after.

    Raises:
        ValueError: the factor or a deviation is out of range.
    """
    _check_growth(factor, symmetry_break, query_noise)
    before = {name: list(getattr(layer, name).weight.shape) for name in ("q_proj", "o_proj")}
    rows = layer.q_proj.weight.unflatten(0, (-1, layer.head_dim))
    signal, noise = split_heads(rows, layer.num_noise_heads, dim=0)
    copies = signal.repeat_interleave(factor, dim=0)
    if query_noise:
        drawn = _draw(copies, generator) * query_noise * signal.std()
        # The first of the copies is the original and stays what it is.
        copies = copies + drawn * (torch.arange(len(copies), device=drawn.device) % factor > 0)[:, None, None]
    bias = layer.q_proj.bias
    if bias is not None:
        signal_bias, noise_bias = split_heads(
            bias.unflatten(0, (-1, layer.head_dim)), layer.num_noise_heads, dim=0
        )
        bias = stripe_heads(signal_bias.repeat_interleave(factor, dim=0), noise_bias, dim=0).flatten()
    layer.q_proj = _linear(stripe_heads(copies, noise, dim=0).flatten(0, 1), bias)

    columns = layer.o_proj.weight.unflatten(1, (layer.num_signal_heads, 2 * layer.head_dim))
    shared = shared_columns(columns, factor, symmetry_break, generator)
    # Copies of a head are neighbours: [heads, factor, columns of a head].
    layer.o_proj = _linear(shared.transpose(1, 2).flatten(1), layer.o_proj.bias)
    layer.num_signal_heads *= factor
    return {name: (shape, list(getattr(layer, name).weight.shape)) for name, shape in before.items()}


def shared_columns(
    weight: Tensor, copies: int, symmetry_break: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Returns `[rows, copies, ...]`, whose sum over the copies is `weight` `[rows, ...]`: equal shares plus noise.

    The noise has `symmetry_break` times the standard deviation of a share and sums to zero over the copies.
    """
    share = weight.unsqueeze(1).expand(-1, copies, *weight.shape[1:]) / copies
    if not symmetry_break or copies == 1:
        return share.clone()
    noise = _draw(share, generator)
    noise -= noise.mean(1, keepdim=True)
    return share + symmetry_break * share.std() * noise


@torch.no_grad()
def widen(
    model: UndividedForCausalLM,
    factor: int,
    *,
    symmetry_break: float = 0.0,
    generator: torch.Generator | None = None,
) -> UndividedForCausalLM:
    """Returns a new model of `factor` times the hidden size and MLP width that computes the same function.

    Rows that write a widened vector are tiled; columns that read one are shared among its tiles; the heads stay.

    Args:
        model: the model.
        factor: how many times.
        symmetry_break: as in `convert_gda_grow`.
        generator: of the noise.

    Raises:
        ValueError: the base model has widths that this does not know.
    """
    base = model.config.base_config
    if base.model_type not in _WIDENED:
        raise ValueError(
            f'width_factor={factor}: model_type "{base.model_type}" cannot be widened; {", ".join(_WIDENED)} can.'
        )
    config = copy.deepcopy(model.config)
    # Written down, because a model may leave it to hidden_size / num_attention_heads.
    config.base_config.head_dim = (
        getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    )
    config.base_config.hidden_size *= factor
    config.base_config.intermediate_size *= factor
    config.base_config.tie_word_embeddings = config.tie_word_embeddings = False
    embedding = model.get_input_embeddings().weight
    with torch.device(embedding.device):
        host = UndividedForCausalLM(config).to(embedding.dtype)
    host.train(model.training)
    host.generation_config = copy.deepcopy(model.generation_config)
    source = model.state_dict()
    for name, target in host.state_dict().items():
        weight = source[name]
        if target.shape[0] > weight.shape[0]:
            weight = weight.repeat(factor, *[1] * (weight.dim() - 1))
        if target.dim() == 2 and target.shape[1] > weight.shape[1]:
            if name.endswith("embed_tokens.weight"):
                weight = weight.repeat(1, factor)
            else:
                weight = shared_columns(weight, factor, symmetry_break, generator).flatten(1)
        target.copy_(weight)
    return host


def _cache_bytes(host: UndividedForCausalLM) -> int:
    """Bytes a token in all layers; a layer that is not grouped differential attention is grouped-query attention."""
    return sum(
        (layer.k_proj.out_features + layer.v_proj.out_features) * layer.k_proj.weight.element_size()
        for layer in host.attention_layers()
        if hasattr(layer, "k_proj")
    )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


def _draw(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise, drawn on the CPU so that a seed means the same everywhere."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)


def _check_growth(factor: int, symmetry_break: float, query_noise: float) -> None:
    _check_factor("signal_factor", factor)
    for name, value in (("symmetry_break", symmetry_break), ("query_noise", query_noise)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value} must be a number from 0 on.")


def _check_factor(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1.")
