"""Rewritings of a latent layer: other bases and fewer axes, in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.convert.sources import EXACT
from undivided.convert._latent import fold_norm_weight, latent_options, rotate_latent, truncate_latent
from undivided.layers.latent import LatentAttention
from undivided.layers.mla import MLAttention


def latent_layer(latent_norm: bool = True, key_value_bias: bool = True) -> MLAttention:
    layer = MLAttention(
        32, 4, 12, 4, 8, 6, latent_norm=latent_norm, key_value_bias=key_value_bias, norm_eps=1e-5
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def output(layer: LatentAttention, hidden: Tensor) -> Tensor:
    angle = torch.arange(hidden.shape[1])[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    cos, sin = (torch.cat([table, table], dim=-1)[None] for table in (angle.cos(), angle.sin()))
    with torch.no_grad():
        return layer(hidden, position_embeddings=(cos, sin))[0]


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]


@pytest.mark.parametrize("key_value_bias", [False, True])
@pytest.mark.parametrize("latent_norm", [False, True])
def test_rotation_changes_the_latent_and_not_the_function(latent_norm: bool, key_value_bias: bool) -> None:
    layer, hidden = latent_layer(latent_norm, key_value_bias), torch.randn(2, 7, 32, dtype=torch.float64)
    expected, before = output(layer, hidden), layer.kv_a_proj_with_mqa(hidden)
    fold_norm_weight(layer)
    torch.testing.assert_close(output(layer, hidden), expected, **EXACT)
    rotation = orthogonal(12)
    rotate_latent(layer, rotation)
    after = layer.kv_a_proj_with_mqa(hidden)
    torch.testing.assert_close(after[..., :12], before[..., :12] @ rotation, **EXACT)
    assert torch.equal(after[..., 12:], before[..., 12:])
    torch.testing.assert_close(output(layer, hidden), expected, **EXACT)


def test_rotation_needs_a_norm_without_weight() -> None:
    layer = latent_layer()
    with pytest.raises(
        ValueError, match=r"the weight of the latent's normalisation is not 1; call fold_norm"
    ):
        rotate_latent(layer, orthogonal(12))


def test_rotation_must_be_as_wide_as_the_latent() -> None:
    with pytest.raises(ValueError, match=r"rotation is \[8, 8\], but latent_dim is 12; give \[12, 12\]\."):
        rotate_latent(latent_layer(latent_norm=False), orthogonal(8))


@pytest.mark.parametrize("key_value_bias", [False, True])
def test_axes_that_are_zero_can_go(key_value_bias: bool) -> None:
    layer = latent_layer(latent_norm=False, key_value_bias=key_value_bias)
    hidden = torch.randn(2, 7, 32, dtype=torch.float64)
    with torch.no_grad():
        layer.kv_a_proj_with_mqa.weight[5:12] = 0.0
        if key_value_bias:
            layer.kv_a_proj_with_mqa.bias[5:12] = 0.0
    expected = output(layer, hidden)
    truncate_latent(layer, 5)
    assert layer.latent_dim == layer.kv_b_proj.in_features == 5
    assert layer.kv_a_proj_with_mqa.out_features == len(layer.kv_a_proj_with_mqa.weight) == 9
    torch.testing.assert_close(output(layer, hidden), expected, **EXACT)


def test_truncation_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"latent_dim=13 is not in 1 to 12, the latent's width\."):
        truncate_latent(latent_layer(latent_norm=False), 13)
    with pytest.raises(ValueError, match="the layer normalises its latent"):
        truncate_latent(latent_layer(), 5)


@pytest.mark.parametrize(
    "options",
    [
        {"latent_norm": False, "query_bias": True, "rope_stride": 2},
        {"query_latent_dim": 10, "query_latent_norm": True, "latent_norm": False, "norm_eps": 1e-3},
        {"query_latent_dim": 10, "query_latent_norm": False, "query_bias": True, "norm_eps": 1e-4},
        {"key_value_bias": True, "output_bias": True, "rope_repeats": 2, "latent_norm": False},
    ],
)
def test_options_rebuild_the_layer(options: dict[str, object]) -> None:
    layer = MLAttention(32, 4, 12, 4, 8, 6, **options)
    again = MLAttention(32, 4, **latent_options(layer))
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in layer.named_parameters()
    }
    assert latent_options(again) == latent_options(layer)
    assert options.items() <= latent_options(layer).items()
    assert repr(again) == repr(layer)
