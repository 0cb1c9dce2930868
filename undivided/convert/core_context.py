"""Core context aware attention from a trained model: its grouped-query attention gets core tokens, no weight changes.

Up to `window` tokens the function is that of the model given; beyond, training adapts the model to summaries of the far
past (`undivided heal`, or any trainer; the paper trains on text alone, 1000 steps, all weights or those of attention).

Source: Core Context Aware Transformers (arXiv 2412.12465), section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from undivided.convert._attach import attach
from undivided.convert._moments import Progress, no_progress
from undivided.convert._report import ConversionLog, Report

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undivided.models.causal_lm import UndividedForCausalLM
    from undivided.models.checkpoint import WorkFolder


def convert_core_context(
    model: PreTrainedModel,
    *,
    group_size: int = 16,
    window: int = 1024,
    pooling: str = "cca",
    core_heads: str = "query",
    rope: str = "post",
    core_logit_bias: float = 0.0,
    evaluate: Callable[[Any], float] | None = None,
    work: WorkFolder | None = None,
    progress: Progress = no_progress,
) -> tuple[UndividedForCausalLM, Report]:
    """Gives every layer of a model core tokens; weights are shared with the model, which stays as it is.

    Args:
        model: a base model with grouped-query attention, or a host of one.
        group_size, window, pooling, core_heads, rope, core_logit_bias: as in `CoreContextAttention`.
        evaluate: returns the perplexity of a model; it fills the report. Texts of up to `window` tokens show nothing.
        work: not needed: nothing here is slow.
        progress: not needed.

    Returns:
        The model and the report. Its stages are "original" and "core_context"; its bytes are those that the cache grows
        by with every token beyond the window.

    Raises:
        ValueError: the base model has no grouped-query attention, or an option is not allowed.

    Source: Core Context Aware Transformers (arXiv 2412.12465), section 4.
    """
    options: dict[str, Any] = {
        "group_size": group_size,
        "window": window,
        "pooling": pooling,
        "core_heads": core_heads,
        "rope": rope,
        "core_logit_bias": core_logit_bias,
    }
    log = ConversionLog(evaluate, work, progress)
    log.evaluate("original", model)
    host = attach(model, "core_context", **options)
    log.evaluate("core_context", host)
    log.approximate(f"{group_size} tokens further back than {window} are one core token")
    numbers = 0.0
    for layer in host.attention_layers():
        heads = (
            layer.q_proj.out_features
            if core_heads == "query" and pooling == "cca"
            else layer.k_proj.out_features
        )
        numbers += 2 * heads / group_size * layer.k_proj.weight.element_size()
    return host, log.report("core_context", options, round(numbers))
