"""The evidence kernel: what an admissible pair weighs, `w = kappa * psi(s)`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from undivided.spec.errors import StatefulBaseline
from undivided.spec.node import Node, input_names, set_tuple, tensor_name


class ChartTerm(Node):
    """One summand of the score `s_ri`."""


def _scale_words(scale: float | None, default: str) -> str:
    return default if scale is None else "" if scale == 1.0 else f" * {scale:.4g}"


class PairTerm(ChartTerm):
    """A summand computed from a tensor of receivers and one of sources."""

    query: str
    key: str


@dataclass(frozen=True)
class Dot(PairTerm):
    """`scale * phi(q_r) . phi(W_h k_i)`, of rank head_dim at most.

    Args:
        query, key: `[batch, heads, length, dim]`.
        scale: factor; None is `dim ** -0.5` of the query.
        key_map: tensor `[heads, dim, latent_dim]` that expands a latent key (the low-rank chart); None for
            none.
        feature: feature map phi, "elu1", "relu" or "softplus"; None is the identity.
    """

    query: str = tensor_name("query")
    key: str = tensor_name("key")
    scale: float | None = None
    key_map: str | None = tensor_name()
    feature: str | None = None

    FEATURES: ClassVar[tuple[str, ...]] = ("elu1", "relu", "softplus")

    def __post_init__(self) -> None:
        if self.feature is not None and self.feature not in self.FEATURES:
            raise ValueError(f"feature={self.feature!r} is not one of {', '.join(self.FEATURES)}.")

    def __str__(self) -> str:
        key = self.key if self.key_map is None else f"{self.key_map} {self.key}"
        query = self.query
        if self.feature is not None:
            query, key = f"{self.feature}({query})", f"{self.feature}({key})"
        return f"{query} . {key}" + _scale_words(self.scale, f" / sqrt(dim of {self.query})")


@dataclass(frozen=True)
class Cosine(PairTerm):
    """`scale * tau * cos(q_r, k_i)`; scale None is `head_dim ** 0.5`; `temperature` is tau `[key heads]`."""

    query: str = tensor_name("query")
    key: str = tensor_name("key")
    scale: float | None = None
    temperature: str | None = tensor_name()

    def __str__(self) -> str:
        scale = "sqrt(head_dim)" if self.scale is None else f"{self.scale:g}"
        factor = "" if self.temperature is None else f"{self.temperature} * "
        return f"{scale} * {factor}cos({self.query}, {self.key})"


@dataclass(frozen=True)
class Distance(PairTerm):
    """`-scale / 2 * |q_r - k_i|^2`; scale None is `head_dim ** -0.5`. A dot product and two fields."""

    query: str = tensor_name("query")
    key: str = tensor_name("key")
    scale: float | None = None

    def __str__(self) -> str:
        return f"-|{self.query} - {self.key}|^2 / 2" + _scale_words(self.scale, " / sqrt(head_dim)")


@dataclass(frozen=True)
class Additive(PairTerm):
    """`w_h . tanh(q_r + k_i)`, `vector` names w `[heads, head_dim]`. Not separable."""

    query: str = tensor_name("query")
    key: str = tensor_name("key")
    vector: str = tensor_name("vector")

    def __str__(self) -> str:
        return f"{self.vector} . tanh({self.query} + {self.key})"


@dataclass(frozen=True)
class KeyBias(ChartTerm):
    """A column field that the state may set: tensor `[batch or 1, key heads or 1, sources]`."""

    tensor: str = tensor_name("key_bias")

    def __str__(self) -> str:
        return self.tensor


@dataclass(frozen=True)
class GivenScores(ChartTerm):
    """A tensor of scores `[batch, heads, receivers, sources]`, for charts that no other term writes."""

    tensor: str = tensor_name("scores")

    def __str__(self) -> str:
        return f"{self.tensor} as given"


@dataclass(frozen=True)
class Chart(Node):
    """The score of a pair: a sum of terms, capped by `softcap * tanh(s / softcap)` if `softcap` is set."""

    terms: tuple[ChartTerm, ...] = (Dot(),)
    softcap: float | None = None

    def __post_init__(self) -> None:
        set_tuple(self, "terms", ChartTerm)
        if not self.terms:
            raise ValueError("terms is empty; a chart has at least one term.")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap={self.softcap} must be positive; leave it None for no cap.")

    def __str__(self) -> str:
        scales = {term.scale for term in self.terms if isinstance(term, Dot)}
        shared = scales.pop() if len(self.terms) > 1 and len(scales) == 1 else None
        if shared is not None and all(isinstance(term, Dot) for term in self.terms):
            plain = [str(dataclasses.replace(term, scale=1.0)) for term in self.terms]  # type: ignore[type-var]
            text = f"({' + '.join(plain)})" + _scale_words(shared, "")
        else:
            text = " + ".join(map(str, self.terms))
        return text if self.softcap is None else f"{self.softcap:g} * tanh({text} / {self.softcap:g})"


class Baseline(Node):
    """One factor of the baseline kappa, given as its logarithm. It must not depend on the state."""


@dataclass(frozen=True)
class Alibi(Baseline):
    """`log kappa = -slope_h * distance`, `slopes` names a tensor `[heads]`."""

    slopes: str = tensor_name("alibi_slopes")

    def __str__(self) -> str:
        return f"exp(-{self.slopes} * distance)"


@dataclass(frozen=True)
class Relative(Baseline):
    """`log kappa = table[h, distance + L - 1]` of a tensor `[heads or 1, 2 L - 1]`, source - receiver."""

    table: str = tensor_name("relative_table")

    def __str__(self) -> str:
        return f"exp({self.table}[distance])"


@dataclass(frozen=True)
class Prior(Baseline):
    """`log kappa` as a tensor that broadcasts to `[heads, receivers, sources]`; it has no batch axis."""

    tensor: str = tensor_name("log_prior")

    def __str__(self) -> str:
        return f"exp({self.tensor})"


@dataclass(frozen=True)
class LogCounts(Baseline):
    """`log kappa_i = log n_i`: a source stands for n_i; tensor `[batch or 1, heads or 1, sources]`."""

    tensor: str = tensor_name("log_counts")

    def __str__(self) -> str:
        return f"exp({self.tensor})"


class Link(Node):
    """How a score becomes weight: `w = mask * kappa * psi(s)`."""

    signed: bool = False


@dataclass(frozen=True)
class Exp(Link):
    """`psi(s) = exp(s / temperature)`: the only increasing link with `psi(a + b) = psi(a) psi(b)`."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive.")

    def __str__(self) -> str:
        return "exp" if self.temperature == 1.0 else f"exp(s / {self.temperature:g})"


@dataclass(frozen=True)
class Softplus(Link):
    """`psi(s) = log(1 + e^s)`."""

    def __str__(self) -> str:
        return "softplus"


@dataclass(frozen=True)
class Elu1(Link):
    """`psi(s) = elu(s) + 1`."""

    def __str__(self) -> str:
        return "elu + 1"


@dataclass(frozen=True)
class Relu(Link):
    """`psi(s) = max(s, 0)`."""

    def __str__(self) -> str:
        return "relu"


@dataclass(frozen=True)
class Identity(Link):
    """`psi(s) = s`, signed."""

    signed = True

    def __str__(self) -> str:
        return "identity"


@dataclass(frozen=True)
class Gelu(Link):
    """`psi(s) = s Phi(s)`, signed."""

    signed = True

    def __str__(self) -> str:
        return "gelu"


@dataclass(frozen=True)
class Silu(Link):
    """`psi(s) = s sigmoid(s)`, signed."""

    signed = True

    def __str__(self) -> str:
        return "silu"


@dataclass(frozen=True)
class Evidence(Node):
    """`w_ri = mask_ri * kappa_ri * psi(s_ri) * t_ri`; the factor t is a second chart, a gate."""

    chart: Chart = Chart()
    baseline: tuple[Baseline, ...] = ()
    link: Link = Exp()
    factor: Chart | None = None

    def __post_init__(self) -> None:
        if isinstance(self.chart, ChartTerm):
            object.__setattr__(self, "chart", Chart((self.chart,)))
        set_tuple(self, "baseline", Baseline)
        state = set(input_names(self.chart)) | (set(input_names(self.factor)) if self.factor else set())
        for factor in self.baseline:
            for name in input_names(factor):
                if name in state:
                    raise StatefulBaseline(
                        f'the baseline {factor} reads "{name}", which the chart reads; add it to the chart.'
                    )

    @property
    def signed(self) -> bool:
        """Whether a weight can be negative."""
        return self.link.signed or self.factor is not None
