"""Real handwritten digits, which need no download."""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits


def split_digits(
    seed: int, num_train: int, label_noise: float = 0.0
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Real handwritten digits: images (n, 64) in [0, 1] and labels (n,) of each split.

    Validation (400) and test (800) are always the same images. The seed draws the training
    images from the other 597, and which of their labels are replaced by random ones.
    """
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    test, validation, rest = parts_of(images, [800, 1200])
    train, train_labels = drawn(labels, rest, seed, num_train, label_noise, 10)
    return {
        "train": (images[train], train_labels),
        "validation": (images[validation], labels[validation]),
        "test": (images[test], labels[test]),
    }


def parts_of(examples, ends):
    """Places of the test, of validation and of the rest, the same for every seed."""
    order = np.random.default_rng(0).permutation(len(examples))
    return np.split(order, ends)


def drawn(labels, rest, seed, num_train, label_noise, num_classes):
    """Places of the training examples, and their labels, a share of them random."""
    rng = np.random.default_rng(seed)
    train = rng.permutation(rest)[:num_train]
    found = labels[train]
    wrong = rng.random(len(train)) < label_noise
    found[wrong] = rng.integers(0, num_classes, wrong.sum())
    return train, found


def regression_digits(
    seed: int, num_images: int, num_outputs: int
) -> tuple[jax.Array, jax.Array]:
    """Images in [0, 1] as rows; even or odd as 1 or -1, or ten classes as one-hot rows."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(seed).permutation(len(images))[:num_images]
    labels = labels[chosen]
    targets = 1 - 2 * (labels % 2)[:, None] if num_outputs == 1 else np.eye(10)[labels]
    inputs = jnp.asarray(images[chosen] / 16, jnp.float32)
    return inputs, jnp.asarray(targets, jnp.float32)


def digits_as_photographs() -> tuple[np.ndarray, np.ndarray]:
    """Digits enlarged to (n, 32, 32, 3) bytes, in the place of CIFAR-10."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).repeat(4, 1).repeat(4, 2).repeat(3, 3)
    return (16 * images).clip(0, 255).astype(np.uint8), labels


def of_classes(
    split: tuple[np.ndarray, np.ndarray], classes: range, count: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Images of these classes and their labels, at most ``count`` of each."""
    images, labels = split
    places = [np.flatnonzero(labels == name)[:count] for name in classes]
    chosen = np.sort(np.concatenate(places))
    return images[chosen], labels[chosen]
