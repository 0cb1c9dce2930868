"""Dynamic hierarchical sparse attention for a trained model: boundaries are learnt from the model's own attention.

The model stays frozen. Of every layer, its keys are what the predictor reads, and its attention to both sides of a gap,
averaged over heads, is what tells a boundary. One predictor serves all layers.

Source: Dynamic Hierarchical Sparse Attention (arXiv 2510.24606), boundary prediction; constants: the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from undivided.convert._attach import attach
from undivided.convert._host import native_model
from undivided.convert._moments import Progress, no_progress
from undivided.convert._report import ConversionLog, Report
from undivided.layers.boundaries import (
    BoundaryPredictor,
    boundary_labels,
    boundary_loss,
    inner_gaps,
)
from undivided.models.bases import attention_layers, cache_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from undivided.models.causal_lm import UndividedForCausalLM
    from undivided.models.checkpoint import WorkFolder

# A gap is a boundary where one side gets twice the mass of the other.
_BOUNDARY = 0.5


def convert_dhsa(
    model: PreTrainedModel,
    calibration: Tensor | None = None,
    *,
    mode: str = "chunks",
    budget: int = 1024,
    query_block: int = 128,
    boundaries: str = "predicted",
    share: str = "boundaries",
    density: float = 0.125,
    decode: str = "sparse",
    epochs: int = 2,
    seed: int = 0,
    evaluate: Callable[[Any], float] | None = None,
    work: WorkFolder | None = None,
    progress: Progress = no_progress,
) -> tuple[UndividedForCausalLM, Report]:
    """Trains a boundary predictor, where one is needed, and lets every layer read long prompts sparsely.

    The weights of the model are shared with it and do not change.

    Args:
        model: a base model with grouped-query attention, or a host of one.
        calibration: token ids `[samples, length]` without padding, of lengths at which the model will be used: keys
            have rotary positions.
        mode, budget, query_block, boundaries, share, density, decode: as in `DHSAttention`.
        epochs: how often the predictor goes through the calibration.
        seed: of the predictor's weights.
        evaluate: returns the perplexity of a model; it fills the report. Texts of up to `budget` tokens show nothing.
        work: keeps the predictor, so that a killed conversion resumes.
        progress: wraps the loop over samples.

    Returns:
        The model and the report. Its stages are "original" and "dhsa".

    Raises:
        ValueError: the model is not supported, an option is not allowed, or a predictor is needed and there is no
            calibration.

    Source: Dynamic Hierarchical Sparse Attention (arXiv 2510.24606).
    """
    options: dict[str, Any] = {
        "mode": mode,
        "budget": budget,
        "query_block": query_block,
        "boundaries": boundaries,
        "share": share,
        "density": density,
        "decode": decode,
    }
    log = ConversionLog(evaluate, work, progress)
    log.evaluate("original", model)
    predictor = None
    if mode == "chunks" and boundaries == "predicted":
        if calibration is None:
            raise ValueError(
                'boundaries="predicted" needs a calibration: the predictor learns from attention to it.'
            )
        key = {"calibration": list(calibration.shape), "epochs": epochs, "seed": seed}
        weights = log.keep(
            "dhsa-predictor",
            key,
            lambda: dict(
                train_boundary_predictor(
                    model, calibration, epochs=epochs, seed=seed, progress=progress
                ).state_dict()
            ),
        )
        predictor = _untrained(model)
        predictor.load_state_dict(weights)
        predictor.to(next(model.parameters()).device, next(model.parameters()).dtype)
    host = attach(model, "dhsa", predictor=predictor, **options)
    log.evaluate("dhsa", host)
    what = f"{budget} keys" if mode == "chunks" else f"{density:.1%} of the blocks of keys"
    log.approximate(f"a block of {query_block} queries of a longer prompt attends to {what}")
    if any(layer.steps_sparsely for layer in host.attention_layers()):
        log.approximate("so does a generated token behind a longer cache")
    cached = sum(
        (layer.k_proj.out_features + layer.v_proj.out_features) * layer.k_proj.weight.element_size()
        for layer in host.attention_layers()
    )
    return host, log.report("dhsa", options | {"epochs": epochs, "seed": seed}, cached)


def train_boundary_predictor(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    window: int = 4,
    num_heads: int = 4,
    hidden: int = 256,
    epochs: int = 2,
    learning_rate: float = 1e-4,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    record: Callable[[float], None] = lambda loss: None,
    progress: Progress = no_progress,
) -> BoundaryPredictor:
    """Returns a predictor that was trained on where the model's own attention changes; the model is frozen.

    Every layer of every text is a step of Adam on the focal cross-entropy of `boundary_loss`.

    Args:
        model: a base model with grouped-query attention, or a host of one.
        input_ids: texts without padding, `[samples, length]`. Attention maps are formed in full, `[heads, length,
            length]` a layer.
        window, num_heads, hidden: as in `BoundaryPredictor`.
        epochs: how often the texts are gone through.
        learning_rate: of Adam.
        layers: whose keys and attention to learn from; default all.
        seed: of the predictor's weights.
        record: called with the loss of every step.
        progress: wraps the loop over texts.

    Raises:
        ValueError: the model is not supported, or texts are shorter than `4 * window` tokens.

    Source: Dynamic Hierarchical Sparse Attention (arXiv 2510.24606), boundary prediction.
    """
    native = native_model(model)
    length = input_ids.shape[1]
    if length < 4 * window:
        raise ValueError(
            f"input_ids has {length} tokens a text; gaps are told apart from {4 * window} on (window={window})."
        )
    predictor = _untrained(native, window, num_heads, hidden, seed)
    device = next(native.parameters()).device
    predictor.to(device).train()
    optimiser = torch.optim.Adam(predictor.parameters(), lr=learning_rate)
    mask = inner_gaps(length, window, device)
    for epoch in range(epochs):
        for row in progress(input_ids.split(1), f"boundaries, epoch {epoch + 1} of {epochs}"):
            for key, target in boundary_examples(native, row.to(device), window, layers):
                with torch.enable_grad():
                    loss = boundary_loss(predictor(key), target, mask)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                record(loss.item())
    return predictor.eval()


def boundary_examples(
    model: PreTrainedModel, input_ids: Tensor, window: int = 4, layers: Sequence[int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields of each layer its keys `[batch, heads, length, head_dim]`, float32, and which gaps are boundaries, 0 or 1.

    Args:
        model: a base model of transformers.
        input_ids: `[batch, length]`, without padding.
        window: as in `boundary_labels`.
        layers: whose; default all.
    """
    kinds = getattr(model.config, "layer_types", None)
    modules = attention_layers(model)
    chosen = range(len(modules)) if layers is None else layers
    labels: dict[int, Tensor] = {}

    def receive(layer_idx: int) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
            is_sliding = kinds is not None and kinds[layer_idx] == "sliding_attention"
            mean = output[1].mean(dim=1, dtype=torch.float32)
            sliding_window = model.config.sliding_window if is_sliding else None
            labels[layer_idx] = boundary_labels(mean, window, sliding_window=sliding_window)
            # The maps of all layers together would not fit.
            return output[0], None

        return hook

    with ExitStack() as stack:
        stack.enter_context(_eager(model))
        stack.enter_context(torch.no_grad())
        for layer_idx in chosen:
            handle = modules[layer_idx].register_forward_hook(receive(layer_idx))
            stack.callback(handle.remove)
        cache = cache_of(model(input_ids=input_ids, use_cache=True, logits_to_keep=1))
        keys = {layer_idx: cache.layers[layer_idx].keys.float() for layer_idx in chosen}
    for layer_idx in chosen:
        key = keys.pop(layer_idx)
        # A cache of a layer with a window may have dropped the first keys.
        target = labels.pop(layer_idx)[:, -(key.shape[2] - 1) :]
        if key.shape[2] == input_ids.shape[1]:
            yield key, (target >= _BOUNDARY).float()


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Returns the area under precision over recall, `sum_k (R_k - R_(k-1)) P_k`; the share of positives is chance.

    Args:
        scores: of any shape.
        labels: of the same shape, true or 1 where positive.
    """
    order = scores.flatten().argsort(descending=True, stable=True)
    hits = labels.flatten().bool()[order].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, device=hits.device)
    return float((precision * hits).sum() / hits.sum().clamp(min=1))


def _untrained(
    model: PreTrainedModel, window: int = 4, num_heads: int = 4, hidden: int = 256, seed: int = 0
) -> BoundaryPredictor:
    """A predictor for the keys of a model, its weights drawn without touching the global generator."""
    key_dim = attention_layers(native_model(model))[0].k_proj.out_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BoundaryPredictor(key_dim, window, num_heads, hidden)


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Attention that returns its maps, and no dropout; the model's own is put back."""
    own, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(own)
        model.train(training)
