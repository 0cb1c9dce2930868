from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from undivided.cost.vision import multiply_adds
from undivided.layers._vision import to_map, to_tokens
from undivided.layers.hilo import HiLoAttention

EXACT = {"rtol": 1e-11, "atol": 1e-11}
WIDTH, HEADS, HEAD_DIM = 12, 4, 3


def layer_of(lofi_heads=2, window=(2, 3), **options):
    """A layer in float64 whose biases are as large as what they are added to."""
    layer = HiLoAttention(
        WIDTH, HEADS, window, lofi_heads=lofi_heads, **{"qkv_bias": True, **options}
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1.0)
    return layer


def draw(size, batch=2):
    return torch.randn(batch, size[0] * size[1], WIDTH, dtype=torch.float64)


def windows_of(size, window):
    """Tokens of each window in row-major order."""
    return [
        [(top + i) * size[1] + left + j for i in range(window[0]) for j in range(window[1])]
        for top in range(0, size[0], window[0])
        for left in range(0, size[1], window[1])
    ]


def one_softmax(query, keys, values):
    return (keys @ query * HEAD_DIM**-0.5).softmax(0) @ values


def by_loops(layer, x, size):
    """One softmax at a time: high-frequency heads first, each token in its window; the others over window means."""
    windows = windows_of(size, layer.window_size)
    out = []
    for tokens in x:
        parts = []
        if layer.hifi_heads:
            qkv = layer.hifi_qkv(tokens).unflatten(-1, (3, layer.hifi_heads, HEAD_DIM))
            part = torch.empty(len(tokens), layer.hifi_heads, HEAD_DIM, dtype=x.dtype)
            for window in windows:
                for token in window:
                    for head in range(layer.hifi_heads):
                        part[token, head] = one_softmax(
                            qkv[token, 0, head], qkv[window, 1, head], qkv[window, 2, head]
                        )
            parts.append(layer.hifi_proj(part.flatten(1)))
        if layer.lofi_heads:
            means = torch.stack([tokens[window].mean(0) for window in windows])
            query = layer.lofi_q(tokens).unflatten(-1, (layer.lofi_heads, HEAD_DIM))
            pairs = layer.lofi_kv(means).unflatten(-1, (2, layer.lofi_heads, HEAD_DIM))
            part = torch.empty_like(query)
            for token in range(len(tokens)):
                for head in range(layer.lofi_heads):
                    part[token, head] = one_softmax(query[token, head], pairs[:, 0, head], pairs[:, 1, head])
            parts.append(layer.lofi_proj(part.flatten(1)))
        out.append(torch.cat(parts, -1))
    return torch.stack(out)


def plain_attention(layer, x):
    """torch's own multi-head attention with the weights of a layer that has low-frequency heads alone."""
    mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    mha.load_state_dict(
        {
            "in_proj_weight": torch.cat([layer.lofi_q.weight, layer.lofi_kv.weight]),
            "in_proj_bias": torch.cat([layer.lofi_q.bias, layer.lofi_kv.bias]),
            "out_proj.weight": layer.lofi_proj.weight,
            "out_proj.bias": layer.lofi_proj.bias,
        }
    )
    return lambda keys: mha(x, keys, keys, need_weights=False)[0]


@pytest.mark.parametrize("lofi_heads", range(HEADS + 1))
def test_equals_the_loop_of_the_formula(lofi_heads):
    layer, size = layer_of(lofi_heads), (4, 6)
    x = draw(size)
    torch.testing.assert_close(layer(x, size), by_loops(layer, x, size), **EXACT)


@pytest.mark.parametrize("lofi_heads", [0, 1, HEADS])
@pytest.mark.parametrize("size", [(3, 7), (1, 1), (4, 5)])
def test_a_map_that_windows_do_not_divide_is_padded_with_zeros_and_cropped(lofi_heads, size):
    layer, x = layer_of(lofi_heads), draw(size)
    below, right = -size[0] % 2, -size[1] % 3
    padded, larger = to_tokens(F.pad(to_map(x, size), (0, right, 0, below)))
    want = to_map(by_loops(layer, padded, larger), larger)[:, :, : size[0], : size[1]]
    torch.testing.assert_close(layer(x, size), to_tokens(want)[0], **EXACT)


def test_windows_of_one_token_are_plain_attention_whatever_alpha_is():
    for options in ({"alpha": 0.0}, {"alpha": 0.5}, {"lofi_heads": 1}):
        layer = layer_of(**{"lofi_heads": None, "window": 1, **options})
        assert (layer.lofi_heads, layer.hifi_heads) == (HEADS, 0)
        x = draw((3, 4))
        torch.testing.assert_close(layer(x, (3, 4)), plain_attention(layer, x)(x), **EXACT)


def test_with_alpha_one_keys_are_means_of_windows():
    layer, size = layer_of(None, 2, alpha=1.0), (4, 6)
    assert not hasattr(layer, "hifi_qkv")
    x = draw(size)
    means = to_tokens(F.avg_pool2d(to_map(x, size), 2))[0]
    torch.testing.assert_close(layer(x, size), plain_attention(layer, x)(means), **EXACT)


def test_with_alpha_zero_windows_are_images_of_their_own():
    layer, size = layer_of(None, 2, alpha=0.0), (4, 6)
    assert not hasattr(layer, "lofi_q")
    x = draw(size, batch=1)
    windows = windows_of(size, (2, 2))
    alone = layer(x[0, torch.tensor(windows)], (2, 2))
    torch.testing.assert_close(layer(x, size)[0, torch.tensor(windows)], alone, **EXACT)


def test_the_first_channels_are_those_of_the_windows():
    layer, size = layer_of(1), (2, 3)
    with torch.no_grad():
        layer.hifi_proj.weight.zero_(), layer.hifi_proj.bias.fill_(1.0)
        layer.lofi_proj.weight.zero_(), layer.lofi_proj.bias.fill_(2.0)
    assert layer(draw(size), size)[0, 0].tolist() == 9 * [1.0] + 3 * [2.0]


def test_a_constant_map_gives_its_projected_value_everywhere():
    layer, size = layer_of(), (4, 6)
    x = torch.randn(2, 1, WIDTH, dtype=torch.float64)
    high = layer.hifi_proj(layer.hifi_qkv(x).chunk(3, -1)[2])
    low = layer.lofi_proj(layer.lofi_kv(x).chunk(2, -1)[1])
    want = torch.cat([high, low], -1).expand(2, 24, WIDTH)
    torch.testing.assert_close(layer(x.repeat(1, 24, 1), size), want, **EXACT)


def test_a_token_changes_detail_in_its_window_alone_and_context_everywhere():
    layer, size = layer_of(), (4, 6)
    x = draw(size, batch=1)
    other = x.clone()
    other[:, -1] += 1.0
    change = (layer(other, size) - layer(x, size))[0].abs() > 1e-9
    detail, context = change.split(WIDTH // 2, -1)
    assert detail.any(-1).nonzero().flatten().tolist() == windows_of(size, (2, 3))[-1]
    assert context.any(-1).all()


def test_pooling_before_the_projection_is_pooling_after_it():
    layer, size = layer_of(HEADS, 2), (4, 6)
    x = draw(size)
    pooled = lambda x: to_tokens(F.avg_pool2d(to_map(x, size), 2))[0]  # noqa: E731
    torch.testing.assert_close(layer.lofi_kv(pooled(x)), pooled(layer.lofi_kv(x)), **EXACT)


def test_gradients_are_those_of_finite_differences():
    layer, size = layer_of(2, 2), (3, 4)
    x = draw(size, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x, size), [x])


def test_an_image_does_not_depend_on_its_batch_mates():
    layer, x = layer_of(), draw((4, 6), batch=4)
    together = layer(x, (4, 6))
    for index in range(4):
        torch.testing.assert_close(layer(x[index : index + 1], (4, 6))[0], together[index], **EXACT)


def test_tokens_need_not_be_contiguous_and_a_square_map_needs_no_size():
    layer, x = layer_of(window=2), draw((4, 4))
    scattered = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(layer(scattered), layer(x, (4, 4)), **EXACT)


def test_dropout_is_of_training_alone():
    layer, x = layer_of(proj_drop=0.5), draw((4, 6))
    assert (layer.train()(x, (4, 6)) == 0).any()
    assert torch.equal(layer.eval()(x, (4, 6)), layer_with_weights_of(layer)(x, (4, 6)))


def layer_with_weights_of(layer):
    other = layer_of()
    other.load_state_dict(layer.state_dict())
    return other


# -- how many heads, parameters, multiply-adds


@pytest.mark.parametrize(
    ("heads", "alpha", "low"),
    [(12, 0.9, 10), (24, 0.9, 21), (12, 0.5, 6), (12, 0.0, 0), (12, 1.0, 12), (100, 0.29, 28)],
)
def test_heads_are_rounded_down_as_the_authors_do(heads, alpha, low):
    with torch.device("meta"):
        layer = HiLoAttention(heads, heads, alpha=alpha)
    assert (layer.lofi_heads, layer.hifi_heads) == (low, heads - low)


class OnMaps(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        tokens, size = to_tokens(x)
        return self.layer(tokens, size)


def test_multiply_adds_are_those_of_the_authors_formula():
    layer = HiLoAttention(384, 12, 2, alpha=0.5)
    assert multiply_adds(OnMaps(layer), (384, 14, 14)).total == 83_467_776
    larger = HiLoAttention(768, 12, 2, alpha=0.9, qkv_bias=True)
    assert multiply_adds(OnMaps(larger), (768, 14, 14)).total / 1e6 == pytest.approx(298.3, abs=0.05)
    assert sum(p.numel() for p in larger.parameters()) / 1e6 == pytest.approx(2.20, abs=0.005)


def test_multiply_adds_of_a_padded_map_are_those_of_the_larger_one():
    layer = OnMaps(HiLoAttention(24, 4, 2))
    assert multiply_adds(layer, (24, 7, 9)) == multiply_adds(layer, (24, 8, 10))


# -- in timm's blocks


def test_stands_in_the_place_of_timms_attention():
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    model = timm_vit.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=4, num_classes=3, class_token=False,
        global_pool="avg", attn_layer=HiLoAttention.with_options(window_size=2, alpha=0.5), qkv_bias=True,
    )  # fmt: skip
    attention = model.blocks[0].attn
    assert isinstance(attention, HiLoAttention)
    assert (attention.window_size, attention.hifi_heads, attention.lofi_q.bias is None) == ((2, 2), 2, False)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)


# -- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(num_heads=5), "num_heads=5 does not divide dim=12"),
        (dict(window_size=0), "window_size=0 must be a positive number, or two: height and width"),
        (dict(alpha=1.2), r"alpha=1.2 must be from 0 \(windows alone\) to 1 \(pooled keys alone\)"),
        (dict(alpha=-0.1), "alpha=-0.1 must be from 0"),
        (dict(lofi_heads=5), "lofi_heads=5 must be from 0 to num_heads=4"),
        (dict(attn_drop=0.1), "attn_drop=0.1 is not computed by HiLoAttention; leave it off"),
        (dict(qk_norm=True), "qk_norm=True is not computed by HiLoAttention"),
    ],
)
def test_options_that_do_not_fit_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        HiLoAttention(WIDTH, **{"num_heads": HEADS, **options})


@pytest.mark.parametrize("lofi_heads", [0, HEADS])
def test_without_padding_a_map_that_windows_do_not_divide_is_named(lofi_heads):
    layer = layer_of(lofi_heads, 2, pad=False)
    assert layer(draw((4, 6)), (4, 6)).shape == (2, 24, WIDTH)
    with pytest.raises(
        ValueError, match=r"window_size\[1\] is 2, which does not divide the 7 positions of axis 1"
    ):
        layer(draw((4, 7)), (4, 7))


def test_tokens_that_are_no_map_are_named():
    layer = HiLoAttention(WIDTH, HEADS)
    with pytest.raises(ValueError, match=r"x has 17 tokens, which is no square map; give size"):
        layer(torch.randn(1, 17, WIDTH))
    with pytest.raises(ValueError, match=r"size=\(4, 4\) has 16 tokens, but x has 17; .*class token"):
        layer(torch.randn(1, 17, WIDTH), (4, 4))
    with pytest.raises(ValueError, match="attn_mask was given, but HiLoAttention takes no mask"):
        layer(torch.randn(1, 16, WIDTH), attn_mask=torch.zeros(16, 16))
