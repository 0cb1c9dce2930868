from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.layers.latents import EXACT, in_float64
from tests.tiny import VOCAB_SIZE, tiny_model
from undivided.convert._mla import mla_host
from undivided.convert.tpla import (
    LOGIT_SCALES,
    TRANSFORMS,
    convert_tpla,
    energy_shares,
    fit_logit_scales,
    hadamard_rotation,
    latent_moments,
    latent_rotations,
    mla_to_gla,
    random_rotation,
    reparameterise,
    slice_latent,
)
from undivided.layers.gla import GLAttention
from undivided.layers.mla import MLAttention
from undivided.layers.tpla import TPLAttention
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.checkpoint import WorkFolder
from undivided.models.configuration import UndividedConfig

WIDTH, ROPE, HEADS = 16, 4, 4
EACH = {"num_shards": 2, "calibration": None, "transform": "none", "logit_scale": "one"}


def source(model_type: str = "deepseek_v3", **overrides: Any) -> UndividedForCausalLM:
    """A DeepSeek model in float64 throughout, as a host with MLA, whose norms have weights far from 1."""
    native = tiny_model(model_type, **overrides)
    entries = [{"mechanism": "mla"}] * native.config.num_hidden_layers
    host = UndividedForCausalLM(
        UndividedConfig(base_config=native.config.to_dict(), attention=entries)
    ).eval()
    host.native.load_state_dict(native.state_dict())
    return in_float64(host)


def converted_source() -> UndividedForCausalLM:
    """A Llama whose layers have MLA without a normalisation of the latent, as conversions make them."""
    options = {"latent_dim": 16, "rope_dim": 4, "nope_dim": 8, "value_dim": 8, "rope_stride": 2}
    options |= {"latent_norm": False, "key_value_bias": True, "mechanism": "mla"}
    native = tiny_model("llama")
    host = UndividedForCausalLM(UndividedConfig(base_config=native.config.to_dict(), attention=[options] * 2))
    shared = {name: tensor for name, tensor in native.state_dict().items() if "self_attn" not in name}
    host.native.load_state_dict(shared, strict=False)
    with torch.no_grad():
        for layer in host.attention_layers():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 1.5 * parameter.shape[-1] ** -0.5)
    return in_float64(host.eval())


def ids(samples: int = 6, length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(VOCAB_SIZE, (samples, length), generator=generator)


def one_half(model: UndividedForCausalLM) -> UndividedForCausalLM:
    """The model with latents of half their rank: no transform of other rows can be cut without loss."""
    with torch.no_grad():
        for layer in model.attention_layers():
            rows = layer.kv_a_proj_with_mqa.weight[:WIDTH]
            left, values, right = torch.linalg.svd(rows, full_matrices=False)
            values[WIDTH // 2 :] = 0
            rows.copy_(left @ torch.diag(values) @ right)
    return model


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("make", [source, converted_source])
def test_reparameterised_equals_mla(transform: str, make: Any) -> None:
    model = make()
    rotations = latent_rotations(model, transform, latent_moments(model, ids()))
    rotated = reparameterise(model, rotations)
    assert all(type(layer) is MLAttention for layer in rotated.attention_layers())
    torch.testing.assert_close(rotated(ids()).logits, model(ids()).logits, **EXACT)


def test_rotating_without_folding_the_norms_weight_would_not_be_exact() -> None:
    model = source()
    rotations = latent_rotations(model, "random")
    layer = model.attention_layers()[0]
    norm = layer.kv_a_layernorm
    folded = reparameterise(model, rotations).attention_layers()[0]
    assert not torch.allclose(norm.weight, torch.ones_like(norm.weight), atol=0.1)
    assert torch.equal(folded.kv_a_layernorm.weight, torch.ones_like(norm.weight))
    # What the folding is for: normalising and rotating do not commute with a weight between them.
    latent, rotation = torch.randn(3, WIDTH, dtype=torch.float64), rotations[0]
    assert not torch.allclose(norm(latent @ rotation), norm(latent) @ rotation, rtol=1e-3)
    unweighted = folded.kv_a_layernorm
    torch.testing.assert_close(unweighted(latent @ rotation), unweighted(latent) @ rotation, **EXACT)


@pytest.mark.parametrize("rotation", [hadamard_rotation(64), random_rotation(50)])
def test_rotations_are_orthogonal(rotation: torch.Tensor) -> None:
    eye = torch.eye(len(rotation), dtype=torch.float64)
    torch.testing.assert_close(rotation.T @ rotation, eye, rtol=0, atol=1e-13)


def test_hadamard_mixes_all_axes_equally() -> None:
    assert torch.equal(hadamard_rotation(16).abs(), torch.full((16, 16), 0.25, dtype=torch.float64))


def test_the_seed_decides_the_rotation() -> None:
    model = source()
    for transform in ("hadamard", "random"):
        first, again, other = (latent_rotations(model, transform, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first[0], again[0])
        assert not torch.equal(first[0], other[0])
        assert not torch.equal(first[0], first[1])


def test_moments_are_those_of_the_normalised_latent_before_its_weight() -> None:
    model = source()
    moments = latent_moments(model, ids())
    for index, moment in enumerate(moments.values()):
        # Every normalised latent has mean square 1 but for the eps, whatever the weight is.
        assert moment.trace().item() == pytest.approx(WIDTH, rel=1e-3), index
    rows: list[torch.Tensor] = []
    layer = model.attention_layers()[0]
    hook = layer.kv_a_proj_with_mqa.register_forward_hook(lambda *seen: rows.append(seen[-1][..., :WIDTH]))
    model(ids())
    hook.remove()
    latent = rows[0].flatten(0, 1)
    latent = latent / (latent.pow(2).mean(dim=-1, keepdim=True) + layer.kv_a_layernorm.eps).sqrt()
    torch.testing.assert_close(moments["0"], latent.T @ latent / len(latent), **EXACT)


def test_principal_axes_put_the_energy_first() -> None:
    model = source()
    moments = latent_moments(model, ids())
    shares = {
        transform: energy_shares(model, 2, latent_rotations(model, transform, moments), moments)["0"]
        for transform in TRANSFORMS
    }
    for share in shares.values():
        assert share.sum().item() == pytest.approx(1.0)
    assert shares["pca"][0] > max(shares[other][0] for other in ("hadamard", "random", "none"))
    eigenvalues = torch.linalg.eigvalsh(moments["0"]).flip(0)
    expected = eigenvalues.unflatten(0, (2, -1)).sum(dim=1) / eigenvalues.sum()
    torch.testing.assert_close(shares["pca"], expected, rtol=1e-8, atol=1e-8)


def test_without_calibration_shards_have_equal_shares() -> None:
    model = source()
    shares = energy_shares(model, 4, latent_rotations(model, "none"), None)
    assert torch.equal(shares["1"], torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("norm", ["local", "exact"])
def test_one_shard_is_mla(norm: str) -> None:
    model = source()
    host, _ = convert_tpla(model, num_shards=1, calibration=ids(), norm=norm)
    torch.testing.assert_close(host(ids()).logits, model(ids()).logits, **EXACT)


@pytest.mark.parametrize("num_shards", [2, 4])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_exact_norm_and_softmax_are_mla(num_shards: int, transform: str) -> None:
    model = source()
    host, _ = convert_tpla(
        model,
        num_shards=num_shards,
        transform=transform,
        calibration=ids(),
        norm="exact",
        softmax="exact",
    )
    assert all(type(layer) is TPLAttention for layer in host.attention_layers())
    torch.testing.assert_close(host(ids()).logits, model(ids()).logits, **EXACT)


@pytest.mark.parametrize("logit_scale", LOGIT_SCALES)
@pytest.mark.parametrize("make", [source, converted_source])
def test_a_latent_of_half_the_rank_loses_nothing(logit_scale: str, make: Any) -> None:
    model = one_half(make())
    if make is converted_source:
        for layer in model.attention_layers():
            layer.kv_a_proj_with_mqa.bias.data.zero_()
    host, _ = convert_tpla(model, calibration=ids(), logit_scale=logit_scale)
    for layer in host.attention_layers():
        assert layer.norm_scale.isfinite().all()
        # All of the energy is the first shard's, and its logits are the whole ones.
        torch.testing.assert_close(layer.norm_scale[0].item(), 1.0, **EXACT)
        expected = torch.ones_like(layer.logit_scale)
        if logit_scale == "literal":
            expected[1] = layer.logit_scale[1]
        # Nor are the logits of the empty one, which are noise, scaled up to count.
        torch.testing.assert_close(layer.logit_scale, expected, **EXACT)
    torch.testing.assert_close(host(ids()).logits, model(ids()).logits, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_empty_shard_has_finite_scales(dtype: torch.dtype) -> None:
    host = mla_host(tiny_model("deepseek_v3", dtype=dtype))
    with torch.no_grad():
        for layer in host.attention_layers():
            layer.kv_a_proj_with_mqa.weight[WIDTH // 2 : WIDTH] = 0
    slice_latent(host, 2, {str(index): torch.tensor([1.0, 0.0], dtype=torch.float64) for index in range(2)})
    assert all(layer.norm_scale.isfinite().all() for layer in host.attention_layers())
    assert host(ids()).logits.isfinite().all()


def test_scales_are_those_of_the_shares() -> None:
    model = source()
    moments = latent_moments(model, ids())
    share = energy_shares(model, 2, latent_rotations(model, "pca", moments), moments)["1"]
    expected = {"inverse": 1 / share, "literal": share, "one": torch.ones_like(share)}
    for logit_scale, scale in expected.items():
        host, _ = convert_tpla(model, calibration=ids(), logit_scale=logit_scale)
        layer = host.attention_layers()[1]
        torch.testing.assert_close(layer.logit_scale, scale[:, None].expand(2, HEADS), **EXACT)
        torch.testing.assert_close(layer.norm_scale, 1 / share, **EXACT)


@pytest.mark.parametrize("norm", ["local", "exact"])
def test_least_squares_are_those_of_the_logits(norm: str) -> None:
    model = source()
    host, _ = convert_tpla(model, calibration=ids(), norm=norm)
    exact = mla_host(model)
    captured: dict[str, torch.Tensor] = {}
    layer = exact.attention_layers()[1]
    hooks = [
        module.register_forward_hook(lambda *seen, name=name: captured.update({name: seen[-1]}))
        for name, module in (("query", layer.q_b_proj), ("latent", layer.kv_a_proj_with_mqa))
    ]
    exact(ids())
    for hook in hooks:
        hook.remove()
    mine = host.attention_layers()[1]
    rotation = latent_rotations(model, "pca", latent_moments(model, ids()))[1]
    latent = captured["latent"][..., :WIDTH] @ rotation
    query = captured["query"].unflatten(-1, (HEADS, -1))[..., : layer.nope_dim]
    up_key = mine.up_projections()[0]
    whole, cut = mine.normalise(latent, exact=True), mine.normalise(latent, exact=False)
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    for head in range(HEADS):
        full = torch.einsum("bnd,dr,bmr->bnm", query[:, :, head], up_key[head], whole)[:, seen]
        for shard in range(2):
            own = slice(shard * WIDTH // 2, (shard + 1) * WIDTH // 2)
            parts = query[:, :, head], up_key[head][:, own], cut[..., own]
            part = torch.einsum("bnd,dr,bmr->bnm", *parts)[:, seen]
            expected = torch.linalg.lstsq(part.reshape(-1, 1), full.reshape(-1, 1)).solution.item()
            assert mine.logit_scale[shard, head].item() == pytest.approx(expected, rel=1e-9)


def test_fitting_leaves_the_model_as_it_was() -> None:
    model = source()
    host = reparameterise(model, latent_rotations(model, "none"))
    slice_latent(host, 2, energy_shares(model, 2, latent_rotations(model, "none"), None))
    before = host(ids()).logits
    fit_logit_scales(host, ids())
    assert torch.equal(host(ids()).logits, before)
    assert [entry["prefill"] for entry in host.config.attention] == ["sliced", "sliced"]
    assert all(not layer.q_b_proj._forward_hooks for layer in host.attention_layers())


@pytest.mark.parametrize("groups", [2, 4])
def test_gla_is_tpla_without_the_blocks_off_the_diagonal(groups: int) -> None:
    model = source()
    gla = mla_to_gla(model, groups)
    assert all(type(layer) is GLAttention for layer in gla.attention_layers())
    tpla, _ = convert_tpla(model, **EACH | {"num_shards": groups})
    kept = torch.block_diag(*[torch.ones(HEADS // groups * 16, WIDTH // groups)] * groups)
    with torch.no_grad():
        for layer in tpla.attention_layers():
            layer.kv_b_proj.weight.mul_(kept)
    torch.testing.assert_close(gla(ids()).logits, tpla(ids()).logits, **EXACT)


def test_gla_of_one_group_is_mla() -> None:
    model = source()
    torch.testing.assert_close(mla_to_gla(model, 1)(ids()).logits, model(ids()).logits, **EXACT)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("query_width", [24, None])
def test_native_models_convert_and_are_left_alone(model_type: str, query_width: int | None) -> None:
    model = tiny_model(model_type, q_lora_rank=query_width, attention_bias=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, config = list(model.modules()), model.config.to_dict()
    expected = model(ids()).logits
    host, report = convert_tpla(model, calibration=ids(), norm="exact", softmax="exact")
    # Only rounding in float32 stands between them.
    difference = (host(ids()).logits - expected).abs().max() / expected.abs().max()
    assert difference < 64 * torch.finfo(torch.float32).eps
    assert list(model.modules()) == modules
    assert model.config.to_dict() == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(model(ids()).logits, expected)
    assert report.options["transform"] == "pca"


def test_all_but_the_attention_is_shared_with_the_source() -> None:
    model = tiny_model("deepseek_v3")
    host, _ = convert_tpla(model, **EACH)
    theirs = dict(model.named_parameters())
    for name, parameter in host.native.named_parameters():
        shared = name in theirs and parameter.data_ptr() == theirs[name].data_ptr()
        assert shared == ("self_attn" not in name), name


@pytest.mark.parametrize("prefill", ["sliced", "exact"])
def test_saved_and_loaded_it_is_the_same(prefill: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    host, _ = convert_tpla(source(), calibration=ids(), prefill=prefill)
    host.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for layer, mine in zip(loaded.attention_layers(), host.attention_layers(), strict=True):
        assert layer.prefill == mine.prefill == prefill
        assert torch.equal(layer.logit_scale, mine.logit_scale)
        assert torch.equal(layer.norm_scale, mine.norm_scale)
    torch.testing.assert_close(in_float64(loaded)(ids()).logits, host(ids()).logits, **EXACT)


def test_exact_prefill_is_mla_and_decoding_is_not() -> None:
    model = source()
    host, _ = convert_tpla(model, calibration=ids(), prefill="exact")
    expected = model(ids()).logits
    prefilled = host(ids()[:, :-1], use_cache=True)
    torch.testing.assert_close(prefilled.logits, expected[:, :-1], **EXACT)
    step = host(ids()[:, -1:], past_key_values=prefilled.past_key_values).logits
    assert not torch.allclose(step, expected[:, -1:], rtol=1e-3)


def test_report_has_every_stage_and_its_cost() -> None:
    model, values = source(), iter([10.0, 10.0, 10.5, 12.0])
    calls: list[Any] = []

    def evaluate(evaluated: Any) -> float:
        calls.append(evaluated(ids()).logits)
        return next(values)

    host, report = convert_tpla(model, calibration=ids(), evaluate=evaluate, prefill="exact")
    expected = {"mla": 10.0, "reparameterised": 10.0, "local_norm": 10.5, "tpla": 12.0}
    assert report.perplexity == expected
    assert list(report.perplexity) == list(expected)
    assert report.approximations == [
        "a shard normalises its latent by its own energy: perplexity 10 -> 10.5",
        "each of 2 shards weighs the keys by its own logits: perplexity 10.5 -> 12",
        "prompts are read exactly; the perplexities are those of sliced ones",
    ]
    # Two layers of 16 / 2 + 4 float64 numbers.
    assert report.cache_bytes_per_token_per_rank == 2 * 12 * 8
    assert report.method == "tpla"
    json.dumps(dataclasses.asdict(report))
    torch.testing.assert_close(calls[1], calls[0], **EXACT)
    assert not torch.allclose(calls[2], calls[0], rtol=1e-4)
    assert not torch.allclose(calls[3], calls[2], rtol=1e-4)


def test_a_latent_without_norm_has_no_stage_for_it() -> None:
    _, report = convert_tpla(converted_source(), calibration=ids(), evaluate=lambda model: 1.0)
    assert list(report.perplexity) == ["mla", "reparameterised", "tpla"]


def test_a_killed_conversion_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = source()
    expected, _ = convert_tpla(model, calibration=ids())
    target = tmp_path / "out"

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), WorkFolder(target) as work:
        patch.setattr("undivided.convert.tpla.fit_logit_scales", killed)
        convert_tpla(model, calibration=ids(), work=work)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError), WorkFolder(target) as work:
        patch.setattr("undivided.convert.tpla.latent_moments", killed)
        host, _ = convert_tpla(model, calibration=ids(), work=work)
        assert work.resumed == ["tpla-moments"]
        raise ZeroDivisionError
    assert torch.equal(host(ids()).logits, expected(ids()).logits)
    # Other weights are another conversion: nothing of it is reused.
    with WorkFolder(target) as work:
        convert_tpla(source(seed=1), calibration=ids(), work=work)
        assert work.resumed == []


def test_modes_are_in_the_config() -> None:
    host, _ = convert_tpla(source(), calibration=ids(), norm="exact", prefill="exact", num_shards=4)
    for entry in host.config.attention:
        assert entry["mechanism"] == "tpla"
        modes = {name: entry[name] for name in ("num_shards", "norm", "softmax", "prefill")}
        assert modes == {"num_shards": 4, "norm": "exact", "softmax": "local", "prefill": "exact"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shards": 3}, "num_shards=3 does not divide latent_dim=16; 2, 4, 8, ... would"),
        ({"transform": "dct"}, "transform='dct' is not one of 'pca', 'hadamard', 'random', 'none'"),
        ({"logit_scale": "two"}, "logit_scale='two' is not one of 'lstsq', 'inverse', 'literal', 'one'"),
        ({"norm": "rms"}, "norm='rms' is not one of 'local', 'exact'"),
        ({"softmax": "rms"}, "softmax='rms' is not one of 'local', 'exact'"),
        ({"prefill": "rms"}, "prefill='rms' is not one of 'sliced', 'exact'"),
        ({"transform": "pca"}, 'calibration is None, but transform="pca" needs one'),
        ({"logit_scale": "lstsq"}, 'calibration is None, but logit_scale="lstsq" needs one'),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_tpla(tiny_model("deepseek_v3"), **EACH | options)


def test_hadamard_names_a_width_that_is_no_power_of_two() -> None:
    model = tiny_model("deepseek_v3", kv_lora_rank=24)
    with pytest.raises(ValueError, match='latent_dim=24 is not a power of two.*transform="random" works'):
        convert_tpla(model, **EACH | {"transform": "hadamard"})
    convert_tpla(model, **EACH | {"transform": "random"})


def test_principal_axes_without_moments_are_refused() -> None:
    with pytest.raises(ValueError, match='moments is None, but transform="pca" needs those of latent_mom'):
        latent_rotations(tiny_model("deepseek_v3"), "pca")


def test_least_squares_are_not_asked_for_when_the_softmax_is_exact() -> None:
    convert_tpla(tiny_model("deepseek_v3"), transform="none", softmax="exact")


def test_a_source_without_latent_attention_is_told_what_to_do() -> None:
    message = 'layer 0 has the mechanism "gqa", but only "mla" can be cut; .* convert_transmla before'
    for model in (tiny_model("llama"), UndividedForCausalLM.from_native(tiny_model("llama"))):
        with pytest.raises(ValueError, match=message):
            convert_tpla(model, calibration=ids())
        with pytest.raises(ValueError, match=message):
            mla_to_gla(model, 2)


def test_a_source_that_was_cut_already_is_refused() -> None:
    host, _ = convert_tpla(source(), calibration=ids())
    with pytest.raises(ValueError, match='layer 0 has the mechanism "tpla", but only "mla" can be cut'):
        convert_tpla(host, calibration=ids())


def test_an_unsupported_base_model_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8))
    with pytest.raises(ValueError, match='model_type "gpt2" is not supported'):
        convert_tpla(model, calibration=ids())


def test_groups_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match="num_latent_heads=3 does not divide latent_dim=16"):
        mla_to_gla(tiny_model("deepseek_v3"), 3)
