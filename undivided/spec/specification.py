"""The specification of an attention operator: seven declarations, hashable, to and from JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from undivided.spec import carrier as _carrier
from undivided.spec import evidence as _evidence
from undivided.spec import regime as _regime
from undivided.spec.carrier import Carrier, Causal, GivenMask, NullSource, Window
from undivided.spec.errors import NotPositive
from undivided.spec.evidence import Evidence, Exp
from undivided.spec.node import Node, check_kind, input_names, set_tuple, tensor_name
from undivided.spec.regime import Anchor, NoAnchor, Probe, Raw, Row, RowSum


@dataclass(frozen=True)
class Term(Node):
    """One summand of a mix: `coefficient * times * alpha V`, where the kernel reads renamed tensors.

    Args:
        coefficient: a number.
        times: name of a tensor that multiplies it: a scalar, `[heads]` or `[batch, heads, receivers]` with
            the heads of the first term; None is 1.
        tensors: pairs (name in the specification, name of the tensor this term reads instead). A term with
            fewer heads than the first serves a group of its heads each (repeated, not tiled).
    """

    coefficient: float = 1.0
    times: str | None = tensor_name()
    tensors: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", tuple((str(a), str(b)) for a, b in self.tensors))

    def renamed(self, name: str) -> str:
        """Returns the tensor that this term reads where the specification says `name`."""
        return dict(self.tensors).get(name, name)

    def __str__(self) -> str:
        sign = "-" if self.coefficient < 0 else "+"
        factor = "" if abs(self.coefficient) == 1 else f"{abs(self.coefficient):g} "
        times = "" if self.times is None else f"{self.times} "
        names = f"({', '.join(new for _, new in self.tensors)})" if self.tensors else ""
        return f"{sign} {factor}{times}alpha{names} V"


class Payload(Node):
    """What a source carries."""


@dataclass(frozen=True)
class Source(Payload):
    """`v_i`, of the source alone: `[batch, key heads, sources, dim]`.

    `value_map` names a tensor `[heads, dim, value_dim]` that expands a latent payload; None for none.
    """

    tensor: str = tensor_name("value")
    value_map: str | None = tensor_name()

    def __str__(self) -> str:
        return self.tensor if self.value_map is None else f"{self.value_map} {self.tensor}"


@dataclass(frozen=True)
class Pair(Payload):
    """`v_ri`, of the pair: `[batch, heads, receivers, sources, value_dim]`."""

    tensor: str = tensor_name("pair_value")

    def __str__(self) -> str:
        return f"{self.tensor} of receiver and source"


class Update(Node):
    """One step from the aggregate z `[batch, heads, receivers, value_dim]` to the output."""


@dataclass(frozen=True)
class Gate(Update):
    """`z * g`; tensor `[batch, heads, receivers]`, or with a last axis of channels."""

    tensor: str = tensor_name("gate")

    def __str__(self) -> str:
        return f"z * {self.tensor}"


@dataclass(frozen=True)
class Scale(Update):
    """`factor * z`."""

    factor: float

    def __str__(self) -> str:
        return f"{self.factor:g} * z"


@dataclass(frozen=True)
class RmsNorm(Update):
    """`z / sqrt(mean(z^2) + eps) * weight` over a head's channels; `weight` names `[value_dim]`, or None."""

    weight: str | None = tensor_name("norm_weight")
    eps: float = 1e-5

    def __str__(self) -> str:
        return "rms norm of z per head"


@dataclass(frozen=True)
class Perturb(Update):
    """`z - (std(z) * noise + mean(z))`, with mean and deviation over receivers and channels of each head.

    The noise `[heads, receivers, value_dim]` has mean 0 and deviation 1 in every head.
    """

    noise: str = tensor_name("noise")

    def __str__(self) -> str:
        return f"z - (std(z) {self.noise} + mean(z))"


@dataclass(frozen=True)
class Residual(Update):
    """`z + x`; tensor like z."""

    tensor: str = tensor_name("residual")

    def __str__(self) -> str:
        return f"z + {self.tensor}"


@dataclass(frozen=True)
class AttentionSpec(Node):
    """An attention operator as independent declarations.

    `w_ri = mask_ri kappa_ri psi(s_ri)` on the carrier; the probe says which observables of W count; the
    anchor picks a representative alpha of that class; `z_r = sum_t c_t sum_i alpha^t_ri v_i`; the update
    turns z into the output.

    The default is softmax attention without a mask.

    Args:
        carrier: receivers, sources, admissible pairs, heads.
        evidence: chart (score), baseline (state-free prior), link.
        probe: observables of the kernel; its gauge is what cannot matter.
        anchor: representative; it must belong to the probe.
        mix: terms that are added; more than one, or a negative one, leaves the single positive kernel.
        payload: what is aggregated.
        update: steps after the aggregate.

    Raises:
        ValueError: the anchor is not one of the probe's, or a part cannot be combined with it.
        TypeError: a part is of the wrong kind.

    Source: Geometric Attention (arXiv 2601.11618 v1), abstract; the language itself is this library's
    reading.
    """

    carrier: Carrier = Carrier()
    evidence: Evidence = Evidence()
    probe: Probe = Row()
    anchor: Anchor = RowSum()
    mix: tuple[Term, ...] = (Term(),)
    payload: Payload = Source()
    update: tuple[Update, ...] = field(default=())

    def __post_init__(self) -> None:
        kinds = {
            "carrier": Carrier,
            "evidence": Evidence,
            "probe": Probe,
            "anchor": Anchor,
            "payload": Payload,
        }
        for name, kind in kinds.items():
            check_kind(self, name, getattr(self, name), kind)
        set_tuple(self, "mix", Term)
        set_tuple(self, "update", Update)
        if not self.mix:
            raise ValueError("mix is empty; it has at least one term.")
        if not isinstance(self.probe, self.anchor.probes):
            allowed = " or ".join(f"{probe.__name__}()" for probe in self.anchor.probes)
            raise ValueError(
                f"anchor={self.anchor!r} does not choose a representative for probe={self.probe!r}; it needs "
                f"{allowed}."
            )
        if self.evidence.signed and not isinstance(self.anchor, NoAnchor):
            raise NotPositive(
                f"anchor={self.anchor!r} needs positive weights, but link={self.evidence.link!r}, "
                f"factor={self.evidence.factor!r} can be negative; use anchor=NoAnchor() and probe=Raw()."
            )
        placed = [mask for mask in self.carrier.masks if not isinstance(mask, GivenMask)]
        if self.carrier.source_map is not None and placed:
            raise ValueError(
                f"masks has {placed[0]!r}, which counts positions; merged sources have none. Use GivenMask()."
            )
        if isinstance(self.carrier.empty_row, NullSource) and not isinstance(self.anchor, RowSum):
            raise ValueError(
                f"empty_row={self.carrier.empty_row!r} needs anchor=RowSum(), not {self.anchor!r}."
            )

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors the interpreter needs, in the order of declaration, each once."""
        shared = list(input_names(self))
        names: dict[str, None] = {}
        for term in self.mix:
            for name in shared:
                names[term.renamed(name)] = None
        return tuple(names)

    @property
    def is_causal(self) -> bool:
        """Whether output n depends on no source after n; column and plan anchors look at later receivers."""
        ordered = any(
            isinstance(mask, Causal) or (isinstance(mask, Window) and mask.after == 0)
            for mask in self.carrier.masks
        )
        return ordered and isinstance(self.probe, Row | Raw | _regime.Support | _regime.Values)

    @property
    def is_positive(self) -> bool:
        """Whether the mixed kernel cannot be negative."""
        return not self.evidence.signed and all(
            term.coefficient >= 0 and term.times is None for term in self.mix
        )

    @property
    def is_gibbs(self) -> bool:
        """Whether alpha is one row-anchored exponential kernel; only then is there a potential."""
        one_kernel = self.is_positive and len(self.mix) == 1
        return one_kernel and isinstance(self.evidence.link, Exp) and isinstance(self.anchor, RowSum)

    def to_json(self, indent: int | None = None) -> str:
        """Returns the specification as JSON; what has its default value is left out."""
        return json.dumps(_to_plain(self), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> AttentionSpec:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: not JSON, an unknown kind or field, or values that no specification has.
        """
        spec = _from_plain(json.loads(text))
        if not isinstance(spec, cls):
            raise ValueError(f"the JSON holds a {type(spec).__name__}, not an {cls.__name__}.")
        return spec


def standard(*, is_causal: bool = False) -> AttentionSpec:
    """Returns scaled dot-product attention, beside which every other system is explained."""
    return AttentionSpec(carrier=Carrier(masks=(Causal(),) if is_causal else ()))


@cache
def _kinds() -> dict[str, type[Node]]:
    found = {}
    for module in (_carrier, _evidence, _regime):
        found.update({name: value for name, value in vars(module).items() if _is_part(value)})
    found.update({name: value for name, value in globals().items() if _is_part(value)})
    return found


def _is_part(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Node) and dataclasses.is_dataclass(value)


def _to_plain(value: Any) -> Any:
    if isinstance(value, Node):
        plain: dict[str, Any] = {"kind": type(value).__name__}
        for item in dataclasses.fields(value):  # type: ignore[arg-type]
            content = getattr(value, item.name)
            if content != item.default:
                plain[item.name] = _to_plain(content)
        return plain
    if isinstance(value, tuple):
        return [_to_plain(part) for part in value]
    return value


def _from_plain(plain: Any) -> Any:
    if isinstance(plain, list):
        return tuple(_from_plain(part) for part in plain)
    if not isinstance(plain, dict):
        return plain
    kinds = _kinds()
    name = plain.get("kind")
    if name not in kinds:
        raise ValueError(f"kind {name!r} is not one of {', '.join(sorted(kinds))}.")
    fields = {item.name for item in dataclasses.fields(kinds[name])}  # type: ignore[arg-type]
    values = {key: _from_plain(value) for key, value in plain.items() if key != "kind"}
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ValueError(f"{name} has no field {unknown[0]!r}; it has {', '.join(sorted(fields)) or 'none'}.")
    return kinds[name](**values)
