"""Small networks over many radii of a method side by side, and what the radii do at first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_breast_cancer

import flatopt
from flatopt import sharpness

from . import after, networks, side_by_side
from .data import drawn, parts_of, split_digits
from .links import FILTERWISE

GOALS = ("accuracy", "loss", "3 bits")


def dense_network(params, inputs):
    """Dense layers in the order of their names, ReLU between them."""
    *hidden, last = sorted(params)
    for name in hidden:
        inputs = jax.nn.relu(networks.dense(params[name], inputs))
    return networks.dense(params[last], inputs)


def demo_cnn(params, images):
    """The network of examples/digits.py; a convolution is one product of matrices."""
    hidden = images.reshape(-1, 8, 8, 1)
    for name in ("0", "1"):
        size = hidden.shape[1]
        padded = jnp.pad(hidden, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [
            padded[:, i : i + size, j : j + size] for i in range(3) for j in range(3)
        ]
        kernel = params[name]["kernel"]
        kernel = kernel.reshape(-1, kernel.shape[-1])
        hidden = jnp.concatenate(shifted, axis=-1) @ kernel + params[name]["bias"]
        hidden = jax.nn.relu(hidden)
        pairs = hidden.reshape(len(hidden), size // 2, 2, size // 2, 2, -1)
        hidden = pairs.mean(axis=(2, 4))
    hidden = hidden.reshape(len(images), -1)
    return dense_network({name: params[name] for name in ("2", "3")}, hidden)


WIDTHS = {
    "one layer of 32": (32,),
    "one layer of 128": (128,),
    "three layers of 32": (32,) * 3,
    "six layers of 24": (24,) * 6,
}
SIZES = {"digits": (64, 10), "breast cancer": (30, 2)}  # of inputs and outputs
CNN = {"0": (3, 3, 1, 16), "1": (3, 3, 16, 32), "2": (128, 64), "3": (64, 10)}


def network_of(name, data):
    """The function of a network, and the shapes of its layers."""
    if name == "CNN":
        return demo_cnn, CNN
    inputs, outputs = SIZES[data]
    sizes = (inputs, *WIDTHS[name], outputs)
    shapes = {
        str(i): pair for i, pair in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }
    return dense_network, shapes


def split_cancer(seed, num_train, label_noise=0.0):
    """As `split_digits`: 150 tumours for validation, 219 for the test, 200 to draw from."""
    inputs, labels = load_breast_cancer(return_X_y=True)
    test, validation, rest = parts_of(inputs, [219, 369])
    inputs = (inputs - inputs[rest].mean(axis=0)) / inputs[rest].std(axis=0)
    inputs = inputs.astype(np.float32)
    train, train_labels = drawn(labels, rest, seed, num_train, label_noise, 2)
    return {
        "train": (inputs[train], train_labels),
        "validation": (inputs[validation], labels[validation]),
        "test": (inputs[test], labels[test]),
    }


SPLITS = {"digits": split_digits, "breast cancer": split_cancer}


class Training(after.Training):
    """One network on one data set, at many radii, seeds and shares of wrong labels."""

    def __init__(self, config, network, data):
        self.config, self.data = config, data
        self.model_fn, shapes = network_of(network, data)
        self.initialize = jax.jit(functools.partial(networks.initialize, shapes))
        self.problem = functools.cache(self._problem)
        splits = SPLITS[data](0, 0)
        self.num_classes = SIZES[data][1]
        self.splits = tuple(
            jax.tree.map(jnp.asarray, splits[name]) for name in ("validation", "test")
        )

    def _problem(self, seed, label_noise):
        config = self.config
        num_train = config.train_images if self.data == "digits" else config.tumours
        images, labels = SPLITS[self.data](seed, num_train, label_noise)["train"]
        passes = -(-config.steps * config.batch_size // num_train)
        rng = np.random.default_rng(seed)
        orders = rng.permuted(np.tile(np.arange(num_train), (passes, 1)), axis=1)
        orders = orders.ravel()[: config.steps * config.batch_size]
        return {
            "seed": np.int32(seed),
            "label_noise": np.float32(label_noise),
            "data": (images, labels),
            "batches": orders.reshape(config.steps, config.batch_size),
            "start": jax.tree.map(np.asarray, self.initialize(jax.random.key(seed))),
        }

    def effects(self, method, seed, share):
        """What radii do at the start, on the first batch."""
        problem = self.problem(seed, share)
        batch = jax.tree.map(lambda x: x[problem["batches"][0]], problem["data"])
        return flatopt.radius(
            self.loss_fn,
            problem["start"],
            side_by_side.noise_key(problem),
            method="sam" if method == "SAM" else "noise",
            kernel=FILTERWISE if method == "LPF-SGD" else None,
            data=jax.tree.map(jnp.asarray, batch),
            model_fn=self.model_fn,
        )

    def at_radii(self, link, radii, problems):
        """Train at radii, (problems, radii), and measure on validation and test data."""
        config = self.config
        rates = {
            "learning_rate": config.learning_rate,
            "weight_decay": config.weight_decay,
        }
        chosen = [
            (rates | {"radius": float(radius)}, seed, share)
            for (seed, share), row in zip(problems, radii, strict=True)
            for radius in row
        ]
        runs = self.runs(chosen)
        carry = self.init(link, runs)
        params, _ = self.advance(link, carry, runs, 0, config.steps, config.steps)
        shape = np.shape(radii)
        return jax.tree.map(lambda x: np.reshape(x, shape), self.measure(params))

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def measure(self, params):
        rounded = sharpness.round_filters(params, 3)
        return {
            name: {
                "accuracy": self.accuracy(params, batch),
                "loss": self.loss_fn(params, batch),
                "3 bits": self.accuracy(rounded, batch),
            }
            for name, batch in zip(("validation", "test"), self.splits, strict=True)
        }
