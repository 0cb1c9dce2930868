"""Attention Editing: attention of another form in a trained model, which two stages of distillation then teach.

The first stage trains each new layer alone on what the old one reads and writes (`undivided heal --layers-tokens`), the
second the whole model on the old one's next-token distribution. The conversions here only put the new layers in place;
latent attention that starts from the old weights is made by `convert_x_ecomla` and `convert_transmla`.

Source: Attention Editing (arXiv 2604.05688), abstract: the two stages and the two targets. Sizes, initial values and
the share of layers that keep the whole text are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from undivided.convert._host import host_sharing_weights, native_model
from undivided.convert._moments import Progress, no_progress
from undivided.convert._report import ConversionLog, Report
from undivided.convert.x_ecomla import convert_x_ecomla
from undivided.layers.gate_swa import GateSWAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undivided.models.causal_lm import UndividedForCausalLM
    from undivided.models.checkpoint import WorkFolder


def convert_edit_mla(
    model: PreTrainedModel,
    *,
    latent_dim: int,
    rope_dim: int | None = None,
    query_latent_dim: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    evaluate: Callable[[Any], float] | None = None,
    work: WorkFolder | None = None,
    progress: Progress = no_progress,
) -> tuple[UndividedForCausalLM, Report]:
    """Puts latent attention with new weights and normalised latents where a model has grouped-query attention.

    Nothing of the old weights is used but the output projection, so the source may have whatever attention the base
    model has: norms of queries and keys are no obstacle, as they are to an SVD. The model does not work before it is
    trained.

    Args:
        model: a causal language model with grouped-query attention, or a host of one with no layer exchanged.
        latent_dim: width of the latent.
        rope_dim: dimensions with positions; default half of a head's width.
        query_latent_dim: width of the queries' latent; default the one that leaves the number of weights as it was.
        layers: indices of the layers to replace; default all.
        seed: of the new weights.
        evaluate: returns the perplexity of a model; it fills the report.
        work: not needed: nothing here is slow.
        progress: wraps the loop over layers.

    Returns:
        The model and the report. Its stages are "original" and "edit_mla".

    Raises:
        ValueError: as `convert_x_ecomla`.

    Source: Attention Editing (arXiv 2604.05688), abstract.
    """
    host, report = convert_x_ecomla(
        model, latent_dim=latent_dim, rope_dim=rope_dim, query_latent_dim=query_latent_dim, layers=layers,
        init="random", latent_norm=True, seed=seed, evaluate=evaluate, progress=progress,
    )  # fmt: skip
    perplexity = {
        {"x_ecomla": "edit_mla"}.get(name, name): value for name, value in report.perplexity.items()
    }
    return host, replace(report, method="edit-mla", perplexity=perplexity)


@torch.no_grad()
def convert_edit_gate_swa(
    model: PreTrainedModel,
    *,
    window: int,
    full_every: int = 6,
    gate: str | None = "elementwise",
    sinks: int = 0,
    evaluate: Callable[[Any], float] | None = None,
    work: WorkFolder | None = None,
    progress: Progress = no_progress,
) -> tuple[UndividedForCausalLM, Report]:
    """Lets most layers of a model attend in a sliding window with an output gate; weights are shared with the model.

    Gates begin at 1, so the model is the one given on texts of at most `window` tokens. Layers `full_every - 1,
    2 full_every - 1, ...` keep their attention and the whole text: at length M the cache is
    `1 / full_every + (1 - 1 / full_every) (window - 1 + sinks) / M` of what it was.

    Args:
        model: a causal language model with grouped-query attention, or a host of one with no layer exchanged.
        window: tokens that a query of the other layers sees, itself included.
        full_every: one of so many layers stays as it is; 0 for none.
        gate: "elementwise", "head", or None for a window alone.
        sinks: first tokens of a text that every query sees besides.
        evaluate: returns the perplexity of a model; it fills the report.
        work: not needed: nothing here is slow.
        progress: wraps the loop over layers.

    Returns:
        The model and the report. Its stages are "original" and "edit_gate_swa".

    Raises:
        ValueError: the model is not supported, or an option is out of range.

    Source: Attention Editing (arXiv 2604.05688), abstract.
    """
    native = native_model(model)
    if full_every < 0 or full_every == 1:
        raise ValueError(
            f"full_every={full_every} must be 0, for no full layer, or at least 2: with 1 none changes."
        )
    options = {"window": window, "gate": gate, "sinks": sinks}
    log = ConversionLog(evaluate, work, progress)
    log.evaluate("original", model)
    host = host_sharing_weights(native)
    count = len(host.decoder_layers)
    edited = [index for index in range(count) if not full_every or (index + 1) % full_every]
    for layer_idx in progress(edited, "windows"):
        source = host.attention_layers()[layer_idx]
        with torch.device("meta"):
            layer = GateSWAttention.from_config(native.config, layer_idx, **options)
        weights = dict(source.named_parameters())
        if gate is not None:
            weights["g_proj.weight"] = torch.nn.Parameter(
                torch.zeros(layer.g_proj.weight.shape).to(weights["q_proj.weight"])
            )
        layer.load_state_dict(weights, assign=True)
        host.set_attention(layer_idx, layer.train(source.training), **options)
    log.evaluate("edit_gate_swa", host)
    log.approximate(f"{len(edited)} of {count} layers see the last {window} tokens and the first {sinks}")
    # Of a long text: the windows are full by then.
    whole = count - len(edited)
    sizes = [layer.k_proj.out_features + layer.v_proj.out_features for layer in host.attention_layers()]
    bytes_per_number = layer.k_proj.weight.element_size() if edited else 0
    cache = sum(size for index, size in enumerate(sizes) if index not in edited) * bytes_per_number
    return host, log.report(
        "edit-gate-swa", options | {"full_every": full_every, "full_layers": whole}, cache
    )
