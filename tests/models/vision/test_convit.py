from __future__ import annotations

import re

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

from timm.layers import resample_abs_pos_embed  # noqa: E402

from undivided.cost.vision import multiply_adds  # noqa: E402
from undivided.layers.convit import GPSA  # noqa: E402
from undivided.models.vision import load_official  # noqa: E402
from undivided.models.vision.convit import MODELS, ConViT  # noqa: E402
from undivided.testing import assert_as_accurate  # noqa: E402

# The paper's millions of parameters, and parameters and multiply-adds of the authors' code.
GOLDEN = {
    "tiny": (6, 5_710_512, 1_252_360_320),
    "tiny_plus": (10, 9_972_912, 2_131_092_352),
    "small": (27, 27_777_322, 5_746_563_360),
    "small_plus": (48, 48_979_882, 10_001_629_152),
    "base": (86, 86_540_040, 17_505_452_544),
    "base_plus": (152, 153_134_856, 30_739_500_544),
}
NARROW = dict(img_size=64, patch_size=8, embed_dim=36, depth=4, num_heads=9, gpsa_layers=2, num_classes=6)
# The same in timm's words: its width is that of a head.
TIMMS = dict(img_size=64, patch_size=8, embed_dim=4, depth=4, num_heads=9, local_up_to_layer=2, num_classes=6)


def drawn(model):
    """Draws all that initialisation leaves small or equal, so that nothing of it is hidden."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gating" in name:
                parameter.normal_(std=2.0)
            else:
                parameter.add_((0.5 if "pos_proj" in name else 0.1) * torch.randn_like(parameter))
    return model


def meta(short):
    with torch.device("meta"):
        return timm.create_model(f"undivided_convit_{short}")


def images(batch=2, size=(64, 64)):
    return torch.randn(batch, 3, *size)


# -- published sizes


def test_every_published_size_is_there():
    assert set(MODELS) == {f"convit_{short}" for short in GOLDEN}
    widths = {name: options["embed_dim"] / options["num_heads"] for name, options in MODELS.items()}
    assert all(width == (64 if name.endswith("_plus") else 48) for name, width in widths.items())


@pytest.mark.parametrize("short", GOLDEN)
def test_parameters_are_those_of_the_authors_but_for_a_bias_without_effect(short):
    millions, parameters, _ = GOLDEN[short]
    model = meta(short)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == parameters - 10 * MODELS[f"convit_{short}"]["num_heads"]
    assert abs(count / 1e6 - millions) < 1.2


@pytest.mark.parametrize("short", GOLDEN)
def test_multiply_adds_are_those_of_the_authors_with_rows_and_columns_for_pairs(short):
    counts, options = multiply_adds(meta(short)), MODELS[f"convit_{short}"]
    width, heads, tokens, side = options["embed_dim"], options["num_heads"], 196, 14
    # Theirs make logits by position of each pair of tokens, from three numbers; ours weigh values twice more.
    pairs, axes = 10 * 3 * heads * tokens**2, 10 * 2 * tokens * side * width
    assert counts.total == GOLDEN[short][2] - pairs + axes
    assert counts.attention == 2 * width * (10 * tokens**2 + 2 * (tokens + 1) ** 2) + axes
    assert counts.convolutions == tokens * 3 * 16**2 * width


# -- structure


def test_blocks_with_positions_come_first_and_the_class_token_after_them():
    model, lengths = ConViT(**NARROW), []
    for stage in model.stages:
        stage.blocks[0].attn.register_forward_hook(lambda _, inputs, out: lengths.append(out.shape[1]))
    model(images())
    assert [isinstance(stage.blocks[0].attn, GPSA) for stage in model.stages] == [True, True, False, False]
    assert lengths == [64, 64, 65, 65]
    assert [stage.cls_token is not None for stage in model.stages] == [False, False, True, False]
    assert [block.is_local for stage in meta("small").stages for block in stage.blocks] == [True] * 10 + [
        False
    ] * 2


def test_the_class_token_has_no_position_and_stands_in_front():
    model = drawn(ConViT(**NARROW)).eval()
    x, size = model.stem(images())
    seen = {}
    model.stages[2].blocks[0].register_forward_hook(lambda _, inputs, out: seen.update(x=inputs[0]))
    model.stages[2](x, size)
    assert torch.equal(seen["x"][:, 0], model.stages[2].cls_token[0].expand(2, -1))
    assert torch.equal(seen["x"][:, 1:], x)


def test_drop_path_grows_linearly():
    model = ConViT(**NARROW, drop_path_rate=0.3)
    rates = [getattr(stage.blocks[0].drop_path, "drop_prob", 0.0) for stage in model.stages]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_without_plain_blocks_there_is_no_class_token():
    model = ConViT(**{**NARROW, "gpsa_layers": 4}, global_pool="avg").eval()
    assert model.num_prefix_tokens == 0 and not [n for n, _ in model.named_parameters() if "cls" in n]
    assert model.forward_features(images()).shape == (2, 64, 36)
    with pytest.raises(
        ValueError, match='global_pool="token" needs a class token, which joins after the blocks'
    ):
        model.reset_classifier(6, "token")


def test_with_plain_blocks_alone_it_is_a_vision_transformer():
    model = ConViT(**{**NARROW, "gpsa_layers": 0})
    assert model.stages[0].cls_token is not None
    assert model(images()).shape == (2, 6)


def test_features_of_pruned_models_have_no_class_token_where_none_has_joined():
    model = drawn(ConViT(**NARROW)).eval()
    x = images()
    want = model.forward_intermediates(x, [1], intermediates_only=True)[0]
    model.prune_intermediate_layers([1])
    assert model.num_prefix_tokens == 0 and not [n for n, _ in model.named_parameters() if "cls" in n]
    assert torch.equal(model(x), want.flatten(2).transpose(1, 2))


# -- initialisation


def test_layers_start_as_convolutions_after_the_start_of_the_whole_model():
    model = ConViT(**NARROW, locality_strength=0.5)
    for stage in model.stages[:2]:
        attn = stage.blocks[0].attn
        assert torch.equal(attn.v.weight, torch.eye(36))
        assert attn.pos_proj.weight[5].tolist() == [0.0, 1.0, -0.5]
        assert (attn.gating_param == 1).all()


def test_the_rest_starts_as_the_authors_start_it():
    model = timm.create_model("undivided_convit_tiny", depth=3, gpsa_layers=2)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if not name.endswith(("attn.v", "pos_proj")):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any() and module.eps == 1e-6, name
    for parameter in (model.stem.pos_embed, model.stages[2].cls_token):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.25)


def test_parameters_without_decay():
    model = ConViT(**NARROW)
    gates = {f"stages.{index}.blocks.0.attn.gating_param" for index in (0, 1)}
    assert model.no_weight_decay() == {"stem.pos_embed", "stages.2.cls_token"} | gates
    assert ConViT(**NARROW, use_pos_embed=False).no_weight_decay() == {"stages.2.cls_token"} | gates


# -- images of other sizes


def test_positions_of_other_sizes_are_interpolated_and_those_of_pairs_made_anew():
    model, x = drawn(ConViT(**NARROW)).eval(), images(1, (80, 48))
    tokens, size = model.stem(x)
    assert size == (10, 6)
    plain = model.stem.proj(x).flatten(2).transpose(1, 2)
    want = resample_abs_pos_embed(model.stem.pos_embed, [10, 6], [8, 8], num_prefix_tokens=0)
    torch.testing.assert_close(tokens - plain, want, rtol=0, atol=1e-6)
    larger = ConViT(**{**NARROW, "img_size": (80, 48)}).eval()
    load_official(larger, released(model), resize_position_bias=True)
    torch.testing.assert_close(larger(x), model(x), rtol=1e-5, atol=1e-5)


def test_an_image_that_patches_do_not_divide_is_padded_with_zeros():
    model, x = drawn(ConViT(**NARROW)).eval(), images(1, (61, 50))
    padded = torch.zeros(1, 3, 64, 56)
    padded[:, :, :61, :50] = x
    assert torch.equal(model(x), model(padded))


# -- against timm's port


@pytest.fixture(scope="module")
def pair():
    """timm's convit and ours with its weights, narrow."""
    from timm.models.convit import ConVit

    torch.manual_seed(0)
    theirs, ours = drawn(ConVit(**TIMMS)), ConViT(**NARROW)
    load_official(ours, theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equals_timm_on_the_same_weights(pair, batch, training):
    ours, theirs = (model.train(training) for model in pair)
    x = images(batch)
    with torch.no_grad():
        found, want = ours(x), theirs(x)
        exact = theirs.double()(x.double())
        theirs.float()
    assert exact.std() > 0.1
    assert_as_accurate(found, want, exact)


def test_features_equal_those_of_timm(pair):
    ours, theirs = (model.eval() for model in pair)
    x = images()
    last, maps = ours.forward_intermediates(x, norm=False)
    for found, want in zip(
        [last, *maps], [theirs.forward_features(x), *theirs.forward_intermediates(x)[1]], strict=True
    ):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    for model in pair:
        model.global_pool = "avg"
    found, want = (model(x) for model in pair)
    for model in pair:
        model.global_pool = "token"
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, ours(x), atol=1e-2)


def test_gradients_equal_those_of_timm(pair):
    ours, theirs = (model.train() for model in pair)
    x, cotangent = images(), torch.randn(2, 6)
    for model in pair:
        model.zero_grad()
        model(x).backward(cotangent)
    translated = ConViT(**NARROW)
    load_official(translated, {name: parameter.grad for name, parameter in theirs.named_parameters()})
    wanted = dict(translated.named_parameters())
    for name, parameter in ours.named_parameters():
        largest = wanted[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=0, atol=1e-4 * largest, msg=name)


def test_a_published_size_equals_timms():
    theirs = drawn(timm.create_model("convit_tiny")).eval()
    ours = timm.create_model("undivided_convit_tiny").eval()
    load_official(ours, theirs.state_dict())
    x = images(1, (224, 224))
    with torch.no_grad():
        found, want = ours(x), theirs(x)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5 * want.abs().max().item())


# -- the authors' checkpoints

# One name of each kind, as in the checkpoints that they released.
AUTHORS = {
    "cls_token": "stages.2.cls_token",
    "pos_embed": "stem.pos_embed",
    "patch_embed.proj.bias": "stem.proj.bias",
    "blocks.0.norm1.weight": "stages.0.blocks.0.norm1.weight",
    "blocks.0.attn.gating_param": "stages.0.blocks.0.attn.gating_param",
    "blocks.1.attn.qk.weight": "stages.1.blocks.0.attn.qk.weight",
    "blocks.1.attn.v.weight": "stages.1.blocks.0.attn.v.weight",
    "blocks.1.attn.pos_proj.weight": "stages.1.blocks.0.attn.pos_proj.weight",
    "blocks.1.attn.proj.bias": "stages.1.blocks.0.attn.proj.bias",
    "blocks.3.attn.qkv.weight": "stages.3.blocks.0.attn.qkv.weight",
    "blocks.3.mlp.fc2.bias": "stages.3.blocks.0.mlp.fc2.bias",
    "norm.weight": "norm.weight",
    "head.weight": "head.fc.weight",
}


def authors_name(name):
    """Our name -> theirs, written down the other way round."""
    name = re.sub(r"^stages\.\d+\.cls_token", "cls_token", name)
    name = re.sub(r"^stages\.(\d+)\.blocks\.0", r"blocks.\1", name)
    name = name.replace("stem.pos_embed", "pos_embed").replace("stem", "patch_embed")
    return name.replace("head.fc", "head")


def released(model):
    """The weights of a model as the authors release them, with a bias of positions."""
    state = {authors_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    for name in [name for name in state if name.endswith("pos_proj.weight")]:
        state[name.replace("weight", "bias")] = torch.randn(9)
    return state


def test_names_are_those_of_the_released_checkpoints():
    names = {authors_name(name): name for name in ConViT(**NARROW).state_dict()}
    assert AUTHORS.items() <= names.items()


@pytest.mark.parametrize("wrap", ["", "model"])
@pytest.mark.parametrize("gpsa_layers", [0, 2, 3])
def test_loads_a_released_checkpoint(wrap, gpsa_layers):
    source, model = (drawn(ConViT(**{**NARROW, "gpsa_layers": gpsa_layers})) for _ in range(2))
    state = released(source)
    if wrap:
        state = {wrap: {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}
    load_official(model, state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.state_dict().items())


def test_weights_of_another_number_of_layers_with_positions_are_refused():
    source = ConViT(**{**NARROW, "gpsa_layers": 3})
    with pytest.raises(
        ValueError,
        match=r"known releases: the authors' and timm's.*Missing: stages\.2\.blocks\.0\.attn\.qkv\.weight. "
        r"Not of this model: stages\.2\.blocks\.0\.attn\.gating_param",
    ):
        load_official(ConViT(**NARROW), released(source))


def test_a_model_for_larger_images_takes_the_positions_resized_if_asked():
    source, larger = drawn(ConViT(**NARROW)), ConViT(**{**NARROW, "img_size": (96, 80)})
    with pytest.raises(
        ValueError, match=r"pos_embed has shape \[1, 64, 36\] .* \[1, 120, 36\] .*; resize_position_bias"
    ):
        load_official(larger, released(source))
    load_official(larger, released(source), resize_position_bias=True)
    want = resample_abs_pos_embed(source.stem.pos_embed, [12, 10], [8, 8], num_prefix_tokens=0)
    torch.testing.assert_close(larger.stem.pos_embed, want)
    state = released(source) | {"pos_embed": torch.zeros(1, 60, 36)}
    with pytest.raises(ValueError, match="pos_embed has 60 positions, which are no square map"):
        load_official(larger, state, resize_position_bias=True)


def test_timm_loads_a_released_file(tmp_path):
    from safetensors.torch import save_file

    source, x = drawn(ConViT(**NARROW)).eval(), images()
    save_file(released(source), str(tmp_path / "convit.safetensors"))
    overlay = {"file": str(tmp_path / "convit.safetensors"), "num_classes": 6}
    model = timm.create_model(
        "undivided_convit_small", pretrained=True, pretrained_cfg_overlay=overlay, **NARROW
    )
    assert torch.equal(model.eval()(x), source(x))


# -- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(gpsa_layers=5), "gpsa_layers=5 must be from 0 to depth=4"),
        (dict(gpsa_layers=-1), "gpsa_layers=-1 must be from 0 to depth=4"),
        (dict(gpsa_layers=4), 'global_pool="token" needs a class token'),
        (dict(num_heads=5), "num_heads=5 does not divide dim=36"),
        (dict(patch_size=0), "patch_size=0 must be a positive number, or two"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        ConViT(**{**NARROW, **options})
