"""Probe and anchor: which observables of the kernel count, and which representative acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from undivided.spec.node import Node, tensor_name


class Probe(Node):
    """The observables of the kernel that count; the transformations they do not see are its gauge."""

    gauge: ClassVar[str]


@dataclass(frozen=True)
class Row(Probe):
    """Ratios within a row."""

    gauge = "a factor per row"

    def __str__(self) -> str:
        return "ratios within a row"


@dataclass(frozen=True)
class Column(Probe):
    """Ratios within a column."""

    gauge = "a factor per column"

    def __str__(self) -> str:
        return "ratios within a column"


@dataclass(frozen=True)
class Plan(Probe):
    """Cross-ratios, with prescribed row and column sums.

    Args:
        row_sums: name of a tensor `[..., receivers]`; None is one for every receiver.
        column_sums: name of a tensor `[..., sources]`; None is what the uniform row kernel on the mask has
            (receivers / sources without a mask), which is feasible on every mask without empty rows or
            columns.
    """

    row_sums: str | None = tensor_name()
    column_sums: str | None = tensor_name()

    gauge = "a factor per row and one per column"

    def __str__(self) -> str:
        return "cross-ratios"


@dataclass(frozen=True)
class Global(Probe):
    """Ratios of all entries."""

    gauge = "one factor"

    def __str__(self) -> str:
        return "ratios of all entries"


@dataclass(frozen=True)
class Raw(Probe):
    """The entries themselves."""

    gauge = "the identity"

    def __str__(self) -> str:
        return "the entries themselves"


@dataclass(frozen=True)
class Support(Probe):
    """Order of the entries of each row, from which a support is read."""

    gauge = "a monotone map per row"

    def __str__(self) -> str:
        return "order within a row"


@dataclass(frozen=True)
class Values(Probe):
    """The aggregate `z = alpha V` for the given payload, nothing else."""

    gauge = "rows of the null space of V"

    def __str__(self) -> str:
        return "the aggregate of the given payload"


class Anchor(Node):
    """The representative of the class, `alpha`."""

    probes: ClassVar[tuple[type[Probe], ...]]


@dataclass(frozen=True)
class RowSum(Anchor):
    """`alpha = diag(1 / W 1) W`; with the exponential link, softmax over sources."""

    probes = (Row,)

    def __str__(self) -> str:
        return "rows sum to 1"


@dataclass(frozen=True)
class ColumnSum(Anchor):
    """`alpha = W diag(1 / 1^T W)`; with the exponential link, softmax over receivers."""

    probes = (Column,)

    def __str__(self) -> str:
        return "columns sum to 1"


@dataclass(frozen=True)
class Sinkhorn(Anchor):
    """The scaling `diag(x) W diag(y)` with the probe's marginals, by Sinkhorn's iteration on logarithms.

    `num_iterations` sweeps (rows, then columns) and a last row step: rows are exact, columns in the limit.

    Args:
        num_iterations: sweeps; 0 is the row anchor.
        tolerance: raise `InfeasibleMarginals` if a column sum misses its marginal by more; None does not ask.
        relaxation: `rho / (rho + tau)` of the columns in unbalanced transport; 1 is balanced.
    """

    num_iterations: int = 5
    tolerance: float | None = None
    relaxation: float = 1.0

    probes = (Plan,)

    def __post_init__(self) -> None:
        if self.num_iterations < 0:
            raise ValueError(f"num_iterations={self.num_iterations} must be 0 or more.")
        if not 0 < self.relaxation <= 1:
            raise ValueError(f"relaxation={self.relaxation} must lie in (0, 1]; 1 is balanced transport.")

    def __str__(self) -> str:
        relaxed = "" if self.relaxation == 1 else f", columns relaxed by {self.relaxation:g}"
        return f"rows and columns have given sums ({self.num_iterations} Sinkhorn sweeps{relaxed})"


@dataclass(frozen=True)
class GlobalSum(Anchor):
    """`alpha = W / sum W`."""

    probes = (Global,)

    def __str__(self) -> str:
        return "all entries sum to 1"


@dataclass(frozen=True)
class NoAnchor(Anchor):
    """`alpha = W`."""

    probes = (Raw, Values)

    def __str__(self) -> str:
        return "none: the weights as they are"


@dataclass(frozen=True)
class TopK(Anchor):
    """The k largest weights of a row, renormalised; of equal weights the earlier source is kept."""

    k: int

    probes = (Row, Support)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1.")

    def __str__(self) -> str:
        return f"the {self.k} largest of a row, which sum to 1"


@dataclass(frozen=True)
class Sparsemax(Anchor):
    """Euclidean projection of `log w` of a row onto the simplex."""

    probes = (Row, Support)

    def __str__(self) -> str:
        return "sparsemax of a row"


@dataclass(frozen=True)
class Entmax(Anchor):
    """The alpha-entmax of `log w` of a row; 1 is softmax, 2 is sparsemax."""

    alpha: float = 1.5

    probes = (Row, Support)

    def __post_init__(self) -> None:
        if not 1 < self.alpha <= 2:
            raise ValueError(f"alpha={self.alpha} must lie in (1, 2]; for 1 use RowSum().")

    def __str__(self) -> str:
        return f"{self.alpha:g}-entmax of a row"
