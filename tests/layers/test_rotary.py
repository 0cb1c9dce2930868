from __future__ import annotations

import pytest
import torch

from undivided.layers.rotary import apply_rotary, rotary_tables, to_interleaved

PAIRS = 4


def tables(positions: torch.Tensor, pairs: int = PAIRS) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[batch, length, pairs]` in float64 for positions `[batch, length]`."""
    frequencies = 100.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = positions.double()[..., None] * frequencies
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotates_each_pair_by_its_angle(interleaved: bool) -> None:
    x = torch.randn(2, 3, 5, 2 * PAIRS, dtype=torch.float64)
    cos, sin = tables(torch.arange(5).expand(2, -1))
    out = apply_rotary(x, cos, sin, interleaved)
    for pair in range(PAIRS):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + PAIRS)
        rotated = torch.complex(x[..., first], x[..., second]) * torch.complex(cos, sin)[:, None, :, pair]
        torch.testing.assert_close(out[..., first], rotated.real)
        torch.testing.assert_close(out[..., second], rotated.imag)


@pytest.mark.parametrize("interleaved", [True, False])
def test_products_depend_on_distance_alone(interleaved: bool) -> None:
    query, key = torch.randn(2, 1, 1, 1, 2 * PAIRS, dtype=torch.float64)

    def product(position: int, other: int) -> torch.Tensor:
        rotated = [
            apply_rotary(x, *tables(torch.tensor([[at]])), interleaved)
            for x, at in ((query, position), (key, other))
        ]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100), rtol=1e-12, atol=1e-12)
    assert not torch.isclose(product(9, 4), product(9, 5))


def test_layouts_are_one_rotation_in_another_order() -> None:
    x = torch.randn(1, 2, 7, 2 * PAIRS, dtype=torch.float64)
    cos, sin = tables(torch.arange(7)[None])
    order = to_interleaved(PAIRS)
    assert order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    halves = apply_rotary(x, cos, sin, interleaved=False)
    torch.testing.assert_close(apply_rotary(x[..., order], cos, sin, interleaved=True), halves[..., order])


def test_halves_are_the_rotation_of_llama() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key = torch.randn(2, 2, 3, 5, 2 * PAIRS, dtype=torch.float64)
    cos, sin = tables(torch.arange(5).expand(2, -1))
    native = apply_rotary_pos_emb(query, key, cos.repeat(1, 1, 2), sin.repeat(1, 1, 2))
    for x, expected in zip((query, key), native, strict=True):
        torch.testing.assert_close(apply_rotary(x, cos, sin, interleaved=False), expected)


def test_tables_of_both_kinds_agree() -> None:
    cos, sin = tables(torch.arange(6)[None])
    from_halves = rotary_tables((cos.repeat(1, 1, 2), sin.repeat(1, 1, 2)))
    from_complex = rotary_tables(torch.complex(cos, sin))
    for expected, halves, complex_ in zip((cos, sin), from_halves, from_complex, strict=True):
        assert torch.equal(halves, expected)
        assert torch.equal(complex_, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keeps_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    cos, sin = (table.float() for table in tables(torch.arange(3)[None]))
    x = torch.randn(1, 1, 3, 2 * PAIRS, dtype=dtype)
    assert apply_rotary(x, cos, sin, interleaved=True).dtype == dtype
