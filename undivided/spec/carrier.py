"""The carrier: receivers, sources, and which pairs of them exist."""

from __future__ import annotations

from dataclasses import dataclass, field

from undivided.spec.node import Node, set_tuple, tensor_name


class Mask(Node):
    """A rule that says which source a receiver may read. Several rules hold together (and)."""

    state_free: bool = True


@dataclass(frozen=True)
class Causal(Mask):
    """Receiver n of N reads source m of M if `m <= n + M - N` (aligned bottom right, as a cache needs)."""

    def __str__(self) -> str:
        return "causal"


@dataclass(frozen=True)
class Window(Mask):
    """Receiver n reads the sources `n - before .. n + after`, counted from its own (bottom right)."""

    before: int
    after: int = 0

    def __post_init__(self) -> None:
        if self.before < 0 or self.after < 0:
            raise ValueError(
                f"before={self.before}, after={self.after}: a window reaches 0 or more positions."
            )

    def __str__(self) -> str:
        return f"window of {self.before} before and {self.after} after"


@dataclass(frozen=True)
class Blocks(Mask):
    """Receiver and source lie in the same block of `block_size` positions."""

    block_size: int

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be at least 1.")

    def __str__(self) -> str:
        return f"blocks of {self.block_size}"


@dataclass(frozen=True)
class GivenMask(Mask):
    """A boolean tensor, True where the pair is admissible; `state_free=False` if the state generates it."""

    tensor: str = tensor_name("mask")
    state_free: bool = True

    def __str__(self) -> str:
        return f"{self.tensor}" if self.state_free else f"{self.tensor}, chosen by the state"


@dataclass(frozen=True)
class HeadMap(Node):
    """Which key head, and which value head, a query head reads.

    Args:
        query_heads, key_heads: numbers of heads; None leaves them to the tensors.
        assignment: key head of each query head, as a tuple or as the name of an integer tensor; None is the
            uniform map `h // (query_heads // key_heads)`.
        value_assignment: the same for values; None is the map of the keys.
    """

    query_heads: int | None = None
    key_heads: int | None = None
    assignment: tuple[int, ...] | str | None = tensor_name()
    value_assignment: tuple[int, ...] | str | None = tensor_name()

    def __post_init__(self) -> None:
        for name in ("assignment", "value_assignment"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def __str__(self) -> str:
        counts = []
        if self.query_heads is not None:
            counts.append(f"{self.query_heads} query heads")
        if self.key_heads is not None:
            counts.append(f"{self.key_heads} key head{'s' if self.key_heads > 1 else ''}")
        parts = [" on ".join(counts)] if counts else []
        for what, assignment in (("keys", self.assignment), ("values", self.value_assignment)):
            if assignment is not None:
                parts.append(f"{what} by {assignment if isinstance(assignment, str) else 'a table'}")
        return ", ".join(parts) or "key heads divide query heads"


class Fallback(Node):
    """What a receiver without an admissible source gets."""


@dataclass(frozen=True)
class Refuse(Fallback):
    """An empty row raises `EmptyRow`."""

    def __str__(self) -> str:
        return "an empty row is an error"


@dataclass(frozen=True)
class ZeroIncrement(Fallback):
    """An empty row yields zero."""

    def __str__(self) -> str:
        return "an empty row yields zero"


@dataclass(frozen=True)
class NullSource(Fallback):
    """Every row has one more source, with this logit and a payload of zero (an attention sink).

    `logit` is a number or the name of a tensor `[heads]`.
    """

    logit: float | str = field(default=0.0, metadata={"tensor": True})

    def __str__(self) -> str:
        return f"a null source of logit {self.logit}"


@dataclass(frozen=True)
class DefaultPayload(Fallback):
    """An empty row yields the tensor `[heads or 1, value_dim]`."""

    tensor: str = tensor_name("default_value")

    def __str__(self) -> str:
        return f"an empty row yields {self.tensor}"


@dataclass(frozen=True)
class Merge(Node):
    """A source map: sources of one class become one, with mean key and mean payload.

    `assignment` names an integer tensor `[batch or 1, sources]` with the class of each source; with
    `log_counts` the class of n sources has the baseline n, as the identity of coarse-graining requires.
    """

    assignment: str = tensor_name("assignment")
    num_classes: int | None = None
    log_counts: bool = True

    def __str__(self) -> str:
        return f"sources merged by {self.assignment}" + (", baseline n" if self.log_counts else ", no count")


@dataclass(frozen=True)
class Carrier(Node):
    """Receivers, sources, and the pairs that are admissible."""

    masks: tuple[Mask, ...] = ()
    heads: HeadMap = HeadMap()
    source_map: Merge | None = None
    empty_row: Fallback = Refuse()

    def __post_init__(self) -> None:
        set_tuple(self, "masks", Mask)

    def __str__(self) -> str:
        parts = [", ".join(map(str, self.masks)) or "all pairs", str(self.heads)]
        if self.source_map is not None:
            parts.append(str(self.source_map))
        if not isinstance(self.empty_row, Refuse):
            parts.append(str(self.empty_row))
        return "; ".join(parts)
