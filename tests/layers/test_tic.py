from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from undivided.layers._vision import to_tokens
from undivided.layers.tic import DIRECTIONS, CyclicShift, InterPool, MSAConv, MSAConv2d, MSAConvBlock
from undivided.spec import interpret

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def layer(**options):
    return MSAConv(8, 2, **{"kernel_size": 3, **options}).double()


def tokens(size=(6, 5), dim=8):
    return torch.randn(2, size[0] * size[1], dim, dtype=torch.float64)


def test_the_map_form_is_the_token_form_and_one_head_has_the_scale_of_all_channels():
    conv = MSAConv2d(8, 3).double()
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    q, k, v = F.conv2d(x, conv.qkv.weight[:, :, None, None], conv.qkv.bias).chunk(3, dim=1)
    columns = [F.unfold(part, 3, padding=1).view(2, 8, 9, 30) for part in (k, v)]
    weights = (8**-0.5 * (q.flatten(2)[:, :, None] * columns[0]).sum(1)).softmax(1)
    want = (weights[:, None] * columns[1]).sum(2).view(2, 8, 6, 5)
    torch.testing.assert_close(conv(x), want, **EXACT)


def test_a_channel_a_head_attends_by_itself():
    conv = MSAConv2d(4, 3, num_heads=4).double()
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    other = x.clone()
    with torch.no_grad():
        conv.qkv.weight.zero_()
        for part in range(3):
            conv.qkv.weight[4 * part : 4 * part + 4] = torch.eye(4)
    other[:, 1] += 1
    assert torch.equal(conv(x)[:, [0, 2, 3]], conv(other)[:, [0, 2, 3]])
    assert not torch.equal(conv(x)[:, 1], conv(other)[:, 1])


def test_grouped_heads_know_their_own_channels_alone():
    made = MSAConv(8, 4, 3, grouped=True, output_proj=False).double()
    assert made.qkv.weight.shape == (24, 2, 1)
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    found = made(x, (3, 4))
    for head in range(4):
        own = MSAConv(2, 1, 3, output_proj=False).double()
        rows = slice(6 * head, 6 * head + 6)
        own.load_state_dict({"qkv.weight": made.qkv.weight[rows, :, 0], "qkv.bias": made.qkv.bias[rows]})
        channels = slice(2 * head, 2 * head + 2)
        torch.testing.assert_close(found[..., channels], own(x[..., channels], (3, 4)))


def test_channels_may_be_rolled_in_eight_directions():
    torch.manual_seed(0)
    four = MSAConv(16, 2, 3, shift=1).double()
    eight = MSAConv(16, 2, 3, shift=1, directions=tuple(DIRECTIONS)).double()
    eight.load_state_dict(four.state_dict())
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    assert not torch.allclose(four(x, (4, 5)), eight(x, (4, 5)))


def test_weights_of_timms_attention_fit_and_a_window_over_the_map_is_that_attention():
    timm = pytest.importorskip("timm")
    vit = timm.layers.Attention(8, num_heads=2, qkv_bias=True).double()
    near = layer(kernel_size=11, border="mask")
    near.load_state_dict(vit.state_dict())
    x = tokens()
    torch.testing.assert_close(near(x, (6, 5)), vit(x), **EXACT)


def test_the_middle_of_a_map_does_not_know_its_size():
    conv = layer(dilation=2)
    x = tokens((9, 9))
    part = x.unflatten(1, (9, 9))[:, 1:8, 2:9].flatten(1, 2)
    found, want = conv(part, (7, 7)).unflatten(1, (7, 7)), conv(x, (9, 9)).unflatten(1, (9, 9))
    torch.testing.assert_close(found[:, 2:-2, 2:-2], want[:, 3:6, 4:7], **EXACT)


def test_within_a_window_the_order_of_the_neighbours_does_not_matter():
    conv = layer(border="mask")
    x = tokens((3, 3))
    order = torch.tensor([8, 1, 6, 3, 4, 5, 2, 7, 0])
    torch.testing.assert_close(conv(x[:, order], (3, 3))[:, 4], conv(x, (3, 3))[:, 4], **EXACT)


# -- shifts


def test_a_shift_of_zero_is_none():
    plain, shifted = layer(), layer(shift=0)
    shifted.load_state_dict(plain.state_dict())
    x = tokens()
    assert torch.equal(shifted(x, (6, 5)), plain(x, (6, 5)))
    other = layer(shift=1)
    other.load_state_dict(plain.state_dict())
    assert not torch.allclose(other(x, (6, 5)), plain(x, (6, 5)))


@pytest.mark.parametrize("directions", [("left", "right", "up", "down"), tuple(DIRECTIONS)])
@pytest.mark.parametrize("shift", [0, 2, "half"])
def test_a_shift_can_be_undone_and_moves_every_channel_once(directions, shift):
    move = CyclicShift(directions, shift)
    x = torch.randn(1, 9, 6, 5)
    assert torch.equal(move.inverse(move(x)), x)
    assert torch.equal(move(x).flatten(2).sort(-1).values, x.flatten(2).sort(-1).values)


def test_channels_move_in_their_directions():
    x = torch.zeros(1, 4, 5, 5)
    x[:, :, 2, 2] = 1
    places = CyclicShift(shift=1)(x)[0].flatten(1).argmax(1).tolist()
    assert [(place // 5, place % 5) for place in places] == [(2, 1), (2, 3), (1, 2), (3, 2)]


def test_shifts_let_a_token_see_further():
    def seen(conv):
        x = tokens((12, 12)).requires_grad_()
        conv(x, (12, 12))[0, 6 * 12 + 6].sum().backward()
        return int((x.grad[0].abs().sum(-1) > 1e-9).sum())

    assert seen(layer(shift="half")) > seen(layer()) == 9
    assert seen(layer(kv_pool=2)) > 9


# -- pooling


def test_pooled_keys_are_means_of_cells_around_the_cell_of_the_query():
    conv = layer(kv_pool=2, border="mask")
    x = tokens((4, 6))
    query, key, value = (part.unflatten(2, (4, 6)) for part in conv.heads(x))
    out = conv.attend(query, key, value)
    k, v = (part.unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5)) for part in (key, value))
    for row, column in ((0, 0), (1, 3), (3, 5), (2, 1)):
        rows, columns = (
            slice(max(row // 2 - 1, 0), row // 2 + 2),
            slice(max(column // 2 - 1, 0), column // 2 + 2),
        )
        near_k, near_v = (part[:, :, rows, columns].flatten(2, 3) for part in (k, v))
        weights = (conv.scale * torch.einsum("bhd,bhnd->bhn", query[:, :, row, column], near_k)).softmax(-1)
        want = torch.einsum("bhn,bhnd->bhd", weights, near_v)
        torch.testing.assert_close(out[:, :, row, column], want, **EXACT)


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (4, 4)])
def test_pooling_takes_maps_of_any_size(size):
    x = tokens(size)
    assert layer(kv_pool=3)(x, size).shape == x.shape
    assert InterPool(8, 2, 3).double()(x, size).shape == x.shape


def test_inter_pooling_adds_a_coarse_map():
    pool = InterPool(8, 2, 3).double()
    x = tokens((4, 6))
    coarse = x.unflatten(1, (2, 2, 3, 2)).mean((2, 4)).flatten(1, 2)
    coarse = pool.attn(pool.norm(coarse), (2, 3)).unflatten(1, (2, 3))
    want = x + coarse[:, [0, 0, 1, 1]][:, :, [0, 0, 1, 1, 2, 2]].flatten(1, 2)
    torch.testing.assert_close(pool(x, (4, 6)), want, **EXACT)


# -- the authors' block


def test_the_early_block_has_a_sum_a_convolution_and_a_relu():
    block = MSAConvBlock(4, 6, 3, stride=2)
    x = torch.randn(1, 4, 7, 7)
    assert torch.equal(block(x), F.relu(F.conv2d(x + block.attn(x), block.conv.weight, stride=2, padding=1)))
    released = {
        "qkv_conv.weight": torch.randn(12, 4, 1, 1),
        "qkv_conv.bias": torch.randn(12),
        "mlp.weight": torch.randn(6, 4, 3, 3),
    }
    block.load_official(released)
    assert torch.equal(block.attn.qkv.weight[:, :, None, None], released["qkv_conv.weight"])
    with pytest.raises(ValueError, match=r"state_dict has \['mlp.weight'\]; the authors' block has"):
        block.load_official({"mlp.weight": released["mlp.weight"]})


# -- specification and errors


def test_a_masked_window_is_its_specification():
    conv = layer(border="mask", dilation=(1, 2), shift=1)
    x = tokens()
    heads = interpret(conv.spec, conv.spec_inputs(x, (6, 5))).out
    moved, size = to_tokens(conv.shift(x.unflatten(1, (6, 5)).permute(0, 3, 1, 2)))
    query, key, value = (part.unflatten(2, size) for part in conv.heads(moved))
    torch.testing.assert_close(heads, conv.attend(query, key, value).flatten(2, 3), **EXACT)
    with pytest.raises(ValueError, match='border="zero" with kv_pool=1 has no specification'):
        _ = layer().spec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide dim=8"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"dilation": 0}, "dilation=0 must be"),
        ({"border": "reflect"}, "border='reflect' is not one of"),
        ({"shift": -1}, "shift=-1 must be 0 or more"),
        ({"kv_pool": 0}, "kv_pool=0 must be at least 1"),
        ({"attn_drop": 0.1}, "attn_drop=0.1 is not computed by MSAConv"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MSAConv(8, **{"num_heads": 2, **options})


def test_other_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"directions=\('north',\) must be some of 'left'"):
        CyclicShift(("north",))
    with pytest.raises(ValueError, match="ratio=1 must be at least 2"):
        InterPool(8, 2, ratio=1)
    with pytest.raises(
        ValueError, match=r"x has shape \[2, 3, 4, 4\]; it must be \[batch, 8, height, width\]"
    ):
        MSAConv2d(8)(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="x has 30 tokens, which is no square map"):
        layer()(tokens())
