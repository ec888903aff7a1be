"""Small networks over many radii of a method side by side, and what the radii do at first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_breast_cancer

import flatopt
from flatopt import kernels, sharpness

from . import after, networks, side_by_side
from .data import drawn, parts_of, split_digits
from .held import Held
from .links import FILTERWISE, METHODS

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
CNNS = {"small CNN": networks.NETWORKS["CNN"], "CNN": (demo_cnn, CNN)}  # for digits


def network_of(name, data):
    """The function of a network, and the shapes of its layers."""
    if name in CNNS:
        return CNNS[name]
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


class Training(Held, after.Training):
    """One network on one data set, at many radii, seeds and shares of wrong labels.

    Attributes:
      kernels: the noise of each method; None: SAM.
      links: what comes before the optimizer.
      filter_axes: the axes that index filters; None: those of the kernels.
      together: whether runs of the loop and of fixed radii are one program. Those of dense
        networks are two: their radii were run before there was a loop.
    """

    kernels = {"NSO": kernels.isotropic(), "SAM": None, "LPF-SGD": FILTERWISE}
    links = {name: METHODS[name] for name in kernels}
    filter_axes = None
    together = False

    def __init__(self, config, network, data):
        model_fn, shapes = network_of(network, data)
        self.initialize = jax.jit(functools.partial(networks.initialize, shapes))
        num_train = config.train_images if data == "digits" else config.tumours
        self.prepare(config, model_fn, SIZES[data][1], SPLITS[data], num_train)

    def prepare(self, config, model_fn, num_classes, split, num_train):
        """Keep what training needs; ``split(seed, num_train, label_noise)`` gives data."""
        self.config, self.model_fn, self.num_classes = config, model_fn, num_classes
        self.split, self.num_train = split, num_train
        self.problem = functools.cache(self._problem)
        self.splits = tuple(
            jax.tree.map(jnp.asarray, split(0, 0, 0.0)[name])
            for name in ("validation", "test")
        )

    def _problem(self, seed, label_noise):
        config, num_train = self.config, self.num_train
        images, labels = self.split(seed, num_train, label_noise)["train"]
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
            kernel=self.kernels[method] if method == "LPF-SGD" else None,
            data=jax.tree.map(jnp.asarray, batch),
            model_fn=self.model_fn,
        )

    def at_radii(self, name, radii, problems):
        """Train at radii, (problems, radii), and measure on validation and test data."""
        link = self.links[name]
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
        rounded = sharpness.round_filters(params, 3, filter_axes=self.filter_axes)
        return {
            name: {
                "accuracy": self.accuracy(params, batch),
                "loss": self.loss_fn(params, batch),
                "3 bits": self.accuracy(rounded, batch),
            }
            for name, batch in zip(("validation", "test"), self.splits, strict=True)
        }
