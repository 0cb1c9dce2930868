from __future__ import annotations

import pytest

from undivided.cost.fsa import SelectedShape
from undivided.ops.selected import tokens_forward


def shape(**sizes: int) -> SelectedShape:
    given = {"tokens": 65536, "heads": 32, "key_heads": 8, "head_dim": 128, "block_size": 64, "topk": 16}
    return SelectedShape(**(given | sizes))


def test_the_ratios_of_the_paper():
    four = shape()
    assert round(four.keys_outer_bytes / four.tokens_outer_bytes, 3) == 0.213
    assert four.keys_outer_flops / four.tokens_outer_flops == 0.5625


def test_formulas_by_hand():
    tiny = shape(tokens=10, heads=4, key_heads=2, head_dim=3, block_size=5, topk=7)
    assert tiny.group == 2
    assert tiny.tokens_outer_bytes == 2 * 3 * 2 * 10 * (35 + 2 + 8)
    assert tiny.tokens_outer_flops == 32 * 3 * 2 * 10 * 35
    assert tiny.keys_outer_bytes == 3 * 10 * (24 + 4) * 8
    assert tiny.keys_outer_flops == 3 * 10 * 35 * (16 + 4)
    assert tiny.merged_flops == 4 * 3 * 4 * 10 * 35
    assert tiny.merged_bytes == 4 * 10 * 7 * (3 * 6 + 8) + 2 * 10 * 3 * (4 + 4)


@pytest.mark.parametrize(
    "sizes", [{}, {"key_heads": 32}, {"key_heads": 1}, {"tokens": 4096}, {"tokens": 2**20}]
)
def test_the_buffer_is_what_a_pass_of_the_kernels_has(sizes):
    own = shape(**sizes)
    outputs = own.tokens * own.topk * own.head_dim * 2
    first = next(tokens_forward.passes(own.key_heads, own.group, outputs))
    heads = first[1] * first[3]
    assert own.buffer_bytes(tokens_forward.BUFFER_BYTES) == heads * own.tokens * own.topk * (
        2 * own.head_dim + 4
    )
    assert heads == 1 or heads * outputs <= tokens_forward.BUFFER_BYTES


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"topk": 0}, "topk=0 must be at least 1."),
        ({"key_heads": 5}, "key_heads=5 does not divide heads=32."),
    ],
)
def test_bad_shapes_are_named(sizes, text):
    with pytest.raises(ValueError, match=text):
        shape(**sizes)
