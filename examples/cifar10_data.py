"""CIFAR-10 as arrays, from files of the standard formats or from a library.

Reads the binary files or the Python pickles of the original distribution
(https://www.cs.toronto.edu/~kriz/cifar.html), or parquet files as those of Hugging Face
(https://huggingface.co/datasets/uoft-cs/cifar10). Without a folder it asks
``tensorflow_datasets`` or ``datasets``, whichever is installed.
"""

import importlib.util
import io
import pathlib
import pickle

import numpy as np


def load(data_dir=None, num_train=None, num_test=None):
    """Read the first images of both splits.

    Args:
      data_dir: folder of the files, or None for an installed library.
      num_train: number of training images; None: all.
      num_test: number of test images; None: all.

    Returns:
      A dict of "train" and "test"; each is a dict of "images", uint8 of shape
      (n, 32, 32, 3), and "labels", int32 of shape (n,).

    Raises:
      FileNotFoundError: if there is nothing to read from.
    """
    limits = {"train": num_train, "test": num_test}
    if data_dir is not None:
        read = from_folder(pathlib.Path(data_dir))
    elif importlib.util.find_spec("tensorflow_datasets"):
        read = read_tensorflow_datasets
    elif importlib.util.find_spec("datasets"):
        read = read_datasets
    else:
        raise FileNotFoundError(
            "CIFAR-10 needs a folder: unpack cifar-10-binary.tar.gz from "
            "https://www.cs.toronto.edu/~kriz/cifar.html and name it with --data-dir, or "
            "install tensorflow_datasets or datasets."
        )
    return {split: read(split, limit) for split, limit in limits.items()}


def from_folder(folder):
    """Return ``read(split, limit)`` for the first format found in the folder."""
    places = [folder, *(folder / name for name in SUBFOLDERS)]
    for pattern, test_pattern, read_file in FORMATS:
        for place in places:
            train, test = sorted(place.glob(pattern)), sorted(place.glob(test_pattern))
            if train and test:
                paths = {"train": train, "test": test}
                return lambda split, limit: concatenate(paths[split], read_file, limit)
    raise FileNotFoundError(
        f"{folder} holds no CIFAR-10: it needs data_batch_1.bin to data_batch_5.bin and "
        "test_batch.bin, the same as Python pickles, or parquet files with train and test "
        "in their names."
    )


def concatenate(paths, read_file, limit):
    """Read files one after another until there are ``limit`` images."""
    parts, missing = [], limit
    for path in paths:
        parts.append(read_file(path, missing))
        if limit is not None:
            missing -= len(parts[-1][1])
            if missing <= 0:
                break
    images, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
    return {"images": images, "labels": labels.astype(np.int32)}


def read_binary(path, limit):
    """One label byte and 3,072 bytes of red, green and blue for each image."""
    rows = np.fromfile(path, np.uint8).reshape(-1, 3073)[:limit]
    return channels_last(rows[:, 1:]), rows[:, 0]


def read_pickle(path, limit):
    """A dict of rows and labels. Unpickling runs code: only open files you trust."""
    with path.open("rb") as file:
        batch = pickle.load(file, encoding="bytes")
    return channels_last(batch[b"data"][:limit]), np.array(batch[b"labels"][:limit])


def channels_last(rows):
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def read_parquet(path, limit):
    """Columns ``img``, or ``image``, with encoded images, and ``label``."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    column = "img" if "img" in file.schema_arrow.names else "image"
    images, labels = [], []
    for batch in file.iter_batches(1024, columns=[column, "label"]):
        rows = batch.to_pylist()
        if limit is not None:
            rows = rows[: limit - len(labels)]
        images += [decode(row[column]["bytes"]) for row in rows]
        labels += [row["label"] for row in rows]
        if len(labels) == limit:
            break
    return np.stack(images), np.array(labels)


def decode(encoded):
    import PIL.Image

    return np.asarray(PIL.Image.open(io.BytesIO(encoded)).convert("RGB"))


def read_tensorflow_datasets(split, limit):
    import tensorflow_datasets as tfds

    split = split if limit is None else f"{split}[:{limit}]"
    data = tfds.as_numpy(tfds.load("cifar10", split=split, batch_size=-1))
    return {"images": data["image"], "labels": data["label"].astype(np.int32)}


def read_datasets(split, limit):
    import datasets

    split = split if limit is None else f"{split}[:{limit}]"
    data = datasets.load_dataset("uoft-cs/cifar10", split=split)
    images = np.stack([np.asarray(image.convert("RGB")) for image in data["img"]])
    return {"images": images, "labels": np.array(data["label"], np.int32)}


SUBFOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py", "plain_text", "data")
FORMATS = (
    ("data_batch_[1-5].bin", "test_batch.bin", read_binary),
    ("data_batch_[1-5]", "test_batch", read_pickle),
    ("*train*.parquet", "*test*.parquet", read_parquet),
)
