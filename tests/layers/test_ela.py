"""Efficient local attention: its gates, the authors' weights, and its places in timm's CNNs."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from undivided.cost.vision import multiply_adds
from undivided.layers.ela import ELA, VERSIONS, add_ela, largest_divisor, strip_means
from undivided.testing import assert_as_accurate, compare_op, poison_surroundings

# Of the authors' modules with 64 and 256 channels.
GOLDEN = {"T": (448, 1792), "B": (576, 2304), "S": (2688, 10752), "L": (3712, 14848)}
every_version = pytest.mark.parametrize("version", VERSIONS)


def drawn(layer):
    """Draws all that starts equal, so that nothing of it is hidden."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def definition(layer, x):
    """The formula with windows, sums and means alone."""

    def gate(strip, conv, norm):
        batch, channels, length = strip.shape
        half = layer.kernel_size // 2
        padded = torch.zeros(batch, channels, length + 2 * half, dtype=x.dtype)
        padded[:, :, half : half + length] = strip
        windows = padded.unfold(2, layer.kernel_size, 1).unflatten(1, (layer.conv_groups, -1))
        weight = conv.weight.to(x.dtype).unflatten(0, (layer.conv_groups, -1))
        mixed = torch.einsum("bgilk,goik->bgol", windows, weight).flatten(1, 2)
        grouped = mixed.reshape(batch, layer.norm_groups, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        scaled = centred / (centred.square().mean(2, keepdim=True) + norm.eps).sqrt()
        scaled = scaled.reshape(strip.shape)
        return 1 / (1 + torch.exp(-(scaled * norm.weight[:, None] + norm.bias[:, None]).to(x.dtype)))

    conv_w, norm_w = (layer.conv, layer.norm) if layer.share else (layer.conv_w, layer.norm_w)
    rows = gate(x.sum(3) / x.shape[3], layer.conv, layer.norm)
    columns = gate(x.sum(2) / x.shape[2], conv_w, norm_w)
    out = x * rows.unsqueeze(3) * columns.unsqueeze(2)
    return x + out if layer.residual else out


# -- the formula


@every_version
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_is_the_definition(version, share, residual):
    layer = drawn(ELA(32, version, share=share, residual=residual)).double()
    x = torch.randn(2, 32, 9, 14, dtype=torch.float64)
    torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-10, atol=1e-12)


@every_version
def test_float32_is_as_exact_as_the_definition(version):
    layer = drawn(ELA(32, version))
    x = torch.randn(2, 32, 9, 14)
    with torch.no_grad():
        found, plain = layer(x), definition(layer, x)
        assert_as_accurate(found, plain, definition(layer.double(), x.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_are_as_exact_as_products_of_that_type(dtype):
    layer = drawn(ELA(32, "S"))
    names = ("conv.weight", "norm.weight", "norm.bias")
    inputs = [torch.randn(2, 32, 9, 14), *(layer.get_parameter(name).detach() for name in names)]

    def fast(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    def eager(x, *values):
        # Gates in float32 at least and products in the type of x: what the precision itself costs.
        wide = torch.promote_types(x.dtype, torch.float32)
        module = ELA(32, "S", dtype=wide)
        named = dict(zip(names, (value.to(wide) for value in values), strict=True))
        rows, columns = (
            torch.sigmoid(
                nn.functional.group_norm(
                    nn.functional.conv1d(strip, named["conv.weight"], padding=2, groups=4),
                    16, named["norm.weight"], named["norm.bias"], module.norm.eps,
                )
            ).to(x.dtype)
            for strip in (x.to(wide).mean(3), x.to(wide).mean(2))
        )  # fmt: skip
        return x * rows[..., None] * columns[:, :, None]

    compare_op(fast, eager, eager, inputs, dtype)


def test_strips_of_half_precision_are_summed_in_float32():
    x = torch.randn(1, 8, 112, 112).to(torch.bfloat16) + 3
    for found, dim in zip(strip_means(x), (3, 2), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), x.double().mean(dim), rtol=1e-6, atol=0)


def test_a_strip_of_equal_values_is_that_value():
    x = torch.randn(2, 8, 6, 1).expand(2, 8, 6, 9)
    torch.testing.assert_close(strip_means(x)[0], x[..., 0])


def test_gradients_are_those_of_the_function():
    layer = drawn(ELA(32, "S")).double()
    x = torch.randn(2, 32, 5, 7, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def call(x, *values):
        return functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()), fast_mode=True)


@every_version
@pytest.mark.parametrize("size", [(1, 9), (9, 1), (1, 1), (3, 8)])
def test_maps_of_any_size_keep_it(version, size):
    x = torch.randn(2, 64, *size)
    layer = ELA(64, version)
    assert layer(x).shape == x.shape and layer(x).isfinite().all()
    assert layer(torch.randn(2, 64, 5, 6)).shape == (2, 64, 5, 6)


def test_a_strip_of_one_position_and_channel_leaves_the_bias_alone():
    # Alone in its group of the norm, it is its own mean.
    layer = drawn(ELA(32, "T"))
    rows, _ = layer.gates(torch.randn(1, 32, 1, 9))
    torch.testing.assert_close(rows[0, :, 0], layer.norm.bias.sigmoid())


def test_without_weights_the_gates_are_the_sigmoid_of_the_bias():
    layer = drawn(ELA(32))
    nn.init.zeros_(layer.conv.weight)
    x = torch.randn(2, 32, 4, 6)
    gate = layer.norm.bias.sigmoid()[:, None, None]
    assert torch.equal(layer(x), x * gate * gate)


def test_transposes_with_the_map_only_if_shared():
    x = torch.randn(2, 32, 5, 8, dtype=torch.float64)
    for share in (True, False):
        layer = drawn(ELA(32, "S", share=share)).double()
        turned = layer(x.transpose(2, 3)).transpose(2, 3)
        assert torch.allclose(turned, layer(x), rtol=1e-12) == share


@pytest.mark.parametrize("training", [True, False])
def test_images_do_not_see_each_other(training):
    layer = drawn(ELA(32, "L")).double().train(training)
    x = torch.randn(3, 32, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]), rtol=1e-12, atol=0)


def test_the_gates_do_not_see_the_scale_of_the_map():
    layer = drawn(ELA(32, "S")).double()
    x = torch.randn(2, 32, 12, 9, dtype=torch.float64)
    for found, want in zip(layer.gates(1e3 * x), layer.gates(1e4 * x), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("version", "width"), [("T", 1), ("B", 1), ("S", 8), ("L", 8)])
def test_before_the_norm_a_channel_sees_its_convolution_group_alone(version, width):
    layer = ELA(32, version)
    x = torch.randn(1, 32, 6, 5, requires_grad=True)
    strip, _ = strip_means(x)
    (gradient,) = torch.autograd.grad(layer.conv(strip)[0, 19].sum(), x)
    reached = gradient.abs().sum((0, 2, 3)).nonzero().flatten().tolist()
    assert reached == list(range(19 // width * width, (19 // width + 1) * width))


def test_shifts_with_the_map_if_the_padding_is_circular():
    x = torch.randn(1, 32, 9, 12, dtype=torch.float64)
    shifted = x.roll((2, 5), (2, 3))
    for mode in ("circular", "zeros"):
        layer = drawn(ELA(32, "S", padding_mode=mode)).double()
        assert torch.allclose(layer(shifted), layer(x).roll((2, 5), (2, 3)), rtol=1e-10) == (
            mode == "circular"
        )


def test_strides_do_not_matter():
    layer = drawn(ELA(32, "S"))
    x = torch.randn(2, 32, 5, 8)
    for other in (x.contiguous(memory_format=torch.channels_last), poison_surroundings(x)):
        torch.testing.assert_close(layer(other), layer(x))


def test_autocast_changes_nothing():
    layer, x = drawn(ELA(32)), torch.randn(2, 32, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
    assert torch.equal(inside, layer(x))


def test_compiles_into_one_graph():
    layer, x = ELA(32), torch.randn(2, 32, 5, 8)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


# -- counts


@every_version
def test_parameters_are_those_of_the_authors(version):
    for channels, count in zip((64, 256), GOLDEN[version], strict=True):
        assert sum(parameter.numel() for parameter in ELA(channels, version).parameters()) == count
    shared, two = (sum(p.numel() for p in ELA(64, version, share=s).parameters()) for s in (True, False))
    assert two == 2 * shared


@pytest.mark.parametrize(("version", "count"), [("T", 5 * 256 * 112), ("L", 8 * 7 * 256 * 112)])
def test_multiply_adds_are_those_of_the_strips(version, count):
    assert multiply_adds(ELA(256, version), (256, 56, 56)).total == count


def test_bytes_are_those_of_the_docstring():
    layer, x = ELA(32), torch.randn(2, 32, 20, 30)
    moved = {"read": 0, "written": 0}

    class Traffic(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            moved["read"] += sum(isinstance(t, torch.Tensor) and t.numel() == x.numel() for t in args)
            moved["written"] += isinstance(out, torch.Tensor) and out.numel() == x.numel()
            return out

    with Traffic():
        layer(x)
    assert moved == {"read": 4, "written": 2}
    assert "reads x four times and writes it twice" in ELA.__doc__


# -- options


def test_groups_that_do_not_divide_are_lowered_and_named():
    layer = ELA(24, "S")
    assert (layer.conv_groups, layer.norm_groups) == (3, 12)
    assert layer.adapted == {"norm_groups": (16, 12)}
    assert "norm_groups lowered from 16 to 12" in repr(layer)
    assert ELA(20, "L").adapted == {"norm_groups": (16, 10)}
    assert ELA(4, "S").conv_groups == 1
    assert ELA(144, "L").adapted == {}
    assert [largest_divisor(24, limit) for limit in (1, 5, 16, 32)] == [1, 4, 12, 24]


def test_sizes_can_be_given_one_by_one():
    layer = ELA(64, "B", kernel_size=3, conv_groups=32, norm_groups=4)
    assert layer.conv.weight.shape == (64, 2, 3) and layer.norm.num_groups == 4


def test_near_identity_starts_with_open_gates():
    layer = ELA(32, share=False, near_identity=True)
    x = torch.randn(2, 32, 5, 8)
    open_gate = torch.tensor(4.0).sigmoid()
    assert all(torch.equal(gate, open_gate.expand_as(gate)) for gate in layer.gates(x))
    assert torch.equal(layer(x), x * open_gate * open_gate)
    layer(x).square().sum().backward()
    assert layer.norm.weight.grad.any() and layer.norm_w.bias.grad.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ELA(64, "X"), "version='X' is not one of 'T', 'B', 'S', 'L'."),
        (lambda: ELA(64, kernel_size=4), "kernel_size=4 must be odd, so that strips keep their length."),
        (lambda: ELA(64, padding_mode="same"), 'padding_mode=\'same\' must be "zeros" or "circular".'),
        (lambda: ELA(0), "channels=0 must be positive."),
        (lambda: ELA(64, norm_groups=0), "norm_groups=0 must be positive."),
        (
            lambda: ELA(24, "B", strict=True),
            "norm_groups=16 does not divide channels=24; 12 would, and is taken with strict=False.",
        ),
        (
            lambda: ELA(20, "S", conv_groups=8, strict=True),
            "conv_groups=8 does not divide channels=20; 5 would, and is taken with strict=False.",
        ),
        (
            lambda: ELA(64)(torch.randn(64, 5, 5)),
            "x has shape [64, 5, 5]; it must be a map [batch, channels=64, height, width].",
        ),
        (
            lambda: ELA(64)(torch.randn(1, 32, 5, 5)),
            "x has shape [1, 32, 5, 5]; it must be a map [batch, channels=64, height, width].",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


# -- the authors' weights


def official(channels, width, taps, prefix=""):
    shapes = {"conv.weight": (channels, width, taps), "gn.weight": (channels,), "gn.bias": (channels,)}
    return {prefix + name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("share", [True, False])
def test_loads_one_module_of_a_checkpoint(share):
    state = official(64, 1, 5, "backbone.feat06.") | official(128, 1, 5, "backbone.feat1.")
    layer = ELA(64, "T", share=share)
    layer.load_official(state, "backbone.feat06")
    branches = [(layer.conv, layer.norm)] + ([] if share else [(layer.conv_w, layer.norm_w)])
    for conv, norm in branches:
        assert torch.equal(conv.weight, state["backbone.feat06.conv.weight"])
        assert torch.equal(norm.weight, state["backbone.feat06.gn.weight"])
        assert torch.equal(norm.bias, state["backbone.feat06.gn.bias"])
    alone = ELA(64, "T")
    alone.load_official({name.removeprefix("backbone.feat06."): value for name, value in state.items()})
    assert torch.equal(alone.conv.weight, layer.conv.weight)


def test_weights_of_another_version_are_refused_and_nothing_is_loaded():
    layer = ELA(64, "L")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"conv.weight has shape \[64, 1, 5\] .* \[64, 8, 7\] in this layer; 64 channels of version T have it\.",
    ):
        layer.load_official(official(64, 1, 5))
    lacking = official(64, 8, 7)
    del lacking["gn.bias"]
    with pytest.raises(
        ValueError,
        match="state_dict has no gn.bias; a module of the authors has conv.weight, gn.weight, gn.bias.",
    ):
        layer.load_official(lacking)
    with pytest.raises(ValueError, match="state_dict has no neck.conv.weight"):
        layer.load_official(official(64, 8, 7), "neck")
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


# -- in networks (written for timm 1.0.29 to 1.0.31: blocks keep an attention in `se`, create_attn takes a class)

timm = pytest.importorskip("timm")


def meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def small(**options):
    return timm.create_model("resnet10t", num_classes=5, **options)


def images(channels=3):
    return torch.randn(2, channels, 64, 64)


@pytest.mark.parametrize(
    ("name", "where", "version", "total", "layers"),
    [
        # As the authors built them; their ResNet-50 holds one more module, of 5376 parameters, that it never calls.
        ("mobilenetv2_100", "blocks.[1-6].*.se", "L", 3_916_904, 16),
        ("resnet50", ("maxpool", "layer?", "layer*.act2"), "S", 25_884_968 - 5_376, 21),
        # By the formula of a version: 7 parameters a channel in T, 9 in B.
        ("resnet50", "block", "T", 25_557_032 + 7 * (3 * 256 + 4 * 512 + 6 * 1024 + 3 * 2048), 16),
        ("resnet50", "stage", "B", 25_557_032 + 9 * (256 + 512 + 1024 + 2048), 4),
        ("resnet18", "block", "T", 11_689_512 + 7 * 2 * (64 + 128 + 256 + 512), 8),
    ],
)
def test_whole_networks_have_the_golden_count(name, where, version, total, layers):
    model = meta(name)
    assert len(add_ela(model, where, version, image_size=64)) == layers
    assert count(model) == total


def test_a_block_gets_what_timm_would_have_built():
    built = small(block_args=dict(attn_layer=partial(ELA, version="S"))).eval()
    added = small()
    layers = add_ela(added, "block", "S")
    assert list(layers) == [f"layer{stage}.0.se" for stage in (1, 2, 3, 4)]
    assert all(added.get_submodule(name) is layer for name, layer in layers.items())
    added.load_state_dict(built.state_dict())
    x = images()
    assert torch.equal(added.eval()(x), built(x))


def test_an_inverted_residual_gates_behind_its_depthwise_convolution():
    model = timm.create_model("mobilenetv2_035", num_classes=5).eval()
    layers = add_ela(model, "block", image_size=32)
    block = model.blocks[1][0]
    seen = {}
    block.bn2.register_forward_hook(lambda module, inputs, output: seen.update(depthwise=output))
    block.se.register_forward_pre_hook(lambda module, inputs: seen.update(gated=inputs[0]))
    model(images())
    assert block.se is layers["blocks.1.0.se"] and seen["gated"] is seen["depthwise"]
    assert all(layer.norm_groups <= 16 for layer in layers.values())


def test_named_modules_are_followed_by_their_gates():
    plain, model = small().eval(), small().eval()
    model.load_state_dict(plain.state_dict())
    layers = add_ela(model, ["layer1", "layer?.0.act1"], near_identity=True)
    assert list(layers) == ["layer1.1", *(f"layer{stage}.0.act1.ela" for stage in (1, 2, 3, 4))]
    seen = {}
    plain.layer1.register_forward_hook(lambda module, inputs, output: seen.setdefault("plain", output))
    first = layers["layer1.0.act1.ela"]
    first.register_forward_hook(lambda module, inputs, output: seen.update(ratio=output / inputs[0]))
    x = images()
    assert model(x).shape == plain(x).shape
    live = seen["ratio"][~seen["ratio"].isnan()]
    torch.testing.assert_close(live, torch.tensor(4.0).sigmoid().square().expand_as(live))


def test_stages_are_those_of_feature_info_without_the_stem():
    layers = add_ela(small(), "stage", "T")
    assert list(layers) == [f"layer{stage}.1" for stage in (1, 2, 3, 4)]
    convnext = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5)
    assert list(add_ela(convnext, "stage")) == [f"stages.{stage}.ela" for stage in range(4)]
    assert convnext(images()).shape == (2, 5)
    assert list(add_ela(timm.create_model("regnetx_002"), "stage", image_size=64))[0] == "s1.ela"


def test_any_network_takes_it_with_its_channels_and_precision():
    net = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU()).double()
    layers = add_ela(net, "?", image_size=16)
    assert [layer.channels for layer in layers.values()] == [16, 16, 8, 8]
    assert net(images(2).double()).dtype == torch.float64


def test_looking_for_channels_changes_nothing():
    model = small(in_chans=1).train()
    model.layer1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = add_ela(model)
    assert {name: model.get_submodule(name).training for name in modes} == modes
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(layer.training for layer in layers.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_every_weight_is_trained_and_survives_a_file(tmp_path):
    from safetensors.torch import load_model, save_model

    model, other = small().train(), small()
    for one in (model, other):
        add_ela(one, ["layer?.0.act1", "layer4"], "S", share=False)
        drawn(one)
    model(images()).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    save_model(model.eval(), str(tmp_path / "model.safetensors"))
    load_model(other.eval(), str(tmp_path / "model.safetensors"))
    x = images()
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("layer9", "where='layer9' is nowhere in ResNet: its modules are called "),
        ("fc", "fc gives shape [1, 5] in a forward pass; it must give a map [B, C, H, W]."),
    ],
)
def test_refuses_places_and_leaves_the_model(where, message):
    model = small()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        add_ela(model, where)
    assert [name for name, _ in model.named_modules()] == names


def test_refuses_networks_without_places():
    model = small()
    add_ela(model)
    with pytest.raises(ValueError, match="where='block' is nowhere in ResNet: no block has an empty place"):
        add_ela(model)
    with pytest.raises(ValueError, match="where='stage' is nowhere in Sequential: its feature_info lists no"):
        add_ela(nn.Sequential(nn.Conv2d(3, 8, 3)), "stage")
    unused = small()
    unused.extra = nn.Module()
    unused.extra.se = None
    with pytest.raises(ValueError, match="extra.se is not reached in a forward pass; it must give a map"):
        add_ela(unused)
    assert unused.layer1[0].se is None and unused.extra.se is None
    with pytest.raises(ValueError, match="norm_groups=32 does not divide channels=16; 16 would"):
        add_ela(timm.create_model("mobilenetv2_035"), "blocks.*.se", "T", image_size=32, strict=True)


def test_equals_timms_module_without_what_the_paper_has_not():
    from timm.layers.coord_attn import EfficientLocalAttn

    theirs = EfficientLocalAttn(32, act_layer=nn.Identity, norm_layer=partial(nn.GroupNorm, 16))
    ours = drawn(ELA(32, "B", share=False))
    with torch.no_grad():
        theirs.conv_h.weight.copy_(ours.conv.weight[..., None])
        theirs.conv_w.weight.copy_(ours.conv_w.weight[:, :, None])
    theirs.norm_h.load_state_dict(ours.norm.state_dict())
    theirs.norm_w.load_state_dict(ours.norm_w.state_dict())
    x = torch.randn(2, 32, 9, 14)
    torch.testing.assert_close(ours(x), theirs(x))
    # As timm has it, with SiLU before the gate and one group, it is another module.
    assert not torch.allclose(EfficientLocalAttn(32)(x), ELA(32, "B", share=False)(x), atol=0.05)
