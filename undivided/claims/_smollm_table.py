"""The rows of SmolLM2-135M-Instruct as latent attention: every initial value at every count of tokens, and the bars."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from undivided.claims._harness import Figure, Row, measured
from undivided.claims._smollm_study import (
    ARMS,
    COLD,
    COLD_STAGED,
    FIXED,
    ROPE_DIM,
    TRANSMLA,
    TRANSMLA_STAGED,
    Scores,
    SmolStudy,
)

# Tokens at which arms are judged, and those of the random one besides.
COUNTS = (1_000_000, 5_000_000, 10_000_000)
LONG = (20_000_000, 50_000_000)
_STAGED = (COLD_STAGED, TRANSMLA_STAGED)
# The paper's: half of the divergence with a fifth of the tokens. Ours: what "removes the cold start" may mean.
_EARLY_BAR, _STAGES_BAR = 2.0, 5.0
# A model within a tenth of its source's perplexity.
_NEAR = 1 / 1.1


@dataclass
class Table:
    """The rows of one size of the cache, as they are measured.

    Args:
        study: the source and its text.
        latent_dim: width of the latent beside `ROPE_DIM` rotary numbers.
        names: of the arms.
        counts: tokens at which arms are judged.
        long: tokens behind them at which the random arm is judged, which goes on alone.
    """

    study: SmolStudy
    latent_dim: int
    names: Sequence[str] = ARMS
    counts: Sequence[int] = COUNTS
    long: Sequence[int] = ()
    found: dict[tuple[str, int], Scores] = field(init=False, default_factory=dict)
    most: dict[str, int] = field(init=False, default_factory=dict)

    @property
    def where(self) -> str:
        """The shape of the rows, without the tokens."""
        config = self.study.source.config
        own = 2 * config.num_key_value_heads * config.head_dim
        return f"SmolLM2-135M-Instruct, {self.latent_dim} + {ROPE_DIM} of {own} cached numbers, speeches"

    def rows(self) -> Iterator[Row]:
        """Trains the arms and yields divergence and perplexity of each at each count."""
        own, study = self.study.own.perplexity, self.study
        models: dict[str, nn.Module] = {}
        for name in self.names:
            alike = models.get({COLD_STAGED: COLD, TRANSMLA_STAGED: TRANSMLA}.get(name, name))
            models[name] = study.build(name, self.latent_dim) if alike is None else copy.deepcopy(alike)
        last = max(self.counts)
        counts = sorted({*self.counts, *(self.long if COLD in models else ())})
        self.most.update({name: last for name in self.names if name != COLD})
        staged = [name for name in _STAGED if name in models]
        for name, count, scores in study.run(models, counts, staged, self.most):
            self.found[name, count] = scores
            cold = self.found.get((COLD, count))
            rival = None if name == COLD or cold is None else cold.divergence
            shape = f"{self.where}, {tokens(count)}"
            yield measured(
                f"divergence from the source, {name}", shape, scores.divergence, "nats", better="lower",
                baseline_name=None if rival is None else COLD, baseline=rival,
            )  # fmt: skip
            yield measured(
                f"perplexity, {name}", shape, scores.perplexity, "perplexity", better="lower",
                baseline_name="the source", baseline=own,
            )  # fmt: skip
            if count == last:
                yield measured(
                    f"share of positions whose most probable token is the source's, {name}", shape,
                    scores.agreement, "of positions", better="higher",
                )  # fmt: skip

    def divergence(
        self, what: str, ours: tuple[str, int], rival: tuple[str, int], required: float | None
    ) -> Iterator[Row]:
        """Yields how much nearer one arm is than another, if both were trained."""
        if ours not in self.found or rival not in self.found:
            return
        shape = f"{self.where}, {tokens(ours[1])}"
        yield measured(
            what, shape, self.found[ours].divergence, "nats", better="lower", required=required,
            baseline_name=f"{rival[0]}, {tokens(rival[1])}", baseline=self.found[rival].divergence,
        )  # fmt: skip

    @property
    def figure(self) -> Figure:
        """The divergences of what was found."""
        return Figure(name=f"recovery-{self.latent_dim}", save=lambda path: draw(self, path))

    def early_rows(self) -> Iterator[Row]:
        """Yields the bar of X-EcoMLA: SVD at its last count against random weights at their own last one."""
        yield from self.divergence(
            "divergence from the source, SVD of fixed rank, against random at its most tokens",
            (FIXED, self.last(FIXED)), (COLD, self.last(COLD)), _EARLY_BAR,
        )  # fmt: skip

    def last(self, *names: str) -> int:
        """Returns the most tokens at which all of the arms were judged."""
        found = [{count for arm, count in self.found if arm == name} for name in names]
        return max(set.intersection(*found), default=0)

    def stage_rows(self) -> Iterator[Row]:
        """Yields the bars of Attention Editing: what the first stage is worth, and how near the source is."""
        last = self.last(COLD_STAGED, COLD)
        layers = tokens(self.study.plan.layers_tokens)
        yield from self.divergence(
            "divergence from the source, random, both stages against the second alone",
            (COLD_STAGED, last), (COLD, last), _STAGES_BAR,
        )  # fmt: skip
        best = self.last(TRANSMLA_STAGED, TRANSMLA)
        yield from self.divergence(
            "divergence from the source, TransMLA, both stages against the second alone",
            (TRANSMLA_STAGED, best), (TRANSMLA, best), 1.0,
        )  # fmt: skip
        if (COLD_STAGED, last) in self.found:
            yield measured(
                "perplexity, random, both stages, against the source's",
                f"{self.where}, {tokens(last)}, {layers} of them layer by layer",
                self.found[COLD_STAGED, last].perplexity, "perplexity", better="lower", baseline_name="the source",
                baseline=self.study.own.perplexity, required=_NEAR,
            )  # fmt: skip


def draw(table: Table, path: Path) -> None:
    """Writes the divergences of all arms over the tokens as a picture; where an arm begins stands at the left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    # A logarithmic axis has no 0.
    start = min(table.counts) / 10
    for name in dict.fromkeys(arm for arm, _ in table.found):
        points = sorted(
            (count or start, scores.divergence) for (arm, count), scores in table.found.items() if arm == name
        )
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"tokens of training (leftmost: none), {table.study.plan.step_tokens} a step")
    axes.set_ylabel("divergence from the source, nats")
    axes.set_title(table.where, fontsize=9)
    axes.grid(True, which="both", color="0.92")
    axes.legend(frameon=False, fontsize=8)
    drawing.savefig(path, dpi=150)


def tokens(count: int) -> str:
    """A number of tokens in words."""
    return f"{count / 1e6:g}M tokens"
