"""What the scores of real heads are made of: fields, interaction, ranks, and what truncation costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from undivided.spec.decomposition import (
    components_for,
    decompose_scores,
    effective_rank,
    score_shares,
    truncate_interaction,
)
from undivided.spec.potential import divergence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEY = "undivided_score_probe"
# (layer index, query, key, value, scale) -> outputs of the heads; and (scores, causal mask) -> scores.
Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class HeadScores(NamedTuple):
    """Measurements of the causal scores of one layer on one text; each `[batch, heads]`.

    Args:
        row, column, interaction: shares of the variance, which add up to one (see `score_shares`).
        raw_rank, interaction_rank: components that hold 90 % of the energy of the whole score matrix, before
            and after the fields fitted on the causal pairs are taken off.
        divergence: for each rank asked for, mean over receivers of KL(attention || attention with the
            interaction cut to that rank), in nats.
    """

    row: torch.Tensor
    column: torch.Tensor
    interaction: torch.Tensor
    raw_rank: torch.Tensor
    interaction_rank: torch.Tensor
    divergence: dict[int, torch.Tensor]


@dataclass
class ScoreProbe:
    """What a probe has seen: for each layer, one entry a forward pass."""

    layers: dict[int, list[HeadScores]] = field(default_factory=dict)

    def mean(self, name: str) -> torch.Tensor:
        """Returns the mean of a measurement over passes and batch, `[layers, heads]`."""
        rows = [
            torch.cat([getattr(scores, name).double() for scores in self.layers[i]])
            for i in sorted(self.layers)
        ]
        return torch.stack([row.mean(0) for row in rows])

    def mean_divergence(self, rank: int) -> torch.Tensor:
        """Returns the mean divergence at a rank, `[layers, heads]`."""
        rows = [
            torch.cat([scores.divergence[rank] for scores in self.layers[i]]) for i in sorted(self.layers)
        ]
        return torch.stack([row.mean(0) for row in rows])


def head_scores(scores: torch.Tensor, ranks: Sequence[int] = ()) -> HeadScores:
    """Measures causal scores.

    Args:
        scores: `[batch, heads, length, length]`, finite everywhere (before the mask).
        ranks: at which to cut the interaction.

    Returns:
        The measurements.
    """
    scores = scores.double()
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    shares = score_shares(scores, causal)
    parts = decompose_scores(scores, causal)
    fields = parts.row_field[..., None] + parts.column_field[..., None, :]
    left, values, right = torch.linalg.svd(scores - fields, full_matrices=False)
    weights, cut = _attention(scores, causal), {}
    for rank in ranks:
        truncated = fields + (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]
        reference = torch.log_softmax(truncated.masked_fill(~causal, float("-inf")), dim=-1)
        cut[rank] = divergence(weights, reference).mean(-1)
    return HeadScores(*shares, effective_rank(scores), components_for(values, 0.9), cut)


@contextmanager
def replaced_attention(model: PreTrainedModel, attend: Attention) -> Iterator[None]:
    """Runs the layers of a causal language model on another attention inside the block.

    Args:
        model: a transformers model whose attention goes through the attention registry.
        attend: (layer index, query, key, value, scale) -> outputs of the heads, all `[batch, heads, length, dim]`; keys
            and values come with as many heads as queries, for whole texts without padding.

    Raises:
        ValueError: the model does not take a registered attention, or asks for something that is not handed on.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def attention(
        module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs
    ):
        for name in ("softcap", "s_aux", "position_bias", "sliding_window"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"the model asks for {name}={kwargs[name]!r}, which score_probe does not compute."
                )
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                "score_probe needs whole texts, not steps with a cache; call the model once a text."
            )
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = attend(module.layer_idx, query, key, value, scale)
        return out.to(value.dtype).transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    AttentionInterface.register(_KEY, attention)
    AttentionMaskInterface.register(_KEY, sdpa_mask)
    model.set_attn_implementation(_KEY)
    try:
        if model.config._attn_implementation != _KEY:
            raise ValueError(
                f"{type(model).__name__} does not take a registered attention; its scores stay hidden."
            )
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def score_probe(
    model: PreTrainedModel, *, ranks: Sequence[int] = (), change: Change | None = None
) -> Iterator[ScoreProbe]:
    """Measures the scores of every head of a causal language model in each forward pass inside the block.

    Args:
        model: a transformers model whose attention goes through the attention registry; texts without
            padding.
        ranks: at which to measure the divergence of truncated scores.
        change: (scores, causal mask) -> scores: run the model itself on other scores (for its perplexity), such
            as `cut_to(8)`; then nothing is measured.

    Yields:
        The probe, filled by the forward passes.

    Raises:
        ValueError: the model does not take a registered attention, or asks for something the probe does not
        compute.

    Source: Geometric Attention (arXiv 2601.11618 v1), abstract (interaction and fields of a score).
    """
    probe = ScoreProbe()

    def attend(layer_idx, query, key, value, scale):
        scores = scale * (query @ key.transpose(-2, -1))
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if change is not None:
            scores = change(scores, causal)
        else:
            probe.layers.setdefault(layer_idx, []).append(head_scores(scores.detach(), ranks))
        return _attention(scores, causal).to(value.dtype) @ value

    with replaced_attention(model, attend):
        yield probe


def cut_to(rank: int) -> Change:
    """Returns the change that cuts the interaction of every head to `rank`."""
    return lambda scores, causal: truncate_interaction(scores, rank, causal)


def without(part: str) -> Change:
    """Returns the change that takes a part off the scores: "row" or "column" field, or "interaction".

    Raises:
        ValueError: there is no such part.
    """
    if part not in ("row", "column", "interaction"):
        raise ValueError(f'part={part!r} is not one of "row", "column", "interaction".')

    def change(scores: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
        parts = decompose_scores(scores, causal)
        if part == "row":
            return scores - parts.row_field[..., None]
        if part == "column":
            return scores - parts.column_field[..., None, :]
        return parts.row_field[..., None] + parts.column_field[..., None, :]

    return change


def changed_loss(model: PreTrainedModel, input_ids: torch.Tensor, change: Change) -> float:
    """Mean loss of a text, in nats a token, when the scores of every head are changed.

    A change reads the score matrix of the whole text, so this is an analysis and not a causal model.
    """
    with score_probe(model, change=change):
        return text_loss(model, input_ids)


def text_loss(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    """Mean loss of a text, in nats a token, without a cache."""
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten()))


def score_figure(probe: ScoreProbe, path: str | Path, *, head_dim: int, title: str = "") -> Path:
    """Draws the shares of every head as three maps, and effective ranks and divergences by layer and rank.

    Args:
        probe: a filled probe.
        path: image file to write; the suffix chooses the format.
        head_dim: width of a head, drawn as the bound of the rank.
        title: above the figure.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ranks = sorted(next(iter(probe.layers.values()))[0].divergence)
    figure = Figure(figsize=(16 if ranks else 13, 4.6), layout="constrained")
    axes: Any = figure.subplots(1, 5 if ranks else 4, width_ratios=[1, 1, 1, 1.4, 1.4][: 5 if ranks else 4])
    for axis, name in zip(axes[:3], ("row", "column", "interaction"), strict=True):
        image = axis.imshow(
            probe.mean(name).numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis", origin="lower"
        )
        axis.set(title=f"{name} share", xlabel="head", ylabel="layer" if name == "row" else "")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes[:3], shrink=0.8, label="share of the variance of causal scores")
    layers = range(len(probe.layers))
    for name, label in (("raw_rank", "scores"), ("interaction_rank", "interaction")):
        values = probe.mean(name).numpy()
        axes[3].plot(layers, values.mean(1), label=label)
        axes[3].fill_between(layers, values.min(1), values.max(1), alpha=0.2)
    axes[3].axhline(head_dim, color="black", linewidth=0.8, linestyle=":", label="head_dim")
    axes[3].set(title="rank of 90 % of the energy (mean, range)", xlabel="layer")
    axes[3].legend(frameon=False)
    if ranks:
        values = torch.stack([probe.mean_divergence(rank).flatten() for rank in ranks])
        axes[4].plot(ranks, values.median(1).values.numpy(), marker="o", label="median head")
        axes[4].plot(ranks, values.quantile(0.9, dim=1).numpy(), marker="o", label="9 of 10 heads below")
        axes[4].set(
            title="KL at cut interaction",
            xlabel="rank kept",
            ylabel="nats",
            xscale="log",
            yscale="log",
        )
        axes[4].set_xticks(ranks, [str(rank) for rank in ranks], minor=False)
        axes[4].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    return Path(path)


def _attention(scores: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores.masked_fill(~causal, float("-inf")), dim=-1)
