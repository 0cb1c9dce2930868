from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

timm = pytest.importorskip("timm")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from undivided.cost.vision import multiply_adds  # noqa: E402
from undivided.layers import vig  # noqa: E402
from undivided.models.vision import load_official  # noqa: E402
from undivided.models.vision.vig import (  # noqa: E402
    DROP_PATH_RATES,
    HIERARCHICAL_MODELS,
    MODELS,
    ViG,
    ViGHierarchical,
)
from undivided.ops import gated_scan  # noqa: E402

# Parameters of the authors' code, the millions that their table prints, and multiply-adds but those of scans.
GOLDEN = {
    "vig_tiny": (5_834_536, 6, 1_109_959_680),
    "vig_small": (22_615_144, 23, 4_365_846_528),
    "vig_base": (89_022_184, 89, 17_315_401_728),
    "vig_h_tiny": (28_600_680, 29, 4_407_776_256),
    "vig_h_small": (50_051_688, 50, 8_606_604_288),
    "vig_h_base": (88_904_360, 89, 15_364_313_088),
}
PLAIN = dict(img_size=64, embed_dim=12, depth=3, num_heads=3, num_classes=6)
STAGES = dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), num_classes=6)
every_kind = pytest.mark.parametrize(("model_class", "options"), [(ViG, PLAIN), (ViGHierarchical, STAGES)])


def drawn(model):
    """Draws all that initialisation leaves small or equal, so that nothing of it is hidden."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


# -- published sizes


def test_every_published_size_is_there():
    assert {*MODELS, *HIERARCHICAL_MODELS} == set(DROP_PATH_RATES) == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_parameters_are_those_of_the_authors(name):
    parameters, millions, _ = GOLDEN[name]
    count = sum(parameter.numel() for parameter in meta(f"undivided_{name}").parameters())
    assert count == parameters
    assert count / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.fixture
def without_scans(monkeypatch):
    """Counting goes through hundreds of small operators in scans, and they have a count of their own below."""
    monkeypatch.setattr(vig, "gated_scan", lambda query, key, value, *gates, **options: value)


def scans_multiply_adds(tokens, width, depth=12):
    x = torch.zeros(1, width // 64, tokens, 32)
    value = torch.zeros(1, width // 64, tokens, 64)
    with FlopCounterMode(display=False) as counter:
        gated_scan(x, x, value, x, reverse_log_gate=x)
    return depth * counter.get_total_flops() // 2


def block_multiply_adds(tokens, width, hidden):
    """Of the projections of one block: keys half as wide, decays of rank 16, a SwiGLU."""
    return tokens * (2 * width**2 + 2 * width**2 + 16 * 2 * width + 3 * width * hidden)


@pytest.mark.parametrize("name", MODELS)
def test_multiply_adds_are_those_of_the_formula(name, without_scans):
    model = meta(f"undivided_{name}")
    counts, width = multiply_adds(model), model.num_features
    hidden = {192: 512, 384: 1024, 768: 2048}[width]
    assert counts.projections == 12 * block_multiply_adds(196, width, hidden) + 1000 * width
    stem = 28**2 * 3 * 81 * width // 2 + 196 * 9 * width**2 // 2
    assert counts.convolutions == stem + 12 * 196 * 9 * width
    assert counts.total == GOLDEN[name][2]


@pytest.mark.parametrize("name", HIERARCHICAL_MODELS)
def test_multiply_adds_of_stages_are_those_of_the_formula(name, without_scans):
    model = meta(f"undivided_{name}")
    counts, width = multiply_adds(model), model.feature_info[0]["num_chs"]
    projections, convolutions = (
        1000 * model.num_features,
        112**2 * 27 * width // 2 + 56**2 * 9 * width**2 // 2,
    )
    for index, stage in enumerate(model.stages):
        tokens, dim = (56 >> index) ** 2, width << index
        hidden = math.ceil(int(dim * 8 / 3) / 32) * 32
        projections += len(stage.blocks) * block_multiply_adds(tokens, dim, hidden)
        convolutions += len(stage.blocks) * tokens * 9 * dim + (tokens * 9 * dim**2 // 2 if index else 0)
    assert (counts.projections, counts.convolutions) == (projections, convolutions)
    assert counts.total == GOLDEN[name][2]


def test_the_counter_counts_scans_as_attention():
    options = {"depth": 1, "img_size": 64}
    counts = multiply_adds(meta("undivided_vig_tiny", **options), (3, 64, 64))
    assert counts.attention == scans_multiply_adds(16, 192, depth=1)
    # The recurrence multiplies twice a token and direction, for the state and for the output; chunks multiply more.
    recurrence = 12 * 2 * 196 * 2 * 192 * 32
    assert recurrence < scans_multiply_adds(196, 192) < 2 * recurrence


def test_the_papers_ratios_leave_out_the_second_projection_of_the_mlps(without_scans):
    # 20 % of DeiT-B for ViG-S, and 5.2 times less than DeiT-T for ViG-T at 1024 x 1024 (abstract).
    small = multiply_adds(meta("undivided_vig_small")).total
    base = multiply_adds(meta("deit_base_patch16_224")).total
    assert (small - 12 * 196 * 384 * 1024) / base == pytest.approx(0.20, abs=0.005)
    assert (small + scans_multiply_adds(196, 384)) / base == pytest.approx(0.26, abs=0.005)
    shape = (3, 1024, 1024)
    tiny = multiply_adds(meta("undivided_vig_tiny", img_size=1024), shape).total
    deit = multiply_adds(meta("deit_tiny_patch16_224", img_size=1024), shape).total
    recurrence = 12 * 2 * 4096 * 2 * 192 * 32
    assert deit / (tiny + recurrence - 12 * 4096 * 192 * 512) == pytest.approx(5.2, rel=0.03)
    assert deit / (tiny + recurrence) == pytest.approx(4.1, rel=0.01)
    assert deit / (tiny + scans_multiply_adds(4096, 192)) == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize(
    ("name", "conv_act", "out_act"), [("tiny", True, True), ("small", False, False), ("h_tiny", False, False)]
)
def test_activations_are_those_of_the_authors_configurations(name, conv_act, out_act):
    attention = meta(f"undivided_vig_{name}").stages[0].blocks[0].attn
    assert (attention.conv_act, attention.out_act) == (conv_act, out_act)


# -- structure


@every_kind
@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_a_block_is_two_residual_branches_with_a_swiglu(model_class, options, layer_scale):
    model = drawn(model_class(**options, layer_scale=layer_scale)).eval()
    block = model.stages[0].blocks[0]
    dim = block.norm1.weight.shape[0]
    x = torch.randn(2, 16, dim)
    scale1, scale2 = (1.0, 1.0) if layer_scale is None else (block.ls1.gamma, block.ls2.gamma)
    y = x + scale1 * block.attn(block.norm1(x), (4, 4))
    gate, up = (block.norm2(y) @ block.mlp.fc1.weight.T).chunk(2, -1)
    want = y + scale2 * ((F.silu(gate) * up) @ block.mlp.fc2.weight.T)
    torch.testing.assert_close(block(x, (4, 4)), want)
    hidden = block.mlp.fc2.weight.shape[1]
    assert hidden == (256 if model_class is ViG else 32)


def test_drop_path_grows_linearly_over_all_blocks():
    for model in (
        ViG(**{**PLAIN, "depth": 5}, drop_path_rate=0.4),
        ViGHierarchical(**STAGES, drop_path_rate=0.4),
    ):
        rates = [
            getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks
        ]
        assert rates == pytest.approx([0.1 * index for index in range(5)])


def test_features_of_the_plain_models_are_every_third_block():
    net = timm.create_model("undivided_vig_tiny", features_only=True, img_size=32, embed_dim=12)
    maps = net(torch.randn(1, 3, 32, 64))
    assert [tuple(one.shape) for one in maps] == [(1, 12, 2, 4)] * 4
    assert [info["module"] for info in net.feature_info.get_dicts()] == [f"stages.{i}" for i in (2, 5, 8, 11)]


def test_positions_are_resized_as_the_authors_do():
    model = ViG(**PLAIN)
    assert model.stem.positions((4, 4)) is model.stem.pos_embed
    table = model.stem.pos_embed.view(1, 4, 4, 12).permute(0, 3, 1, 2)
    want = F.interpolate(table, (7, 3), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.stem.positions((7, 3)), want)


@pytest.mark.parametrize("size", [(64, 64), (53, 70), (9, 17)])
def test_every_pixel_is_read(size):
    model = drawn(ViG(**PLAIN)).double().eval()
    x = torch.randn(1, 3, *size, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    assert (gradient != 0).all()


def test_the_order_of_rows_matters_to_the_scans_alone():
    model = drawn(ViGHierarchical(**STAGES)).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert (model(x) - model(x.transpose(2, 3))).abs().max() > 1e-6


# -- initialisation


def test_plain_models_start_with_the_layers_own_weights_in_the_attention():
    model = ViG(embed_dim=96, depth=2, num_heads=3, num_classes=50)
    for stage in model.stages:
        block = stage.blocks[0]
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert block.attn.qkv.weight.abs().max() <= 2**-2.5 * math.sqrt(6 / (96 + 192))
        assert block.attn.qkv.weight.std().item() == pytest.approx(
            2**-2.5 * math.sqrt(2 / (96 + 192)), rel=0.1
        )
        assert not block.attn.decay_up.bias.any()
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.1) and not model.head.fc.bias.any()
    assert model.stem.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.no_weight_decay() == {"stem.pos_embed"}


def test_hierarchical_models_start_with_the_layers_own_weights_in_the_convolution_alone():
    model = ViGHierarchical(embed_dim=96, depths=(1,), num_heads=(3,), num_classes=50)
    attention = model.stages[0].blocks[0].attn
    for module in (attention.qkv, attention.gate, attention.decay_down, attention.proj, model.head.fc):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
    bound = 2**-2.5 * math.sqrt(6 / (9 + 9 * 96))
    assert 0.9 * bound < attention.conv.weight.abs().max() <= bound
    assert model.no_weight_decay() == set()


# -- the authors' checkpoints

# One name of each kind, as in the authors' code.
ATTENTION = {
    "in_proj.0.weight": "conv.weight",
    "qkv_proj.weight": "qkv.weight",
    "gk_proj.0.weight": "decay_down.weight",
    "gk_proj.1.weight": "decay_up.weight",
    "gk_proj.1.bias": "decay_up.bias",
    "o_proj.weight": "proj.weight",
    "g_norm.weight": "scan_norm.weight",
    "l_norm.weight": "local_norm.weight",
    "g_proj.weight": "gate.weight",
    "g_proj.bias": "gate.bias",
}
NORM = ("weight", "bias")


def released(model):
    """The weights of a model under the authors' names, and which of ours each is."""
    plain = isinstance(model, ViG)
    names = {"head.weight": "head.fc.weight", "head.bias": "head.fc.bias", "norm.weight": "norm.weight"}
    stem, first = ("patch_embed.proj", (0, 1, 3, 4)) if plain else ("patch_embed", (0, 2, 5, 7))
    for index, ours in zip(first, ("conv1", "norm1", "conv2", "norm2"), strict=True):
        names |= {f"{stem}.{index}.{kind}": f"stem.{ours}.{kind}" for kind in NORM}
    if plain:
        names["pos_embed"] = "stem.pos_embed"
    else:
        names = {
            (f"classifier.{name}" if "patch" not in name else name): ours for name, ours in names.items()
        }
        names["classifier.norm.bias"] = "norm.bias"
    for i, stage in enumerate(model.stages):
        if stage.downsample is not None:
            for index, ours in ((1, "conv"), (3, "norm")):
                names |= {
                    f"layers.{i - 1}.downsample.{index}.{k}": f"stages.{i}.downsample.{ours}.{k}"
                    for k in NORM
                }
        for j in range(len(stage.blocks)):
            theirs = f"blocks.{i}" if plain else f"layers.{i}.blocks.{j}"
            ours = f"stages.{i}.blocks.{j}"
            attention, norms = ("attn", ("attn_norm", "mlp_norm")) if plain else ("op", ("norm", "norm2"))
            mlp = ("gate_proj", "down_proj") if plain else ("fc1", "fc2")
            names |= {f"{theirs}.{attention}.{name}": f"{ours}.attn.{own}" for name, own in ATTENTION.items()}
            for k in NORM[:1] if plain else NORM:
                names |= {f"{theirs}.{norm}.{k}": f"{ours}.norm{n + 1}.{k}" for n, norm in enumerate(norms)}
            names |= {
                f"{theirs}.mlp.{name}.weight": f"{ours}.mlp.fc{n + 1}.weight" for n, name in enumerate(mlp)
            }
            if f"{ours}.ls1.gamma" in model.state_dict():
                names |= {f"{theirs}.gamma{n}": f"{ours}.ls{n}.gamma" for n in (1, 2)}
    assert set(names.values()) == set(model.state_dict())
    return {name: model.state_dict()[ours].clone() for name, ours in names.items()}


@every_kind
@pytest.mark.parametrize("wrap", ["", "model"])
def test_loads_a_released_checkpoint(model_class, options, wrap):
    source, model = drawn(model_class(**options)), drawn(model_class(**options))
    state = released(source)
    load_official(model, {wrap: {f"module.{n}": t for n, t in state.items()}, "epoch": 3} if wrap else state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.state_dict().items())


def test_loads_scaled_branches_and_refuses_to_lose_them():
    source = drawn(ViG(**PLAIN, layer_scale=1.0))
    model = ViG(**PLAIN, layer_scale=1.0)
    load_official(model, released(source))
    assert torch.equal(model.stages[2].blocks[0].ls2.gamma, source.stages[2].blocks[0].ls2.gamma)
    with pytest.raises(ValueError, match=r"Not of this model: stages\.0\.blocks\.0\.ls1\.gamma"):
        load_official(ViG(**PLAIN), released(source))


def test_a_model_for_larger_images_takes_the_positions_resized_if_asked():
    source, larger = drawn(ViG(**PLAIN)), ViG(**{**PLAIN, "img_size": (96, 64)})
    with pytest.raises(
        ValueError, match=r"stem.pos_embed has shape \[1, 16, 12\] .* \[1, 24, 12\] .*=True would"
    ):
        load_official(larger, released(source))
    load_official(larger, released(source), resize_position_bias=True)
    torch.testing.assert_close(larger.stem.pos_embed, source.stem.positions((6, 4)))
    oblong = released(drawn(ViG(**{**PLAIN, "img_size": (64, 48)})))
    with pytest.raises(ValueError, match="pos_embed has 12 positions, which is no square map"):
        load_official(larger, oblong, resize_position_bias=True)


@pytest.mark.parametrize("attn_variant", ["paper", "released"])
def test_the_variant_reaches_every_layer_and_changes_evaluation_alone(attn_variant):
    source, model = drawn(ViG(**PLAIN)), ViG(**PLAIN, attn_variant=attn_variant)
    load_official(model, released(source))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.train()(x), source.train()(x))
    assert torch.equal(model.eval()(x), source.eval()(x)) == (attn_variant == "paper")
    assert all(stage.blocks[0].attn.variant == attn_variant for stage in model.stages)


# -- refusals


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"num_heads has 3 stages, but depths=\(1, 1, 2, 1\) has 4"):
        ViGHierarchical(**{**STAGES, "num_heads": (1, 2, 2)})
    with pytest.raises(ValueError, match=r"img_size=\(64, 0\) must be a positive number, or two"):
        ViG(**{**PLAIN, "img_size": (64, 0)})
    with pytest.raises(ValueError, match="variant='official' must be one of 'paper', 'released'"):
        ViG(**PLAIN, attn_variant="official")
