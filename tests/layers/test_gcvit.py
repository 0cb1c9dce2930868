from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from undivided.layers._vision import crop_map, pad_map, to_map, to_tokens
from undivided.layers.gcvit import (
    FusedMBConv,
    GlobalQueryGenerator,
    GlobalWindowAttention,
    WindowAttention,
    poolings_between,
)
from undivided.layers.relative_position import RelativePositionBias

EXACT = {"rtol": 1e-11, "atol": 1e-11}
WIDTH, HEADS = 12, 3
both = pytest.mark.parametrize("layer_class", [WindowAttention, GlobalWindowAttention])


def layer_of(layer_class, window=(2, 3), **options):
    """A layer in float64 whose biases of all kinds are as large as what they are added to."""
    layer = layer_class(WIDTH, HEADS, window, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1.0)
        layer.position_bias.table.normal_()
    return layer


def draw(layer, size, batch=2):
    """The arguments of a forward pass: tokens, size, and a global query where the layer wants one."""
    x = torch.randn(batch, size[0] * size[1], WIDTH, dtype=torch.float64)
    if not isinstance(layer, GlobalWindowAttention):
        return [x, size]
    places = layer.window_size[0] * layer.window_size[1]
    return [x, size, torch.randn(batch, places, WIDTH, dtype=torch.float64)]


def by_loops(layer, x, size, global_query=None):
    """One softmax at a time: over images, windows, heads and places, offsets by subtraction."""
    height, width = layer.window_size
    table = layer.position_bias.table.view(2 * height - 1, 2 * width - 1, HEADS)
    projected = layer.qkv(x).unflatten(-1, (-1, HEADS, WIDTH // HEADS))
    key, value = projected[:, :, -2], projected[:, :, -1]
    out = torch.empty_like(x)
    places = [(i, j) for i in range(height) for j in range(width)]
    for top in range(0, size[0], height):
        for left in range(0, size[1], width):
            tokens = [(top + i) * size[1] + left + j for i, j in places]
            for image in range(x.shape[0]):
                for head in range(HEADS):
                    lanes = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
                    for place, (i, j) in enumerate(places):
                        if global_query is None:
                            query = projected[image, tokens[place], 0, head]
                        else:
                            query = global_query[image, place, lanes]
                        logits = torch.stack(
                            [
                                query @ key[image, t, head] * (WIDTH // HEADS) ** -0.5
                                + table[i - a + height - 1, j - b + width - 1, head]
                                for t, (a, b) in zip(tokens, places, strict=True)
                            ]
                        )
                        out[image, tokens[place], lanes] = logits.softmax(0) @ value[image, tokens, head]
    return layer.proj(out)


@both
def test_equals_the_loop_of_the_formula(layer_class):
    layer = layer_of(layer_class)
    arguments = draw(layer, (4, 6))
    torch.testing.assert_close(layer(*arguments), by_loops(layer, *arguments), **EXACT)


@both
def test_a_map_that_windows_do_not_divide_is_padded_with_zeros_and_cropped(layer_class):
    layer = layer_of(layer_class)
    x, size, *query = draw(layer, (3, 7))
    padded = F.pad(to_map(x, size), (0, 2, 0, 1))
    want = to_map(by_loops(layer, *to_tokens(padded), *query), (4, 9))[:, :, :3, :7]
    torch.testing.assert_close(layer(x, size, *query), to_tokens(want)[0], **EXACT)


@pytest.mark.parametrize("size", [(4, 6), (3, 6), (5, 7), (1, 1)])
def test_cropping_undoes_padding(size):
    x = torch.randn(2, size[0] * size[1], 5)
    padded, larger = pad_map(x, size, (2, 3))
    assert larger[0] % 2 == larger[1] % 3 == 0
    assert padded.shape[1] == larger[0] * larger[1]
    assert torch.equal(crop_map(padded, larger, size), x)
    torch.testing.assert_close(padded.sum(1), x.sum(1))


def test_with_one_window_global_attention_is_cross_attention():
    layer = layer_of(GlobalWindowAttention, (3, 4))
    x, size, query = draw(layer, (3, 4))
    key, value = layer.heads(x)
    heads = query.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    logits = layer.scale * heads @ key.transpose(-2, -1) + layer.position_bias()
    want = layer.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, size, query), want, **EXACT)


def test_windows_of_equal_content_have_equal_global_outputs_wherever_they_are():
    layer = layer_of(GlobalWindowAttention)
    _, size, query = draw(layer, (4, 6))
    window = torch.randn(2, WIDTH, 2, 3, dtype=torch.float64)
    out = to_map(layer(to_tokens(window.repeat(1, 1, 2, 2))[0], size, query), size)
    torch.testing.assert_close(out, out[:, :, :2, :3].repeat(1, 1, 2, 2), **EXACT)


def changed_windows(run, x, size):
    """Windows of 2 x 3 whose output changes with the last token."""
    other = x.clone()
    other[:, -1] += 1.0
    change = to_map(run(other) - run(x), size).abs().amax((0, 1)) > 1e-9
    return change.unflatten(0, (-1, 2)).unflatten(2, (-1, 3)).permute(0, 2, 1, 3).flatten(2).any(-1)


def test_a_far_token_changes_its_own_window_alone_where_queries_are_local():
    layer, size = layer_of(WindowAttention), (8, 9)
    x, _ = draw(layer, size, batch=1)
    found = changed_windows(lambda x: layer(x, size), x, size)
    assert found.nonzero().tolist() == [[3, 2]]


def test_a_far_token_changes_every_window_through_the_global_query():
    layer, size = layer_of(GlobalWindowAttention), (8, 9)
    x = torch.randn(1, 72, WIDTH, dtype=torch.float64)
    generator = GlobalQueryGenerator(WIDTH, (2, 3), 1).double()
    found = changed_windows(lambda x: layer(x, size, generator(x, size)), x, size)
    assert found.all()


@both
def test_gradients_are_those_of_finite_differences(layer_class):
    layer = layer_of(layer_class, 2)
    x, size, *query = draw(layer, (2, 4), batch=1)
    tensors = [x.requires_grad_(), *(q.requires_grad_() for q in query)]
    assert torch.autograd.gradcheck(lambda x, *query: layer(x, size, *query), tensors)


@both
def test_an_image_does_not_depend_on_its_batch_mates(layer_class):
    layer = layer_of(layer_class)
    x, size, *query = draw(layer, (4, 6), batch=4)
    together = layer(x, size, *query)
    for index in range(4):
        one = slice(index, index + 1)
        torch.testing.assert_close(layer(x[one], size, *(q[one] for q in query))[0], together[index], **EXACT)


def test_autocast_takes_queries_wider_than_its_projections():
    layer = GlobalWindowAttention(WIDTH, HEADS, (2, 3))
    x, size, query = (
        part.float() if isinstance(part, torch.Tensor) else part for part in draw(layer, (4, 6))
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, size, query)
    torch.testing.assert_close(out.float(), layer(x, size, query), rtol=0.05, atol=0.02)


def test_a_global_layer_has_no_query_projection():
    assert WindowAttention(64, 2).qkv.weight.shape == (192, 64)
    assert GlobalWindowAttention(64, 2).qkv.weight.shape == (128, 64)


# -- queries from the whole map


@pytest.mark.parametrize(
    ("side", "window", "poolings"), [(56, 7, 3), (28, 7, 2), (14, 14, 0), (7, 7, 0), (28, 14, 1)]
)
def test_the_generator_makes_exactly_one_window(side, window, poolings, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the map was resized")

    monkeypatch.setattr(F, "interpolate", refuse)
    assert poolings_between((side, side), (window, window)) == poolings
    generator = GlobalQueryGenerator(8, window, poolings)
    assert len(generator.blocks) == max(poolings, 1)
    assert generator(torch.randn(2, side * side, 8), (side, side)).shape == (2, window * window, 8)


def test_the_generator_resizes_what_is_not_a_window():
    generator = GlobalQueryGenerator(8, (3, 4), 1)
    x = torch.randn(2, 9 * 10, 8)
    pooled = F.max_pool2d(generator.blocks[0](to_map(x, (9, 10))), 3, 2, 1)
    want = F.interpolate(pooled, (3, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(generator(x, (9, 10)), want.flatten(2).transpose(1, 2))


def test_the_fused_block_is_the_formula():
    block, x = FusedMBConv(8).double(), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    shifted = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    y = F.gelu(torch.einsum("bchwij,cij->bchw", shifted, block.conv_dw.weight[:, 0]))
    hidden = F.gelu(y.mean((2, 3)) @ block.squeeze.weight.T)
    y = y * torch.sigmoid(hidden @ block.excite.weight.T)[..., None, None]
    want = x + torch.einsum("bchw,dc->bdhw", y, block.conv_pw.weight[:, :, 0, 0])
    torch.testing.assert_close(block(x), want, **EXACT)
    assert block.squeeze.weight.shape == (2, 8)


# -- relative positions


def test_the_bias_depends_on_the_offset_alone():
    bias = RelativePositionBias(2, (3, 4))
    maps = bias().unflatten(2, (3, 4)).unflatten(1, (3, 4))
    assert torch.equal(maps[:, 1:, 1:, 1:, 1:], maps[:, :-1, :-1, :-1, :-1])
    # The query at the lower right and the key at the upper left have the largest offset, the last row.
    assert torch.equal(maps[:, 2, 3, 0, 0], bias.table[-1])
    assert torch.equal(maps[:, 0, 0, 2, 3], bias.table[0])


def test_a_table_resized_to_its_own_window_is_itself_and_a_constant_stays_one():
    bias = RelativePositionBias(2, 7)
    torch.testing.assert_close(bias.resized(bias.table), bias.table)
    larger = RelativePositionBias(2, (12, 10)).resized(torch.full((169, 2), 0.7))
    torch.testing.assert_close(larger, torch.full((23 * 19, 2), 0.7))


def test_a_table_resized_keeps_rows_and_columns_apart():
    rows = torch.arange(13.0)[:, None].expand(13, 13).reshape(169, 1)
    larger = RelativePositionBias(1, 12).resized(rows).view(23, 23)
    torch.testing.assert_close(larger, larger[:, :1].expand(23, 23))
    assert (larger[1:, 0] > larger[:-1, 0]).all()


# -- in timm's blocks


def test_stands_in_the_place_of_timms_attention():
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    attention = WindowAttention.with_options(window_size=2)
    model = timm_vit.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3, class_token=False,
        global_pool="avg", attn_layer=attention, qkv_bias=True,
    )  # fmt: skip
    assert isinstance(model.blocks[0].attn, WindowAttention)
    assert model.blocks[0].attn.window_size == (2, 2)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)


# -- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(num_heads=5), "num_heads=5 does not divide dim=12"),
        (dict(window_size=0), "window_size=0 must be a positive number, or two: height and width"),
        (dict(window_size=(2, 3, 4)), r"window_size=\(2, 3, 4\) must be a positive number, or two"),
        (dict(attn_drop=0.1), "attn_drop=0.1 is not computed by WindowAttention; leave it off"),
        (dict(qk_norm=True), "qk_norm=True is not computed by WindowAttention"),
    ],
)
def test_options_that_do_not_fit_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        WindowAttention(WIDTH, **{"num_heads": 3, **options})


def test_tokens_that_are_no_map_are_named():
    layer = WindowAttention(WIDTH, 3, 2)
    with pytest.raises(
        ValueError, match=r"x has 17 tokens, which is no square map; give size=\(height, width\)"
    ):
        layer(torch.randn(1, 17, WIDTH))
    with pytest.raises(ValueError, match=r"size=\(4, 4\) has 16 tokens, but x has 17; .*class token"):
        layer(torch.randn(1, 17, WIDTH), (4, 4))
    with pytest.raises(ValueError, match=r"x has shape \[1, 12, 4, 4\]; it needs 3 axes"):
        layer(torch.randn(1, WIDTH, 4, 4))
    with pytest.raises(ValueError, match="is_causal=True was given, but WindowAttention takes no mask"):
        layer(torch.randn(1, 16, WIDTH), is_causal=True)


@pytest.mark.parametrize("shape", [(1, 4, WIDTH), (2, 9, WIDTH), (2, 4, 8)])
def test_global_queries_of_another_batch_window_or_width_are_named(shape):
    layer = GlobalWindowAttention(WIDTH, 3, 2)
    with pytest.raises(ValueError, match=r"it must be \[batch, window tokens, dim\] = \[2, 4, 12\]"):
        layer(torch.randn(2, 16, WIDTH), (4, 4), torch.randn(shape))


def test_a_generator_does_not_pool_a_negative_number_of_times():
    with pytest.raises(ValueError, match="num_poolings=-1 must be 0 or more"):
        GlobalQueryGenerator(8, 7, -1)
