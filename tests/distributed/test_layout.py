from __future__ import annotations

import pytest

from tests.tiny import tiny_config
from undivided.distributed import Layout, rank_layouts
from undivided.models.configuration import UndividedConfig


@pytest.mark.parametrize(
    ("world_size", "shards", "heads"), [(2, 2, 9), (4, 2, 8), (6, 2, 9), (8, 1, 8), (4, 4, 3)]
)
def test_the_ranks_tile_shards_and_heads_once(world_size, shards, heads):
    ranks = [Layout(r, world_size, shards, heads) for r in range(world_size)]
    tiles = [
        (layout.shard, head) for layout in ranks for head in range(layout.heads.start, layout.heads.stop)
    ]
    assert sorted(tiles) == [(shard, head) for shard in range(shards) for head in range(heads)]
    columns = {(c.start, c.stop) for c in (layout.columns(64) for layout in ranks)}
    assert sorted(columns) == [(i * 64 // shards, (i + 1) * 64 // shards) for i in range(shards)]


def test_grouped_heads_stay_with_their_latent():
    ranks = [Layout(r, 4, 2, 8, grouped=True) for r in range(4)]
    assert [(layout.shard, layout.heads.start) for layout in ranks] == [(0, 0), (0, 2), (1, 4), (1, 6)]


def test_a_world_that_does_not_fit_says_which_would():
    with pytest.raises(
        ValueError, match="world_size=4 does not fit num_shards=2 and num_attention_heads=9; 2, 6, 18 would"
    ):
        Layout(0, 4, 2, 9)


def test_native_layers_and_unequal_grids_are_refused():
    base = tiny_config("llama")
    latent = dict(latent_dim=16, rope_dim=4, nope_dim=8, value_dim=8)
    with pytest.raises(ValueError, match="layer 1 has its native attention"):
        rank_layouts(
            UndividedConfig(base_config=base, attention=[{"mechanism": "mla", **latent}, None]), 0, 2
        )
    with pytest.raises(ValueError, match='mechanism "gqa" cannot be spread over ranks; mla, tpla, gla can'):
        rank_layouts(UndividedConfig(base_config=base, attention=[{"mechanism": "gqa"}] * 2), 0, 2)
    mixed = [{"mechanism": "mla", **latent}, {"mechanism": "tpla", "num_shards": 2, **latent}]
    with pytest.raises(ValueError, match="differ in their number of shards"):
        rank_layouts(UndividedConfig(base_config=base, attention=mixed), 0, 2)
