"""What a conversion says about itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from undivided.convert._moments import Progress, no_progress

if TYPE_CHECKING:
    from torch import Tensor

    from undivided.models.checkpoint import WorkFolder


@dataclass(frozen=True, kw_only=True)
class Report:
    """Report of one conversion; `dataclasses.asdict` gives JSON types.

    Args:
        method: the converter's name, such as "transmla".
        options: the options as they were used, "auto" replaced by what was chosen.
        perplexity: stage to perplexity, in the order of the stages, "original" first; empty without
        evaluation.
        cache_bytes_per_token_per_rank: what one rank caches a token in all layers, in bytes.
        approximations: one sentence for each step that changes the function, with its cost.
        seconds: wall-clock time of the conversion, evaluations included.
    """

    method: str
    options: dict[str, Any]
    cache_bytes_per_token_per_rank: int
    seconds: float
    perplexity: dict[str, float] = field(default_factory=dict)
    approximations: list[str] = field(default_factory=list)


class ConversionLog:
    """What a converter does beside converting: it evaluates, keeps slow results and notes approximations.

    Args:
        evaluate: returns the perplexity of a model; None to evaluate nothing.
        work: where slow results are kept; None to keep none.
        progress: wraps the long loops.
    """

    def __init__(
        self,
        evaluate: Callable[[Any], float] | None = None,
        work: WorkFolder | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self.started = time.monotonic()
        self.perplexity: dict[str, float] = {}
        self.approximations: list[str] = []
        self.evaluator = evaluate
        self.work = work
        self.progress = progress

    def evaluate(self, stage: str, model: Any) -> None:
        """Measures the perplexity of a stage, unless it is known already."""
        if self.evaluator is not None and stage not in self.perplexity:
            self.perplexity[stage] = self.evaluator(model)

    def keep(
        self, name: str, key: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Returns what an earlier run computed for the same key, or computes it."""
        return compute() if self.work is None else self.work.stage(name, key, compute)

    def approximate(self, sentence: str) -> None:
        """Notes an approximation; the stage evaluated last is the first that has it."""
        if len(self.perplexity) > 1:
            before, after = list(self.perplexity.values())[-2:]
            sentence += f": perplexity {before:.4g} -> {after:.4g}"
        self.approximations.append(sentence)

    def report(self, method: str, options: dict[str, Any], cache_bytes_per_token_per_rank: int) -> Report:
        """Returns the report of all that was logged."""
        return Report(
            method=method,
            options=options,
            cache_bytes_per_token_per_rank=cache_bytes_per_token_per_rank,
            seconds=time.monotonic() - self.started,
            perplexity=self.perplexity,
            approximations=self.approximations,
        )
