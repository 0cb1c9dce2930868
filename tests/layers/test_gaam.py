"""Gaussian adaptive attention: the published layer, heads and padding, the density form, the head for classes."""

from __future__ import annotations

import pytest
import torch

from undivided.inspect import importance_factor
from undivided.layers.gaam import (
    DensityAdaptiveAttention,
    GaussianAdaptiveAttention,
    GaussianAdaptiveBlock,
    GaussianGQAttention,
)
from undivided.models.gat import ATTENTIONS, LayerwiseGAT

EXACT = {"rtol": 1e-6, "atol": 1e-7}


def published(x, offset, width, axis, padding=None, eps=1e-8):
    """The densities one by one, multiplied and divided by their sum, as the paper's layer has them."""
    known = x if padding is None else torch.where(x != padding, x, torch.zeros_like(x))
    mean, var = known.mean(axis, keepdim=True), known.var(axis, keepdim=True) + eps
    density = torch.ones_like(x)
    for o, c in zip(offset, width, strict=True):
        t = (x - (mean + o)) / var.sqrt()
        density = density * torch.exp(-t.square() / (2 * c * c)) / (2 * torch.pi * c * c) ** 0.5
    weight = density / density.sum(axis, keepdim=True).clamp(min=eps)
    return x * weight if padding is None else torch.where(x != padding, x * weight, x)


@pytest.mark.parametrize(
    ("axis", "shape"), [(1, (2, 10, 6)), (-1, (2, 10, 6)), (1, (3, 11)), (2, (2, 3, 9, 4))]
)
@pytest.mark.parametrize("padding", [None, 0.0])
def test_heads_are_layers_of_their_own_on_slices(axis, shape, padding):
    layer = GaussianAdaptiveAttention(axis, num_heads=2, num_gaussians=3, padding_value=padding).double()
    torch.nn.init.normal_(layer.offset, std=0.2)
    # Wide enough that the published product of densities does not underflow.
    torch.nn.init.uniform_(layer.width, 0.8, 2.0)
    x = torch.randn(shape, dtype=torch.float64)
    if padding is not None:
        x[torch.rand(shape) < 0.2] = padding
    length = shape[axis]
    parts = x.split([length // 2, length - length // 2], dim=axis)
    expected = [
        published(part, layer.offset[h], layer.width[h], axis, padding) for h, part in enumerate(parts)
    ]
    torch.testing.assert_close(layer(x), torch.cat(expected, dim=axis), **EXACT)
    out, weights = layer(x, need_weights=True)
    torch.testing.assert_close(out, layer(x))
    assert weights.shape == x.shape
    for part in weights.split([length // 2, length - length // 2], dim=axis):
        torch.testing.assert_close(part.sum(axis), torch.ones_like(part.sum(axis)))


def test_the_last_head_takes_the_rest():
    layer = GaussianAdaptiveAttention(1, num_heads=4)
    assert layer._chunks(10) == [(0, 3, 2), (3, 1, 4)]
    assert layer._chunks(12) == [(0, 4, 3)]


def test_padding_can_be_left_out_of_the_statistics():
    layer = GaussianAdaptiveAttention(1, num_gaussians=2, padding_value=-9.0, masked_stats=True).double()
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    padded = torch.cat([x, torch.full((2, 4, 3), -9.0, dtype=torch.float64)], dim=1)
    out = layer(padded)
    plain = GaussianAdaptiveAttention(1, num_gaussians=2).double()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(out[:, :7], plain(x))
    assert (out[:, 7:] == -9.0).all()
    whole = torch.full((1, 4, 2), -9.0, dtype=torch.float64, requires_grad=True)
    layer(whole).sum().backward()
    assert whole.grad.isfinite().all()


def test_blocks_add_their_input():
    block = GaussianAdaptiveBlock(1, num_layers=3)
    x = torch.randn(2, 16, 5)
    expected = x
    for layer in block.layers:
        expected = expected + layer(expected)
    torch.testing.assert_close(block(x), expected)
    assert sum(p.numel() for p in block.parameters()) == 3 * 2 * 4 * 5
    with pytest.raises(ValueError, match="have 2, 2, 3 entries; they need 2 each"):
        GaussianAdaptiveBlock([1, 2], [4, 4], [5, 5, 5])


def test_the_density_form_is_its_equation():
    layer = DensityAdaptiveAttention(6, num_heads=2).double()
    torch.nn.init.normal_(layer.delta)
    torch.nn.init.uniform_(layer.c, 0.5, 3.0)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    parts = []
    for head, part in enumerate(x.split(4, dim=1)):
        y = part.mean(2)
        mean = y.mean(1, keepdim=True)
        var = (y.square().mean(1, keepdim=True) - mean**2).abs() + 1e-8
        t = (y - (mean + layer.delta[head])) / (var + 1e-5).sqrt()
        parts.append(part * torch.exp(-(t**2) / (2 * layer.c[head]))[:, :, None])
    torch.testing.assert_close(layer(x), torch.cat(parts, dim=1))
    torch.testing.assert_close(layer(x.mean(2)), torch.cat(parts, dim=1).mean(2))
    with torch.no_grad():
        layer.c.fill_(1e12)
        torch.testing.assert_close(layer(x), x)
        layer.c.fill_(2.0)
        layer.delta.zero_()
        constant = x[:, :1].expand_as(x)
        torch.testing.assert_close(layer(constant), constant)
        layer.c[0, 0, 0] = 0.0
    with pytest.raises(ValueError, match="c has values that are not positive"):
        layer(x)


def test_parameters_are_as_many_as_published():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(DensityAdaptiveAttention(1024, 8)) == 16_384
    heads = {n: LayerwiseGAT(24, 1024, 100, num_heads=n) for n in (8, 1)}
    convs = count(heads[8].conv1) + count(heads[8].conv2)
    assert convs == 221_720
    assert count(heads[8]) - count(heads[8].classifier) == 238_104
    assert count(heads[1]) - count(heads[1].classifier) == 223_768


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_head_for_classes_learns(attention):
    size = 64
    model = LayerwiseGAT(8, size, 3, attention=attention, channels=16)
    assert model.image == ((4, 8) if attention == "gqdaam" else (8, 8))
    hidden = tuple(torch.randn(6, 4, size) for _ in range(9))
    labels = torch.arange(6) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(hidden), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []


def test_a_token_is_gated_alone():
    layer = GaussianGQAttention(16, 4, 2, 4)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(layer.gate(x)[:, :2], layer.gate(x[:, :2]))


def test_the_importance_factor_goes_from_zero_to_one():
    weights = [torch.rand(4, 3, 5), torch.rand(2, 3, 5)]
    found = importance_factor(weights)
    mean = torch.cat(weights).mean(0)
    torch.testing.assert_close(found, (mean - mean.min()) / (mean.max() - mean.min()))
    assert (found.min(), found.max()) == (0, 1)
    with pytest.warns(UserWarning, match="weighs everything alike"):
        assert not importance_factor([torch.ones(2, 3)]).any()
    with pytest.raises(ValueError, match="weights is empty"):
        importance_factor([])


def test_the_gate_ranks_the_features_that_tell_the_classes():
    torch.manual_seed(0)
    informative = torch.zeros(12, dtype=torch.bool)
    informative[[1, 4, 7]] = True
    labels = torch.arange(256) % 2
    x = torch.randn(256, 12)
    x[:, informative] += 4.0 * labels[:, None]
    x[:, informative] = x[:, informative] - 2.0
    gate, head = GaussianAdaptiveAttention(1, 1, 2), torch.nn.Linear(12, 2)
    optimizer = torch.optim.Adam([*gate.parameters(), *head.parameters()], lr=3e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(12 * gate(x)), labels).backward()
        optimizer.step()
    weights = importance_factor([gate(x, need_weights=True)[1]])
    apart = weights[informative].mean() - weights[~informative].mean()
    assert apart.abs() > 0.3


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: GaussianAdaptiveAttention(1.5), "axis=1.5 must be an integer"),
        (lambda: GaussianAdaptiveAttention(1, 0), "num_heads=0 and num_gaussians=1 must be at least 1"),
        (lambda: GaussianAdaptiveAttention(1, masked_stats=True), "masked_stats=True needs padding_value"),
        (lambda: GaussianAdaptiveAttention(3)(torch.randn(2, 4, 4)), "has no axis 3 that could be weighed"),
        (lambda: GaussianAdaptiveAttention(0)(torch.randn(2, 4)), "has no axis 0"),
        (
            lambda: GaussianAdaptiveAttention(1, 3)(torch.randn(2, 5)),
            "3 heads need at least 6, two values each",
        ),
        (lambda: DensityAdaptiveAttention(4, 3)(torch.randn(2, 8, 4)), "num_heads=3 does not divide the 8"),
        (lambda: DensityAdaptiveAttention(4)(torch.randn(2, 8)), r"must be \[batch, layers, 4\]"),
        (lambda: LayerwiseGAT(8, 62, 3), "62 features make no image of at most 1 to 2; pad them to 64"),
        (lambda: LayerwiseGAT(8, 40, 3, attention="gqdaam"), "hidden_size=40 must be a multiple of 16"),
        (lambda: LayerwiseGAT(8, 64, 3, attention="dot"), "attention='dot' is not one of"),
        (lambda: LayerwiseGAT(6, 64, 3), "num_heads=8 does not divide num_layers=6"),
    ],
)
def test_what_does_not_fit_is_refused(build, text):
    with pytest.raises((ValueError, TypeError), match=text):
        build()
