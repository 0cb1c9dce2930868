"""The four ways in which a specification and its inputs can contradict each other."""

from __future__ import annotations


class EmptyRow(ValueError):
    """A receiver has no admissible source, and the carrier declares no fallback."""


class InfeasibleMarginals(ValueError):
    """No plan on the admissible pairs has the wanted row and column sums."""


class NotPositive(ValueError):
    """The operation is defined for positive kernels only, and a weight is zero or negative."""


class StatefulBaseline(ValueError):
    """A baseline depends on the state; what does belongs into the chart."""
