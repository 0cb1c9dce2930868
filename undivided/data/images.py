"""Small real images with labels: the user's own files, Fashion-MNIST, or handwritten digits."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from undivided.data.wheels import cache_folder

if TYPE_CHECKING:
    from torch import Tensor

# Where the Debian package dataset-fashion-mnist puts its files.
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_PARTS = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
_NPZ = {
    "train_images": "x_train",
    "train_labels": "y_train",
    "test_images": "x_test",
    "test_labels": "y_test",
}


@dataclass(frozen=True)
class ImageSet:
    """Images and their classes.

    Attributes:
        name: of the set.
        train_images, test_images: `[images, channels, height, width]`, uint8.
        train_labels, test_labels: `[images]`, int64, classes from 0.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def num_classes(self) -> int:
        """How many classes the training labels name."""
        return int(self.train_labels.max()) + 1


def read_images(path: str | Path) -> ImageSet:
    """Reads a set of labelled images.

    Args:
        path: a folder with the four files of the MNIST family (`train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
            `t10k-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`, with or without `.gz`), or an `.npz` file with arrays
            `x_train`, `y_train`, `x_test`, `y_test`; images `[n, height, width]` or `[n, height, width, channels]`,
            uint8.

    Raises:
        ValueError: a file or an array is missing, or is not what its place needs; the sentence names it.
    """
    import numpy as np
    import torch

    path = Path(path).expanduser()
    if path.is_dir():
        arrays = {part: _read_idx(_find(path, file)) for part, file in _PARTS.items()}
    elif path.suffix == ".npz" and path.is_file():
        with np.load(path) as stored:
            missing = [name for name in _NPZ.values() if name not in stored]
            if missing:
                raise ValueError(f"{path} has no array {missing[0]!r}; it needs {', '.join(_NPZ.values())}.")
            arrays = {part: stored[name] for part, name in _NPZ.items()}
    else:
        raise ValueError(f"{path} is neither a folder nor an .npz file.")
    tensors = {}
    for part, array in arrays.items():
        if part.endswith("labels"):
            tensors[part] = torch.from_numpy(array.astype("int64").reshape(-1))
            continue
        if array.dtype != "uint8" or array.ndim not in (3, 4):
            raise ValueError(
                f"{part} of {path} are {array.dtype} {list(array.shape)}; they must be uint8 [n, height, width] or "
                "[n, height, width, channels]."
            )
        channels_first = array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)
        tensors[part] = torch.from_numpy(np.array(channels_first, order="C"))
    for split in ("train", "test"):
        images, labels = len(tensors[f"{split}_images"]), len(tensors[f"{split}_labels"])
        if images != labels:
            raise ValueError(f"{path} has {images} {split} images, but {labels} labels.")
    return ImageSet(path.stem, **tensors)


def fashion_mnist(cache_dir: str | Path | None = None) -> ImageSet:
    """Returns Fashion-MNIST: 60,000 + 10,000 grey images of 28 x 28 pixels in 10 classes (MIT licence).

    Args:
        cache_dir: a folder that has its four files in a subfolder `fashion-mnist`; by default this library's in the
            Hugging Face cache. Where there is none, the files of the Debian package `dataset-fashion-mnist` are read.

    Raises:
        FileNotFoundError: there are none; the sentence says where to put them.

    Source: Xiao et al., arXiv 1708.07747.
    """
    own = cache_folder(cache_dir) / "fashion-mnist"
    for folder in (own, _DEBIAN):
        if folder.is_dir():
            return read_images(folder)
    raise FileNotFoundError(
        f"no Fashion-MNIST here: put its four files (train-images-idx3-ubyte.gz, ...) into {own}, or install the "
        "Debian package dataset-fashion-mnist."
    )


def digits(test_every: int = 5) -> ImageSet:
    """Returns the 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn, every fifth for the test."""
    import torch
    from sklearn.datasets import load_digits

    stored = load_digits()
    images = torch.from_numpy(stored.images * 15.9375).to(torch.uint8)[:, None]
    labels = torch.from_numpy(stored.target).long()
    test = torch.arange(len(labels)) % test_every == 0
    return ImageSet("digits", images[~test], labels[~test], images[test], labels[test])


def _find(folder: Path, name: str) -> Path:
    # Some copies have a dot where the original has a hyphen.
    for candidate in (name, f"{name}.gz", name.replace("-idx", ".idx"), f"{name.replace('-idx', '.idx')}.gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    raise ValueError(f"{folder} has no {name} (or {name}.gz).")


def _read_idx(file: Path):
    """The array of an IDX file of bytes."""
    import numpy as np

    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    header = np.frombuffer(data, dtype=">i4", count=1 + data[3]) if data[:3] == b"\0\0\x08" else None
    if header is None or len(data) != 4 * len(header) + int(np.prod(header[1:])):
        raise ValueError(f"{file} is not a whole IDX file of bytes.")
    return np.frombuffer(data, dtype=np.uint8, offset=4 * len(header)).reshape(header[1:])
