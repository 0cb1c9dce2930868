"""Mixture of heads from a trained model: its grouped-query attention gets a router, and no weight changes.

Each token keeps the first `shared_heads` heads and the `top_k` others of the largest queries; training then adapts the
model to fewer heads. With all routed heads selected and binary gates the function is that of the model given.

Source: MoH (arXiv 2410.11842), section on continue-tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from undivided.convert._host import host_sharing_weights, native_model
from undivided.convert._moments import Progress, no_progress
from undivided.convert._report import ConversionLog, Report
from undivided.layers.moh import MoHAttention
from undivided.models.causal_lm import UndividedForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undivided.models.checkpoint import WorkFolder


@torch.no_grad()
def convert_moh(
    model: PreTrainedModel,
    *,
    shared_heads: int,
    top_k: int,
    router: str = "query_norm",
    gate_mode: str = "binary",
    balance_coeff: float = 0.01,
    seed: int = 0,
    evaluate: Callable[[Any], float] | None = None,
    work: WorkFolder | None = None,
    progress: Progress = no_progress,
) -> tuple[UndividedForCausalLM, Report]:
    """Gives every layer of a model a router of heads; weights are shared with the model, which stays as it is.

    Args:
        model: a base model with grouped-query attention, or a host of one.
        shared_heads: heads that every token uses, the first ones.
        top_k: routed heads that a token uses.
        router: "query_norm" (no parameters, ready at once) or "linear" (new random weights).
        gate_mode: "binary", or "released": selected heads are weighed, with a mean of one.
        balance_coeff: factor of the balance loss in the model's loss.
        seed: of new weights.
        evaluate: returns the perplexity of a model; it fills the report.
        work: not needed: nothing here is slow.
        progress: wraps the loop over layers.

    Returns:
        The model and the report. Its stages are "original" and "routed".

    Raises:
        ValueError: the base model has no grouped-query attention, head counts do not fit, or options do not go
            together.

    Source: MoH (arXiv 2410.11842), section on continue-tuning.
    """
    native = native_model(model)
    options = {
        "shared_heads": shared_heads,
        "top_k": top_k,
        "router": router,
        "gate_mode": gate_mode,
        "balance_coeff": balance_coeff,
    }
    log = ConversionLog(evaluate, work, progress)
    log.evaluate("original", model)
    host = host_sharing_weights(native)
    generator = torch.Generator().manual_seed(seed)
    for layer_idx in progress(range(len(host.decoder_layers)), "routing"):
        source = host.attention_layers()[layer_idx]
        with torch.device("meta"):
            layer = MoHAttention.from_config(native.config, layer_idx, **options)
        weights = dict(source.named_parameters())
        for name, parameter in layer.router.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
            weights[f"router.{name}"] = torch.nn.Parameter(drawn.to(weights["q_proj.weight"]))
        layer.load_state_dict(weights, assign=True)
        layer.train(source.training)
        host.set_attention(layer_idx, layer, **options)
    log.evaluate("routed", host)
    share = layer.router.active_share
    if share < 1:
        log.approximate(f"each token uses {share:.0%} of the heads")
    if gate_mode != "binary":
        log.approximate("the outputs of heads are weighed, with a mean of one over the routed ones in use")
    bytes_per_token = sum(
        (layer.k_proj.out_features + layer.v_proj.out_features) * layer.k_proj.weight.element_size()
        for layer in host.attention_layers()
    )
    return host, log.report("moh", options | {"seed": seed}, bytes_per_token)
