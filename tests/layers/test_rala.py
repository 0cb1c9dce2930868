from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from undivided.layers._vision import to_map, to_tokens
from undivided.layers.rala import (
    ModulatedSoftmaxAttention,
    RankAugmentedLinearAttention,
    axial_rotary,
    rank_report,
)
from undivided.ops.linear.features import rotate
from undivided.spec import interpret

EXACT = {"rtol": 1e-10, "atol": 1e-10}
WIDTH, HEADS = 16, 2
LAYERS = [RankAugmentedLinearAttention, ModulatedSoftmaxAttention]
both = pytest.mark.parametrize("layer_class", LAYERS)
SWITCHES = [{}, {"lepe_kernel": None}, {"rope": False}, {"modulation": False}]
PLAIN = {"lepe_kernel": None, "rope": False, "modulation": False}


def layer_of(layer_class=RankAugmentedLinearAttention, **options):
    """A layer in float64 with biases as large as what they are added to."""
    layer = layer_class(WIDTH, HEADS, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return layer


def tokens(size, batch=2):
    return torch.randn(batch, size[0] * size[1], WIDTH, dtype=torch.float64)


def by_pairs(layer, x, size):
    """The layer as a matrix of all pairs, one head at a time, rotated as complex numbers."""
    height, width = size
    head_dim = WIDTH // HEADS
    q, k, v, o = layer.qkvo(x).chunk(4, -1)
    lepe = to_tokens(F.conv2d(to_map(v, size), layer.lepe.weight, layer.lepe.bias, padding=2, groups=WIDTH))[
        0
    ]
    frequencies = 10000.0 ** (-torch.linspace(0, 1, head_dim // 4, dtype=torch.float64))
    row, column = (
        i.flatten()[:, None] for i in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    phase = torch.exp(1j * torch.cat([row * frequencies, column * frequencies], -1))
    turned = lambda t: torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2).contiguous()) * phase  # noqa: E731
    out = []
    for head in range(HEADS):
        lanes = slice(head * head_dim, (head + 1) * head_dim)
        qh, kh, vh = q[..., lanes], k[..., lanes], v[..., lanes]
        if isinstance(layer, RankAugmentedLinearAttention):
            qh, kh = F.elu(qh) + 1, F.elu(kh) + 1
            a = torch.softmax(head_dim**-0.5 * (qh.mean(1, keepdim=True) @ kh.transpose(1, 2)), -1)
            top = torch.einsum("bnd,bmd->bnm", turned(qh), turned(kh).conj()).real
            matrix = a * top / ((a * (qh @ kh.transpose(1, 2))).sum(-1, keepdim=True) + 1e-6)
        else:
            top = torch.einsum("bnd,bmd->bnm", turned(qh), turned(kh).conj()).real
            matrix = torch.softmax(head_dim**-0.5 * top, -1)
        out.append(matrix @ vh)
    return layer.proj((torch.cat(out, -1) + lepe) * o)


@both
@pytest.mark.parametrize("size", [(3, 5), (5, 3), (1, 1)])
def test_equals_the_matrix_of_all_pairs(layer_class, size):
    layer, x = layer_of(layer_class), tokens(size)
    torch.testing.assert_close(layer(x, size), by_pairs(layer, x, size), **EXACT)


@both
@pytest.mark.parametrize("options", SWITCHES)
def test_is_what_its_specification_means(layer_class, options):
    layer, x = layer_of(layer_class, **options), tokens((3, 5))
    out = interpret(layer.spec, layer.spec_inputs(x, (3, 5))).out
    torch.testing.assert_close(layer.proj(out.transpose(1, 2).flatten(2)), layer(x, (3, 5)), **EXACT)


def test_without_everything_it_is_plain_linear_attention():
    layer, x = layer_of(**PLAIN, token_weight=False), tokens((4, 4))
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in layer.qkvo(x).chunk(3, -1))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    out = q @ (k.transpose(-2, -1) @ v / 16) / (q @ k.mean(2)[..., None] + 1e-6)
    torch.testing.assert_close(layer(x), layer.proj(out.transpose(1, 2).flatten(2)), **EXACT)


def test_modulation_has_no_activation():
    layer, x = layer_of(), tokens((3, 5))
    once = layer.features(x, (3, 5))
    with torch.no_grad():
        layer.qkvo.weight[3 * WIDTH :] *= -2
        layer.qkvo.bias[3 * WIDTH :] *= -2
    torch.testing.assert_close(layer.features(x, (3, 5)), -2 * once, **EXACT)


def test_the_local_term_is_modulated_too():
    layer, x = layer_of(), tokens((3, 5))
    with torch.no_grad():
        layer.qkvo.weight[3 * WIDTH :] = 0
        layer.qkvo.bias[3 * WIDTH :] = 0
    assert not layer.features(x, (3, 5)).any()


# -- positions


def test_products_depend_on_offsets_of_rows_and_columns_alone():
    size = (5, 7)
    cos, sin = axial_rotary(size, 8, dtype=torch.float64)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turned = [rotate(t.expand(35, 8), cos, sin) for t in (q, k)]
    products = (turned[0] @ turned[1].T).unflatten(1, size).unflatten(0, size)
    torch.testing.assert_close(products[1:, 2:, 1:, 2:], products[:-1, :-2, :-1, :-2], **EXACT)
    assert (products[0, 0, 1, 0] - products[0, 0, 0, 1]).abs() > 1e-3


def test_a_rotation_keeps_norms_and_leaves_the_first_token():
    cos, sin = axial_rotary((3, 5), 12, dtype=torch.float64)
    x = torch.randn(15, 12, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1), **EXACT)
    assert torch.equal(rotate(x, cos, sin)[0], x[0])


def test_rows_turn_the_first_half_of_the_channels_and_columns_the_second():
    cos, sin = axial_rotary((3, 5), 12, dtype=torch.float64)
    angle = torch.atan2(sin, cos).view(3, 5, 2, 3)
    # The ends of the frequencies are 1 and 1e-4, both included.
    want = torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)
    for row in range(3):
        for column in range(3):
            torch.testing.assert_close(angle[row, column], torch.stack([row * want, column * want]))


def test_tables_are_at_least_float32_and_may_be_handed_over():
    assert axial_rotary((3, 5), 8, dtype=torch.bfloat16)[0].dtype == torch.float32
    layer, x = layer_of(), tokens((3, 5))
    tables = axial_rotary((3, 5), 8, dtype=torch.float64)
    assert torch.equal(layer(x, (3, 5), tables), layer(x, (3, 5)))
    turned = tuple(table.flip(0) for table in tables)
    assert not torch.allclose(layer(x, (3, 5), turned), layer(x, (3, 5)))


def test_a_constant_value_is_returned_without_rotations_and_not_with_them():
    for rope in (False, True):
        layer, x = layer_of(**{**PLAIN, "rope": rope}, eps=0.0), tokens((3, 5))
        with torch.no_grad():
            layer.qkvo.weight[2 * WIDTH :] = 0
        constant = layer.qkvo.bias[2 * WIDTH :].expand(2, 15, WIDTH)
        assert torch.allclose(layer.features(x, (3, 5)), constant, rtol=1e-10) != rope


# -- padding


@both
def test_padding_changes_no_other_token(layer_class):
    layer, x = layer_of(layer_class), tokens((4, 5))
    keep = torch.zeros(4, 5, dtype=torch.bool)
    keep[:3] = True
    mask = keep.flatten().expand(2, -1)
    padded = x.masked_fill(~mask[..., None], torch.nan)
    out = layer(padded, (4, 5), token_mask=mask)[:, :15]
    torch.testing.assert_close(out, layer(x[:, :15], (3, 5)), **EXACT)
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


# -- ranks


@pytest.fixture(scope="module")
def ranks():
    """Ranks of 28 x 28 tokens that vary slowly over the map, one head, the same projections in all layers."""
    torch.manual_seed(0)
    width, side = 32, 28
    projections = torch.randn(4 * width, width) / width**0.5
    x = F.interpolate(torch.randn(2, width, 7, 7), (side, side), mode="bicubic").flatten(2).transpose(1, 2)
    found = {}
    for name, layer_class, options in (
        ("plain", RankAugmentedLinearAttention, {"token_weight": False, "modulation": False}),
        ("weights", RankAugmentedLinearAttention, {"modulation": False}),
        ("modulation", RankAugmentedLinearAttention, {"token_weight": False}),
        ("both", RankAugmentedLinearAttention, {}),
        ("softmax", ModulatedSoftmaxAttention, {"modulation": False}),
    ):
        layer = layer_class(width, 1, lepe_kernel=None, rope=False, qkv_bias=False, **options)
        with torch.no_grad():
            layer.qkvo.weight.copy_(projections[: len(layer.qkvo.weight)])
        found[name] = rank_report(layer, x, (side, side))
    return found


def test_modulation_raises_the_effective_rank_of_the_output(ranks):
    assert ranks["modulation"].output_effective > 2 * ranks["plain"].output_effective
    assert ranks["both"].output_effective > 2 * ranks["weights"].output_effective
    assert ranks["both"].output_numerical == 32 > ranks["plain"].output_numerical


def test_weights_change_the_buffer_and_modulation_does_not(ranks):
    assert ranks["modulation"].buffer_effective == pytest.approx(ranks["plain"].buffer_effective)
    assert ranks["both"].buffer_effective == pytest.approx(ranks["weights"].buffer_effective)
    assert ranks["weights"].buffer_effective != pytest.approx(ranks["plain"].buffer_effective, rel=1e-3)


def test_softmax_has_no_buffer(ranks):
    assert ranks["softmax"][:2] == (None, None)
    assert ranks["softmax"].output_effective > ranks["plain"].output_effective


def test_ranks_of_known_matrices():
    class Fixed(ModulatedSoftmaxAttention):
        def features(self, x, size=None, rotary=None, token_mask=None):
            return x

    layer = Fixed(4, 1)
    values = torch.tensor([1.0, 1.0, 0.0, 0.0])
    report = rank_report(layer, torch.diag(values)[None])
    assert report.output_numerical == 2
    assert report.output_effective == pytest.approx(2.0)
    report = rank_report(layer, torch.diag(torch.tensor([1.0, 2e-3, 5e-4, 0.0]))[None])
    assert report.output_numerical == 2
    assert rank_report(layer, torch.zeros(1, 4, 4)).output_numerical == 0


def test_output_of_a_head_has_its_width_as_rank_and_modulation_is_of_all_channels():
    x = torch.randn(1, 100, WIDTH, dtype=torch.float64)
    layer = layer_of(lepe_kernel=None, modulation=False)
    values = layer.features(x)[0].unflatten(-1, (HEADS, -1)).transpose(0, 1)
    assert torch.linalg.matrix_rank(values).tolist() == [WIDTH // HEADS] * HEADS
    few = torch.randn(1, 100, 3, dtype=torch.float64) @ torch.randn(3, WIDTH, dtype=torch.float64)
    plain, modulated = (layer_of(lepe_kernel=None, modulation=m, qkv_bias=False) for m in (False, True))
    with torch.no_grad():
        for layer in (plain, modulated):
            # All keys alike: a buffer of rank one a head, which no weight can raise.
            layer.qkvo.weight[WIDTH : 2 * WIDTH] = 0
            layer.rope = False
    assert torch.linalg.matrix_rank(plain.features(few)[0]) <= HEADS
    assert HEADS < torch.linalg.matrix_rank(modulated.features(few)[0]) <= 3 * HEADS


# -- precision


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_far_off_as_its_projections(layer_class, dtype):
    layer, x = layer_of(layer_class), tokens((8, 8))
    want = layer(x, (8, 8))
    found = layer.to(dtype)(x.to(dtype), (8, 8)).double()
    assert (found - want).norm() < 8 * torch.finfo(dtype).eps * want.norm()


@both
def test_autocast_is_close_and_finite(layer_class):
    layer, x = layer_of(layer_class).float(), tokens((8, 8)).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x, (8, 8))
    assert found.dtype == torch.bfloat16
    want = layer(x, (8, 8))
    assert (found.float() - want).norm() < 8 * torch.finfo(torch.bfloat16).eps * want.norm()


@both
def test_gradients_are_those_of_finite_differences(layer_class):
    layer, x = layer_of(layer_class), tokens((2, 3), batch=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x, (2, 3)), x)


@both
def test_an_image_does_not_depend_on_its_batch_mates(layer_class):
    layer, x = layer_of(layer_class), tokens((3, 5), batch=4)
    torch.testing.assert_close(torch.cat([layer(one[None], (3, 5)) for one in x]), layer(x, (3, 5)), **EXACT)


# -- in timm's blocks


@both
def test_stands_in_the_place_of_timms_attention(layer_class):
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    model = timm_vit.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3, class_token=False,
        global_pool="avg", attn_layer=layer_class.with_options(lepe_kernel=3), qkv_bias=True,
    )  # fmt: skip
    assert isinstance(model.blocks[0].attn, layer_class)
    assert model.blocks[0].attn.lepe.kernel_size == (3, 3)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)


# -- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(num_heads=5), "num_heads=5 does not divide dim=16"),
        (
            dict(num_heads=8),
            "rope=True needs a head_dim that 4 divides, but dim=16 with num_heads=8 makes it 2",
        ),
        (dict(lepe_kernel=4), "lepe_kernel=4 must be odd and positive, or None"),
        (dict(feature_map="identity"), "feature_map='identity' is not one of elu1, softplus, relu"),
        (dict(attn_drop=0.1), "attn_drop=0.1 is not computed by RankAugmentedLinearAttention; leave it off"),
    ],
)
def test_options_that_do_not_fit_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        RankAugmentedLinearAttention(WIDTH, **{"num_heads": 2, **options})


def test_tokens_that_are_no_map_and_masks_of_timm_are_refused():
    layer = layer_of()
    with pytest.raises(ValueError, match="x has 17 tokens, which is no square map"):
        layer(tokens((1, 17)))
    with pytest.raises(
        ValueError, match="is_causal=True was given, but RankAugmentedLinearAttention takes no mask"
    ):
        layer(tokens((4, 4)), is_causal=True)
