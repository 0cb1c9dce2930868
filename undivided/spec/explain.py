"""What is different: a specification beside standard attention, one line a declaration."""

from __future__ import annotations

from typing import NamedTuple

from undivided.spec.carrier import Causal
from undivided.spec.specification import AttentionSpec, standard


class Line(NamedTuple):
    """One declaration of both specifications, in words."""

    declaration: str
    standard: str
    this: str

    @property
    def differs(self) -> bool:
        """Whether the two say different things."""
        return self.standard != self.this


def explain(spec: AttentionSpec, beside: AttentionSpec | None = None) -> list[Line]:
    """Returns the declarations of a specification beside those of another.

    Args:
        spec: what is explained.
        beside: default standard attention, causal if `spec` has a causal mask.

    Returns:
        Lines for carrier, chart, baseline, link, probe, anchor, mix, payload and update.
    """
    if beside is None:
        beside = standard(is_causal=any(isinstance(mask, Causal) for mask in spec.carrier.masks))
    one, other = _words(beside), _words(spec)
    return [Line(name, one[name], other[name]) for name in one]


def _words(spec: AttentionSpec) -> dict[str, str]:
    carrier, evidence = spec.carrier, spec.evidence
    parts = [str(carrier.source_map)] if carrier.source_map is not None else []
    return {
        "carrier": "; ".join(
            [", ".join(map(str, carrier.masks)) or "all pairs", *parts, str(carrier.empty_row)]
        ),
        "heads": str(carrier.heads),
        "chart s": str(evidence.chart),
        "baseline": " * ".join(map(str, evidence.baseline)) or "1",
        "link": str(evidence.link) + ("" if evidence.factor is None else f", times {evidence.factor}"),
        "probe": f"{spec.probe} (gauge: {spec.probe.gauge})",
        "anchor": str(spec.anchor),
        "mix z": " ".join(map(str, spec.mix)).removeprefix("+ "),
        "payload V": str(spec.payload),
        "update": ", then ".join(map(str, spec.update)) or "z",
    }
