from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F

timm = pytest.importorskip("timm")

from torchvision.ops import deform_conv2d  # noqa: E402

from undivided.cost.vision import multiply_adds  # noqa: E402
from undivided.layers._vision import to_map, to_tokens  # noqa: E402
from undivided.models.vision import load_official  # noqa: E402
from undivided.models.vision.litv2 import (  # noqa: E402
    DROP_PATH_RATES,
    MODELS,
    ConvMlp,
    DeformableConv2d,
    DeformableMerging,
    LITv2,
)

EXACT = {"rtol": 1e-11, "atol": 1e-11}
# Parameters of the authors' code, and the millions and thousand millions of multiply-adds that their table prints.
GOLDEN = {
    "small": (27_844_000, 28, 3.7),
    "medium": (48_830_368, 49, 7.5),
    "base": (86_520_704, 87, 13.2),
    "base_384": (86_520_704, 87, 39.7),
}
NARROW = dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 4), num_classes=6)


def drawn(model):
    """Draws all that initialisation leaves zero or one, so that nothing of it is hidden."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    return model


def meta(short):
    with torch.device("meta"):
        return timm.create_model(f"undivided_litv2_{short}")


# -- published sizes


def test_every_published_size_is_there():
    assert set(MODELS) == set(DROP_PATH_RATES) == {f"litv2_{short}" for short in GOLDEN}


@pytest.mark.parametrize("short", GOLDEN)
def test_parameters_and_multiply_adds_are_those_of_the_paper(short):
    model, (parameters, millions, giga) = meta(short), GOLDEN[short]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == parameters and round(count / 1e6) == millions
    assert multiply_adds(model).total / 1e9 == pytest.approx(giga, abs=0.06)


def test_attention_is_in_the_last_two_stages_and_pools_in_the_third():
    model = meta("small")
    assert [[block.has_attention for block in stage.blocks] for stage in model.stages] == [
        [False] * 2, [False] * 2, [True] * 6, [True] * 2,
    ]  # fmt: skip
    third, fourth = model.stages[2].blocks[0].attn, model.stages[3].blocks[0].attn
    assert (third.window_size, third.lofi_heads, third.hifi_heads) == ((2, 2), 10, 2)
    assert (fourth.window_size, fourth.lofi_heads, fourth.hifi_heads) == ((1, 1), 24, 0)
    assert {layer.head_dim for layer in (third, fourth)} == {32}


def test_the_weights_are_the_same_whatever_the_size_of_images():
    shapes = [{n: p.shape for n, p in meta(short).named_parameters()} for short in ("base", "base_384")]
    assert shapes[0] == shapes[1]
    assert meta("base_384").pretrained_cfg["input_size"] == (3, 384, 384)


def test_drop_path_grows_linearly_over_all_blocks():
    model = LITv2(**NARROW, drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * index for index in range(5)])


def test_multiply_adds_of_a_block_are_those_of_its_formula():
    sizes = dict(embed_dim=32, num_heads=(4,), window_size=(2,), patch_size=16)
    counts = [multiply_adds(LITv2(depths=(depth,), **sizes), (3, 224, 224)) for depth in (1, 2)]
    tokens, pooled, width, head = 14 * 14, 7 * 7, 32, 8
    low, high, hidden = 3 * head, head, 4 * width
    every_token = width * 3 * high + high**2 + width * low + low**2 + 2 * width * hidden
    assert counts[1].projections - counts[0].projections == tokens * every_token + pooled * width * 2 * low
    assert counts[1].convolutions - counts[0].convolutions == tokens * 9 * hidden
    assert counts[1].attention - counts[0].attention == 2 * tokens * (4 * high + pooled * low)


# -- the parts


def test_the_mlp_is_the_formula():
    mlp, size = ConvMlp(6, 24).double(), (3, 5)
    x = torch.randn(2, 15, 6, dtype=torch.float64)
    hidden = F.pad(to_map(x @ mlp.fc1.weight.T + mlp.fc1.bias, size), (1, 1, 1, 1))
    near = hidden.unfold(2, 3, 1).unfold(3, 3, 1)
    y = torch.einsum("bchwij,cij->bchw", near, mlp.conv.weight[:, 0]) + mlp.conv.bias[:, None, None]
    want = F.gelu(to_tokens(y)[0]) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x, size), want, **EXACT)


def test_zeros_around_the_map_tell_tokens_where_they_are():
    mlp = ConvMlp(6, 24)
    mlp.initialise()
    out = to_map(mlp(torch.ones(1, 25, 6), (5, 5)), (5, 5))
    torch.testing.assert_close(out[..., 1, 1], out[..., 3, 2])
    assert (out[..., 0, 0] - out[..., 2, 2]).abs().max() > 1e-2


def bilinear(image, row, column):
    """The value at a place between pixels, zero outside."""
    top, left = math.floor(row), math.floor(column)
    value = torch.zeros_like(image[:, 0, 0])
    for i in (top, top + 1):
        for j in (left, left + 1):
            if 0 <= i < image.shape[1] and 0 <= j < image.shape[2]:
                value = value + (1 - abs(row - i)) * (1 - abs(column - j)) * image[:, i, j]
    return value


def deformable(offset_scale=0.3):
    layer = DeformableConv2d(3, 5, 2, 2).double()
    with torch.no_grad():
        for parameter in layer.offset.parameters():
            parameter.normal_(std=offset_scale)
    return layer


def test_a_deformable_convolution_reads_where_its_offsets_point():
    layer, x = deformable(1.0), torch.randn(2, 3, 6, 4, dtype=torch.float64)
    offsets = layer.offset(x)
    assert offsets.abs().max() > 2
    want = layer.bias[None, :, None, None].repeat(2, 1, 3, 2)
    for image in range(2):
        for row in range(3):
            for column in range(2):
                shift = offsets[image, :, row, column].tolist()
                for tap in range(4):
                    i, j = divmod(tap, 2)
                    place = 2 * row + i + shift[2 * tap], 2 * column + j + shift[2 * tap + 1]
                    want[image, :, row, column] += layer.weight[:, :, i, j] @ bilinear(x[image], *place)
    torch.testing.assert_close(layer(x), want, **EXACT)


def test_without_offsets_merging_is_a_convolution_of_stride_two():
    merging, size = DeformableMerging(4, 8).double().eval(), (6, 4)
    x = torch.randn(2, 24, 4, dtype=torch.float64)
    found, smaller = merging(x, size)
    conv = F.conv2d(to_map(x, size), merging.conv.weight, merging.conv.bias, stride=2)
    assert smaller == (3, 2)
    torch.testing.assert_close(to_map(found, smaller), F.gelu(merging.norm(conv)), **EXACT)


def test_a_map_of_odd_sides_is_padded_with_zeros():
    merging = drawn(DeformableMerging(4, 8).double().eval())
    x = torch.randn(2, 15, 4, dtype=torch.float64)
    found, size = merging(x, (3, 5))
    want, same = merging(to_tokens(F.pad(to_map(x, (3, 5)), (0, 1, 0, 1)))[0], (4, 6))
    assert size == same == (2, 3)
    torch.testing.assert_close(found, want, **EXACT)


def test_gradients_of_a_deformable_convolution_are_those_of_finite_differences():
    layer, x = deformable(), torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    # Between two places the function is smooth, on a place it has a kink.
    assert (layer.offset(x) - layer.offset(x).round()).abs().min() > 1e-3
    parameters = list(layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), [x, *parameters])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_are_not_rounded_to_half_precision(dtype):
    layer = deformable().to(dtype)
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    found = layer(x)
    want = layer.float()(x.float())
    assert found.dtype == dtype
    # The offsets are rounded once, and the output.
    torch.testing.assert_close(found.float(), want, rtol=2e-2, atol=3e-2)


def test_under_autocast_only_the_offsets_are_rounded():
    layer, x = deformable().float(), torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        offset = layer.offset(x)
        found = layer(x)
    want = deform_conv2d(x, offset.float(), layer.weight, layer.bias, stride=2)
    assert found.dtype == offset.dtype == torch.bfloat16
    assert torch.equal(found, want.bfloat16())


# -- initialisation


def test_every_kind_of_module_starts_as_the_authors_start_it():
    model = timm.create_model("undivided_litv2_small", num_classes=10)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2), name
            assert not module.bias.any(), name
        elif isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
        elif name.endswith("mlp.conv"):
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.1), name
            assert not module.bias.any(), name
        elif name.endswith("conv.offset"):
            assert not module.weight.any() and not module.bias.any(), name
        elif isinstance(module, DeformableConv2d):
            # Uniform within one over the root of the inputs of an output, as torch has it.
            bound = module.weight[0].numel() ** -0.5
            assert 0.99 * bound < module.weight.abs().max().item() <= bound, name
    assert model.no_weight_decay() == set()


# -- the authors' checkpoints

# One name of each kind, as in their code.
AUTHORS = {
    "patch_embed.proj.weight": "stem.proj.weight",
    "patch_embed.norm.bias": "stem.norm.bias",
    "layers.0.blocks.0.norm2.weight": "stages.0.blocks.0.norm2.weight",
    "layers.0.blocks.0.mlp.fc1.weight": "stages.0.blocks.0.mlp.fc1.weight",
    "layers.0.blocks.0.mlp.dwconv.dwconv.weight": "stages.0.blocks.0.mlp.conv.weight",
    "layers.0.downsample.dconv.weight": "stages.1.downsample.conv.weight",
    "layers.0.downsample.dconv.bias": "stages.1.downsample.conv.bias",
    "layers.1.downsample.dconv.conv_offset.weight": "stages.2.downsample.conv.offset.weight",
    "layers.2.downsample.norm_layer.running_var": "stages.3.downsample.norm.running_var",
    "layers.2.downsample.norm_layer.num_batches_tracked": "stages.3.downsample.norm.num_batches_tracked",
    "layers.2.blocks.1.norm1.bias": "stages.2.blocks.1.norm1.bias",
    "layers.2.blocks.1.attn.l_q.weight": "stages.2.blocks.1.attn.lofi_q.weight",
    "layers.2.blocks.1.attn.l_kv.bias": "stages.2.blocks.1.attn.lofi_kv.bias",
    "layers.2.blocks.1.attn.l_proj.weight": "stages.2.blocks.1.attn.lofi_proj.weight",
    "layers.2.blocks.1.attn.h_qkv.weight": "stages.2.blocks.1.attn.hifi_qkv.weight",
    "layers.2.blocks.1.attn.h_proj.bias": "stages.2.blocks.1.attn.hifi_proj.bias",
    "layers.3.blocks.0.attn.l_q.weight": "stages.3.blocks.0.attn.lofi_q.weight",
    "norm.weight": "norm.weight",
    "head.bias": "head.fc.bias",
}


def authors_name(name):
    """Our name -> theirs, written down the other way round."""
    name = re.sub(r"^stages\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", name)
    for ours, theirs in [
        ("stem", "patch_embed"), ("stages", "layers"), ("downsample.conv.offset", "downsample.dconv.conv_offset"),
        ("downsample.conv", "downsample.dconv"), ("downsample.norm", "downsample.norm_layer"),
        ("mlp.conv", "mlp.dwconv.dwconv"), ("lofi_", "l_"), ("hifi_", "h_"), ("head.fc", "head"),
    ]:  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def released(model):
    return {authors_name(name): tensor.clone() for name, tensor in model.state_dict().items()}


def test_names_are_those_of_the_authors():
    names = {authors_name(name): name for name in LITv2(**NARROW).state_dict()}
    assert AUTHORS.items() <= names.items()


@pytest.mark.parametrize("wrap", ["", "model"])
def test_loads_a_released_checkpoint(wrap):
    source, model, x = drawn(LITv2(**NARROW)), drawn(LITv2(**NARROW)), torch.randn(1, 3, 64, 64)
    state = released(source)
    load_official(model, {wrap: state, "epoch": 3} if wrap else state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.state_dict().items())
    assert torch.equal(model.eval()(x), source.eval()(x))


def test_another_alpha_has_other_heads_and_is_named():
    with pytest.raises(
        ValueError, match=r"lofi_q.weight has shape \[24, 32\] in state_dict, but \[16, 32\] in the"
    ):
        load_official(LITv2(**NARROW, alpha=0.5), released(LITv2(**NARROW)))
    with pytest.raises(ValueError, match=r"Not of this model: stages\.2\.blocks\.0\.attn\.hifi_qkv\.weight"):
        load_official(LITv2(**NARROW, alpha=1.0), released(LITv2(**NARROW)))


def test_one_name_too_many_is_named():
    state = released(LITv2(**NARROW)) | {"layers.0.blocks.0.attn.l_q.weight": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"Missing: nothing. Not of this model: stages\.0\.blocks\.0\.attn\.lofi_q"
    ):
        load_official(LITv2(**NARROW), state)


# -- whole models


def test_running_statistics_are_those_of_evaluation():
    model, x = drawn(LITv2(**NARROW)), torch.randn(4, 3, 64, 64)
    before = model.eval()(x)
    model.train()(x)
    assert not torch.equal(model.eval()(x), before)


def test_small_maps_are_cut_into_windows_that_are_padded():
    model = drawn(LITv2(**NARROW)).eval()
    maps = model.forward_intermediates(torch.randn(1, 3, 40, 72), intermediates_only=True)
    assert [tuple(one.shape[2:]) for one in maps] == [(10, 18), (5, 9), (3, 5), (2, 3)]


# -- refusals


def test_stages_that_do_not_agree_are_named():
    with pytest.raises(ValueError, match=r"num_heads has 3 stages, but depths=\(1, 1, 2, 1\) has 4"):
        LITv2(**{**NARROW, "num_heads": (1, 2, 2)})
    with pytest.raises(ValueError, match=r"window_size has 1 stages, but depths"):
        LITv2(**NARROW, window_size=(2,))
    with pytest.raises(
        ValueError, match=r"window_size=\(0, -1, 2, 1\) must not be negative; 0 is no attention"
    ):
        LITv2(**NARROW, window_size=(0, -1, 2, 1))
    with pytest.raises(ValueError, match=r"patch_size=0 must be a positive number, or two"):
        LITv2(**NARROW, patch_size=0)
    with pytest.raises(ValueError, match="alpha=2 must be from 0"):
        LITv2(**NARROW, alpha=2)
