"""Claims: a paper's figure and the same work measured here, side by side; one module a system.

`claims/<slug>.py` defines `CLAIM`, a `Claim`: what the paper says, a gate that raises on wrong results, and a
measurement that yields rows. `undivided reproduce <slug>` runs the gate, then the measurement, and keeps the
rows.
"""

from __future__ import annotations

import importlib
import pkgutil

from undivided import catalog
from undivided.claims._harness import Claim, Row, measured

__all__ = ["Claim", "Row", "available", "load", "measured"]


def available() -> tuple[str, ...]:
    """Slugs of the systems that have a claim, in alphabetical order; imports none of them."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def load(slug: str) -> Claim:
    """Imports and returns the claim of one system.

    Args:
        slug: The system's name, such as `"tpla"`.

    Raises:
        ValueError: If there is no such system, or it has no claim yet; the message says what there is.
    """
    slugs = available()
    if slug not in slugs:
        row = catalog.get(slug)
        have = ", ".join(slugs) or "none"
        raise ValueError(f'"{slug}" ({row.name}) has no claim yet; claims exist for: {have}.')
    return importlib.import_module(f"{__name__}.{slug}").CLAIM
