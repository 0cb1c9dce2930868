from __future__ import annotations

import pytest
import torch

from tests.layers.latents import (
    EXACT,
    HEADS,
    HIDDEN,
    SIZES,
    causal_softmax,
    hidden_states,
    logits,
    normalised,
    positions,
    random_layer,
)
from undivided.layers.gla import GLAttention
from undivided.layers.latent import LatentAttention
from undivided.layers.mla import MLAttention
from undivided.layers.tpla import TPLAttention


def tpla_like(mla: MLAttention, **options: object) -> TPLAttention:
    tpla = random_layer(TPLAttention, **options)
    tpla.load_state_dict({**mla.state_dict(), "norm_scale": tpla.norm_scale, "logit_scale": tpla.logit_scale})
    return tpla


def with_scales(tpla: TPLAttention) -> TPLAttention:
    """The layer with scales that differ from shard to shard and from head to head."""
    tpla.norm_scale.copy_(torch.rand(tpla.norm_scale.shape) + 1.2)
    tpla.logit_scale.copy_(torch.rand(tpla.logit_scale.shape) + 0.5)
    return tpla


def test_equals_mla_when_one_shard() -> None:
    mla = random_layer(MLAttention)
    tpla = tpla_like(mla, num_shards=1)
    hidden, tables = hidden_states(), positions(9)
    torch.testing.assert_close(tpla(hidden, tables)[0], mla(hidden, tables)[0], **EXACT)


@pytest.mark.parametrize("num_shards", [2, 4, 16])
def test_equals_mla_when_norm_and_softmax_are_exact(num_shards: int) -> None:
    mla = random_layer(MLAttention)
    tpla = with_scales(tpla_like(mla, num_shards=num_shards, norm="exact", softmax="exact"))
    hidden, tables = hidden_states(), positions(9)
    torch.testing.assert_close(tpla(hidden, tables)[0], mla(hidden, tables)[0], **EXACT)


@pytest.mark.parametrize("modes", [("local", "exact"), ("exact", "local"), ("local", "local")])
def test_each_local_mode_changes_the_result(modes: tuple[str, str]) -> None:
    mla = random_layer(MLAttention)
    tpla = tpla_like(mla, norm=modes[0], softmax=modes[1])
    hidden, tables = hidden_states(), positions(9)
    assert not torch.allclose(tpla(hidden, tables)[0], mla(hidden, tables)[0], rtol=1e-3)


@pytest.mark.parametrize("num_shards", [2, 4])
@pytest.mark.parametrize("norm", ["local", "exact"])
def test_is_what_its_formula_says(num_shards: int, norm: str) -> None:
    layer = with_scales(random_layer(TPLAttention, num_shards=num_shards, norm=norm))
    hidden = hidden_states()
    width, (up_key, up_value) = SIZES["latent_dim"] // num_shards, layer.up_projections()
    latent = layer.kv_a_proj_with_mqa(hidden)[..., : SIZES["latent_dim"]]
    expected = torch.zeros(2, 9, HIDDEN, dtype=torch.float64)
    for shard in range(num_shards):
        own = slice(shard * width, (shard + 1) * width)
        if norm == "local":
            # The eps stands inside the root, beside the scaled energy of the shard over the whole width.
            energy = layer.norm_scale[shard] * latent[..., own].pow(2).sum(dim=-1, keepdim=True)
            part = latent[..., own] / (energy / SIZES["latent_dim"] + layer.kv_a_layernorm.eps).sqrt()
            part = layer.kv_a_layernorm.weight[own] * part
        else:
            part = normalised(layer, hidden)[..., own]
        heads = []
        for head in range(HEADS):
            content, rotary = logits(layer, hidden, head, part, up_key[head][:, own])
            weights = causal_softmax((layer.logit_scale[shard, head] * content + rotary) * 10**-0.5)
            heads.append(weights @ part @ up_value[head][:, own].T)
        expected += layer.o_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(layer(hidden, positions(9))[0], expected, **EXACT)


@pytest.mark.parametrize("num_shards", [2, 4])
def test_is_gla_with_every_head_in_each_group(num_shards: int) -> None:
    tpla = random_layer(TPLAttention, num_shards=num_shards)
    tpla.logit_scale.copy_(torch.rand(tpla.logit_scale.shape) + 0.5)
    gla = GLAttention(HIDDEN, num_shards * HEADS, **SIZES, num_latent_heads=num_shards).double()
    query = tpla.q_proj.weight.unflatten(0, (HEADS, -1)).repeat(num_shards, 1, 1)
    # The scale of a shard's content logits can be folded into its copy of the queries, before the rotary
    # part.
    query[:, : SIZES["nope_dim"]] *= tpla.logit_scale.flatten()[:, None, None]
    up = tpla.kv_b_proj.weight.chunk(num_shards, dim=1)
    gla.load_state_dict(
        {
            "q_proj.weight": query.flatten(0, 1),
            "kv_a_proj_with_mqa.weight": tpla.kv_a_proj_with_mqa.weight,
            "kv_a_layernorm.weight": tpla.kv_a_layernorm.weight,
            "kv_b_proj.weight": torch.cat(up),
            "o_proj.weight": tpla.o_proj.weight.repeat(1, num_shards),
        }
    )
    hidden, tables = hidden_states(), positions(9)
    torch.testing.assert_close(tpla(hidden, tables)[0], gla(hidden, tables)[0], **EXACT)


def test_a_latent_of_low_rank_loses_nothing() -> None:
    mla = random_layer(MLAttention)
    with torch.no_grad():
        mla.kv_a_proj_with_mqa.weight[SIZES["latent_dim"] // 2 : SIZES["latent_dim"]] = 0
    tpla = tpla_like(mla)
    tpla.norm_scale.copy_(torch.ones(2))
    hidden, tables = hidden_states(), positions(9)
    torch.testing.assert_close(tpla(hidden, tables)[0], mla(hidden, tables)[0], **EXACT)


@pytest.mark.parametrize("norm", ["local", "exact"])
@pytest.mark.parametrize("softmax", ["local", "exact"])
def test_absorbed_equals_expanded(norm: str, softmax: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = with_scales(random_layer(TPLAttention, norm=norm, softmax=softmax))
    hidden, tables = hidden_states(), positions(9)
    outputs = []
    for form in ("expanded", "absorbed"):
        monkeypatch.setattr("undivided.layers.latent._cheaper_form", lambda *sizes, form=form: form)
        outputs.append(layer(hidden, tables)[0])
    torch.testing.assert_close(*outputs, **EXACT)


class Cache:
    """The two methods of a transformers cache that a layer calls."""

    def __init__(self, rows: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        self.rows = rows

    def get_seq_length(self, layer_idx: int) -> int:
        return 0 if self.rows is None else self.rows[0].shape[2]

    def update(self, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = new[:2]
        if self.rows is not None:
            rows = tuple(torch.cat(pair, dim=2) for pair in zip(self.rows, rows, strict=True))
        self.rows = rows
        return rows


def test_exact_prefill_is_mla_and_its_cache_serves_the_shards() -> None:
    mla = random_layer(MLAttention)
    tpla = with_scales(tpla_like(mla, prefill="exact"))
    hidden, tables = hidden_states(), positions(9)
    cache, exact = Cache(), Cache()
    prefilled = tpla(hidden[:, :6], [table[:, :6] for table in tables], past_key_values=cache)[0]
    expected = mla(hidden[:, :6], [table[:, :6] for table in tables], past_key_values=exact)[0]
    torch.testing.assert_close(prefilled, expected, **EXACT)
    for mine, its in zip(cache.rows, exact.rows, strict=True):
        torch.testing.assert_close(mine, its, **EXACT)

    # From there on it decodes as the sliced layer does on the exactly normalised rows.
    sliced = with_scales(tpla_like(mla, prefill="sliced"))
    sliced.load_state_dict(tpla.state_dict())
    step = [table[:, 6:7] for table in tables]
    decoded = tpla(hidden[:, 6:7], step, past_key_values=cache)[0]
    torch.testing.assert_close(decoded, sliced(hidden[:, 6:7], step, past_key_values=exact)[0], **EXACT)
    assert not torch.allclose(decoded, mla(hidden, tables)[0][:, 6:7], rtol=1e-3)


def test_sliced_prefill_is_not_exact() -> None:
    mla = random_layer(MLAttention)
    hidden, tables = hidden_states(), positions(9)
    assert not torch.allclose(tpla_like(mla)(hidden, tables)[0], mla(hidden, tables)[0], rtol=1e-3)


def test_a_mask_of_its_own_for_every_head() -> None:
    layer = with_scales(random_layer(TPLAttention))
    hidden, tables = hidden_states(), positions(9)
    seen = torch.rand(2, HEADS, 9, 9) < 0.5
    seen |= torch.eye(9, dtype=torch.bool)
    together = layer.attend(*attend_inputs(layer, hidden, tables), seen, exact=False)
    for head in range(HEADS):
        alone = layer.attend(*attend_inputs(layer, hidden, tables), seen[:, head : head + 1], exact=False)
        torch.testing.assert_close(together[:, head], alone[:, head], **EXACT)


def attend_inputs(layer: LatentAttention, hidden: torch.Tensor, tables: tuple) -> tuple[torch.Tensor, ...]:
    nope, rope = layer.queries(hidden).split([layer.nope_dim, layer.rope_dim], dim=-1)
    latent, rope_key = layer.kv_a_proj_with_mqa(hidden).split([layer.latent_dim, layer.rope_dim], dim=-1)
    latent = layer.normalise(latent, exact=False)[:, None]
    return nope, layer.rotate(rope, tables), latent, layer.rotate(rope_key[:, None], tables)


@pytest.mark.parametrize("norm", ["local", "exact"])
def test_gradients_are_those_of_the_function(norm: str) -> None:
    layer = with_scales(random_layer(TPLAttention, norm=norm))
    names, weights = zip(*layer.named_parameters(), strict=True)
    tables = positions(3)

    def function(hidden: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        parameters = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, parameters, (hidden, tables))[0]

    inputs = (hidden_states(1, 3).requires_grad_(), *weights)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shards": 3}, "num_shards=3 does not divide latent_dim=16; 2, 4, 8, ... would"),
        ({"num_shards": 0}, "num_shards=0 does not divide latent_dim=16"),
        ({"norm": "global"}, "norm='global' is not one of 'local', 'exact'"),
        ({"softmax": "none"}, "softmax='none' is not one of 'local', 'exact'"),
        ({"prefill": "local"}, "prefill='local' is not one of 'sliced', 'exact'"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_layer(TPLAttention, **options)
