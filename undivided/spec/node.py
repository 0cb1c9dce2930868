"""What every part of a specification is: a frozen dataclass of plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import field
from typing import Any


class Node:
    """Base of everything a specification is made of; `str(node)` is a phrase for people."""


def tensor_name(default: str | None = None) -> Any:
    """Returns a dataclass field that holds the name of an input tensor."""
    return field(default=default, metadata={"tensor": True})


def set_tuple(node: Node, name: str, kind: type[Node]) -> None:
    """Makes a field of a frozen node a tuple of `kind`; one node alone and lists are taken as well.

    Raises:
        TypeError: an element is of another kind.
    """
    value = getattr(node, name)
    items = (value,) if isinstance(value, Node) else tuple(value)
    for item in items:
        check_kind(node, name, item, kind)
    object.__setattr__(node, name, items)


def check_kind(node: Node, name: str, value: object, kind: type[Node]) -> None:
    """Raises a TypeError unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} of {type(node).__name__} holds {value!r}; it needs a {kind.__name__}.")


def input_names(node: Node) -> Iterator[str]:
    """Yields the names of the tensors that a node and its parts read, in the order of declaration."""
    for item in dataclasses.fields(node):  # type: ignore[arg-type]
        value = getattr(node, item.name)
        if item.metadata.get("tensor"):
            if isinstance(value, str):
                yield value
        else:
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Node):
                    yield from input_names(part)
