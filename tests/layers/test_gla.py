from __future__ import annotations

import pytest
import torch

from tests.layers.latents import EXACT, HEADS, HIDDEN, SIZES, hidden_states, positions, random_layer
from undivided.layers.gla import GLAttention
from undivided.layers.latent import LatentAttention
from undivided.layers.mla import MLAttention


def part(gla: GLAttention, group: int) -> MLAttention:
    """The group's heads with the group's latent, as an MLA of its own."""
    groups = gla.num_latent_heads
    heads, width = HEADS // groups, gla.latent_dim // groups
    mla = MLAttention(
        HIDDEN,
        heads,
        width,
        4,
        6,
        5,
    ).double()
    own = slice(group * width, (group + 1) * width)
    latent_rows = gla.kv_a_proj_with_mqa.weight[: gla.latent_dim]
    state = {
        "q_proj.weight": gla.q_proj.weight.chunk(groups)[group],
        "kv_a_proj_with_mqa.weight": torch.cat(
            [latent_rows[own], gla.kv_a_proj_with_mqa.weight[gla.latent_dim :]]
        ),
        "kv_a_layernorm.weight": gla.kv_a_layernorm.weight[own],
        "kv_b_proj.weight": gla.kv_b_proj.weight.chunk(groups)[group],
        "o_proj.weight": gla.o_proj.weight.chunk(groups, dim=1)[group],
    }

    mla.load_state_dict(state)
    return mla


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_is_one_mla_a_group_side_by_side(groups: int) -> None:
    gla = random_layer(GLAttention, num_latent_heads=groups)
    hidden, tables = hidden_states(), positions(9)
    expected = sum(part(gla, group)(hidden, tables)[0] for group in range(groups))
    torch.testing.assert_close(gla(hidden, tables)[0], expected, **EXACT)


def test_a_head_reads_no_other_groups_latent() -> None:
    gla = random_layer(GLAttention, num_latent_heads=2)
    hidden, tables = hidden_states(), positions(9)
    with torch.no_grad():
        # Only the first group's heads reach the output.
        gla.o_proj.weight[:, HEADS // 2 * SIZES["value_dim"] :] = 0
        before = gla(hidden, tables)[0]
        gla.kv_a_proj_with_mqa.weight[SIZES["latent_dim"] // 2 : SIZES["latent_dim"]] *= -3
    torch.testing.assert_close(gla(hidden, tables)[0], before, **EXACT)


def test_groups_share_one_up_projection_width() -> None:
    gla = random_layer(GLAttention, num_latent_heads=2)
    assert gla.kv_b_proj.weight.shape == (HEADS * 11, 8)
    assert isinstance(gla, LatentAttention)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_latent_heads": 3}, "num_latent_heads=3 does not divide latent_dim=16"),
        ({"num_latent_heads": 8}, "num_latent_heads=8 does not divide num_attention_heads=4"),
        ({"num_latent_heads": 0}, "num_latent_heads=0 does not divide latent_dim=16"),
    ],
)
def test_groups_that_do_not_divide_are_named(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_layer(GLAttention, **sizes)
