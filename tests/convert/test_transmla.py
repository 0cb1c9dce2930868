"""TransMLA: no cut loses nothing, a cut keeps the best axes, and the result is DeepSeek's attention."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.convert.sources import EXACT, SOURCES, logits, source_model, tokens
from tests.tiny import tiny_model
from undivided.convert import Report, convert_transmla
from undivided.convert._merged_heads import all_key_axes, key_moments, merge_heads, merged_layer
from undivided.convert._moments import principal_axes
from undivided.convert.transmla import balance_keys, compress_latent, latent_moments, normalise_latents
from undivided.layers._base import grouped_query_dimensions
from undivided.layers.latent import grouped_latent_attention
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.checkpoint import WorkFolder
from undivided.models.evaluation import cache_bytes_per_token
from undivided.testing import assert_as_accurate

every_source = pytest.mark.parametrize("name", SOURCES)
SMALL: dict[str, Any] = {"latent_dim": 16, "rope_dim": 4, "freqfold": 2}


def partial_rope_model(source: Any, rope_dim: int, freqfold: int) -> UndividedForCausalLM:
    return merge_heads(
        source, all_key_axes(source, key_moments(source, tokens()), rope_dim, freqfold), rope_dim
    )


def uneven_entropy(model: nn.Module) -> float:
    """A stand-in for a perplexity: fixed, positive, and different for different models."""
    with torch.no_grad():
        return math.exp(model(tokens(2, 9, seed=5)).logits.log_softmax(-1).exp().pow(2).mean().item() * 100)


@every_source
def test_full_rank_is_the_original(name: str) -> None:
    source, ids = source_model(name), tokens()
    model, report = convert_transmla(source, None, rank="full")
    torch.testing.assert_close(model(ids).logits, logits(source, ids), **EXACT)
    assert report.options == {"rank": "full"}
    assert report.approximations == []


@every_source
@pytest.mark.parametrize("balance_kv_ratio", [None, 1.0, 0.3])
def test_full_width_loses_nothing_but_positions(name: str, balance_kv_ratio: float | None) -> None:
    source, ids = source_model(name), tokens()
    sizes = grouped_query_dimensions(source.config)
    rope_dim, width = sizes["head_dim"] // 2, 2 * sizes["num_key_value_heads"] * sizes["head_dim"]
    model, _ = convert_transmla(
        source,
        ids,
        latent_dim=width - rope_dim,
        rope_dim=rope_dim,
        freqfold=2,
        balance_kv_ratio=balance_kv_ratio,
    )
    expected = partial_rope_model(source, rope_dim, 2)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, **EXACT)


@every_source
def test_queries_through_a_latent_of_full_width_are_the_same(name: str) -> None:
    source, ids = source_model(name), tokens()
    rope_dim = grouped_query_dimensions(source.config)["head_dim"] // 2
    options: dict[str, Any] = {"latent_dim": 8, "rope_dim": rope_dim, "freqfold": 2}
    expected, _ = convert_transmla(source, ids, **options)
    width = expected.attention_layers()[0].q_proj.out_features * 2 // 3
    model, _ = convert_transmla(source, ids, query_latent_dim=width, **options)
    assert not hasattr(model.attention_layers()[0], "q_proj")
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, **EXACT)


def test_one_key_head_can_keep_all_positions() -> None:
    source, ids = source_model("llama, one key head"), tokens()
    for options in ({}, {"query_latent_dim": 32}):
        model, _ = convert_transmla(source, ids, latent_dim=8, rope_dim=8, freqfold=1, **options)
        torch.testing.assert_close(model(ids).logits, source(ids).logits, **EXACT)


def test_host_without_exchanged_layers_is_accepted() -> None:
    source, ids = source_model(), tokens()
    expected, _ = convert_transmla(source, ids, **SMALL)
    model, _ = convert_transmla(UndividedForCausalLM.from_native(source), ids, **SMALL)
    assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_loads_what_it_saves(bias: bool, tied: bool, tmp_path: Path) -> None:
    source, ids = tiny_model("llama", attention_bias=bias, tie_word_embeddings=tied), tokens()
    model, _ = convert_transmla(source, ids, query_latent_dim=12, latent_norm=True, **SMALL)
    model.save_pretrained(tmp_path)
    loaded = UndividedForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.attention == model.config.attention
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    with torch.no_grad():
        assert_as_accurate(loaded(ids).logits, model(ids).logits, model.double()(ids).logits)


def test_low_precision_costs_no_more_than_in_the_original() -> None:
    ids = tokens()
    low, _ = convert_transmla(tiny_model("qwen2", dtype=torch.bfloat16), None, rank="full")
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    eager = tiny_model("qwen2", dtype=torch.bfloat16)
    reference = tiny_model("qwen2", dtype=torch.bfloat16).double()
    with torch.no_grad():
        assert_as_accurate(low(ids).logits, eager(ids).logits, logits(reference, ids), factor=2.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("llama, one head a key", {}), ("llama", {"query_latent_dim": 20, "latent_norm": True}),
     ("qwen2", {"query_latent_dim": 20})],
)  # fmt: skip
def test_transformers_deepseek_attention_computes_the_same(name: str, options: dict[str, Any]) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RMSNorm

    source = source_model(name)
    model, _ = convert_transmla(source, tokens(), **SMALL, **options)
    bias = name == "qwen2"
    config = DeepseekV3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16,
        q_lora_rank=options.get("query_latent_dim"), qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        attention_bias=bias, attn_implementation="sdpa",
    )  # fmt: skip
    hidden = torch.randn(2, 7, 32, dtype=torch.float64)
    cos, sin = source.get_decoder().rotary_emb(hidden, torch.arange(7)[None])
    for layer in model.attention_layers():
        theirs = DeepseekV3Attention(config, 0).double()
        for norm in ("q_a_layernorm", "kv_a_layernorm"):
            if isinstance(getattr(theirs, norm), DeepseekV3RMSNorm):
                mine = getattr(layer, norm)
                kept = nn.Identity() if isinstance(mine, nn.Identity) else nn.RMSNorm(mine.dim, eps=mine.eps)
                setattr(theirs, norm, kept)
        missing = theirs.load_state_dict(layer.state_dict(), strict=False)
        # Qwen2 has no bias on its output projection.
        assert missing.unexpected_keys == []
        assert missing.missing_keys == (["o_proj.bias"] if bias else [])
        if bias:
            nn.init.zeros_(theirs.o_proj.bias)
        tables = cos[..., ::2], sin[..., ::2]
        expected = theirs.double()(hidden, position_embeddings=tables, attention_mask=None)[0]
        torch.testing.assert_close(layer(hidden, position_embeddings=(cos, sin))[0], expected, **EXACT)


def test_absorbed_and_expanded_are_the_same() -> None:
    source = source_model()
    model, _ = convert_transmla(source, tokens(), **SMALL)
    layer = model.attention_layers()[0]
    hidden = torch.randn(2, 7, 32, dtype=torch.float64)
    positions = source.get_decoder().rotary_emb(hidden, torch.arange(7)[None])
    nope, rope = layer.queries(hidden).split([8, 4], dim=-1)
    latent, key = layer.kv_a_proj_with_mqa(hidden)[:, None].split([16, 4], dim=-1)
    rope, key = layer.rotate(rope, positions), layer.rotate(key, positions)
    expected = layer(hidden, position_embeddings=positions)[0]
    for form in ("expanded", "absorbed"):
        heads = grouped_latent_attention(
            nope,
            rope,
            latent,
            key,
            *layer.up_projections(),
            scale=layer.scale,
            form=form,
            backend="reference",
        )
        torch.testing.assert_close(layer.project_output(heads), expected, **EXACT)


@every_source
def test_decoding_equals_prefill(name: str) -> None:
    source = source_model(name)
    rope_dim = grouped_query_dimensions(source.config)["head_dim"] // 2
    model, _ = convert_transmla(source, tokens(), latent_dim=10, rope_dim=rope_dim, freqfold=2)
    ids, cache, steps = tokens(2, 11, seed=1), None, []
    for token in ids.split(1, dim=1):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), model(ids).logits, **EXACT)


def test_cache_holds_latent_and_rotary_key_alone() -> None:
    model, report = convert_transmla(source_model(), tokens(), **SMALL)
    cache = model(tokens(1, 5), use_cache=True).past_key_values
    for layer in cache.layers:
        assert (layer.keys.shape, layer.values.shape) == ((1, 1, 5, 16), (1, 1, 5, 4))
    assert report.cache_bytes_per_token_per_rank == 2 * (16 + 4) * 8 == cache_bytes_per_token(model)


def test_balanced_keys_are_as_long_as_asked() -> None:
    source, ids = source_model("llama with bias"), tokens()
    axes = all_key_axes(source, key_moments(source, ids), 4, 2)
    host = merge_heads(source, axes, 4)
    moment = latent_moments(host, ids)["0.latent"]
    for ratio in (1.0, 0.25):
        layer = merged_layer(source, 0, axes[0], 4)
        balanced = balance_keys(layer, moment, ratio)
        host.set_attention(0, layer)
        torch.testing.assert_close(latent_moments(host, ids)["0.latent"], balanced, **EXACT)
        lengths = balanced.diagonal().sqrt()
        assert lengths[:12].mean() / lengths[16:].mean() == pytest.approx(ratio)


def test_keys_that_are_long_do_not_crowd_out_the_values() -> None:
    """Scaled keys with queries scaled back: the same model, and with balancing the same conversion."""
    source, ids = source_model(), tokens()
    scaled = source_model()
    with torch.no_grad():
        for layer in scaled.get_decoder().layers:
            layer.self_attn.k_proj.weight *= 64.0
            layer.self_attn.q_proj.weight /= 64.0
    for ratio, same in ((1.0, True), (None, False)):
        outputs = [
            convert_transmla(model, ids, balance_kv_ratio=ratio, **SMALL)[0](ids).logits
            for model in (source, scaled)
        ]
        assert torch.allclose(*outputs, **EXACT) is same


def test_more_axes_hold_more_and_the_rest_is_what_is_lost() -> None:
    source, ids = source_model(), tokens()
    axes = all_key_axes(source, key_moments(source, ids), 4, 2)
    host = merge_heads(source, axes, 4)
    moment = latent_moments(host, ids)["0.latent"]
    values = principal_axes(moment)[1]
    hidden = torch.randn(1, 50, 32, dtype=torch.float64)
    whole = merged_layer(source, 0, axes[0], 4)
    errors = []
    for latent_dim in (4, 8, 16, 28):
        layer = merged_layer(source, 0, axes[0], 4)
        share = compress_latent(layer, moment, latent_dim)
        assert share == pytest.approx((values[:latent_dim].sum() / values.sum()).item())
        up = torch.linalg.pinv(whole.kv_b_proj.weight) @ layer.kv_b_proj.weight
        latent, cut = (x.kv_a_proj_with_mqa(hidden)[..., : x.latent_dim] for x in (whole, layer))
        errors.append((latent - cut @ up.T).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9 < errors[0]


def test_latents_are_calibrated_on_the_model_with_partial_positions() -> None:
    source, ids = source_model(), tokens()
    host = partial_rope_model(source, 4, 4)
    found = latent_moments(host, ids)["1.latent"][12:, 12:]
    original = latent_moments(merge_heads(source), ids)["1.latent"]
    assert (found - original).abs().max() > 1e-3
    norm = host.decoder_layers[1].input_layernorm(
        host.native.model(ids, output_hidden_states=True).hidden_states[1]
    )
    values = source.get_decoder().layers[1].self_attn.v_proj(norm).flatten(0, 1)
    torch.testing.assert_close(found, values.T @ values / len(values), **EXACT)


def test_constant_norm_weight_keeps_the_mean_length() -> None:
    source, ids = source_model(), tokens()
    plain, _ = convert_transmla(source, ids, query_latent_dim=20, **SMALL)
    model, _ = convert_transmla(source, ids, query_latent_dim=20, latent_norm=True, **SMALL)

    def lengths(host: Any, index: int, name: str, width: int | None = None) -> Tensor:
        seen = []
        handle = getattr(host.attention_layers()[index], name).register_forward_hook(
            lambda module, inputs, output: seen.append(output[..., :width])
        )
        host(ids)
        handle.remove()
        return seen[0].pow(2).mean(dim=-1).sqrt()

    for name, norm, width in (
        ("kv_a_proj_with_mqa", "kv_a_layernorm", 16),
        ("q_a_proj", "q_a_layernorm", None),
    ):
        for index in (0, 1):
            weight = getattr(model.attention_layers()[index], norm).weight
            assert weight.max() == weight.min()
            torch.testing.assert_close(
                weight[0].double(), lengths(plain, index, name, width).mean(), rtol=1e-5, atol=0
            )
        normalised = lengths(model, 0, norm)
        torch.testing.assert_close(
            normalised.mean(), lengths(plain, 0, name, width).mean(), rtol=1e-4, atol=0
        )


def test_mean_of_inverse_lengths_would_not_keep_the_function() -> None:
    source, ids = source_model(), tokens()
    plain, _ = convert_transmla(source, ids, **SMALL)
    expected = plain(ids).logits
    model, _ = convert_transmla(source, ids, latent_norm=True, **SMALL)
    error = (model(ids).logits - expected).norm()
    for layer, before in zip(model.attention_layers(), plain.attention_layers(), strict=True):
        seen: list[Tensor] = []
        handle = before.kv_a_proj_with_mqa.register_forward_hook(
            lambda m, i, output, seen=seen: seen.append(output)
        )
        plain(ids)
        handle.remove()
        layer.kv_a_layernorm.weight.data.fill_(seen[0].pow(2).mean(dim=-1).rsqrt().mean().item())
    assert (model(ids).logits - expected).norm() > error


@pytest.mark.parametrize(
    ("scores", "chosen", "tried"),
    [([5.0, 4.0, 3.0], 4, 3), ([5.0, 4.0, 4.0], 2, 3), ([5.0, 6.0, 1.0], 1, 2), ([math.nan, 1.0], 1, 1)],
)
def test_fold_doubles_until_it_gets_worse(scores: list[float], chosen: int, tried: int) -> None:
    asked = [9.0, *scores]
    models = []

    def evaluate(model: Any) -> float:
        models.append(model)
        return asked[len(models) - 1] if len(models) <= tried + 1 else 7.0

    _, report = convert_transmla(source_model(), tokens(), latent_dim=16, rope_dim=8, evaluate=evaluate)
    assert report.options["freqfold"] == chosen
    # The original, the folds, and the result: the chosen fold is not evaluated twice.
    assert len(models) == 1 + tried + 1
    if not math.isnan(scores[0]):
        assert report.perplexity == {"original": 9.0, "partial_rope": min(scores[:tried]), "mla": 7.0}


def test_fold_starts_at_the_stride() -> None:
    scores = iter([9.0, 5.0, 6.0, 7.0])
    _, report = convert_transmla(
        source_model(), tokens(), latent_dim=16, rope_dim=4, evaluate=lambda model: next(scores)
    )
    assert report.options["freqfold"] == 2


def test_without_evaluation_the_calibration_chooses_the_best_fold() -> None:
    source, ids = source_model(), tokens()
    _, report = convert_transmla(source, ids, latent_dim=16, rope_dim=8)

    def nll(fold: int) -> float:
        scores = partial_rope_model(source, 8, fold)(ids).logits[:, :-1].log_softmax(-1)
        return -scores.gather(-1, ids[:, 1:, None]).mean().item()

    chosen = report.options["freqfold"]
    assert report.perplexity == {}
    assert nll(chosen) <= nll(1)
    assert chosen == 4 or nll(2 * chosen) > nll(chosen)


def test_report_says_what_was_done_and_what_it_cost() -> None:
    _, report = convert_transmla(
        source_model(), tokens(), latent_dim=8, rope_dim=4, query_latent_dim=10, latent_norm=True,
        evaluate=uneven_entropy,
    )  # fmt: skip
    assert isinstance(report, Report)
    assert report.method == "transmla"
    assert list(report.perplexity) == ["original", "partial_rope", "mla", "latent_norm"]
    assert report.options["latent_dim"] == 8
    assert report.seconds > 0
    before, after = (f"{report.perplexity[stage]:.4g}" for stage in ("original", "partial_rope"))
    assert report.approximations[0].startswith("4 of 16 key dimensions keep positions (")
    assert report.approximations[0].endswith(f"frequencies folded): perplexity {before} -> {after}")
    assert "the latent keeps 8 of 28 axes" in report.approximations[1]
    assert "the query latent keeps 10 of 32 axes" in report.approximations[1]
    assert report.approximations[2].startswith("latents are normalised to their mean length: perplexity ")
    assert json.loads(json.dumps(asdict(report), allow_nan=False)) == asdict(report)


def test_report_names_no_cut_where_none_was_made() -> None:
    _, report = convert_transmla(source_model(), tokens(), latent_dim=28, rope_dim=4, freqfold=2)
    assert report.approximations == ["4 of 16 key dimensions keep positions (2 frequencies folded)"]
    assert report.perplexity == {}


def test_resumes_with_the_same_result(tmp_path: Path) -> None:
    source, ids = source_model(), tokens()
    options: dict[str, Any] = {"latent_dim": 16, "rope_dim": 4, "query_latent_dim": 12}
    expected, _ = convert_transmla(source, ids, evaluate=uneven_entropy, **options)

    def killed(model: Any) -> float:
        if isinstance(model, UndividedForCausalLM) and model.attention_layers()[0].latent_dim == 16:
            raise KeyboardInterrupt
        return uneven_entropy(model)

    with pytest.raises(KeyboardInterrupt), WorkFolder(tmp_path / "out") as work:
        convert_transmla(source, ids, evaluate=killed, work=work, **options)
    with WorkFolder(tmp_path / "out") as work:
        model, report = convert_transmla(source, ids, evaluate=uneven_entropy, work=work, **options)
        assert work.resumed == ["transmla-keys", "transmla-fold", "transmla-latents"]
    assert list(report.perplexity) == ["original", "partial_rope", "mla"]
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_computes_where_the_model_is(device: torch.device, tmp_path: Path) -> None:
    source, ids = source_model().to(device), tokens()
    options: dict[str, Any] = {**SMALL, "query_latent_dim": 12, "latent_norm": True, "freqfold": "auto"}
    expected, _ = convert_transmla(source, ids, **options)
    # What is kept comes back on the CPU.
    with WorkFolder(tmp_path / "out") as work:
        model, _ = convert_transmla(source, ids, work=work, **options)
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}
    torch.testing.assert_close(model(ids.to(device)).logits, expected(ids.to(device)).logits, **EXACT)


def test_progress_sees_every_long_loop() -> None:
    seen = []

    def progress(items: Any, description: str) -> Any:
        seen.append(description)
        return items

    convert_transmla(source_model(), tokens(), latent_dim=16, rope_dim=4, latent_norm=True, progress=progress)
    assert seen == [
        "calibrating keys", "choosing the fold of frequencies", "calibrating latents", "compressing",
        "calibrating norms",
    ]  # fmt: skip


def test_norms_are_calibrated_by_hand_as_by_option() -> None:
    source, ids = source_model(), tokens()
    model, _ = convert_transmla(source, ids, **SMALL)
    normalise_latents(model, ids)
    expected, _ = convert_transmla(source, ids, latent_norm=True, **SMALL)
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert model.config.attention == expected.config.attention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 29}, r"latent_dim=29 is not in 1 to 28: keys and values of 2 heads with head_dim=8 "
         r"are 32 numbers, 4 of them the rotary key\."),
        ({"latent_dim": 0}, "latent_dim=0 is not in 1 to 28"),
        ({"rope_dim": 6}, r"rope_dim=6 does not fit head_dim=8: it must be even and divide it; 2, 4, 8 wou"),
        ({"rope_dim": 1}, "rope_dim=1 does not fit head_dim=8"),
        ({"rope_dim": 16}, "rope_dim=16 does not fit head_dim=8"),
        ({"freqfold": 1}, r"freqfold=1 is not a multiple of head_dim / rope_dim = 2 that divides "
         r'head_dim / 2 = 4; 2, 4 or "auto" would do\.'),
        ({"rope_dim": 8, "freqfold": 3}, r"freqfold=3 is .* divides head_dim / 2 = 4; 1, 2, 4 or"),
        ({"rope_dim": 8, "freqfold": 8}, "freqfold=8 is not"),
        ({"rope_dim": 8, "freqfold": "best"}, "freqfold='best' is not"),
        ({"query_latent_dim": 33}, r"query_latent_dim=33 is not in 1 to 32, the width of all queries; None"),
        ({"balance_kv_ratio": 0.0}, r"balance_kv_ratio=0.0 must be above 0, or None"),
        ({"rank": "half"}, r'rank=\'half\' is not one of "pca", "full"\.'),
    ],
)  # fmt: skip
def test_refuses_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_transmla(source_model(), tokens(), **{**SMALL, **options})


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (None, ValueError, r'calibration is None; rank="pca" needs token ids \[samples, length\]\.'),
        (torch.zeros(0, 8).long(), ValueError, r"calibration is \[0, 8\]; give token ids .* not empty\."),
        (torch.zeros(8).long(), ValueError, r"calibration is \[8\]; give token ids"),
        (torch.zeros(2, 8), TypeError, r"calibration is torch.float32; token ids are integers\."),
        (
            torch.full((2, 8), 256),
            ValueError,
            r"calibration has the token ids 256 to 256, the model has 0 to 255;",
        ),
    ],
)
def test_refuses_a_calibration_it_cannot_use(calibration: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        convert_transmla(source_model(), calibration, **SMALL)


def test_refuses_models_it_does_not_cover() -> None:
    source = source_model()
    source.config.model_type = "qwen3"
    with pytest.raises(ValueError, match=r'model_type "qwen3" is not supported: it normalises query and key'):
        convert_transmla(source, tokens(), **SMALL)
    with pytest.raises(ValueError, match=r'model_type "deepseek_v3" has latent attention already; give'):
        convert_transmla(tiny_model("deepseek_v3"), tokens(), **SMALL)
    model, _ = convert_transmla(source_model(), None, rank="full")
    with pytest.raises(ValueError, match=r'layer 0 has the mechanism "mla" already; give a model whose'):
        convert_transmla(model, tokens(), **SMALL)
