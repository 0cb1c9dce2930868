"""Dynamic mask attention from a trained model: its grouped-query attention learns which keys to keep.

Up to `keep_window_size` tokens the function is that of the model given; beyond, queries lose keys, at first the oldest
ones, until training has taught the biases which to keep (any trainer; A and W_dt alone are a few thousand weights).

Source: Trainable Dynamic Mask Sparse Attention (arXiv 2508.02124), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from undivided.convert._host import host_sharing_weights, native_model
from undivided.convert._moments import Progress, no_progress
from undivided.convert._report import ConversionLog, Report
from undivided.layers.dma import DynamicMaskAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undivided.models.causal_lm import UndividedForCausalLM
    from undivided.models.checkpoint import WorkFolder


@torch.no_grad()
def convert_dma(
    model: PreTrainedModel,
    *,
    keep_window_size: int = 2048,
    score_form: str = "exp",
    seed: int = 0,
    evaluate: Callable[[Any], float] | None = None,
    work: WorkFolder | None = None,
    progress: Progress = no_progress,
) -> tuple[UndividedForCausalLM, Report]:
    """Gives every layer of a model dynamic masks; weights are shared with the model, which stays as it is.

    A starts at zero and W_dt is drawn at random: all biases are equal, and each query keeps the latest keys.

    Args:
        model: a base model with grouped-query attention, or a host of one.
        keep_window_size, score_form: as in `DynamicMaskAttention`.
        seed: of W_dt.
        evaluate: returns the perplexity of a model; it fills the report.
        work: not needed: nothing here is slow.
        progress: not needed.

    Returns:
        The model and the report. Its stages are "original" and "dma". The cache grows by no byte once a layer has
        `keep_window_size` tokens; the report has the bytes of a token before that.

    Raises:
        ValueError: the base model has no grouped-query attention, or an option is not allowed.
        TypeError: `keep_window_size` is no integer.

    Source: Trainable Dynamic Mask Sparse Attention (arXiv 2508.02124), section 3.
    """
    options = {"keep_window_size": keep_window_size, "score_form": score_form}
    native = native_model(model)
    log = ConversionLog(evaluate, work, progress)
    log.evaluate("original", model)
    host = host_sharing_weights(native)
    generator = torch.Generator().manual_seed(seed)
    cache_bytes = 0
    for layer_idx, source in enumerate(host.attention_layers()):
        with torch.device("meta"):
            layer = DynamicMaskAttention.from_config(native.config, layer_idx, **options)
        weight = source.k_proj.weight
        drawn = torch.randn(layer.dt_proj.weight.shape, generator=generator)
        start = {
            "A": torch.zeros(layer.A.shape),
            "dt_proj.weight": DynamicMaskAttention.STANDARD_DEVIATION * drawn,
        }
        shared = dict(source.named_parameters())
        layer.load_state_dict(
            shared | {name: value.to(weight.device, weight.dtype) for name, value in start.items()},
            assign=True,
        )
        layer.train(source.training)
        host.set_attention(layer_idx, layer, **options)
        # Keys and values; a bias and a position are 12 bytes more.
        cache_bytes += 2 * weight.shape[0] * weight.element_size() + 12 * layer.num_key_value_heads
    log.evaluate("dma", host)
    log.approximate(f"a query keeps {keep_window_size} keys of each key head")
    return host, log.report("dma", options, cache_bytes)
