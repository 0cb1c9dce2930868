"""Models, devices and the comparison of arrangements."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.tiny import MODEL_TYPES, tiny_config
from undivided.cost import (
    DEVICES,
    OWN,
    PRESETS,
    Device,
    GroupedShape,
    LatentShape,
    ModelShape,
    get_device,
    load_model,
    model_from_config,
    num_parameters,
    plan,
)

# Parameters in the published checkpoints, but for MTP modules and (DeepSeek-V3) 58 x 256 router biases.
PUBLISHED = {
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V3": 671_026_419_200 - 58 * 256,
    "Llama-3-8B": 8_030_261_248,
    "Llama-2-7B": 6_738_415_616,
    "Qwen2.5-7B": 7_615_616_512,
    "SmolLM2-135M": 134_515_008,
}


def rows_of(*args, **kwargs):
    return {row.arrangement: row for row in plan(*args, **kwargs)}


def attention_only(name: str) -> ModelShape:
    """A model without MLPs, experts and vocabulary, as the TPLA paper times it."""
    return replace(PRESETS[name], experts=None, intermediate_size=0, vocab_size=1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name):
    assert num_parameters(PRESETS[name]) == PUBLISHED[name]


def test_kimi_k2_has_about_a_trillion_parameters_of_which_32_billion_are_active():
    model = PRESETS["Kimi-K2"]
    assert round(num_parameters(model) / 1e12, 2) == 1.03
    active = replace(model, experts=replace(model.experts, num_experts=model.experts.experts_per_token))
    assert round((num_parameters(active) - model.vocab_size * model.hidden_size) / 1e9) == 32


def count_with_transformers(config) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_saved_config_gives_the_parameters_that_transformers_builds(tmp_path, model_type, tied):
    config = tiny_config(model_type, tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    assert num_parameters(load_model(tmp_path)) == count_with_transformers(config)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {"attention_bias": True, "head_dim": 12}),
        ("deepseek_v3", {"attention_bias": True, "first_k_dense_replace": 1, "n_shared_experts": 1}),
        ("deepseek_v2", {"q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": 2}),
    ],
)
def test_options_of_a_config_give_the_parameters_that_transformers_builds(tmp_path, model_type, overrides):
    config = tiny_config(model_type, **overrides)
    config.save_pretrained(tmp_path)
    assert num_parameters(load_model(tmp_path)) == count_with_transformers(config)


@pytest.mark.parametrize(
    ("model_type", "entry"),
    [
        ("llama", {"mechanism": "gqa", "num_key_value_heads": 4}),
        ("llama", {"mechanism": "sqa", "num_query_heads": 2}),
        ("qwen2", {"mechanism": "sqa", "preset": "xsqa", "window": 4}),
        (
            "llama",
            {"mechanism": "mla", "latent_dim": 16, "rope_dim": 4, "nope_dim": 8, "value_dim": 8}
            | {"latent_norm": False},
        ),
        (
            "qwen2",
            {"mechanism": "mla", "latent_dim": 16, "rope_dim": 4, "nope_dim": 8, "value_dim": 6}
            | {"query_bias": True, "key_value_bias": True, "query_latent_dim": 20},
        ),
        ("deepseek_v3", {"mechanism": "tpla", "num_shards": 4}),
        ("deepseek_v2", {"mechanism": "gla", "num_latent_heads": 2}),
    ],
)
def test_converted_config_gives_the_parameters_of_the_converted_model(tmp_path, model_type, entry):
    from undivided.models.configuration import UndividedConfig

    config = UndividedConfig(base_config=tiny_config(model_type), attention=[entry, None])
    config.save_pretrained(tmp_path)
    assert num_parameters(load_model(tmp_path)) == count_with_transformers(config)


def test_sliding_windows_are_read_as_transformers_reads_them():
    def windows(config):
        return [layer.sliding_window for layer in model_from_config(config.to_dict(), "m").attention]

    assert windows(tiny_config("gemma2")) == [8, None]
    assert windows(tiny_config("mistral", sliding_window=16)) == [16, 16]
    assert windows(tiny_config("qwen2", sliding_window=16)) == [None, None]
    assert windows(tiny_config("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=1)) == [
        None,
        16,
    ]
    older = {key: value for key, value in tiny_config("gemma2").to_dict().items() if key != "layer_types"}
    assert [layer.sliding_window for layer in model_from_config(older, "m").attention] == [8, None]


def test_kimi_config_is_read_like_deepseek_v3():
    config = tiny_config("deepseek_v3").to_dict()
    assert model_from_config(config | {"model_type": "kimi_k2"}, "m") == model_from_config(config, "m")


def test_preset_is_found_in_any_case_and_after_an_organisation():
    assert load_model("deepseek-ai/deepseek-v3") is PRESETS["DeepSeek-V3"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gpt2"},
            "m: model_type 'gpt2' has no cost model; llama, qwen2, mistral, gemma2, deepseek_v2, "
            "deepseek_v3, kimi_k2, undivided have.",
        ),
        (
            {"model_type": "llama", "num_attention_heads": 4},
            "m: the llama configuration lacks 'hidden_size'.",
        ),
    ],
)
def test_config_that_cannot_be_read_says_what_is_wrong(config, message):
    with pytest.raises(ValueError) as raised:
        model_from_config(config, "m")
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ([None], "m: attention has 1 entries; its base model has 2 layers."),
        ([None, {"mechanism": "gda"}], "m: layer 1: mechanism 'gda' on a GroupedShape has no cost model; "),
        (
            [{"mechanism": "sqa", "num_query_heads": 1, "reverse": True}, None],
            'm: layer 0: mechanism "sqa" with reverse=True has no cost model.',
        ),
        ([{"mechanism": "mla", "latent_dim": 8}, None], "lacks rope_dim, nope_dim, value_dim."),
    ],
)
def test_converted_config_that_cannot_be_read_names_the_layer(attention, message):
    config = {"model_type": "undivided", "base_config": tiny_config().to_dict(), "attention": attention}
    with pytest.raises(ValueError) as raised:
        model_from_config(config, "m")
    assert message in str(raised.value)


def test_config_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list; a configuration is a JSON object"):
        load_model(tmp_path)


def test_unknown_model_is_answered_with_the_nearest_presets():
    with pytest.raises(
        ValueError, match=r"Did you mean Llama-3-8B or Llama-2-7B\? Presets: DeepSeek-V2-Lite, "
    ):
        load_model("Lama-3-8B")
    with pytest.raises(ValueError, match="there is no file nowhere/config.json"):
        load_model("nowhere/config.json")


def test_devices_are_the_datasheets_and_may_be_overridden():
    assert DEVICES["h800"].tflops == DEVICES["h100"].tflops
    measured = get_device("H100", bandwidth_tb=3.02)
    assert measured == replace(DEVICES["h100"], bandwidth_tb=3.02)
    custom = get_device("custom", memory_gb=1, bandwidth_tb=2, tflops=3)
    assert (custom.bytes_per_second, custom.flops_per_second("fp8"), custom.link_gb) == (2e12, 3e12, None)


def test_device_without_fp8_units_multiplies_fp8_at_its_bf16_rate():
    a100 = DEVICES["a100-80gb"]
    assert a100.flops_per_second("fp8") == a100.flops_per_second("bf16") == 312e12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h10",), 'device "h10" is not known. Did you mean "h100"? Known: a100-80gb, h100, h800, '),
        (("custom",), "missing: memory_gb, bandwidth_tb, tflops."),
    ],
)
def test_unknown_device_is_refused_with_those_known(arguments, message):
    with pytest.raises(ValueError) as raised:
        get_device(*arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_device_figures_are_positive_and_finite(value):
    with pytest.raises(ValueError, match="memory_gb is .*; it must be above 0 and finite"):
        get_device("h100", memory_gb=value)


def test_one_row_an_arrangement_in_a_fixed_order():
    latent = ["mla-tensor", "mla-data", "mla-context", "gla", "tpla"]
    assert [row.arrangement for row in plan("DeepSeek-V3", world_size=8)] == latent
    assert [row.arrangement for row in plan("Llama-3-8B", world_size=8)] == ["gqa", *latent]


def test_deepseek_v3_cache_of_a_token_is_61_layers_of_576_elements():
    row = rows_of("DeepSeek-V3", "h200", world_size=8)["mla-tensor"]
    assert row.cache_bytes_per_token == 61 * 576 * 2
    assert row.cache_bytes_per_token_per_layer == 576 * 2


@pytest.mark.parametrize(("name", "published"), [("DeepSeek-V3", 1.79), ("Kimi-K2", 1.80)])
def test_core_of_tpla_at_32k_on_two_ranks_is_faster_by_the_cache_ratio(name, published):
    # 1.79 is the paper's decode speed-up of DeepSeek-V3; that of Kimi-K2 (1.93) is beyond any count of bytes.
    rows = rows_of(attention_only(name), "h800", context=32768, batch=32, world_size=2)
    ratio = rows["mla-tensor"].core_seconds / rows["tpla"].core_seconds
    assert {row.bound for row in rows.values()} == {"memory"}
    assert ratio <= 576 / 320
    assert round(ratio, 2) == published


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Kimi-K2", "Llama-3-8B"])
def test_replicating_the_latent_costs_the_group_its_cache(name):
    rows = rows_of(name, "b200", context=4096, world_size=8, dtype="fp8", batch=8)
    if name != "Kimi-K2":
        ratio = rows["mla-data"].largest_batch / rows["mla-tensor"].largest_batch
        # Less than the eight ranks: data parallelism replicates the attention weights instead.
        assert 1 < ratio < 8
    assert rows["mla-data"].cache_bytes_per_token * 8 == rows["mla-tensor"].cache_bytes_per_token
    assert rows["mla-data"].weight_bytes > rows["mla-tensor"].weight_bytes


def test_largest_batch_fits_and_one_more_sequence_does_not():
    for world_size in (1, 2):
        for arrangement, row in rows_of("Llama-2-7B", context=4096, world_size=world_size).items():
            for batch, fits in ((row.largest_batch, True), (row.largest_batch + 1, False)):
                again = rows_of("Llama-2-7B", context=4096, world_size=world_size, batch=batch)[arrangement]
                assert again.fits == fits
                assert any("does not fit" in note for note in again.notes) != fits


def test_largest_batch_fills_memory_less_weights_and_reserve():
    model = PRESETS["Llama-2-7B"]
    row = rows_of(model, "h100", context=2048, reserve_gb=5)["gqa"]
    free = 80e9 - 5e9 - 2 * num_parameters(model)
    assert row.largest_batch == free // (2048 * 32 * 8192 * 2)


def test_best_is_the_fastest_of_those_that_fit():
    rows = plan("DeepSeek-V3", "h200", world_size=8, weight_dtype="fp8")
    best = [row for row in rows if row.best]
    assert len(best) == 1
    assert best[0].tokens_per_second == max(row.tokens_per_second for row in rows if row.fits)
    assert not all(row.fits for row in rows)


def test_nothing_is_best_where_weights_do_not_fit():
    rows = plan("DeepSeek-V3", "h100", world_size=8)
    assert not any(row.fits or row.best for row in rows)
    assert all(row.largest_batch == 0 for row in rows)
    assert rows[0].notes == (
        "does not fit: the rank's weights exceed its 80 GB, less a reserve of 8 GB, by 97.6 GB.",
    )


def _toy() -> tuple[ModelShape, Device]:
    layer = GroupedShape(hidden_size=8, num_heads=2, num_key_value_heads=1, head_dim=4)
    model = ModelShape("toy", (layer,) * 3, intermediate_size=16, vocab_size=32)
    return model, Device("toy", 1, 1e-12 * 100, {"bf16": 1e-12 * 1000}, link_gb=None)


def test_step_of_a_toy_model_is_what_one_counts_by_hand():
    model, device = _toy()
    row = rows_of(model, device, context=10, batch=5, latent_dim=4, rope_dim=2)["gqa"]
    cache, queries_and_outputs = 5 * 10 * 8 * 2, 5 * (8 + 8) * 2
    assert row.core_bytes == 3 * (cache + queries_and_outputs)
    assert row.core_flops == 3 * 2 * 5 * 10 * (8 + 8)
    projections = 8 * (8 + 4 + 4 + 8)
    assert row.projection_bytes == 3 * 2 * projections
    assert row.projection_flops == 3 * 2 * 5 * projections
    mlps, head = 3 * 3 * 8 * 16, 8 * 32
    assert row.other_bytes == 2 * (mlps + head)
    assert row.other_flops == 2 * 5 * (mlps + head)
    # The core is bound by memory, 100 bytes a second; the weights, read once for 5 tokens, by memory too.
    assert row.core_seconds == pytest.approx(row.core_bytes / 100)
    assert row.weight_seconds == pytest.approx((row.projection_bytes + row.other_bytes) / 100)
    assert row.tokens_per_second == pytest.approx(5 / (row.core_seconds + row.weight_seconds))


def test_time_is_the_slower_of_bytes_and_flops_on_both_sides_of_the_ridge():
    model, device = _toy()
    arguments = {"context": 10, "batch": 5, "latent_dim": 4, "rope_dim": 2}
    intensity = rows_of(model, device, **arguments)["gqa"].arithmetic_intensity
    for ridge, bound in ((1.01 * intensity, "memory"), (0.99 * intensity, "compute")):
        row = rows_of(model, replace(device, tflops={"bf16": 1e-12 * 100 * ridge}), **arguments)["gqa"]
        assert row.bound == bound
        assert row.core_seconds == pytest.approx(max(row.core_bytes / 100, row.core_flops / (100 * ridge)))


def test_experts_read_grow_with_the_batch_to_all_of_them():
    experts = PRESETS["DeepSeek-V3"].experts
    assert experts.touched(1) == pytest.approx(8)
    assert experts.touched(2) == pytest.approx(8 + 8 * (1 - 8 / 256))
    assert experts.touched(10_000) == pytest.approx(256)


def test_weights_held_by_all_ranks_cover_the_model():
    for name, model in PRESETS.items():
        world_size = 9 if name == "SmolLM2-135M" else 4
        own = plan(model, world_size=world_size)[0]
        assert own.weight_bytes * world_size >= 2 * num_parameters(model)
        assert own.weight_bytes < 2 * num_parameters(model)


def test_sliding_window_caps_the_cache_and_what_is_read():
    layer = replace(PRESETS["Llama-2-7B"].attention[0], sliding_window=1024)
    model = replace(PRESETS["Llama-2-7B"], attention=(layer,) * 32)
    windowed, full = (rows_of(shape, context=8192)["gqa"] for shape in (model, PRESETS["Llama-2-7B"]))
    assert windowed.cache_bytes_per_token * 8 == full.cache_bytes_per_token
    assert windowed.core_flops * 8 == full.core_flops


def test_cache_and_weight_dtypes_are_apart():
    both = rows_of("Llama-3-8B", "h100", dtype="fp8")["gqa"]
    cache = rows_of("Llama-3-8B", "h100", dtype="fp8", weight_dtype="bf16")["gqa"]
    none = rows_of("Llama-3-8B", "h100")["gqa"]
    assert both.cache_bytes_per_token * 2 == cache.cache_bytes_per_token * 2 == none.cache_bytes_per_token
    assert both.weight_bytes * 2 == cache.weight_bytes == none.weight_bytes


def test_replicated_key_value_heads_are_said_to_be():
    note = "8 key/value heads over 16 ranks: a rank holds 1, so the group caches every token 2 times."
    assert note in rows_of("Llama-3-8B", world_size=16)["gqa"].notes
    assert not rows_of("Llama-3-8B", world_size=8, context=1024)["gqa"].notes


def test_uneven_batch_is_as_slow_as_its_fullest_rank():
    even, uneven = (rows_of("Llama-3-8B", world_size=8, batch=batch)["mla-data"] for batch in (72, 65))
    assert uneven.core_seconds == even.core_seconds
    assert "batch 65 over 8 ranks: the fullest serves 9, others wait." in uneven.notes


def test_what_a_row_is_to_the_model():
    def relations(rows):
        return {row.arrangement: row.relation for row in rows}

    assert relations(plan("DeepSeek-V3", world_size=8)) == {
        "mla-tensor": OWN,
        "mla-data": OWN,
        "mla-context": OWN,
        "gla": "needs training",
        "tpla": "approximates MLA",
    }
    assert relations(plan("Llama-3-8B", world_size=8)) == {
        "gqa": OWN,
        "mla-tensor": "after conversion",
        "mla-data": "after conversion",
        "mla-context": "after conversion",
        "gla": "needs training",
        "tpla": "after conversion",
    }


def test_converted_model_is_compared_with_what_it_was():
    base = PRESETS["Llama-3-8B"]
    layer = LatentShape(4096, 32, 512, 64, 128, 128, latent_norm=False, mechanism="tpla", num_shards=4)
    model = replace(base, attention=(layer,) * 32, base_attention=base.attention)
    rows = rows_of(model, world_size=8)
    assert rows["gqa"].relation == "before conversion"
    assert rows["gqa"].cache_bytes_per_token == rows_of(base, world_size=8)["gqa"].cache_bytes_per_token
    assert (rows["tpla"].label, rows["tpla"].relation) == ("TPLA, 4 shards", OWN)
    assert rows["mla-tensor"].relation == "another model"
    assert rows_of(model, world_size=8, num_shards=2)["tpla"].relation == "another model"


def test_layers_that_stay_grouped_keep_their_cache_in_a_hybrid_model():
    base = PRESETS["Llama-3-8B"]
    latent = LatentShape(4096, 32, 512, 64, 128, 128, latent_norm=False)
    model = replace(base, attention=(latent, *base.attention[1:]), base_attention=base.attention)
    row = rows_of(model, world_size=4)["mla-tensor"]
    assert row.cache_bytes_per_token == 2 * (576 + 31 * 2048 / 4)
    split = rows_of(model, world_size=4)
    for arrangement in ("mla-data", "mla-context"):
        assert split[arrangement].cache_bytes_per_token == 2 * (576 + 31 * 2048) / 4


def test_gla_is_left_out_where_groups_do_not_divide_heads():
    arrangements = [row.arrangement for row in plan("SmolLM2-135M", num_shards=2)]
    assert arrangements == ["gqa", "mla-tensor", "mla-data", "mla-context", "tpla"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"world_size": 6},
            "world_size=6 does not divide num_heads=32; 2, 4, 8, 16, 32 would.",
        ),
        ({"world_size": 0}, "world_size is 0; it must be at least 1."),
        ({"batch": 0}, "batch is 0; it must be at least 1."),
        ({"dtype": "int4"}, 'dtype "int4" is not known; fp8, fp16, bf16, fp32 are.'),
        ({"reserve_gb": 80}, "reserve_gb is 80; it must be at least 0 and below the device's 80."),
        (
            {"num_shards": 3},
            "num_shards=3 does not divide latent_dim=512; 2, 4, 8, 16, 32, 64, 128, 256, ... would.",
        ),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(arguments, message):
    with pytest.raises(ValueError) as raised:
        plan("Llama-3-8B", **arguments)
    assert str(raised.value) == message


def test_dims_are_refused_for_a_model_that_has_its_own():
    with pytest.raises(ValueError) as raised:
        plan("DeepSeek-V3", latent_dim=256)
    assert str(raised.value) == (
        "latent_dim=256 is for a grouped-query model; DeepSeek-V3 is latent and has its own."
    )


def test_cost_needs_neither_torch_nor_transformers(run_python):
    code = (
        "import json, sys\nfrom undivided.cost import plan\nplan('Llama-3-8B')\n"
        "print(json.dumps([name for name in ('torch', 'transformers') if name in sys.modules]))"
    )
    assert json.loads(run_python(code).stdout) == []
