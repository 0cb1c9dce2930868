"""Formulas of one layer on one rank, against published figures and against counting."""

from __future__ import annotations

from dataclasses import replace

import pytest

from undivided.cost import (
    PRESETS,
    GroupedShape,
    LatentShape,
    grouped_context_parallel,
    grouped_data_parallel,
    grouped_tensor_parallel,
    key_value_heads_per_rank,
    latent_context_parallel,
    latent_data_parallel,
    latent_grouped,
    latent_sharded,
    latent_tensor_parallel,
    to_latent,
)

BF16 = 2
DEEPSEEK = PRESETS["DeepSeek-V3"].attention[0]
KIMI = PRESETS["Kimi-K2"].attention[0]
LLAMA_2 = PRESETS["Llama-2-7B"].attention[0]
SMOLLM = PRESETS["SmolLM2-135M"].attention[0]


def test_deepseek_v3_on_two_ranks_has_the_figures_of_the_tpla_paper():
    mla, tpla = latent_tensor_parallel(DEEPSEEK, 2), latent_sharded(DEEPSEEK, 2, 2)
    assert (mla.cache_elements, mla.macs_per_row) == (576, 64 * (576 + 512))
    assert (tpla.cache_elements, tpla.macs_per_row) == (320, 128 * (320 + 256))
    assert mla.cache_elements / tpla.cache_elements == 1.8
    assert round(100 * (tpla.macs_per_row / mla.macs_per_row - 1), 1) == 5.9


@pytest.mark.parametrize(("shape", "mla", "tpla"), [(DEEPSEEK, 121, 230), (KIMI, 60, 115)])
def test_arithmetic_intensity_on_two_ranks_is_the_published_one(shape, mla, tpla):
    assert round(latent_tensor_parallel(shape, 2).arithmetic_intensity(BF16)) == mla
    assert round(latent_sharded(shape, 2, 2).arithmetic_intensity(BF16)) == tpla


def test_tpla_scores_its_second_rope_part_and_nothing_else_more_than_mla():
    extra = latent_sharded(DEEPSEEK, 2, 2).macs_per_row - latent_tensor_parallel(DEEPSEEK, 2).macs_per_row
    assert extra == DEEPSEEK.num_heads // 2 * DEEPSEEK.rope_dim


def test_mla_cache_of_deepseek_v3_is_61_layers_of_576_elements():
    layers = PRESETS["DeepSeek-V3"].attention
    assert sum(latent_tensor_parallel(layer, 8).cache_elements * BF16 for layer in layers) == 61 * 576 * 2


def test_transmla_caches_7_percent_of_llama_2():
    ratio = to_latent(LLAMA_2, 512, 64).cache_elements / LLAMA_2.cache_elements
    assert LLAMA_2.cache_elements == 8192
    assert (round(100 * ratio, 2), round(100 * (1 - ratio), 2)) == (7.03, 92.97)


@pytest.mark.parametrize(
    ("latent_dim", "percent"), [(512, 53.1), (256, 28.1), (128, 15.6), (64, 9.4), (48, 7.8)]
)
def test_x_ecomla_ranks_give_its_cache_percentages(latent_dim, percent):
    llama_1b = GroupedShape(2048, num_heads=32, num_key_value_heads=8, head_dim=64)
    converted = to_latent(llama_1b, latent_dim, rope_dim=32)
    assert round(100 * converted.cache_elements / llama_1b.cache_elements, 1) == percent


@pytest.mark.parametrize(("latent_dim", "query_latent_dim"), [(160, 264), (16, 444)])
def test_x_ecomla_query_ranks_keep_the_parameter_count(latent_dim, query_latent_dim):
    upcycled = LatentShape(576, 9, latent_dim, 32, 32, 64, query_latent_dim=query_latent_dim)
    before, after = grouped_tensor_parallel(SMOLLM, 1), latent_tensor_parallel(upcycled, 1)
    assert after.projection_macs == before.projection_macs


def test_ccgqa_cache_is_an_eighth_of_multi_head_attention():
    compressed = GroupedShape(2048, num_heads=8, num_key_value_heads=2, head_dim=128)
    multi_head = GroupedShape(2048, num_heads=16, num_key_value_heads=16, head_dim=128)
    assert multi_head.cache_elements == 2 * 2048
    assert multi_head.cache_elements == 8 * compressed.cache_elements


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 128])
def test_tensor_parallel_mla_cache_never_shrinks(world_size):
    assert latent_tensor_parallel(DEEPSEEK, world_size).cache_elements == 576


@pytest.mark.parametrize("num_heads", [9, 28, 32])
def test_key_value_heads_per_rank_counts_the_heads_that_queries_touch(num_heads):
    divisors = [number for number in range(1, num_heads + 1) if num_heads % number == 0]
    for kv_heads in divisors:
        for world_size in divisors:
            touched = [set() for _ in range(world_size)]
            for head in range(num_heads):
                touched[head // (num_heads // world_size)].add(head // (num_heads // kv_heads))
            most = max(len(heads) for heads in touched)
            assert key_value_heads_per_rank(num_heads, kv_heads, world_size) == most


def test_grouped_query_heads_are_replicated_beyond_their_number():
    llama_3 = PRESETS["Llama-3-8B"].attention[0]
    caches = [
        grouped_tensor_parallel(llama_3, world_size).cache_elements for world_size in (1, 2, 4, 8, 16, 32)
    ]
    assert caches == [2048, 1024, 512, 256, 256, 256]


def _one_head_by_counting(shape: LatentShape, latent_dim: int) -> int:
    """MACs of one query head and one cached row: the two dot products of the score, then the weighted sum."""
    return latent_dim + shape.rope_dim + latent_dim


@pytest.mark.parametrize(("world_size", "num_shards"), [(1, 1), (1, 2), (2, 2), (8, 2), (4, 4), (2, 4)])
def test_tpla_ranks_together_score_every_head_on_every_shard_once(world_size, num_shards):
    rank = latent_sharded(DEEPSEEK, world_size, num_shards)
    pairs = DEEPSEEK.num_heads * num_shards
    assert rank.macs_per_row * world_size == pairs * _one_head_by_counting(DEEPSEEK, 512 // num_shards)
    assert rank.cache_elements == 512 // min(world_size, num_shards) + 64


@pytest.mark.parametrize(("world_size", "num_shards"), [(1, 1), (1, 2), (2, 2), (8, 2), (4, 4), (2, 4)])
def test_gla_ranks_together_score_every_head_on_one_group_once(world_size, num_shards):
    rank = latent_grouped(DEEPSEEK, world_size, num_shards)
    macs = DEEPSEEK.num_heads * _one_head_by_counting(DEEPSEEK, 512 // num_shards)
    assert rank.macs_per_row * world_size == macs
    assert rank.cache_elements == latent_sharded(DEEPSEEK, world_size, num_shards).cache_elements


@pytest.mark.parametrize("shape", [DEEPSEEK, KIMI, PRESETS["DeepSeek-V2-Lite"].attention[0]])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_one_shard_or_one_group_is_mla(shape, world_size):
    mla = latent_tensor_parallel(shape, world_size)
    assert latent_sharded(shape, world_size, 1) == mla
    assert latent_grouped(shape, world_size, 1) == mla


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_way_to_split_mla_exactly_does_the_same_work_in_total(world_size):
    whole = latent_tensor_parallel(DEEPSEEK, 1).macs_per_row
    heads = latent_tensor_parallel(DEEPSEEK, world_size)
    batch = latent_data_parallel(DEEPSEEK, world_size)
    rows = latent_context_parallel(DEEPSEEK, world_size)
    assert heads.macs_per_row * world_size == whole
    assert batch.macs_per_row == whole and batch.batch_split == world_size
    assert rows.macs_per_row == whole and rows.row_split == world_size


def test_on_one_rank_all_splits_of_a_layer_coincide_and_send_nothing():
    grouped = PRESETS["Qwen2.5-7B"].attention[0]
    for functions, shape in (
        ((latent_tensor_parallel, latent_data_parallel, latent_context_parallel), DEEPSEEK),
        ((grouped_tensor_parallel, grouped_data_parallel, grouped_context_parallel), grouped),
    ):
        first, *others = [function(shape, 1) for function in functions]
        assert first.link_elements == 0
        assert others == [first, first]


def test_ring_all_reduce_sends_every_element_twice_less_the_own_part():
    assert latent_tensor_parallel(DEEPSEEK, 4).link_elements == 2 * 7168 * 3 / 4
    assert latent_data_parallel(DEEPSEEK, 4).link_elements == 0


def test_context_parallel_sends_queries_and_outputs_of_other_ranks_heads():
    # Three of four ranks get this rank's queries; this rank's partial outputs of 96 of 128 heads go to them.
    queries, outputs = 3 * 32 * 576, 96 * (512 + 1)
    assert latent_context_parallel(DEEPSEEK, 4).link_elements == queries + outputs + 2 * 7168 * 3 / 4


def test_projections_split_by_heads_sum_to_the_whole_and_the_replicated_part():
    one, four = latent_tensor_parallel(DEEPSEEK, 1), latent_tensor_parallel(DEEPSEEK, 4)
    replicated = 7168 * (1536 + 576)
    assert 4 * (four.projection_macs - replicated) == one.projection_macs - replicated


def test_tpla_keeps_output_and_query_projections_of_all_heads_in_a_shard_group():
    mla, tpla = latent_tensor_parallel(DEEPSEEK, 2), latent_sharded(DEEPSEEK, 2, 2)
    # The up-projections are as many: twice the heads, half the latent. Half the latent is made elsewhere.
    doubled = 64 * (1536 * 192 + 128 * 7168)
    assert tpla.projection_macs - mla.projection_macs == doubled - 7168 * 256


@pytest.mark.parametrize("num_shards", [2, 4])
def test_all_shards_on_one_rank_weigh_what_mla_weighs(num_shards):
    mla, tpla = latent_tensor_parallel(DEEPSEEK, 1), latent_sharded(DEEPSEEK, 1, num_shards)
    assert tpla.weight_elements == mla.weight_elements
    assert tpla.projection_macs == mla.projection_macs


def test_default_latent_is_512_or_lossless():
    assert to_latent(LLAMA_2).latent_dim == 512
    assert to_latent(SMOLLM).latent_dim == SMOLLM.cache_elements - 64
    assert to_latent(SMOLLM).cache_elements == SMOLLM.cache_elements


def test_conversion_keeps_the_sliding_window():
    assert to_latent(replace(LLAMA_2, sliding_window=4096)).sliding_window == 4096


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: latent_tensor_parallel(DEEPSEEK, 6),
            "world_size=6 does not divide num_heads=128; 2, 4, 8, 16, 32, 64, 128 would.",
        ),
        (
            lambda: latent_sharded(replace(DEEPSEEK, latent_dim=256), 3, 3),
            "num_shards=3 does not divide latent_dim=256; 2, 4, 8, 16, 32, 64, 128, 256 would.",
        ),
        (
            lambda: latent_sharded(replace(DEEPSEEK, num_heads=96, latent_dim=12), 4, 6),
            "num_shards=6 does not divide world_size=4 and is no multiple of it; 2, 4 would.",
        ),
        (
            lambda: latent_grouped(replace(DEEPSEEK, num_heads=9), 1, 2),
            "num_shards=2 does not divide num_heads=9; 3, 9 would.",
        ),
        (
            lambda: to_latent(SMOLLM, 512),
            "latent_dim=512 is not in 1 to 320: 3 key/value heads of 64 fill no more beside rope_dim=64.",
        ),
        (
            lambda: to_latent(LLAMA_2, 512, 48),
            "rope_dim=48 does not divide head_dim=128; 2, 4, 8, 16, 32, 64, 128 would.",
        ),
        (
            lambda: GroupedShape(512, num_heads=8, num_key_value_heads=3, head_dim=64),
            "num_key_value_heads=3 does not divide num_heads=8; 2, 4, 8 would.",
        ),
    ],
)
def test_numbers_that_do_not_divide_are_refused_with_those_that_would(call, message):
    with pytest.raises(ValueError) as raised:
        call()
    assert str(raised.value) == message
