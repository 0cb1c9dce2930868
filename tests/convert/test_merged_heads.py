"""All key heads as one, and their rotation: exact where it can be, the paper's approximation elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.convert.sources import EXACT, SOURCES, logits, source_model, tokens
from undivided.convert._merged_heads import all_key_axes, key_axes, key_moments, merge_heads, merged_layer
from undivided.layers._base import grouped_query_dimensions

every_source = pytest.mark.parametrize("name", SOURCES)


def random_moment(size: int, seed: int = 0) -> Tensor:
    rows = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.T @ rows / len(rows)


def partial_rope(
    source: PreTrainedModel, layer_idx: int, axes: Tensor, rope_dim: int, hidden: Tensor
) -> Tensor:
    """The attention with positions on the first `rope_dim` of the rotated keys, from its definition."""
    attention, sizes = (
        source.get_decoder().layers[layer_idx].self_attn,
        grouped_query_dimensions(source.config),
    )
    num_groups, head_dim = sizes["num_key_value_heads"], sizes["head_dim"]
    num_heads, length = source.config.num_attention_heads, hidden.shape[1]
    query = attention.q_proj(hidden).view(1, length, num_heads, head_dim)
    key, value = attention.k_proj(hidden), attention.v_proj(hidden).view(1, length, num_groups, head_dim)
    per_head = axes.view(num_groups, head_dim, -1)
    group = torch.arange(num_heads) // (num_heads // num_groups)
    query = torch.einsum("bnhd,hdk->bhnk", query, per_head[group])
    key = (key @ axes)[:, None]

    rotary = source.get_decoder().rotary_emb
    cos, sin = rotary(hidden, torch.arange(length)[None])
    turn = torch.complex(cos, sin)[0, :, : head_dim // 2][:, :: head_dim // rope_dim]

    def placed(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x[..., :rope_dim].unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * turn).flatten(-2)
        return torch.cat([turned, rotary.attention_scaling * x[..., rope_dim:]], dim=-1)

    scores = placed(query) @ placed(key).mT * sizes["scale"]
    softcap = getattr(source.config, "attn_logit_softcapping", None)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), value[:, :, group])
    return attention.o_proj(out.flatten(2))


def attend(source: PreTrainedModel, layer: nn.Module, hidden: Tensor) -> Tensor:
    positions = source.get_decoder().rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    return layer(hidden, position_embeddings=positions)[0]


@every_source
def test_merged_heads_are_the_original(name: str) -> None:
    source, ids = source_model(name), tokens()
    torch.testing.assert_close(merge_heads(source)(ids).logits, logits(source, ids), **EXACT)


@every_source
def test_rotated_keys_with_all_positions_are_the_original(name: str) -> None:
    source, ids = source_model(name), tokens()
    head_dim = grouped_query_dimensions(source.config)["head_dim"]
    axes = all_key_axes(source, key_moments(source, ids), head_dim, 1)
    torch.testing.assert_close(merge_heads(source, axes)(ids).logits, logits(source, ids), **EXACT)


def test_real_and_imaginary_parts_need_the_same_rotation() -> None:
    source, ids = source_model(), tokens()
    axes = all_key_axes(source, key_moments(source, ids), 8, 1)
    others = [key_axes(random_moment(16), 2, 8, 8, 1) for _ in axes]
    imaginary = torch.arange(16).view(2, 2, 4)[:, 1].flatten()
    for own, other in zip(axes, others, strict=True):
        own[imaginary] = other[imaginary]
        torch.testing.assert_close(own.T @ own, torch.eye(16, dtype=torch.float64))
    assert (merge_heads(source, axes)(ids).logits - source(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize(("rope_dim", "freqfold"), [(8, 1), (8, 2), (8, 4), (4, 2), (4, 4), (2, 4)])
def test_axes_are_orthogonal(rope_dim: int, freqfold: int) -> None:
    axes = key_axes(random_moment(24), 3, 8, rope_dim, freqfold)
    torch.testing.assert_close(axes.T @ axes, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rope_dim", "freqfold"), [(8, 1), (8, 2), (4, 2), (4, 4), (2, 4)])
def test_rotary_dimensions_are_the_leading_axes_of_every_group(rope_dim: int, freqfold: int) -> None:
    num_groups, head_dim = 3, 8
    moment = random_moment(num_groups * head_dim)
    axes = key_axes(moment, num_groups, head_dim, rope_dim, freqfold)
    held = (axes * (moment @ axes)).sum(dim=0)
    pairs = held.view(-1, 2).sum(dim=1)
    kept, found = freqfold * rope_dim // head_dim, []
    for first in range(0, head_dim // 2, freqfold):
        real = [h * head_dim + first + f for h in range(num_groups) for f in range(freqfold)]
        imaginary = [dim + head_dim // 2 for dim in real]
        folded = moment[real][:, real] + moment[imaginary][:, imaginary]
        found.append(torch.linalg.eigvalsh(folded).flip(0)[:kept])
    torch.testing.assert_close(pairs[: rope_dim // 2], torch.cat(found))


def test_a_pair_is_the_real_and_imaginary_part_of_one_vector() -> None:
    axes = key_axes(random_moment(24), 3, 8, 4, 2)
    halves = axes.view(3, 2, 4, 12, 2)
    assert torch.equal(halves[:, 0, ..., 0], halves[:, 1, ..., 1])
    assert not halves[:, 0, ..., 1].any()
    assert not halves[:, 1, ..., 0].any()


@pytest.mark.parametrize("freqfold", [1, 2, 4])
def test_rotation_gathers_more_of_the_keys_than_the_first_head_has(freqfold: int) -> None:
    moment = random_moment(24)
    plain, rotated = key_axes(None, 3, 8, 8, freqfold), key_axes(moment, 3, 8, 8, freqfold)
    held = [(axes.T @ moment @ axes).diagonal()[:8].sum().item() for axes in (plain, rotated)]
    assert held[1] > held[0]


def test_a_larger_fold_gathers_more_of_the_keys() -> None:
    moment = random_moment(24)
    held = [
        (axes.T @ moment @ axes).diagonal()[:8].sum().item()
        for axes in (key_axes(moment, 3, 8, 8, freqfold) for freqfold in (1, 2, 4))
    ]
    assert held == sorted(held)
    assert held[0] < held[2]


def test_without_a_moment_the_first_head_keeps_its_positions() -> None:
    axes = key_axes(None, 3, 8, 4, 2)
    assert axes[:, :4].argmax(dim=0).tolist() == [0, 4, 2, 6]


@every_source
@pytest.mark.parametrize(("stride", "freqfold"), [(1, 1), (1, 2), (2, 2), (2, 4)])
def test_partial_positions_are_those_of_the_definition(name: str, stride: int, freqfold: int) -> None:
    source = source_model(name)
    rope_dim = grouped_query_dimensions(source.config)["head_dim"] // stride
    axes = all_key_axes(source, key_moments(source, tokens()), rope_dim, freqfold)
    hidden = torch.randn(1, 7, 32, dtype=torch.float64)
    for layer_idx in range(2):
        layer = merged_layer(source, layer_idx, axes[layer_idx], rope_dim)
        expected = partial_rope(source, layer_idx, axes[layer_idx], rope_dim, hidden)
        torch.testing.assert_close(attend(source, layer, hidden), expected, **EXACT)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_scale_of_a_wider_key_needs_longer_queries(name: str) -> None:
    source = source_model(name)
    sizes = grouped_query_dimensions(source.config)
    head_dim = sizes["head_dim"]
    axes = all_key_axes(source, key_moments(source, tokens()), head_dim, 1)
    layer = merged_layer(source, 0, axes[0], head_dim)
    assert layer.scale == (2 * head_dim) ** -0.5
    hidden = torch.randn(1, 7, 32, dtype=torch.float64)
    expected = partial_rope(source, 0, axes[0], head_dim, hidden)
    torch.testing.assert_close(attend(source, layer, hidden), expected, **EXACT)
    with torch.no_grad():
        layer.q_proj.weight *= layer.scale / sizes["scale"]
    assert (attend(source, layer, hidden) - expected).abs().max() > 1e-2


def test_projections_may_have_a_bias_each_for_itself() -> None:
    source, ids = source_model("llama with bias"), tokens()
    for layer in source.get_decoder().layers:
        layer.self_attn.q_proj.bias = None
        layer.self_attn.k_proj.bias = None
    host = merge_heads(source)
    assert host.config.attention[0]["query_bias"] is False
    assert host.config.attention[0]["key_value_bias"] is True
    torch.testing.assert_close(host(ids).logits, logits(source, ids), **EXACT)


def test_source_stays_as_it_is_and_shares_what_stays() -> None:
    source, ids = source_model(), tokens()
    before, expected = source.state_dict(), source(ids).logits
    host = merge_heads(source)
    with torch.no_grad():
        host.attention_layers()[0].q_proj.weight.zero_()
    assert torch.equal(source(ids).logits, expected)
    assert list(source.state_dict()) == list(before)
    pointers = {tensor.data_ptr() for tensor in source.state_dict().values()}
    own = {name for name, tensor in host.state_dict().items() if tensor.data_ptr() not in pointers}
    assert {name.split(".")[-2] for name in own} == {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
