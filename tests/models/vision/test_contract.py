"""timm's contract, for every model that the library registers, at a size that takes milliseconds."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

from timm.models import group_parameters  # noqa: E402
from timm.optim import param_groups_weight_decay  # noqa: E402

from undivided.models.vision import PREFIX, load_official, registered_models  # noqa: E402
from undivided.models.vision._initialisation import initialise, truncated_normal  # noqa: E402
from undivided.models.vision.convit import ConViT  # noqa: E402
from undivided.models.vision.gcvit import GCViT  # noqa: E402
from undivided.models.vision.litv2 import LITv2  # noqa: E402
from undivided.models.vision.ravlt import RAVLT  # noqa: E402
from undivided.models.vision.tic import TiC  # noqa: E402
from undivided.models.vision.vig import ViG, ViGHierarchical  # noqa: E402

# A family adds here what makes its models small; everything below holds for all.
SMALL = {
    ConViT: dict(img_size=64, patch_size=8, embed_dim=36, depth=4, num_heads=9, gpsa_layers=2),
    GCViT: dict(img_size=64, embed_dim=8, depths=(2, 2, 3, 2), num_heads=(1, 2, 2, 4)),
    LITv2: dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 4)),
    RAVLT: dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), projection=24),
    TiC: dict(embed_dim=8, depths=(1, 1, 2, 1), head_dim=8, kernel_size=3),
    ViG: dict(img_size=64, embed_dim=8, depth=3, num_heads=2),
    ViGHierarchical: dict(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4)),
}
# Their features are tokens with the class token in front, as in timm's vision transformers; others' are maps.
CLASS_TOKEN = {ConViT}
CLASSES = 5
MODELS = registered_models()
every_model = pytest.mark.parametrize("name", MODELS)


def kinds():
    """One model of each family for every structure that is left when all of them are small."""
    found = {}
    for name, family in MODELS.items():
        with torch.device("meta"):
            shapes = small(name).state_dict() if family in SMALL else {name: torch.empty(0)}
        found.setdefault((family, *((key, value.shape) for key, value in shapes.items())), name)
    return list(found.values())


# float32 at another order of summation.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def small(name, **options):
    return timm.create_model(name, **{"num_classes": CLASSES, **SMALL[MODELS[name]], **options})


every_kind = pytest.mark.parametrize("name", kinds())
every_class = pytest.mark.parametrize(
    "name", [next(n for n in MODELS if MODELS[n] is cls) for cls in dict.fromkeys(MODELS.values())]
)


def images(batch=2, size=64, channels=3):
    return torch.randn(batch, channels, size, size)


def lively(model):
    """Draws all parameters at random, so that no branch is hidden by a factor of 1e-5 or a zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# -- registration


@every_model
def test_is_registered_under_our_prefix_and_takes_no_name_of_timm(name):
    assert name.startswith(PREFIX)
    assert timm.is_model(name)
    assert timm.models.model_entrypoint(name).__module__.startswith("undivided.models.vision.")


def test_timm_lists_our_models_and_keeps_its_own():
    assert set(timm.list_models(f"{PREFIX}*")) == set(MODELS)
    for name in MODELS:
        own = name.removeprefix(PREFIX)
        if timm.is_model(own):
            assert timm.models.model_entrypoint(own).__module__.startswith("timm.")


@every_model
def test_the_whole_model_is_as_its_config_says(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    config = model.pretrained_cfg
    assert config["architecture"] == name
    assert model.get_classifier() is model.get_submodule(config["classifier"])
    assert model.get_classifier().out_features == config["num_classes"] == model.num_classes
    assert model.get_submodule(config["first_conv"]).in_channels == config["input_size"][0]
    assert [info["reduction"] for info in model.feature_info] == sorted(
        info["reduction"] for info in model.feature_info
    )


def test_importing_the_library_registers_nothing_and_importing_the_package_does(run_python):
    code = """
import sys, undivided, undivided.layers.gcvit, undivided.models
assert "timm" not in sys.modules
import timm
before = len(timm.list_models("undivided_*"))
import undivided.models.vision
print(before, len(timm.list_models("undivided_*")))
"""
    assert run_python(code).stdout.split() == ["0", str(len(MODELS))]


def test_without_timm_the_error_says_what_to_install(run_python):
    code = """
import sys
sys.modules["timm"] = None
try:
    import undivided.models.vision
except ModuleNotFoundError as error:
    print(error)
"""
    assert 'undivided.models.vision needs timm: pip install "undivided[vision]".' in run_python(code).stdout


def test_timm_still_has_what_registration_is_written_for():
    build = inspect.signature(timm.models.build_model_with_cfg).parameters
    needed = {"model_cls", "variant", "pretrained", "pretrained_filter_fn", "feature_cfg"}
    assert needed <= set(build), f"timm {timm.__version__} builds otherwise (written for 1.0.29 to 1.0.31)"


@every_class
def test_an_argument_that_does_not_exist_is_refused(name):
    with pytest.raises(TypeError, match="windowsize"):
        small(name, windowsize=7)


# -- forward


@every_kind
def test_forward_is_head_of_features(name):
    model, x = lively(small(name)).eval(), images()
    features = model.forward_features(x)
    assert features.shape[0] == 2
    assert features.shape[-1 if MODELS[name] in CLASS_TOKEN else 1] == model.num_features
    logits = model(x)
    assert logits.shape == (2, CLASSES)
    assert torch.equal(logits, model.forward_head(features))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(pooled), logits)


@every_kind
def test_an_image_does_not_depend_on_its_batch_mates(name):
    model, x = lively(small(name)).eval(), images(4)
    together = model(x)
    assert together.std() > 1e-2
    for index in range(4):
        torch.testing.assert_close(model(x[index : index + 1])[0], together[index], **CLOSE)


@every_kind
def test_training_and_evaluation_agree_where_nothing_is_dropped(name):
    model, x = lively(small(name)).train(), images()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            # Statistics of the batch are the one difference that is meant.
            module.eval()
    torch.testing.assert_close(model(x), model.eval()(x), **CLOSE)


@every_class
@pytest.mark.parametrize("rate", ["drop_rate", "proj_drop_rate", "drop_path_rate"])
def test_every_rate_drops_in_training_alone(name, rate):
    model, x = lively(small(name, **{rate: 0.4})), images()
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@every_class
@pytest.mark.parametrize("size", [(64, 96), (48, 48), (75, 53), (9, 17)])
def test_images_of_other_sizes_are_taken(name, size):
    model = lively(small(name)).eval()
    x = torch.randn(2, 3, *size)
    assert model(x).isfinite().all()
    for info, feature in zip(model.feature_info, model.forward_intermediates(x)[1], strict=True):
        assert tuple(feature.shape[2:]) == tuple(-(-length // info["reduction"]) for length in size)


@every_class
def test_images_of_other_channels_and_models_of_other_dtypes(name):
    assert small(name, in_chans=1)(images(channels=1)).shape == (2, CLASSES)
    assert small(name, dtype=torch.float64)(images().double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert small(name)(images()).isfinite().all()


@every_class
def test_one_graph_under_torch_compile(name):
    model, x = lively(small(name)).eval(), images()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), **CLOSE)


# -- classifier


@every_kind
def test_the_classifier_can_be_exchanged_and_removed(name):
    model, x = small(name).eval(), images()
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.num_classes == model.get_classifier().out_features == 7
    assert not model.head.training
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))
    assert small(name, num_classes=0)(x).shape == (2, model.num_features)


@every_class
def test_a_wider_pooling_widens_the_classifier(name):
    model = small(name, global_pool="catavgmax")
    assert model.head_hidden_size == 2 * model.num_features == model.get_classifier().in_features
    assert model(images()).shape == (2, CLASSES)


# -- features


@every_kind
def test_intermediates_are_those_of_the_stages(name):
    model, x = lively(small(name)).eval(), images()
    last, maps = model.forward_intermediates(x, norm=True)
    assert torch.equal(last, model.forward_features(x))
    if MODELS[name] in CLASS_TOKEN:
        last = last[:, 1:].transpose(1, 2).unflatten(2, maps[-1].shape[2:])
    assert torch.equal(maps[-1], last)
    raw = model.forward_intermediates(x, intermediates_only=True)
    for info, one in zip(model.feature_info, raw, strict=True):
        assert one.shape == (2, info["num_chs"], 64 // info["reduction"], 64 // info["reduction"])
    assert torch.equal(raw[0], maps[0]) and not torch.equal(raw[-1], maps[-1])
    some = model.forward_intermediates(x, [0, -2], intermediates_only=True, stop_early=True)
    assert torch.equal(some[0], raw[0]) and torch.equal(some[1], raw[-2])
    (one,) = model.forward_intermediates(x, 1, intermediates_only=True)
    assert torch.equal(one, raw[-1])


@every_class
def test_stages_after_the_last_one_asked_for_do_not_run(name):
    model = small(name).eval()
    model.stages[-1].register_forward_hook(lambda *_: pytest.fail("the last stage ran"))
    model.forward_intermediates(images(), [1], stop_early=True)


@every_class
def test_intermediates_that_do_not_exist_are_named(name):
    model = small(name)
    with pytest.raises(ValueError, match=f"indices has 9, but there are {len(model.stages)} stages"):
        model.forward_intermediates(images(), [0, 9])
    with pytest.raises(ValueError, match="indices=0 must be from 1 to"):
        model.forward_intermediates(images(), 0)
    with pytest.raises(ValueError, match="output_fmt='NLC' must be \"NCHW\""):
        model.forward_intermediates(images(), output_fmt="NLC")


@every_kind
def test_features_only_gives_the_maps_that_it_announces(name):
    net = timm.create_model(name, features_only=True, out_indices=(0, 2), **SMALL[MODELS[name]])
    maps = net(images())
    assert [one.shape[1] for one in maps] == net.feature_info.channels()
    assert [64 // one.shape[2] for one in maps] == net.feature_info.reduction()
    assert len(net.model.stages) == 3 and isinstance(net.model.get_classifier(), nn.Identity)


# -- training


@every_kind
def test_every_parameter_has_a_gradient(name):
    model = lively(small(name)).train()
    model(images()).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@every_kind
def test_recomputing_changes_no_gradient(name):
    model, x = lively(small(name)).train(), images()
    blocks = sum(len(stage.blocks) for stage in model.stages)
    runs = []
    for stage in model.stages:
        for block in stage.blocks:
            # Before a block: recomputing stops as soon as it has what the backward pass needs.
            block.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients(enable):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        runs.clear()
        model(x).square().sum().backward()
        return len(runs), [parameter.grad.clone() for parameter in model.parameters()]

    (plain, want), (recomputed, found) = gradients(False), gradients(True)
    assert (plain, recomputed) == (blocks, 2 * blocks)
    torch.testing.assert_close(found, want, **CLOSE)


@every_kind
def test_parameters_without_decay_exist_and_are_left_out_by_timm(name):
    model = small(name)
    names = model.no_weight_decay()
    parameters = dict(model.named_parameters())
    assert names <= set(parameters)
    undecayed, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=names)
    assert undecayed["weight_decay"] == 0.0 and decayed["weight_decay"] == 0.05
    kept = {id(parameter) for parameter in decayed["params"]}
    assert all(id(parameters[one]) not in kept for one in names)


@every_class
@pytest.mark.parametrize("coarse", [False, True])
def test_groups_by_depth_rise_from_the_stem_to_the_head(name, coarse):
    model = small(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    ordered = [groups[key] for key in sorted(groups)]
    assert all(one.startswith("stem") for one in ordered[0])
    assert any(one.startswith("head") for one in ordered[-1])
    depth = len(model.stages) if coarse else sum(len(stage.blocks) for stage in model.stages)
    assert len(ordered) >= depth + 2
    # What stands before the blocks of a stage is as deep as the first of them, not as deep as the head.
    deepest = [one for group in ordered[depth + 1 :] for one in group]
    assert not any(one.startswith(("stem", "stages")) for one in deepest)


@every_class
def test_weights_survive_a_file(name, tmp_path):
    from safetensors.torch import load_model, save_model

    model, other, x = lively(small(name)).eval(), lively(small(name)).eval(), images()
    save_model(model, str(tmp_path / "model.safetensors"))
    assert not torch.equal(other(x), model(x))
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), model(x))


@every_class
def test_timm_loads_a_file_of_ours(name, tmp_path):
    from safetensors.torch import save_file

    model, x = lively(small(name)).eval(), images()
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": CLASSES}
    again = small(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(again(x), model(x))


# -- released weights


@every_class
def test_a_foreign_dict_is_refused_and_nothing_is_loaded(name):
    model = lively(small(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    foreign = timm.create_model("resnet10t", num_classes=CLASSES).state_dict()
    with pytest.raises(
        ValueError, match=r"state_dict is not one of .* Missing: .* Not of this model: .*conv1"
    ):
        load_official(model, foreign)
    almost = {key: torch.zeros_like(value) for key, value in before.items()}
    lost = next(key for key in almost if "weight" in key)
    kept = almost.pop(lost)
    with pytest.raises(ValueError, match=f"Missing: {lost}. Not of this model: nothing"):
        load_official(model, almost)
    almost[lost] = kept.flatten()[1:]
    with pytest.raises(ValueError, match=f"{lost} has shape .* in state_dict, but .* in the model"):
        load_official(model, almost)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# -- order of initialisation


class Tuned(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.initialise()

    def initialise(self):
        nn.init.eye_(self.linear.weight)


def test_what_a_module_wants_of_its_own_comes_after_what_holds_for_all():
    model = nn.Sequential(nn.Linear(4, 4), Tuned(), nn.LayerNorm(4))
    nn.init.ones_(model[0].bias)
    nn.init.zeros_(model[2].weight)
    initialise(model, truncated_normal)
    assert torch.equal(model[1].linear.weight, torch.eye(4))
    assert not model[1].linear.bias.any() and not model[0].bias.any()
    assert model[2].weight.min() == 1
    assert 0 < model[0].weight.std() < 0.05


@every_class
def test_entry_points_have_timms_signature(name):
    assert list(inspect.signature(timm.models.model_entrypoint(name)).parameters) == ["pretrained", "kwargs"]
