from __future__ import annotations

import re
from functools import cache

import pytest
import torch

timm = pytest.importorskip("timm")

from undivided.cost.vision import multiply_adds  # noqa: E402
from undivided.layers.rala import ModulatedSoftmaxAttention, RankAugmentedLinearAttention  # noqa: E402
from undivided.models.vision import load_official  # noqa: E402
from undivided.models.vision.ravlt import DROP_PATH_RATES, MODELS, RAVLT  # noqa: E402

# Parameters and multiply-adds of the authors' code, to the unit, and what their table prints: millions, and thousand
# millions of multiply-adds.
GOLDEN = {
    "tiny": (14_897_768, 2_613_312_000, 15, 2.4),
    "small": (25_591_208, 4_878_388_352, 26, 4.6),
    "base": (48_241_288, 10_579_554_816, 48, 9.9),
    "large": (95_242_440, 17_208_927_104, 95, 16.0),
}
NARROW = dict(
    embed_dims=(8, 16, 24, 32), depths=(1, 2, 2, 1), num_heads=(1, 2, 2, 2), projection=40, num_classes=5
)
# Logits of the authors' code in float64 with the weights of `filled` for the images of `waves`.
EVALUATED = [
    [5.12542394, -4.18385334, 3.85541585, -2.42733838, 1.87095170],
    [6.70180915, -5.81184673, 5.50934201, -4.08111291, 3.49849258],
]
TRAINED = [
    [0.10143835, 0.11620915, 0.34709361, 0.23391315, 0.09874201],
    [0.17457361, 0.02976825, 0.44547687, 0.12513915, 0.21619126],
]
# And norms of the gradients there, in training, of the sum of logits times 1, 2, 3, 4, 5.
GRADIENTS = {
    "patch_embed.proj.0.weight": 76.1040677,
    "layers.0.blocks.0.attn.qkvo.weight": 1.10556721,
    "layers.1.blocks.0.pos.weight": 0.376088926,
    "layers.0.downsample.reduction.weight": 3.86115417,
    "layers.1.blocks.1.attn.lepe.weight": 0.875808306,
    "layers.2.blocks.0.attn.qkvo.weight": 0.131386425,
    "layers.3.blocks.0.gamma_1": 0.0432455794,
    "proj.weight": 4.9770341,
    "norm.bias": 4.33778278,
}


@cache
def meta(short):
    with torch.device("meta"):
        return timm.create_model(f"undivided_ravlt_{short}")


def narrow(**options):
    return RAVLT(**{**NARROW, **options})


def authors_name(name):
    """Our name -> theirs, written down the other way round."""
    name = re.sub(r"^norm\.", "", name)
    name = re.sub(r"^stages\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", name)
    name = re.sub(r"blocks\.(\d+)\.(norm[12])", r"blocks.\1.\2.norm", name)
    for ours, theirs in (
        ("stem", "patch_embed"), ("stages", "layers"), ("mlp", "ffn"), ("head.fc", "head"),
        ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def released(model):
    """The weights of a model under the authors' names and in their shapes, with their tables of angles."""
    state = {}
    for name, tensor in model.state_dict().items():
        theirs = authors_name(name)
        if "gamma" in theirs:
            tensor = tensor[None, :, None, None]
        elif tensor.dim() == 2:
            tensor = tensor[..., None, None]
        state[theirs] = tensor.clone()
    return state | {f"layers.{index}.RoPE.angle": torch.zeros(4) for index in range(4)}


def filled(state):
    """Sine waves for weights: no generator of random numbers, and nothing near its initial value."""
    filled = dict(state)
    names = sorted(name for name in state if not name.endswith(("num_batches_tracked", "angle")))
    for index, name in enumerate(names):
        tensor = state[name]
        steps = torch.arange(tensor.numel(), dtype=torch.float64) * (0.7 + 0.01 * index) + index
        wave = torch.sin(steps).view(tensor.shape)
        if tensor.squeeze().dim() > 1:
            filled[name] = 2 * wave / tensor[0].numel() ** 0.5
        elif "gamma" in name or name.endswith(("weight", "running_var")):
            filled[name] = 1 + 0.3 * wave
        else:
            filled[name] = 0.3 * wave
    return filled


def waves():
    x = torch.sin(torch.arange(2 * 3 * 64 * 96, dtype=torch.float64) * 0.37).view(2, 3, 64, 96)
    return x * torch.linspace(0, 2, 96, dtype=torch.float64)


def authors_weights(**options):
    model = narrow(**options)
    load_official(model, filled(released(model)))
    return model


# -- published sizes


def test_every_published_size_is_there():
    assert set(MODELS) == set(DROP_PATH_RATES) == {f"ravlt_{short}" for short in GOLDEN}


@pytest.mark.parametrize("short", GOLDEN)
def test_parameters_are_those_of_the_authors(short):
    parameters, _, millions, _ = GOLDEN[short]
    count = sum(parameter.numel() for parameter in meta(short).parameters())
    assert count == parameters
    assert count / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("short", GOLDEN)
def test_multiply_adds_are_those_of_the_authors_code(short):
    counts = multiply_adds(meta(short))
    _, total, _, printed = GOLDEN[short]
    assert counts.total == total
    # Their table is without the products of attention, but for 2 %.
    assert (total - counts.attention) / 1e9 == pytest.approx(printed, rel=0.021)
    assert total / 1e9 > 1.05 * printed


@pytest.mark.parametrize("short", GOLDEN)
def test_the_first_two_stages_are_linear_and_the_last_two_are_not(short):
    kinds = [[type(block.attn) for block in stage.blocks] for stage in meta(short).stages]
    assert all(kind is RankAugmentedLinearAttention for stage in kinds[:2] for kind in stage)
    assert all(kind is ModulatedSoftmaxAttention for stage in kinds[2:] for kind in stage)
    widths = {block.attn.head_dim for stage in meta(short).stages for block in stage.blocks}
    assert widths == ({64} if short in ("tiny", "small") else {96, 64})


def test_tokens_of_linear_stages_cost_the_same_in_larger_images():
    model = narrow(attention=("linear",) * 4, embed_dims=(8,) * 4, num_heads=(1,) * 4)
    counts = [multiply_adds(model, (3, side, side)).attention for side in (64, 128)]
    # Twice a token: the product with the sum over queries and that over keys; and the buffer in and out.
    tokens = [sum((side // r) ** 2 for r in (4, 8, 8, 16, 16, 32)) for side in (64, 128)]
    assert counts == [count * 2 * (8 + 8 * 8) for count in tokens]


# -- against the authors' code


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_logits_are_those_of_the_authors_code(training, dtype):
    model = narrow(dtype=dtype).train(training)
    load_official(model, filled(released(model)))
    want = torch.tensor(TRAINED if training else EVALUATED, dtype=torch.float64)
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(model(waves().to(dtype)).double(), want, **close)


def test_gradients_are_those_of_the_authors_code():
    model = narrow(dtype=torch.float64).train()
    load_official(model, filled(released(model)))
    (model(waves()) * torch.arange(1, 6)).sum().backward()
    found = {authors_name(name): parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert {name: found[name] for name in GRADIENTS} == pytest.approx(GRADIENTS, rel=1e-5)


@pytest.mark.parametrize("size", [(64, 16), (16, 64)])
def test_gradients_through_maps_of_one_row_or_column_are_those_of_finite_differences(size):
    # Layouts of maps with an axis of 1 are ambiguous, and batch norms have gone wrong over it.
    torch.manual_seed(0)
    model = narrow(dtype=torch.float64).train()
    load_official(model, filled(released(model)))
    parameters = dict(model.named_parameters())
    x = torch.randn(4, 3, *size, dtype=torch.float64)
    direction = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}

    def moved(step):
        point = {name: parameters[name] + step * direction[name] for name in parameters}
        return torch.func.functional_call(model, point, (x,)).sin().sum()

    moved(0.0).backward()
    slope = sum((parameters[name].grad * direction[name]).sum().item() for name in parameters)
    assert slope == pytest.approx(((moved(1e-6) - moved(-1e-6)) / 2e-6).item(), rel=1e-4)


def test_one_image_is_evaluated_as_in_a_batch():
    model = authors_weights().eval()
    x = waves().float()
    torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), model(x), rtol=1e-4, atol=1e-5)


# One name of each kind, as in the authors' checkpoints.
AUTHORS = {
    "patch_embed.proj.0.weight": "stem.proj.0.weight",
    "patch_embed.proj.10.running_var": "stem.proj.10.running_var",
    "layers.0.blocks.0.pos.weight": "stages.0.blocks.0.pos.weight",
    "layers.0.blocks.0.norm1.norm.weight": "stages.0.blocks.0.norm1.weight",
    "layers.0.blocks.0.attn.qkvo.weight": "stages.0.blocks.0.attn.qkvo.weight",
    "layers.2.blocks.1.attn.lepe.bias": "stages.2.blocks.1.attn.lepe.bias",
    "layers.3.blocks.0.attn.proj.bias": "stages.3.blocks.0.attn.proj.bias",
    "layers.1.blocks.0.ffn.dwconv.weight": "stages.1.blocks.0.mlp.dwconv.weight",
    "layers.1.blocks.0.gamma_1": "stages.1.blocks.0.ls1.gamma",
    "layers.0.downsample.reduction.weight": "stages.1.downsample.reduction.weight",
    "layers.0.downsample.norm.num_batches_tracked": "stages.1.downsample.norm.num_batches_tracked",
    "proj.weight": "norm.proj.weight",
    "norm.running_mean": "norm.norm.running_mean",
    "head.weight": "head.fc.weight",
}


def test_names_are_those_of_the_released_checkpoints():
    assert AUTHORS.items() <= {authors_name(name): name for name in narrow().state_dict()}.items()


@pytest.mark.parametrize("wrap", ["", "model"])
def test_loads_a_released_checkpoint(wrap):
    source, model = authors_weights(), narrow()
    state = released(source)
    if wrap:
        state = {wrap: {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}
    load_official(model, state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.state_dict().items())


def test_weights_without_factors_do_not_enter_a_model_with_factors():
    with pytest.raises(ValueError, match=r"Missing: stages\.0\.blocks\.0\.ls1\.gamma, .* and 8 more"):
        load_official(narrow(), released(narrow(layer_scale=None)))


def test_one_name_too_many_is_named():
    state = released(narrow()) | {"layers.0.blocks.0.attn.gate": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"Missing: nothing. Not of this model: .*attn\.gate"):
        load_official(narrow(), state)


# -- structure


def test_drop_path_grows_linearly_over_all_blocks():
    model = narrow(drop_path_rate=0.5)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.5 * index / 5 for index in range(6)])


def test_weights_start_as_the_authors_start_them():
    model = RAVLT(num_classes=10, depths=(1, 1, 1, 1), layer_scale=(1.0, 1.0, 1e-6, 1e-6))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15), name
            assert not module.bias.any(), name
        elif isinstance(module, torch.nn.LayerNorm | torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any(), name
    factors = [stage.blocks[0].ls2.gamma.unique().tolist() for stage in model.stages]
    assert factors == [[1.0], [1.0], [pytest.approx(1e-6)], [pytest.approx(1e-6)]]
    assert model.get_classifier().weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_the_classifier_reads_the_projection():
    model = narrow()
    assert model.num_features == model.head_hidden_size == model.get_classifier().in_features == 40
    assert [info["num_chs"] for info in model.feature_info] == [8, 16, 24, 32]


@pytest.mark.parametrize(
    ("indices", "prune_norm", "width"), [([0, 1], False, 16), ([0, 3], True, 32), ([3], False, 40)]
)
def test_what_is_pruned_leaves_the_width_of_what_is_left(indices, prune_norm, width):
    model = narrow().eval()
    model.prune_intermediate_layers(indices, prune_norm=prune_norm)
    assert model(torch.randn(1, 3, 64, 64)).shape[1] == width == model.num_features


def test_without_factors_there_are_none():
    assert not any("gamma" in name for name, _ in narrow(layer_scale=None).named_parameters())


# -- refusals


def test_stages_that_do_not_agree_are_named():
    with pytest.raises(ValueError, match=r"num_heads has 3 stages, but depths=\(1, 2, 2, 1\) has 4"):
        narrow(num_heads=(1, 2, 2))
    with pytest.raises(ValueError, match="attention has 'flash', which is not one of linear, softmax"):
        narrow(attention=("linear", "linear", "softmax", "flash"))
    with pytest.raises(ValueError, match="rope=True needs a head_dim that 4 divides"):
        narrow(num_heads=(4, 2, 2, 2))
