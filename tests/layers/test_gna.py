from __future__ import annotations

import pytest
import torch

from undivided.layers._vision import to_map
from undivided.layers.gcvit import WindowAttention
from undivided.layers.gna import NeighborhoodAttention
from undivided.spec import interpret

EXACT = {"rtol": 1e-11, "atol": 1e-11}
WIDTH, HEADS = 12, 3


def layer_of(kernel_size=(3, 5), **options):
    return NeighborhoodAttention(WIDTH, HEADS, kernel_size, **options).double()


def tokens(size, batch=2):
    return torch.randn(batch, size[0] * size[1], WIDTH, dtype=torch.float64)


def test_equals_the_loop_of_the_formula():
    layer, size = layer_of(), (6, 7)
    x = tokens(size)
    query, key, value = layer.qkv(x).unflatten(-1, (3, HEADS, 4)).unbind(2)
    out = torch.empty(2, 42, HEADS, 4, dtype=torch.float64)
    for row in range(6):
        for column in range(7):
            top, left = min(max(row - 1, 0), 3), min(max(column - 2, 0), 2)
            seen = [i * 7 + j for i in range(top, top + 3) for j in range(left, left + 5)]
            logits = torch.einsum("bhd,bkhd->bhk", query[:, row * 7 + column], key[:, seen]) / 2
            out[:, row * 7 + column] = torch.einsum("bhk,bkhd->bhd", logits.softmax(-1), value[:, seen])
    torch.testing.assert_close(layer(x, size), layer.proj(out.flatten(2)), **EXACT)


@pytest.mark.parametrize("options", [{}, {"stride": (2, 3)}, {"dilation": (2, 1)}])
def test_equals_its_specification(options):
    layer, size = layer_of(**options), (6, 7)
    x = tokens(size)
    out = interpret(layer.spec, layer.spec_inputs(x, size)).out
    torch.testing.assert_close(layer.proj(out.transpose(1, 2).flatten(2)), layer(x, size), **EXACT)


def test_a_stride_of_the_window_is_window_attention_without_its_bias():
    layer = layer_of(kernel_size=(2, 3), stride=(2, 3))
    windows = WindowAttention(WIDTH, HEADS, (2, 3)).double()
    windows.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        windows.position_bias.table.zero_()
    x = tokens((4, 6))
    torch.testing.assert_close(layer(x, (4, 6)), windows(x, (4, 6)), **EXACT)


def test_a_token_reaches_its_neighbors_alone_and_the_borders_reach_inwards():
    layer, size = layer_of(kernel_size=3), (6, 6)
    x = tokens(size, batch=1)
    other = x.clone()
    other[:, 0] += 1.0
    change = to_map(layer(other, size) - layer(x, size), size)[0].abs().amax(0) > 1e-9
    assert change.nonzero().tolist() == [[i, j] for i in range(2) for j in range(2)]
    other = x.clone()
    other[:, 2 * 6 + 2] += 1.0
    change = to_map(layer(other, size) - layer(x, size), size)[0].abs().amax(0) > 1e-9
    assert change.nonzero().tolist() == [[i, j] for i in range(4) for j in range(4)]


def test_gradients_are_those_of_finite_differences():
    layer = layer_of(kernel_size=2, stride=2)
    x = tokens((3, 4), batch=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x, (3, 4)), [x])


def test_gradients_reach_every_parameter():
    layer = layer_of()
    layer(tokens((6, 7)), (6, 7)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_weights_have_the_names_of_natten():
    shapes = {name: list(tensor.shape) for name, tensor in layer_of().state_dict().items()}
    assert shapes == {"qkv.weight": [36, 12], "qkv.bias": [36], "proj.weight": [12, 12], "proj.bias": [12]}


def test_one_graph_under_torch_compile():
    layer, x = layer_of(stride=(2, 1)), tokens((6, 7))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, (6, 7)), layer(x, (6, 7)), **EXACT)


def test_stands_in_the_place_of_timms_attention():
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    model = timm_vit.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3, class_token=False,
        global_pool="avg", attn_layer=NeighborhoodAttention.with_options(kernel_size=3), qkv_bias=True,
    )  # fmt: skip
    assert model.blocks[0].attn.kernel_size == (3, 3)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(num_heads=5), "num_heads=5 does not divide dim=12"),
        (dict(kernel_size=0), "kernel_size=0 must be a positive number, or two: height and width"),
        (dict(stride=(1, 8)), r"stride\[1\] is 8, but kernel_size\[1\] is 7; use at most 7"),
        (dict(dilation=(1, 2, 3)), r"dilation=\(1, 2, 3\) must be a positive number, or two"),
        (dict(attn_drop=0.1), "attn_drop=0.1 is not computed by NeighborhoodAttention; leave it off"),
    ],
)
def test_options_that_do_not_fit_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        NeighborhoodAttention(WIDTH, **{"num_heads": 3, **options})


def test_maps_and_masks_that_do_not_fit_are_named():
    layer = layer_of(kernel_size=3, dilation=(1, 2))
    with pytest.raises(ValueError, match=r"kernel_size\[0\] is 3, but axis 0 has 2 positions; use at most 2"):
        layer(tokens((2, 6)), (2, 6))
    with pytest.raises(ValueError, match=r"dilation\[1\] is 3 \* 2 = 6, but axis 1 has 5 positions"):
        layer(tokens((3, 5)), (3, 5))
    with pytest.raises(ValueError, match="is_causal=True was given, but NeighborhoodAttention takes no mask"):
        layer(tokens((6, 6)), is_causal=True)
