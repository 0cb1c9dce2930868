"""Measurements of attention, and what they say."""

from undivided.inspect.gaam import importance_factor

__all__ = ["importance_factor"]
