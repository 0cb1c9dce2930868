from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from undivided.layers._vision import to_map
from undivided.layers.convit import GPSA

EXACT = {"rtol": 1e-11, "atol": 1e-11}
WIDTH, HEADS = 12, 4


def layer_of(dim=WIDTH, heads=HEADS, **options):
    """A layer in float64 whose positions, gates and contents all matter."""
    layer = GPSA(dim, heads, **options).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if "pos" not in name else 0.3)
        layer.gating_param.normal_()
    return layer


def draw(tokens, batch=2, dim=WIDTH):
    return torch.randn(batch, tokens, dim, dtype=torch.float64)


def by_position(layer, size):
    """The weights by position as they are written, `[H, N, N]`."""
    height, width = size
    y, x = (place.flatten() for place in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
    dx, dy = (place[None, :] - place[:, None] for place in (x, y))
    r = torch.stack((dx, dy, dx**2 + dy**2), dim=-1).double()
    return (r @ layer.pos_proj.weight.T).permute(2, 0, 1).softmax(-1)


def directly(layer, x, size):
    """`concat_h(A_h V_h) W_O` with the whole of A, divided by its row sums as in the authors' code."""
    query, key = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in layer.qk(x).chunk(2, -1))
    value = layer.v(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    content = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    gate = torch.sigmoid(layer.gating_param)[:, None, None]
    weights = (1 - gate) * content + gate * by_position(layer, size)
    weights = weights / weights.sum(-1, keepdim=True)
    return layer.proj((weights @ value).transpose(1, 2).flatten(2)), weights


# -- what is computed


@pytest.mark.parametrize("size", [(5, 5), (3, 6), (20, 20)])
def test_equals_the_direct_form_at_any_size(size):
    layer, x = layer_of(), draw(size[0] * size[1], batch=1)
    want, weights = directly(layer, x, size)
    torch.testing.assert_close(layer(x, size), want, **EXACT)
    torch.testing.assert_close(layer.attention_map(x, size), weights, **EXACT)


def test_gradients_equal_those_of_the_direct_form():
    layer, x, size = layer_of(qkv_bias=True), draw(20).requires_grad_(), (4, 5)
    cotangent = torch.randn_like(x)
    parameters = [x, *layer.parameters()]
    found = torch.autograd.grad(layer(x, size), parameters, cotangent)
    wanted = torch.autograd.grad(directly(layer, x, size)[0], parameters, cotangent)
    torch.testing.assert_close(found, wanted, **EXACT)
    assert all(gradient.abs().sum() > 0 for gradient in found)


def test_gradients_are_those_of_finite_differences():
    layer, x = layer_of(), draw(16, batch=1)
    names = ["qk.weight", "v.weight", "pos_proj.weight", "gating_param"]
    tensors = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def run(*parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


def test_rows_sum_to_one_so_that_dividing_by_their_sums_changes_nothing():
    rows = layer_of().attention_map(draw(20), (4, 5)).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), **EXACT)


def test_with_gates_at_zero_it_is_self_attention():
    layer, x = layer_of(), draw(20)
    with torch.no_grad():
        layer.gating_param.fill_(-30.0)
    plain = F.scaled_dot_product_attention(*layer.heads(x))
    torch.testing.assert_close(layer(x, (4, 5)), layer.proj(plain.transpose(1, 2).flatten(2)))


def test_with_gates_at_one_queries_and_keys_do_not_matter():
    layer, x = layer_of(), draw(20)
    with torch.no_grad():
        layer.gating_param.fill_(30.0)
        before = layer(x, (4, 5))
        layer.qk.weight.normal_()
    torch.testing.assert_close(layer(x, (4, 5)), before)


def test_content_and_position_are_mixed_after_the_softmax():
    """A head that looks at its own token keeps half of it however strong the contents are."""
    layer, x = GPSA(WIDTH, 1, locality_strength=100.0, gate_init=0.0).double(), draw(25)
    with torch.no_grad():
        layer.qk.weight.normal_(std=10.0)
    assert (layer.attention_map(x)[:, 0].diagonal(dim1=1, dim2=2) > 0.5 - 1e-12).all()


def test_an_image_does_not_depend_on_its_batch_mates():
    layer, x = layer_of(), draw(20, batch=4)
    together = layer(x, (4, 5))
    for index in range(4):
        torch.testing.assert_close(layer(x[index : index + 1], (4, 5))[0], together[index], **EXACT)


def test_sizes_of_one_number_of_tokens_are_told_apart():
    layer, x = layer_of(), draw(36)
    assert torch.equal(layer(x), layer(x, (6, 6)))
    assert not torch.allclose(layer(x, (4, 9)), layer(x, (9, 4)), atol=1e-3)
    torch.testing.assert_close(layer(x, (4, 9)), directly(layer, x, (4, 9))[0], **EXACT)


# -- the start


def test_starts_as_the_convolution_of_its_heads():
    """Sharp heads and no content: head h is the tap at its offset, of the map W_O[:, h] W_V[h]."""
    dim, size = 18, (7, 9)
    layer = GPSA(dim, 9, locality_strength=50.0, gate_init=40.0).double()
    torch.nn.init.normal_(layer.v.weight)
    x = draw(63, dim=dim)
    kernel = torch.empty(dim, dim, 3, 3, dtype=torch.float64)
    for head in range(9):
        lanes = slice(2 * head, 2 * head + 2)
        # head = h1 + 3 h2, one row down for each h1, one column to the right for each h2.
        kernel[:, :, head % 3, head // 3] = layer.proj.weight[:, lanes] @ layer.v.weight[lanes]
    want = F.conv2d(to_map(x, size), kernel, layer.proj.bias)
    found = to_map(layer(x, size), size)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-10)


def test_nine_heads_start_at_the_nine_offsets():
    maps = by_position(GPSA(9, 9).double(), (7, 7))[:, 24].unflatten(-1, (7, 7))
    peaks = [divmod(one.argmax().item(), 7) for one in maps]
    assert [(y - 3, x - 3) for y, x in peaks] == [
        (-1, -1), (0, -1), (1, -1), (-1, 0), (0, 0), (1, 0), (-1, 1), (0, 1), (1, 1)
    ]  # fmt: skip


def test_four_heads_start_between_four_neighbours():
    maps = by_position(GPSA(4, 4).double(), (7, 7))[:, 24].unflatten(-1, (7, 7))
    for head, (down, right) in enumerate([(-1, -1), (1, -1), (-1, 1), (1, 1)]):
        four = maps[head][sorted((3, 3 + down))][:, sorted((3, 3 + right))]
        torch.testing.assert_close(four, maps[head].max().expand(2, 2))
        assert four.sum() > 0.6


def test_starts_as_the_authors_start_it():
    layer = GPSA(144, 16, qkv_bias=True, locality_strength=0.5)
    assert torch.equal(layer.v.weight, torch.eye(144))
    assert torch.equal(layer.gating_param, torch.ones(16))
    assert layer.gates.tolist() == pytest.approx([1 / (1 + math.exp(-1))] * 16)
    # Heads 0 and 7 of a 4 x 4 kernel: taps (-1.5, -1.5), and three rows below and one column right of it.
    assert layer.pos_proj.weight[[0, 7]].tolist() == [[-1.5, -1.5, -0.5], [-0.5, 1.5, -0.5]]
    for linear in (layer.qk, layer.proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(linear.bias.any() for linear in (layer.qk, layer.v, layer.proj))


def test_heads_beyond_the_kernel_start_at_random_and_one_is_told():
    with pytest.warns(
        UserWarning, match="num_heads=6 is no square: the first 4 heads start as a 2 x 2 .* other 2"
    ):
        layer = GPSA(12, 6)
    assert (layer.pos_proj.weight[:4, 2] == -1).all()
    assert 0 < layer.pos_proj.weight[4:].abs().max() < 0.1


def test_without_the_convolution_all_weights_start_at_random():
    layer = GPSA(60, 6, conv_init=False)
    assert layer.v.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.pos_proj.weight.abs().max() < 0.1


def test_the_authors_bias_of_positions_would_change_nothing():
    layer = layer_of()
    shifted = by_position(layer, (4, 5)).log() + torch.randn(HEADS, 1, 1).double()
    torch.testing.assert_close(shifted.softmax(-1), by_position(layer, (4, 5)), **EXACT)
    assert layer.pos_proj.bias is None


# -- how far heads look


def test_nonlocality_is_the_mean_distance():
    layer, x = layer_of(), draw(12)
    weights, want = layer.attention_map(x, (3, 4)), torch.zeros(HEADS).double()
    for i in range(12):
        for j in range(12):
            distance = math.hypot(i // 4 - j // 4, i % 4 - j % 4)
            want += distance * weights[:, :, i, j].mean(0) / 12
    torch.testing.assert_close(layer.nonlocality(x, (3, 4)), want, **EXACT)


def test_nonlocality_falls_with_the_strength_of_locality():
    x = draw(81, dim=9)
    far = [
        GPSA(9, 9, locality_strength=s, gate_init=30.0).double().nonlocality(x).mean()
        for s in (0.01, 0.1, 1, 50)
    ]
    assert far == sorted(far, reverse=True)
    # Sharp heads see their own taps: one of distance 0, four of 1, four of sqrt 2; borders shorten some.
    assert 0.8 < far[-1] < (4 + 4 * 2**0.5) / 9


# -- in timm's place


@pytest.fixture(scope="module")
def pair():
    """timm's layer and ours with its weights, its bias of positions among them."""
    timm_convit = pytest.importorskip("timm.models.convit")
    torch.manual_seed(0)
    theirs, ours = timm_convit.GPSA(36, 9, qkv_bias=True).double(), GPSA(36, 9, qkv_bias=True).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    state = theirs.state_dict()
    state.pop("pos_proj.bias")
    ours.load_state_dict(state)
    return ours, theirs


def test_equals_timms_layer_and_its_gradients(pair):
    ours, theirs = pair
    x = draw(49, dim=36).requires_grad_()
    outs = [ours(x), theirs(x)]
    torch.testing.assert_close(*outs, **EXACT)
    cotangent = torch.randn_like(x)
    for module, out in zip(pair, outs, strict=True):
        module.zero_grad()
        out.backward(cotangent)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, **EXACT, msg=name)


def test_map_and_nonlocality_equal_timms(pair):
    ours, theirs = pair
    x = draw(49, dim=36)
    theirs(x)
    nonlocality, weights = theirs.get_attention_map(x, return_map=True)
    torch.testing.assert_close(ours.attention_map(x).mean(0), weights, **EXACT)
    torch.testing.assert_close(ours.nonlocality(x), nonlocality, **EXACT)


def test_stands_in_the_place_of_timms_attention_and_keeps_its_start():
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    model = timm_vit.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=36, depth=2, num_heads=9, num_classes=3, class_token=False,
        global_pool="avg", attn_layer=GPSA.with_options(locality_strength=2.0), qkv_bias=True,
    )  # fmt: skip
    for block in model.blocks:
        assert isinstance(block.attn, GPSA)
        assert torch.equal(block.attn.v.weight, torch.eye(36))
        assert (block.attn.pos_proj.weight[:, 2] == -2.0).all()
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)


def test_reduced_precision_and_autocast_run():
    x = draw(20).float()
    assert GPSA(WIDTH, HEADS, dtype=torch.bfloat16)(x.bfloat16(), (4, 5)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        layer = GPSA(WIDTH, HEADS)
        layer(x, (4, 5)).float().square().sum().backward()
    assert layer.gating_param.grad.isfinite().all() and layer.pos_proj.weight.grad.isfinite().all()


# -- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(num_heads=5), "num_heads=5 does not divide dim=12"),
        (dict(attn_drop=0.1), "attn_drop=0.1 is not computed by GPSA; leave it off"),
        (dict(qk_norm=True), "qk_norm=True is not computed by GPSA"),
    ],
)
def test_options_that_do_not_fit_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        GPSA(WIDTH, **{"num_heads": 4, **options})


def test_tokens_that_are_no_map_are_named():
    layer = GPSA(WIDTH, 4)
    with pytest.raises(
        ValueError, match=r"x has 17 tokens, which is no square map; give size=\(height, width\)"
    ):
        layer(torch.randn(1, 17, WIDTH))
    with pytest.raises(ValueError, match=r"size=\(4, 4\) has 16 tokens, but x has 17; .*class token"):
        layer(torch.randn(1, 17, WIDTH), (4, 4))
    with pytest.raises(ValueError, match="is_causal=True was given, but GPSA takes no mask"):
        layer(torch.randn(1, 16, WIDTH), is_causal=True)
