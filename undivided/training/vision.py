"""Training an image classifier from scratch: timm's loader, augmentation, optimiser and schedule around one loop.

What happens in an epoch depends on its number and the seed alone, so that a run that was killed goes on from its last
whole epoch with the losses it would have had.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from undivided.data.folders import WorkFolder, prepare_target, write_folder
from undivided.data.images import ImageSet, digits, fashion_mnist

BUILT_IN: dict[str, Callable[[], ImageSet]] = {"fashion-mnist": fashion_mnist, "digits": digits}
LOG, FIGURE = "training.jsonl", "training.png"
_TRAIN, _TEST = ("train", "training"), ("val", "validation", "valid", "test")
_MEAN, _STD = 0.5, 0.25

Watch = Callable[[Iterable[Any], str, int], Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class VisionRecipe:
    """How a classifier is trained; the defaults are those of DeiT, for few epochs on few images.

    Args:
        epochs: how often the training images are gone through.
        batch_size: images a step; a last batch that is not full is left out.
        learning_rate: the highest; a cosine takes it to a hundredth after a linear warm-up.
        warmup_epochs: epochs of the warm-up, below `epochs`.
        weight_decay: of what the model does not except; vectors and biases never decay.
        optimizer: name of an optimiser in timm.
        clip: largest norm of the gradient; None for any.
        smoothing: of the labels.
        mixup, cutmix: strength of either, 0 for none; with one of them `batch_size` must be even.
        ema: decay of a moving average of the weights, which is then what is tested and kept; None for none.
        crop: least share of an image's area that a training crop has.
        flip: share of training images that are mirrored.
        augment: timm's name of an augmentation, such as "rand-m9-mstd0.5"; None for none.
        erasing: probability that a part of a training image is erased.
        workers: processes that load images; 0 loads them in this one.
        bf16: bfloat16 by autocast.
        seed: of weights, order and augmentation.

    Raises:
        ValueError: a value is out of its range.

    Source: DeiT (arXiv 2012.12877), table 9.
    """

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup_epochs: int = 1
    weight_decay: float = 0.05
    optimizer: str = "adamw"
    clip: float | None = 1.0
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float | None = None
    crop: float = 0.5
    flip: float = 0.5
    augment: str | None = None
    erasing: float = 0.0
    workers: int = 0
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"epochs": 1, "batch_size": 1, "warmup_epochs": 0, "workers": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} must be below epochs={self.epochs}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive.")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip} must be positive; leave it None for no limit.")
        for name in ("weight_decay", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")
        for name in ("smoothing", "flip", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1.")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop={self.crop} must be above 0 and at most 1.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema={self.ema} must be between 0 and 1; leave it None for no average.")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size} must be even with mixup or cutmix.")


class Images(torch.utils.data.Dataset):
    """Images in memory as timm's loader reads them: an image and its class, the image through `transform`."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        array = self.images[index].movedim(0, -1).numpy()
        image: Any = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        return self.transform(image) if self.transform is not None else image, int(self.labels[index])


class Files(torch.utils.data.Dataset):
    """Images in files, as `Images`; each is closed once it is read."""

    def __init__(self, folder: Path, classes: list[str]) -> None:
        from timm.data.readers.reader_image_folder import find_images_and_targets

        numbers = {name: number for number, name in enumerate(classes)}
        self.samples, _ = find_images_and_targets(str(folder), class_to_idx=numbers)
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        path, label = self.samples[index]
        with Image.open(path) as file:
            image = file.convert("RGB")
        return self.transform(image) if self.transform is not None else image, label


@dataclass(frozen=True)
class ImageData:
    """What is trained and tested on.

    Attributes:
        name: in words.
        train, test: sets that timm's loader reads.
        classes: their names, in the order of their numbers.
        channels: of an image.
        size: pixels of a side where all images have one size, else None.
    """

    name: str
    train: Any
    test: Any
    classes: list[str]
    channels: int
    size: int | None


def open_images(data: str | Path) -> ImageData:
    """Opens a folder of classes, or a set that is built in.

    Args:
        data: a folder with the folders `train` and `val` (or `validation`, `test`), each with a folder of images a
            class; or "fashion-mnist" or "digits".

    Raises:
        ValueError: there is no such set, or a folder has no classes, or other ones in `val` than in `train`.
    """
    if str(data) in BUILT_IN and not Path(data).is_dir():
        images = BUILT_IN[str(data)]()
        return ImageData(
            images.name,
            Images(images.train_images, images.train_labels),
            Images(images.test_images, images.test_labels),
            [str(number) for number in range(images.num_classes)],
            images.train_images.shape[1],
            images.train_images.shape[2],
        )
    folder = Path(data).expanduser()
    names = ", ".join(f'"{name}"' for name in BUILT_IN)
    if not folder.is_dir():
        raise ValueError(f"data={data} is neither a folder nor one of {names}.")
    parts = []
    for kinds in (_TRAIN, _TEST):
        found = next((folder / kind for kind in kinds if (folder / kind).is_dir()), None)
        if found is None:
            raise ValueError(f"{folder} has no folder {kinds[0]!r} (or {', '.join(map(repr, kinds[1:]))}).")
        parts.append(found)
    classes = [sorted(path.name for path in part.iterdir() if path.is_dir()) for part in parts]
    if not classes[0]:
        raise ValueError(f"{parts[0]} has no folders; each class needs one with its images.")
    other = sorted(set(classes[0]) ^ set(classes[1]))
    if other:
        raise ValueError(
            f"{parts[0].name} and {parts[1].name} of {folder} differ in the class {other[0]!r}; they need the same."
        )
    train, test = (Files(part, classes[0]) for part in parts)
    return ImageData(folder.name, train, test, classes[0], 3, None)


def train_vision(
    name: str,
    data: str | Path,
    out: str | Path,
    recipe: VisionRecipe,
    *,
    image_size: int | None = None,
    model_options: dict[str, Any] | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
    watch: Watch = lambda items, description, total: items,
) -> dict[str, Any]:
    """Trains a model of timm's registry, this library's included, and writes it with its log and a figure.

    The folder is one that `timm.create_model("local-dir:OUT")` opens. A killed run leaves the old folder or none, and
    the next one with the same arguments goes on behind the last whole epoch.

    Args:
        name: of the model, such as "undivided_convit_tiny".
        data: as `open_images` takes it.
        out: folder to be written: `config.json`, `model.safetensors`, `training.jsonl`, `training.png`.
        recipe: how to train.
        image_size: pixels of a side that the model sees; default that of the set, or that the model is made for.
        model_options: further arguments of the model.
        device: where to train.
        overwrite: replace an existing folder.
        say: called with a sentence from time to time.
        watch: wraps what is gone through, with a description and its length; for a bar of progress.

    Returns:
        The report: what `config.json` has under "training", with a row an epoch: `epoch`, `loss`, `learning_rate`,
        `accuracy` (percent of the test images).

    Raises:
        ValueError: an argument does not fit, there are fewer images than a batch, or the loss is not finite.
        OSError: the target cannot be written.
    """
    prepare_target(out, overwrite=overwrite)
    images = open_images(data)
    if len(images.train) < recipe.batch_size:
        raise ValueError(
            f"batch_size={recipe.batch_size} is more than the {len(images.train)} training images; take fewer."
        )
    options = dict(model_options or {})
    model, options, size = _model(name, images, image_size or images.size, options, recipe.seed)
    model.to(device)
    key = {"name": name, "data": str(data), "options": options, "size": size, "recipe": asdict(recipe)}
    with WorkFolder(out) as work:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]
        file = work.path / f"epochs-{digest}.safetensors"
        state = _Run(model, recipe, len(images.train) // recipe.batch_size, file)
        if state.rows:
            say(f"going on behind epoch {len(state.rows)} of {recipe.epochs}")
        loaders = _loaders(images, recipe, size, device)
        for epoch in range(len(state.rows), recipe.epochs):
            _seed(recipe.seed, epoch)
            loss = state.epoch(
                watch(loaders[0], f"epoch {epoch + 1}/{recipe.epochs}", len(loaders[0])), device
            )
            row = {
                "epoch": epoch + 1, "loss": loss, "learning_rate": state.rate(),
                "accuracy": accuracy(state.kept, loaders[1], device),
            }  # fmt: skip
            state.save(row)
            say(f"epoch {epoch + 1}: loss {loss:.4f}, {row['accuracy']:.2f} % of the test images")
        report = {
            "data": images.name, "recipe": asdict(recipe), "parameters": sum(p.numel() for p in model.parameters()),
            "epochs": state.rows,
        }  # fmt: skip
        say(f"writing {out}")
        write_folder(
            out,
            lambda folder: _write(folder, name, state.kept, images, size, options, report),
            overwrite=overwrite,
        )
    return report


def _model(
    name: str, images: ImageData, size: int | None, options: dict[str, Any], seed: int
) -> tuple[nn.Module, dict[str, Any], int]:
    import timm

    # Registers this library's models.
    import undivided.models.vision  # noqa: F401

    if not timm.is_model(name):
        raise ValueError(
            f"name={name!r} is no model that timm knows; `undivided systems` lists this library's."
        )
    if size is None:
        size = int(timm.get_pretrained_cfg(name).input_size[-1]) if timm.get_pretrained_cfg(name) else 224
    torch.manual_seed(seed)
    given = {"num_classes": len(images.classes), "in_chans": images.channels, **options}
    try:
        return timm.create_model(name, img_size=size, **given), {"img_size": size, **options}, size
    except TypeError as error:
        if "img_size" not in str(error):
            raise ValueError(f"{name} cannot be made with {given}: {error}.") from error
    # Convolutional networks take any size and no argument of it.
    torch.manual_seed(seed)
    try:
        return timm.create_model(name, **given), options, size
    except TypeError as error:
        raise ValueError(f"{name} cannot be made with {given}: {error}.") from error


def _loaders(images: ImageData, recipe: VisionRecipe, size: int, device: str) -> list[Any]:
    from timm.data import create_loader

    shared: dict[str, Any] = {
        "input_size": (images.channels, size, size), "batch_size": recipe.batch_size,
        "mean": (_MEAN,) * images.channels, "std": (_STD,) * images.channels,
        "num_workers": recipe.workers, "use_prefetcher": False,
        # Workers that live on would carry random numbers from epoch to epoch, and a resumed run would not have them.
        "persistent_workers": False, "pin_memory": device.startswith("cuda"), "interpolation": "bicubic",
    }  # fmt: skip
    return [
        create_loader(
            images.train, is_training=True, scale=(recipe.crop, 1.0), hflip=recipe.flip, color_jitter=0.0,
            auto_augment=recipe.augment, re_prob=recipe.erasing, **shared,
        ),
        create_loader(images.test, is_training=False, crop_pct=1.0, **shared),
    ]  # fmt: skip


def _seed(seed: int, epoch: int) -> None:
    """Seeds all that draws: torch, timm's augmentation (random) and its mixup (numpy)."""
    import numpy as np

    number = (seed * 1_000_003 + epoch) % 2**32
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


class _Run:
    """A model in training with all that goes with it, and its checkpoint."""

    def __init__(self, model: nn.Module, recipe: VisionRecipe, updates: int, file: Path) -> None:
        from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2
        from timm.utils import ModelEmaV3

        self.model, self.recipe, self.updates = model, recipe, updates
        self.optimizer = create_optimizer_v2(
            model, opt=recipe.optimizer, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.schedule, _ = create_scheduler_v2(
            self.optimizer, num_epochs=recipe.epochs, warmup_epochs=recipe.warmup_epochs, warmup_lr=1e-6,
            min_lr=recipe.learning_rate / 100, step_on_epochs=False, updates_per_epoch=updates,
        )  # fmt: skip
        self.average = None if recipe.ema is None else ModelEmaV3(model, decay=recipe.ema)
        self.mix: Any = None
        self.loss: nn.Module = LabelSmoothingCrossEntropy(recipe.smoothing)
        if recipe.mixup or recipe.cutmix:
            from timm.data import Mixup

            classes = int(getattr(model, "num_classes", 0))
            self.mix = Mixup(
                recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes
            )
            self.loss = SoftTargetCrossEntropy()
        self.rows: list[dict[str, Any]] = []
        self.file = file
        if self.file.is_file():
            self._load()

    @property
    def kept(self) -> nn.Module:
        """The model that is tested and written: the average if there is one."""
        return self.model if self.average is None else self.average.module

    def rate(self) -> float:
        """The learning rate now."""
        return float(self.optimizer.param_groups[0]["lr"])

    def epoch(self, batches: Iterable[Any], device: str) -> float:
        """Trains for an epoch and returns the mean loss."""
        self.model.train()
        done = len(self.rows) * self.updates
        total = torch.zeros((), device=device, dtype=torch.float64)
        for x, y in batches:
            self.schedule.step_update(done)
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            if self.mix is not None:
                x, y = self.mix(x, y)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=self.recipe.bf16):
                loss = self.loss(self.model(x), y)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.recipe.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
            self.optimizer.step()
            done += 1
            if self.average is not None:
                self.average.update(self.model, step=done)
            total += loss.detach()
        mean = float(total) / self.updates
        if not math.isfinite(mean):
            raise ValueError(
                f"the loss of epoch {len(self.rows) + 1} is {mean}; a learning_rate below "
                f"{self.recipe.learning_rate:g} may do."
            )
        return mean

    def save(self, row: dict[str, Any]) -> None:
        """Adds an epoch's row, and writes all that the next epoch needs, whole or not at all."""
        from safetensors.torch import save_file

        self.rows.append(row)
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {
                f"average.{name}": tensor for name, tensor in self.average.module.state_dict().items()
            }
        for number, parameter in enumerate(self._parameters()):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{number}.{name}"] = torch.as_tensor(value)
        # Copies: tied weights share memory, which safetensors refuses.
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        partial = self.file.with_suffix(".partial")
        save_file(copies, partial, metadata={"rows": json.dumps(self.rows)})
        partial.replace(self.file)

    def _load(self) -> None:
        from safetensors import safe_open

        with safe_open(str(self.file), framework="pt") as stored:
            self.rows = json.loads(stored.metadata()["rows"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }

        self.model.load_state_dict(part("model."))
        if self.average is not None:
            self.average.module.load_state_dict(part("average."))
        for number, parameter in enumerate(self._parameters()):
            state = part(f"optimizer.{number}.")
            # A step is counted on the CPU, as torch's optimisers do by default.
            self.optimizer.state[parameter] = {
                name: value if name == "step" else value.to(parameter.device) for name, value in state.items()
            }

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def accuracy(model: nn.Module, loader: Iterable[Any], device: str) -> float:
    """Returns the share of a loader's images whose class is found, in percent."""
    model.eval()
    right, count = torch.zeros((), device=device, dtype=torch.int64), 0
    for x, y in loader:
        right += (model(x.to(device)).argmax(-1) == y.to(device)).sum()
        count += len(y)
    return 100 * int(right) / max(count, 1)


def _write(
    folder: Path, name: str, model: nn.Module, images: ImageData, size: int, options: dict[str, Any],
    report: dict[str, Any],
) -> None:  # fmt: skip
    from timm.models import save_for_hf

    save_for_hf(
        model, str(folder), model_args={"in_chans": images.channels, **options}, safe_serialization=True,
        model_config={
            "architecture": name, "num_classes": len(images.classes), "label_names": images.classes, "training": report,
            "pretrained_cfg": {
                "input_size": [images.channels, size, size], "mean": [_MEAN] * images.channels,
                "std": [_STD] * images.channels, "interpolation": "bicubic", "crop_pct": 1.0,
                "num_classes": len(images.classes),
            },
        },
    )  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in report["epochs"])
    (folder / LOG).write_text(lines, encoding="utf-8")
    (folder / FIGURE).write_bytes(figure(report["epochs"], f"{name} on {images.name}"))


def figure(rows: list[dict[str, Any]], title: str) -> bytes:
    """Returns loss and accuracy by epoch as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawing = Figure(figsize=(8.4, 3.6), layout="constrained")
    FigureCanvasAgg(drawing)
    epochs = [row["epoch"] for row in rows]
    for axes, (name, label) in zip(
        drawing.subplots(1, 2),
        (("loss", "training loss"), ("accuracy", "accuracy on test images, %")),
        strict=True,
    ):
        axes.plot(epochs, [row[name] for row in rows], marker="o", markersize=3)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, color="0.92")
    drawing.suptitle(title)
    image = BytesIO()
    drawing.savefig(image, format="png", dpi=150)
    return image.getvalue()
