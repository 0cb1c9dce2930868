"""Training of image classifiers: what is learnt, kept, and resumed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("timm")
from PIL import Image  # noqa: E402

from undivided.training import vision  # noqa: E402
from undivided.training.vision import VisionRecipe, open_images, train_vision  # noqa: E402

NAME = "undivided_convit_tiny"
OPTIONS = {"embed_dim": 16, "num_heads": 4, "depth": 2, "gpsa_layers": 1, "patch_size": 4}
RECIPE = VisionRecipe(epochs=3, batch_size=8, learning_rate=1e-2, crop=0.8, flip=0.0)


@pytest.fixture
def folder(tmp_path):
    """Two classes that a glance tells apart: a bright left and a bright right half, with noise."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("val", 6)):
        for label in ("left", "right"):
            place = tmp_path / "data" / part / label
            place.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 100, (12, 12, 3), generator=generator)
                half = pixels[:, :6] if label == "left" else pixels[:, 6:]
                half += 150
                Image.fromarray(pixels.byte().numpy()).save(place / f"{number}.png")
    return tmp_path / "data"


def train(folder, out, recipe=RECIPE, **options):
    options = {"model_options": OPTIONS, "image_size": 12} | options
    return train_vision(NAME, folder, out, recipe, **options)


def test_a_folder_of_classes_is_learnt_and_timm_opens_what_is_written(folder, tmp_path):
    import timm

    said = []
    report = train(folder, tmp_path / "out", replace(RECIPE, epochs=6), say=said.append)
    assert report["epochs"][-1]["accuracy"] == 100.0
    assert report["epochs"][-1]["loss"] < report["epochs"][0]["loss"]
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "model.safetensors", "training.jsonl", "training.png"
    ]  # fmt: skip
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert rows == report["epochs"] and [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    config = json.loads((out / "config.json").read_text())
    assert config["label_names"] == ["left", "right"] and config["training"]["recipe"]["epochs"] == 6
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    pixels = torch.zeros(1, 3, 12, 12) - 1.5
    pixels[..., :6] += 3
    assert model(pixels).argmax().item() == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert said[-1] == f"writing {out}"


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "recipe", [RECIPE, replace(RECIPE, ema=0.9, mixup=0.5, erasing=0.5)], ids=["plain", "all"]
)
def test_a_killed_run_goes_on_with_the_losses_it_would_have_had(recipe, folder, tmp_path):
    whole = train(folder, tmp_path / "whole", recipe)

    def kill(items, description, total):
        if description.startswith("epoch 3"):
            raise Killed
        return items

    with pytest.raises(Killed):
        train(folder, tmp_path / "out", recipe, watch=kill)
    assert not (tmp_path / "out").exists()
    said = []
    resumed = train(folder, tmp_path / "out", recipe, say=said.append)
    assert said[0] == "going on behind epoch 2 of 3"
    assert resumed["epochs"] == whole["epochs"]
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert first == second


def test_another_recipe_does_not_go_on_from_there(folder, tmp_path):
    def kill(items, description, total):
        if description.startswith("epoch 2"):
            raise Killed
        return items

    with pytest.raises(Killed):
        train(folder, tmp_path / "out", watch=kill)
    said = []
    train(folder, tmp_path / "out", replace(RECIPE, seed=1, epochs=2), say=said.append)
    assert "going on" not in said[0]


def test_the_average_is_what_is_kept(folder, tmp_path):
    from safetensors.torch import load_file

    plain, average = tmp_path / "plain", tmp_path / "average"
    recipe = replace(RECIPE, epochs=2)
    train(folder, plain, recipe)
    train(folder, average, replace(recipe, ema=0.999))
    own, kept = (load_file(place / "model.safetensors") for place in (plain, average))
    start = vision._model(NAME, open_images(folder), 12, OPTIONS, RECIPE.seed)[0].state_dict()
    for name in ("head.fc.weight", "stages.0.blocks.0.attn.qk.weight"):
        # So slow an average has hardly moved.
        assert (kept[name] - start[name]).norm() < 0.5 * (own[name] - start[name]).norm()


def test_a_convolutional_network_takes_the_size_of_the_images(folder, tmp_path):
    recipe = replace(RECIPE, epochs=1, warmup_epochs=0)
    options = {"channels": (8, 8, 8, 8), "layers": (1, 1, 1, 1), "stem_width": 8}
    report = train_vision("resnet18", folder, tmp_path / "out", recipe, image_size=32, model_options=options)
    assert len(report["epochs"]) == 1 and report["parameters"] < 20_000


def test_built_in_images_have_their_own_size_and_channels():
    pytest.importorskip("sklearn")
    found = open_images("digits")
    assert (found.name, found.channels, found.size, len(found.classes)) == ("digits", 1, 8, 10)
    image, label = found.train[0]
    assert image.size == (8, 8) and image.mode == "L" and label == int(found.train.labels[0])


def test_data_that_are_no_images_are_named(folder, tmp_path):
    with pytest.raises(
        ValueError, match='data=nothing is neither a folder nor one of "fashion-mnist", "digits"'
    ):
        open_images("nothing")
    with pytest.raises(ValueError, match=r"has no folder 'train' \(or 'training'\)"):
        open_images(tmp_path)
    (folder / "val" / "other").mkdir()
    with pytest.raises(ValueError, match="train and val of .* differ in the class 'other'"):
        open_images(folder)
    (tmp_path / "bare" / "train").mkdir(parents=True)
    (tmp_path / "bare" / "test").mkdir()
    with pytest.raises(ValueError, match="bare/train has no folders; each class needs one"):
        open_images(tmp_path / "bare")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(epochs=0), "epochs=0 must be at least 1"),
        (dict(warmup_epochs=3), "warmup_epochs=3 must be below epochs=3"),
        (dict(learning_rate=0.0), "learning_rate=0.0 must be positive"),
        (dict(clip=0.0), "clip=0.0 must be positive; leave it None"),
        (dict(mixup=-1.0), "mixup=-1.0 must be at least 0"),
        (dict(smoothing=2.0), "smoothing=2.0 must be from 0 to 1"),
        (dict(crop=0.0), "crop=0.0 must be above 0"),
        (dict(ema=1.0), "ema=1.0 must be between 0 and 1"),
        (dict(mixup=0.1, batch_size=7), "batch_size=7 must be even with mixup or cutmix"),
    ],
)
def test_recipes_out_of_range_are_named(change, text):
    with pytest.raises(ValueError, match=text):
        replace(RECIPE, **change)


def test_what_cannot_be_trained_is_named_before_anything_is_written(folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="batch_size=64 is more than the 40 training images"):
        train(folder, out, replace(RECIPE, batch_size=64))
    with pytest.raises(ValueError, match="name='convit_huge' is no model that timm knows"):
        train_vision("convit_huge", folder, out, RECIPE)
    with pytest.raises(ValueError, match=f"{NAME} cannot be made with .*no_such"):
        train(folder, out, model_options={"no_such": 1})
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists; choose another or allow overwriting"):
        train(folder, out)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_loss_that_is_not_finite_ends_the_run(folder, tmp_path, monkeypatch):
    from timm import loss

    monkeypatch.setattr(loss.LabelSmoothingCrossEntropy, "forward", lambda self, x, y: x.sum() * float("nan"))
    with pytest.raises(ValueError, match="the loss of epoch 1 is nan; a learning_rate below 0.01 may do"):
        train(folder, tmp_path / "out")


def test_the_figure_has_one_point_an_epoch(monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **style: drawn.append((x, y)))
    rows = [{"epoch": 1, "loss": 2.0, "accuracy": 10.0}, {"epoch": 2, "loss": 1.0, "accuracy": 20.0}]
    assert vision.figure(rows, "a model").startswith(b"\x89PNG")
    assert drawn == [([1, 2], [2.0, 1.0]), ([1, 2], [10.0, 20.0])]
