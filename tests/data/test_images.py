from __future__ import annotations

import gzip

import numpy as np
import pytest

from undivided.data.images import digits, fashion_mnist, read_images

FILES = {
    "train-images-idx3-ubyte": (5, 4, 3),
    "train-labels-idx1-ubyte": (5,),
    "t10k-images-idx3-ubyte": (2, 4, 3),
    "t10k-labels-idx1-ubyte": (2,),
}


def write_idx(file, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    data = header + array.astype("uint8").tobytes()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


@pytest.fixture
def folder(tmp_path):
    for index, (name, shape) in enumerate(FILES.items()):
        array = np.arange(np.prod(shape)).reshape(shape)
        write_idx(tmp_path / (name + ".gz" * (index % 2)), array)
    return tmp_path


def test_reads_the_files_of_the_mnist_family_compressed_or_not(folder):
    found = read_images(folder)
    assert found.train_images.shape == (5, 1, 4, 3) and found.test_images.shape == (2, 1, 4, 3)
    assert found.train_images[1, 0].tolist() == [[12, 13, 14], [15, 16, 17], [18, 19, 20], [21, 22, 23]]
    assert found.train_labels.tolist() == [0, 1, 2, 3, 4] and found.num_classes == 5


def test_reads_arrays_with_colours_last(tmp_path):
    images = np.arange(2 * 4 * 3 * 3, dtype="uint8").reshape(2, 4, 3, 3)
    labels = np.array([[1], [0]])
    np.savez(tmp_path / "set.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    found = read_images(tmp_path / "set.npz")
    assert found.name == "set"
    assert found.train_images.shape == (2, 3, 4, 3)
    assert found.train_images[0, :, 0, 0].tolist() == [0, 1, 2]
    assert found.test_labels.tolist() == [1, 0]


def test_what_is_missing_or_broken_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere.npz is neither a folder nor an .npz file"):
        read_images(tmp_path / "nowhere.npz")
    np.savez(tmp_path / "part.npz", x_train=np.zeros((1, 2, 2), "uint8"))
    with pytest.raises(ValueError, match="part.npz has no array 'y_train'"):
        read_images(tmp_path / "part.npz")
    images, labels = np.zeros((1, 2, 2)), np.zeros(1)
    np.savez(tmp_path / "float.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    with pytest.raises(ValueError, match=r"train_images of .* are float64 \[1, 2, 2\]; they must be uint8"):
        read_images(tmp_path / "float.npz")
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(4))
    with pytest.raises(ValueError, match="has 5 train images, but 4 labels"):
        read_images(folder)
    (folder / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x09short")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is not a whole IDX file of bytes"):
        read_images(folder)
    (folder / "train-images-idx3-ubyte").unlink()
    with pytest.raises(ValueError, match=r"has no train-images-idx3-ubyte \(or train-images-idx3-ubyte.gz\)"):
        read_images(folder)


def test_fashion_mnist_is_read_from_the_cache_or_says_where_to_put_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("undivided.data.images._DEBIAN", tmp_path / "none")
    with pytest.raises(
        FileNotFoundError, match="put its four files .* into .*fashion-mnist, or install the Debian"
    ):
        fashion_mnist(tmp_path / "empty")
    folder.rename(tmp_path.parent / "fashion-mnist")
    found = fashion_mnist(tmp_path.parent)
    (tmp_path.parent / "fashion-mnist").rename(folder)
    assert len(found.train_images) == 5 and found.name == "fashion-mnist"


def test_digits_are_those_of_scikit_learn():
    found = digits()
    assert found.train_images.shape == (1437, 1, 8, 8) and found.test_images.shape == (360, 1, 8, 8)
    assert found.train_images.max() == 255 and found.num_classes == 10
