from __future__ import annotations

import re
from functools import cache

import pytest
import torch
import torch.nn.functional as F

timm = pytest.importorskip("timm")

from undivided.cost.vision import MultiplyAdds, multiply_adds  # noqa: E402
from undivided.models.vision import load_official  # noqa: E402
from undivided.models.vision.gcvit import DROP_PATH_RATES, MODELS, GCViT  # noqa: E402
from undivided.testing import assert_as_accurate  # noqa: E402

# Parameters of the authors' code, and the millions and thousand millions of multiply-adds that their table prints.
GOLDEN = {
    "xxtiny": (11_995_428, 12, 2.1),
    "xtiny": (19_981_294, 20, 2.6),
    "tiny": (28_221_974, 28, 4.7),
    "tiny2": (34_535_654, 34, 5.5),
    "small": (51_092_173, 51, 8.5),
    "small2": (68_615_197, 68, 10.7),
    "base": (90_320_836, 90, 14.8),
    "large": (202_075_570, 201, 32.6),
    "large_384": (202_860_610, 201, 120.4),
    "large_512": (203_795_362, 201, 245.0),
}
# Where that table is not the count of the authors' own code: this is, to the unit.
COUNTED = {
    "xtiny": 2_912_519_424,
    "tiny2": 6_177_973_504,
    "small2": 11_537_698_176,
    "large_384": 103_943_399_424,
    "large_512": 202_137_286_656,
}
NARROW = dict(embed_dim=8, depths=(2, 2, 3, 2), num_heads=(1, 2, 2, 4), num_classes=6)
# timm rounds the squeezed channels to multiples of 8, which changes no published size.
WIDER = {**NARROW, "embed_dim": 32, "layer_scale": 1.0, "img_size": 96}


def drawn(model):
    """Draws all that initialisation leaves small or equal, so that nothing of it is hidden."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "table" in name or "gamma" in name:
                parameter.normal_()
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@cache
def meta(short):
    with torch.device("meta"):
        return timm.create_model(f"undivided_gcvit_{short}")


# -- published sizes


def test_every_published_size_is_there():
    assert set(MODELS) == set(DROP_PATH_RATES) == {f"gcvit_{short}" for short in GOLDEN}


@pytest.mark.parametrize("short", GOLDEN)
def test_parameters_are_those_of_the_authors(short):
    parameters, millions, _ = GOLDEN[short]
    count = sum(parameter.numel() for parameter in meta(short).parameters())
    assert count == parameters
    assert count / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("short", GOLDEN)
def test_multiply_adds_are_those_of_the_paper_or_of_the_authors_code(short):
    total = multiply_adds(meta(short)).total
    if short in COUNTED:
        assert total == COUNTED[short]
    else:
        assert total / 1e9 == pytest.approx(GOLDEN[short][2], rel=0.02)


def test_larger_images_have_larger_windows():
    windows = lambda short: [stage.blocks[0].attn.window_size for stage in meta(short).stages]  # noqa: E731
    assert windows("tiny") == [(7, 7), (7, 7), (14, 14), (7, 7)]
    assert windows("large_384") == [(12, 12), (12, 12), (24, 24), (12, 12)]
    assert windows("large_512") == [(16, 16), (16, 16), (32, 32), (16, 16)]


@pytest.mark.parametrize(
    ("short", "scaled"), [("tiny2", False), ("small", True), ("small2", True), ("large", True)]
)
def test_branches_are_scaled_from_small_on(short, scaled):
    assert any("gamma" in name for name, _ in meta(short).named_parameters()) == scaled


# -- structure


def test_even_blocks_are_local_and_odd_ones_global():
    kinds = [[block.is_global for block in stage.blocks] for stage in GCViT(**NARROW).stages]
    assert kinds == [[False, True], [False, True], [False, True, False], [False, True]]


def test_drop_path_grows_linearly_over_all_blocks():
    model = GCViT(**NARROW, drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.4 * index / 8 for index in range(9)])


def test_the_global_query_comes_from_the_stage_input_before_any_norm():
    model = drawn(GCViT(**NARROW, img_size=64)).eval()
    seen = {}
    stage = model.stages[0]
    stage.query_generator.register_forward_hook(lambda _, inputs, out: seen.update(read=inputs[0], query=out))
    for kind, block in zip(("local", "global"), stage.blocks, strict=True):
        block.attn.register_forward_pre_hook(lambda _, inputs, kind=kind: seen.update({kind: inputs[2:]}))
    x, size = model.stem(torch.randn(1, 3, 64, 64))
    stage(x, size)
    assert torch.equal(seen["read"], x)
    assert seen["local"] == ()
    assert seen["global"][0] is seen["query"]


def test_two_blocks_reach_the_whole_map():
    model = drawn(GCViT(**NARROW)).double().eval()

    def reached(blocks):
        x = torch.randn(1, 56 * 56, 8, dtype=torch.float64, requires_grad=True)
        stage = model.stages[0]
        query, y = stage.query_generator(x, (56, 56)), x
        for block in blocks:
            y = block(y, (56, 56), query)
        (gradient,) = torch.autograd.grad(y[0, 0].sum(), x)
        return (gradient[0].abs().amax(-1) > 0).double().mean().item()

    local, globally = model.stages[0].blocks
    assert reached([local]) == pytest.approx(49 / 56**2)
    assert reached([local, globally]) == 1.0


# -- initialisation


def test_linear_layers_norms_and_tables_start_as_the_authors_start_them():
    model = GCViT(img_size=64, num_classes=10)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
    tables = [parameter for name, parameter in model.named_parameters() if name.endswith("table")]
    assert torch.cat([table.flatten() for table in tables]).std().item() == pytest.approx(0.02, rel=0.1)
    assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if name.endswith("table")}


# -- against timm's independent port


@pytest.fixture(scope="module")
def pair():
    """timm's gcvit and ours with its weights, narrow."""
    from timm.models.gcvit import GlobalContextVit

    torch.manual_seed(0)
    options = WIDER
    theirs = drawn(GlobalContextVit(**options))
    ours = GCViT(**options)
    load_official(ours, theirs.state_dict())
    return ours, theirs


def one_by_one(model, x):
    # timm before 1.0.31 gives an image the global queries of its batch mates.
    return torch.cat([model(image[None]) for image in x])


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equals_timm_on_the_same_weights(pair, batch, training):
    ours, theirs = (model.train(training) for model in pair)
    x = torch.randn(batch, 3, 96, 96)
    with torch.no_grad():
        found, want = ours(x), one_by_one(theirs, x)
        exact = one_by_one(theirs.double(), x.double())
        theirs.float()
    assert exact.std() > 0.1
    assert_as_accurate(found, want, exact)


def test_gradients_equal_those_of_timm(pair):
    ours, theirs = (model.train() for model in pair)
    x, cotangent = torch.randn(2, 3, 96, 96), torch.randn(2, 6)
    for model, out in ((ours, ours(x)), (theirs, one_by_one(theirs, x))):
        model.zero_grad()
        out.backward(cotangent)
    translated = GCViT(**WIDER)
    load_official(translated, {name: parameter.grad for name, parameter in theirs.named_parameters()})
    wanted = dict(translated.named_parameters())
    for name, parameter in ours.named_parameters():
        largest = wanted[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=0, atol=1e-4 * largest, msg=name)


def test_a_published_size_equals_timms():
    theirs = drawn(timm.create_model("gcvit_xxtiny")).eval()
    ours = timm.create_model("undivided_gcvit_xxtiny").eval()
    load_official(ours, theirs.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        found, want = ours(x), theirs(x)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5 * want.abs().max().item())


# -- the authors' checkpoints

# One name of each kind, as in the checkpoints that they released.
AUTHORS = {
    "patch_embed.proj.bias": "stem.proj.bias",
    "patch_embed.conv_down.conv.0.weight": "stem.downsample.conv.conv_dw.weight",
    "patch_embed.conv_down.conv.2.fc.0.weight": "stem.downsample.conv.squeeze.weight",
    "patch_embed.conv_down.conv.2.fc.2.weight": "stem.downsample.conv.excite.weight",
    "patch_embed.conv_down.conv.3.weight": "stem.downsample.conv.conv_pw.weight",
    "patch_embed.conv_down.reduction.weight": "stem.downsample.reduction.weight",
    "patch_embed.conv_down.norm1.weight": "stem.downsample.norm1.weight",
    "levels.0.blocks.1.norm2.bias": "stages.0.blocks.1.norm2.bias",
    "levels.0.blocks.0.attn.qkv.weight": "stages.0.blocks.0.attn.qkv.weight",
    "levels.2.blocks.1.attn.relative_position_bias_table": "stages.2.blocks.1.attn.position_bias.table",
    "levels.3.blocks.1.mlp.fc2.weight": "stages.3.blocks.1.mlp.fc2.weight",
    "levels.1.blocks.0.gamma1": "stages.1.blocks.0.ls1.gamma",
    "levels.1.blocks.0.gamma2": "stages.1.blocks.0.ls2.gamma",
    "levels.0.downsample.conv.2.fc.0.weight": "stages.1.downsample.conv.squeeze.weight",
    "levels.2.downsample.norm2.bias": "stages.3.downsample.norm2.bias",
    "levels.0.q_global_gen.to_q_global.2.conv.0.weight": "stages.0.query_generator.blocks.2.conv_dw.weight",
    "levels.0.q_global_gen.to_q_global.2.conv.2.fc.2.weight": "stages.0.query_generator.blocks.2.excite.weight",
    "levels.3.q_global_gen.to_q_global.0.conv.3.weight": "stages.3.query_generator.blocks.0.conv_pw.weight",
    "norm.weight": "norm.weight",
    "head.weight": "head.fc.weight",
}


def authors_name(name):
    """Our name -> theirs, written down the other way round."""
    name = re.sub(r"^stages\.(\d)\.downsample", lambda match: f"levels.{int(match[1]) - 1}.downsample", name)
    fused = {"conv_dw": "conv.0", "squeeze": "conv.2.fc.0", "excite": "conv.2.fc.2", "conv_pw": "conv.3"}
    for ours, theirs in [
        ("stem.downsample", "patch_embed.conv_down"), ("stem", "patch_embed"), ("stages", "levels"),
        ("query_generator.blocks", "q_global_gen.to_q_global"), ("position_bias.table", "relative_position_bias_table"),
        ("head.fc", "head"), ("ls1.gamma", "gamma1"), ("ls2.gamma", "gamma2"),
        *((f"conv.{ours}", theirs) for ours, theirs in fused.items()), *fused.items(),
    ]:  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def released(model):
    """The weights of a model as the authors release them, with their tables of indices."""
    state = {authors_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    for name in [name for name in state if name.endswith("relative_position_bias_table")]:
        state[name.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
    return state


def scaled(**options):
    return drawn(GCViT(**{**NARROW, "layer_scale": 1e-5, **options}))


def test_names_are_those_of_the_released_checkpoints():
    model = scaled()
    names = {authors_name(name): name for name in model.state_dict()}
    assert AUTHORS.items() <= names.items()


@pytest.mark.parametrize("wrap", ["", "state_dict", "model"])
def test_loads_a_released_checkpoint(wrap):
    source, model = scaled(), scaled()
    state = released(source)
    if wrap:
        state = {wrap: {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}
    load_official(model, state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.state_dict().items())


def test_weights_without_scales_do_not_enter_a_model_with_scales():
    with pytest.raises(ValueError, match=r"Missing: stages\.0\.blocks\.0\.ls1\.gamma, .* and 14 more"):
        load_official(scaled(), released(drawn(GCViT(**NARROW))))
    with pytest.raises(ValueError, match=r"Not of this model: stages\.0\.blocks\.0\.ls1\.gamma"):
        load_official(GCViT(**NARROW), released(scaled()))


def test_one_name_too_many_is_named():
    state = released(scaled()) | {"levels.0.blocks.0.attn.rpb": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"Missing: nothing. Not of this model: stages\.0\.blocks\.0\.attn\.rpb"
    ):
        load_official(scaled(), state)


def test_two_names_for_one_weight_are_named():
    source = scaled()
    state = released(source) | {"head.fc.weight": torch.zeros(6, 64)}
    with pytest.raises(ValueError, match="Not of this model: head.fc.fc.weight"):
        load_official(scaled(), state)


def test_a_model_for_larger_images_takes_the_tables_resized_if_asked():
    source, larger = scaled(), scaled(img_size=384)
    with pytest.raises(
        ValueError, match=r"table has shape \[169, 1\] .* \[529, 1\] .*; resize_position_bias=True"
    ):
        load_official(larger, released(source))
    load_official(larger, released(source), resize_position_bias=True)
    table = source.stages[0].blocks[1].attn.position_bias.table
    want = F.interpolate(table.T.view(1, 1, 13, 13), size=(23, 23), mode="bicubic").flatten()
    torch.testing.assert_close(larger.stages[0].blocks[1].attn.position_bias.table[:, 0], want)
    weight = "stages.2.blocks.0.mlp.fc1.weight"
    assert torch.equal(larger.state_dict()[weight], source.state_dict()[weight])


def test_another_number_of_classes_is_named():
    with pytest.raises(
        ValueError, match=r"head.fc.weight has shape \[6, 64\] in state_dict, but \[9, 64\] in the m"
    ):
        load_official(scaled(num_classes=9), released(scaled()))


def test_timm_loads_a_released_file(tmp_path):
    from safetensors.torch import save_file

    source, x = scaled().eval(), torch.randn(1, 3, 224, 224)
    save_file(released(source), str(tmp_path / "gcvit.safetensors"))
    overlay = {"file": str(tmp_path / "gcvit.safetensors"), "num_classes": 6}
    model = timm.create_model(
        "undivided_gcvit_small", pretrained=True, pretrained_cfg_overlay=overlay, mlp_ratio=3.0, **NARROW
    )
    assert torch.equal(model.eval()(x), source(x))


# -- refusals


def test_stages_that_do_not_agree_are_named():
    with pytest.raises(ValueError, match=r"num_heads has 3 stages, but depths=\(2, 2, 3, 2\) has 4"):
        GCViT(**{**NARROW, "num_heads": (1, 2, 2)})
    with pytest.raises(ValueError, match=r"img_size=\(224, 0\) must be a positive number, or two"):
        GCViT(**NARROW, img_size=(224, 0))


# -- the counter


def test_multiply_adds_of_a_layer_are_those_of_its_formula():
    model = GCViT(**NARROW).eval()
    counts = multiply_adds(model, (3, 224, 224))
    attention = sum(
        2 * side**2 * window**2 * width * len(stage.blocks)
        for stage, side, window, width in zip(
            model.stages, (56, 28, 14, 7), (7, 7, 14, 7), (8, 16, 32, 64), strict=True
        )
    )
    assert counts.attention == attention
    blocks = sum(
        # qkv and output, a third less of the first in global blocks, and an MLP of three times the width.
        side**2 * width**2 * sum(3 + (not block.is_global) + 6 for block in stage.blocks)
        for stage, side, width in zip(model.stages, (56, 28, 14, 7), (8, 16, 32, 64), strict=True)
    )
    fused = [module for module in model.modules() if type(module).__name__ == "FusedMBConv"]
    gates = sum(module.squeeze.weight.numel() + module.excite.weight.numel() for module in fused)
    assert counts.projections == blocks + gates + 64 * 6
    assert counts.total == counts.convolutions + counts.projections + counts.attention


def test_the_count_says_what_is_in_it():
    text = str(MultiplyAdds(474_000_000, 3_803_000_000, 484_000_000))
    assert text == (
        "4.76 G multiply-adds: 0.47 G in convolutions, 3.80 G in projections, 0.48 G in attention"
    )


def test_counting_leaves_the_model_as_it_is():
    model = GCViT(**NARROW).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = multiply_adds(model, (3, 32, 32))
    assert model.training and first == multiply_adds(model.double().eval(), (3, 32, 32))
    assert all(torch.equal(value, before[name].to(value)) for name, value in model.state_dict().items())


def test_an_operator_of_unknown_cost_is_named():
    @torch.library.custom_op("undivided_test::mix", mutates_args=())
    def mix(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    mix.register_fake(lambda x: torch.empty_like(x))

    class Mixing(torch.nn.Conv2d):
        def forward(self, x):
            return mix(super().forward(x))

    with pytest.raises(
        ValueError, match="the multiply-adds of undivided_test.mix are unknown; give its formula"
    ):
        multiply_adds(Mixing(3, 4, 1), (3, 8, 8))


def test_an_input_size_is_needed():
    with pytest.raises(ValueError, match=r"input_size=None must be \(channels, height, width\)"):
        multiply_adds(torch.nn.Conv2d(3, 4, 1))
