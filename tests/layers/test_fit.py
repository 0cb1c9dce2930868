from __future__ import annotations

import pytest
import torch

from undivided.layers.fit import (
    CrossLayer,
    TransformerLayer,
    chunk_causal_mask,
    drop_path,
    fixed_positions,
    group_image,
    parse_layers,
    shift_groups,
    sines,
    snake_order,
)


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ("(2)4(2)", ((2, 4), (2, 0))),
        ("(2)4(2)4", ((2, 4), (2, 4))),
        ("(2)4(2)4(2)", ((2, 4), (2, 4), (2, 0))),
        ("(0)12(1)", ((0, 12), (1, 0))),
        ("(3)", ((3, 0),)),
    ],
)
def test_a_string_of_layers_is_read(layers, blocks):
    assert parse_layers(layers) == blocks


@pytest.mark.parametrize("layers", ["2(4)", "", "(2)4(2", "(2)-1(2)", "(a)1", "(2) 4"])
def test_another_string_is_refused(layers):
    with pytest.raises(ValueError, match="must be local layers in brackets and global layers after them"):
        parse_layers(layers)


def test_a_block_without_global_layers_is_refused_before_the_last():
    with pytest.raises(
        ValueError, match=r'layers="\(2\)4\(1\)0\(2\)" has no global layers in block 1; only the last'
    ):
        parse_layers("(2)4(1)0(2)")


def test_the_mask_of_chunks_is_a_kronecker_product():
    want = torch.kron(torch.ones(3, 3).tril(), torch.ones(2, 2)).bool()
    assert torch.equal(chunk_causal_mask(3, 2), want)


def test_shifted_latents_are_those_of_the_group_before():
    z = torch.randn(2, 4, 3, 5)
    shifted = shift_groups(z)
    assert not shifted[:, 0].any()
    assert torch.equal(shifted[:, 1:], z[:, :-1])
    assert not shift_groups(z[:, :1]).any()


def test_an_image_is_cut_into_groups_of_patches_in_row_major_order():
    image = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12)
    x = group_image(image, 2, 4)
    assert x.shape == (2, 4, 6, 12)
    # Group 3 is the lower right one; its patch 4 is in its second row and column.
    patch = image[1, :, 4 + 2 : 4 + 4, 6 + 2 : 6 + 4]
    assert torch.equal(x[1, 3, 4], patch.permute(1, 2, 0).flatten())


@pytest.mark.parametrize(
    ("size", "groups", "message"),
    [
        ((8, 8), 3, "num_groups=3 must be a square"),
        (
            (10, 8),
            4,
            r"the height of images is 10, which patch_size \* sqrt\(num_groups\) = 4 does not divide",
        ),
        ((8, 10), 4, "the width of images is 10"),
    ],
)
def test_images_that_groups_do_not_divide_are_refused(size, groups, message):
    with pytest.raises(ValueError, match=message):
        group_image(torch.zeros(1, 1, *size), 2, groups)


def test_a_snake_turns_at_every_row():
    assert snake_order(3, 3).tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]


def test_sines_stand_before_cosines_and_coordinates_end_at_a_thousand():
    table = fixed_positions(1, 3, 4)
    angle = torch.tensor([500.0, 5.0])
    torch.testing.assert_close(table[1], torch.cat([angle.sin(), angle.cos()]))
    torch.testing.assert_close(sines(torch.tensor([1000.0]), 4)[0], table[2])
    grid = fixed_positions(2, 3, 8)
    torch.testing.assert_close(grid[4, :4], sines(torch.tensor(1000.0), 4))
    torch.testing.assert_close(grid[4, 4:], sines(torch.tensor(500.0), 4))


def test_dropped_paths_are_whole_and_the_rest_is_scaled():
    x = torch.ones(1000, 3)
    y = drop_path(x, 0.5, True)
    assert set(y.flatten().tolist()) == {0.0, 2.0}
    assert (y[:, 0] == y[:, 2]).all()
    assert abs(y.mean() - 1) < 0.1
    assert drop_path(x, 0.5, False) is x


def test_a_cross_layer_has_no_mlp_and_norms_its_source():
    layer = CrossLayer(12, 8, 2)
    assert (
        sum(p.numel() for p in layer.parameters()) == 2 * 12 + 2 * 8 + (12 + 8 + 8) * 8 + 3 * 8 + 8 * 12 + 12
    )
    x, source = torch.randn(2, 3, 12), torch.randn(2, 5, 8)
    y = torch.nn.functional.layer_norm(source, (8,), eps=1e-6)
    q = layer.attn.q(torch.nn.functional.layer_norm(x, (12,), eps=1e-6)).view(2, 3, 2, 4)
    k, v = layer.attn.k(y).view(2, 5, 2, 4), layer.attn.v(y).view(2, 5, 2, 4)
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 2).softmax(-1)
    want = x + layer.attn.proj(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))
    torch.testing.assert_close(layer(x, source), want)
    assert torch.equal(CrossLayer(12, 8, 2, mlp_ratio=2)(x, source).isfinite().all(), torch.tensor(True))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads=3 does not divide the width 8"):
        TransformerLayer(8, 3)
