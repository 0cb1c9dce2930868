"""How many heads sparse query attention keeps: the named variants and the checks. No torch."""

from __future__ import annotations

from fractions import Fraction

# Name -> query heads and key/value heads as parts of the base model's heads; 0 stands for one head.
PRESETS: dict[str, tuple[Fraction, Fraction]] = {
    "sqa": (Fraction(1, 2), Fraction(1, 4)),
    "ssqa": (Fraction(1, 2), Fraction(1, 2)),
    "xsqa": (Fraction(1, 4), Fraction(1, 4)),
    "xsmqa": (Fraction(1, 4), Fraction(0)),
    "lsqa": (Fraction(3, 4), Fraction(1, 4)),
}


def sparse_head_counts(
    num_attention_heads: int,
    num_query_heads: int | None = None,
    num_key_value_heads: int | None = None,
    preset: str | None = None,
    reverse: bool = False,
) -> tuple[int, int]:
    """Returns the query heads and the key/value heads of a layer of sparse query attention.

    Args:
        num_attention_heads: heads H of the base model, which define the width of a head.
        num_query_heads: query heads H_q; default the preset's, or H.
        num_key_value_heads: key and value heads G; default the preset's, or H_q (H with `reverse`).
        preset: a key of `PRESETS`.
        reverse: fewer query heads than key/value heads, `H_q < G`.

    Returns:
        `(H_q, G)`.

    Raises:
        ValueError: the preset is unknown, does not divide H or contradicts a number given; a number is out of range;
            or the smaller one does not divide the larger.

    Source: SQA (arXiv 2510.01817).
    """
    heads, queries, groups = num_attention_heads, num_query_heads, num_key_value_heads
    if preset is not None:
        for name, value, own in zip(
            ("num_query_heads", "num_key_value_heads"),
            (queries, groups),
            _of_preset(preset, heads),
            strict=True,
        ):
            if value not in (None, own):
                raise ValueError(
                    f'{name}={value} contradicts preset="{preset}", which has {own} for '
                    f"num_attention_heads={heads}; give one of the two."
                )
        queries, groups = _of_preset(preset, heads)
    if queries is None:
        queries = heads
    if groups is None:
        groups = heads if reverse else queries
    for name, value in (("num_query_heads", queries), ("num_key_value_heads", groups)):
        if not 1 <= value <= heads:
            raise ValueError(f"{name}={value} is not in 1 to num_attention_heads={heads}.")
    if reverse and queries >= groups:
        raise ValueError(
            f"reverse=True needs fewer query heads than key/value heads, but num_query_heads={queries} and "
            f"num_key_value_heads={groups}."
        )
    if not reverse and groups > queries:
        raise ValueError(
            f"num_key_value_heads={groups} is more than num_query_heads={queries}; reverse=True allows it."
        )
    few, many = sorted((("num_query_heads", queries), ("num_key_value_heads", groups)), key=lambda x: x[1])
    if many[1] % few[1]:
        divisors = ", ".join(str(n) for n in range(1, many[1] + 1) if many[1] % n == 0)
        raise ValueError(f"{few[0]}={few[1]} does not divide {many[0]}={many[1]}; {divisors} would.")
    return queries, groups


def _of_preset(preset: str, heads: int) -> tuple[int, int]:
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is not one of {', '.join(map(repr, PRESETS))}.")
    counts = []
    for part in PRESETS[preset]:
        if (heads * part).denominator > 1:
            raise ValueError(
                f'preset="{preset}" needs a multiple of {part.denominator} heads, but num_attention_heads={heads}.'
            )
        counts.append(int(heads * part) or 1)
    return counts[0], counts[1]
