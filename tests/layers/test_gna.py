from __future__ import annotations

import pytest
import torch

from undivided.layers._vision import to_map
from undivided.layers.causal_neighborhood import CausalNeighborhoodAttention
from undivided.layers.gcvit import WindowAttention
from undivided.layers.gna import NeighborhoodAttention, NeighborhoodAttention1D, NeighborhoodAttention3D
from undivided.ops.neighborhood import Neighborhood
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
        (dict(kernel_size=0), "kernel_size=0 must be at least 1 on every axis"),
        (dict(stride=(1, 8)), r"stride\[1\] is 8, but kernel_size\[1\] is 7; use at most 7"),
        (dict(dilation=(1, 2, 3)), r"dilation=\(1, 2, 3\) has 3 entries, but there are 2 axes; give 1 or 2"),
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


# -- lines, volumes, and the mixer of language models


def test_a_line_and_a_volume_equal_their_specifications():
    line = NeighborhoodAttention1D(WIDTH, HEADS, 4, stride=2, dilation=2, causal=True).double()
    volume = NeighborhoodAttention3D(WIDTH, HEADS, (2, 3, 3), causal=(True, False, False)).double()
    for layer, x, size in (
        (line, tokens((1, 17)), ()),
        (volume, tokens((4, 15)), ((4, 5, 3),)),
    ):
        out = interpret(layer.spec, layer.spec_inputs(x, *size)).out
        torch.testing.assert_close(layer.proj(out.transpose(1, 2).flatten(2)), layer(x, *size), **EXACT)


def test_a_map_of_one_row_is_a_line():
    flat = layer_of(kernel_size=(1, 5), stride=(1, 2))
    line = NeighborhoodAttention1D(WIDTH, HEADS, 5, stride=2).double()
    line.load_state_dict(flat.state_dict())
    x = tokens((1, 13))
    torch.testing.assert_close(line(x), flat(x, (1, 13)), **EXACT)


def test_a_relative_bias_has_the_shape_of_natten_and_a_gradient():
    layer, size = layer_of(kernel_size=(3, 5), rel_pos_bias=True), (4, 6)
    assert layer.rpb.shape == (HEADS, 5, 9)
    x = tokens(size)
    layer(x, size).square().sum().backward()
    # Every distance occurs somewhere: windows are shifted at the borders.
    assert (layer.rpb.grad != 0).all()
    plain = layer_of(kernel_size=(3, 5))
    plain.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        layer.rpb.zero_()
    torch.testing.assert_close(layer(x, size), plain(x, size), **EXACT)
    with pytest.raises(
        NotImplementedError, match="rel_pos_bias is not written in the specification language"
    ):
        _ = layer.spec


def still(length):
    """Rotary tables that turn nothing."""
    return torch.ones(1, length, 4, dtype=torch.float64), torch.zeros(1, length, 4, dtype=torch.float64)


@pytest.mark.parametrize("dilation", [1, 2])
def test_the_mixer_of_language_models_is_a_causal_neighborhood(dilation):
    layer = CausalNeighborhoodAttention(WIDTH, 3, 1, 4, kernel_size=3, dilation=dilation).double()
    x = tokens((1, 11))
    tables = still(11)
    query, key, value = layer.heads(x, tables)
    mask = Neighborhood.of((11,), 3, 1, dilation, True).mask(x.device)
    assert torch.equal(layer.seen(11, 11, x.device), mask)
    logits = (query @ key.transpose(-2, -1) / 2).masked_fill(~mask, float("-inf"))
    want = layer.o_proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, tables)[0], want, **EXACT)
    out = interpret(layer.spec, layer.spec_inputs(x, tables)).out
    torch.testing.assert_close(layer.o_proj(out.transpose(1, 2).flatten(2)), want, **EXACT)


def test_the_mixer_of_language_models_keeps_what_its_window_reaches():
    transformers = pytest.importorskip("transformers")
    layer = CausalNeighborhoodAttention(WIDTH, 3, 1, 4, kernel_size=3, dilation=2).double()
    x = tokens((1, 15))
    want = layer(x, still(15))[0]
    cache = transformers.DynamicCache()
    steps = [layer(x[:, :7], still(7), past_key_values=cache)[0]]
    steps += [layer(token, still(1), past_key_values=cache)[0] for token in x[:, 7:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), want, **EXACT)
    assert cache.layers[0].keys.shape[2] == 4


def test_grids_and_windows_that_do_not_fit_are_named():
    volume = NeighborhoodAttention3D(WIDTH, HEADS, 2)
    with pytest.raises(
        ValueError, match=r"size=\(2, 3, 4\) must be .time, height, width. of the 20 tokens of x"
    ):
        volume(torch.randn(1, 20, WIDTH), (2, 3, 4))
    with pytest.raises(ValueError, match=r"kernel_size\[0\] is 7, but axis 0 has 5 positions; use at most 5"):
        NeighborhoodAttention1D(WIDTH, HEADS)(torch.randn(1, 5, WIDTH))
    with pytest.raises(
        ValueError, match=r"kernel_size=\(2, 2\) has 2 entries, but there are 3 axes; give 1 or 3"
    ):
        NeighborhoodAttention3D(WIDTH, HEADS, (2, 2))
    for options, text in (
        ({"kernel_size": 0}, "kernel_size=0 must be at least 1"),
        ({"kernel_size": 3, "dilation": 0}, "dilation=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=text):
            CausalNeighborhoodAttention(WIDTH, 3, 1, 4, **options)
