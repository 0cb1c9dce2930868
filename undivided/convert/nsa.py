"""Native sparse attention from a trained model: its grouped-query attention gets blocks, a window and gates.

The projections are the model's. Blocks begin as means of their tokens, and gates open the selected branch: up to `topk`
blocks a text is attended nearly as before, by 0.98 of it; beyond, training (any trainer) must teach what to select.

Source: Native Sparse Attention (arXiv 2502.11089), which trains from scratch; the start is of this library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from undivided.convert._host import host_sharing_weights, native_model
from undivided.convert._moments import Progress, no_progress
from undivided.convert._report import ConversionLog, Report
from undivided.layers.nsa import NSAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undivided.models.causal_lm import UndividedForCausalLM
    from undivided.models.checkpoint import WorkFolder


@torch.no_grad()
def convert_nsa(
    model: PreTrainedModel,
    *,
    block_size: int = 64,
    topk: int = 16,
    window: int = 512,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    evaluate: Callable[[Any], float] | None = None,
    work: WorkFolder | None = None,
    progress: Progress = no_progress,
) -> tuple[UndividedForCausalLM, Report]:
    """Gives every layer of a model native sparse attention; weights are shared with the model, which stays as it is.

    Args:
        model: a base model with grouped-query attention, or a host of one.
        block_size, topk, window, kernel_size, kernel_stride: as in `NSAttention`.
        evaluate: returns the perplexity of a model; it fills the report.
        work: not needed: nothing here is slow.
        progress: not needed.

    Returns:
        The model and the report. Its stages are "original" and "nsa".

    Raises:
        ValueError: the base model has no grouped-query attention, or an option is not allowed.
    """
    options = {
        "block_size": block_size,
        "topk": topk,
        "window": window,
        "kernel_size": kernel_size,
        "kernel_stride": kernel_stride,
    }
    native = native_model(model)
    log = ConversionLog(evaluate, work, progress)
    log.evaluate("original", model)
    host = host_sharing_weights(native)
    cache_bytes = 0.0
    for layer_idx, source in enumerate(host.attention_layers()):
        layer = NSAttention.from_config(native.config, layer_idx, gate_bias=True, **options)
        layer.start_from_attention()
        weight = source.k_proj.weight
        start = layer.to(weight.device, weight.dtype).state_dict()
        layer.load_state_dict(start | dict(source.named_parameters()), assign=True)
        layer.train(source.training)
        host.set_attention(layer_idx, layer, gate_bias=True, **options)
        cache_bytes += 2 * weight.shape[0] * weight.element_size() * (1 + 1 / kernel_stride)
    log.evaluate("nsa", host)
    log.approximate(f"gates of 0.98 and 0.02, and {topk} blocks of {block_size} tokens for each token")
    return host, log.report("nsa", options, round(cache_bytes))
