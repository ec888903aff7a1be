"""A residual network on photographs: training it, and measuring how flat it became."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flatopt import curvature, kernels, sharpness

from .methods import TUNING_SEED, gradients_a_step, step
from .runs import ROOT

sys.path.append(str(ROOT / "examples"))
import resnet

RISE = 0.05  # scale of the noise under which the rise of the loss is measured
FILTERWISE = kernels.filterwise()
FLATNESS = (
    "trace",
    "trace_error",
    "max_eigenvalue",
    "max_eigenvalue_error",
    "rise",
    "rise_error",
)
MEASURES = ("train_loss", "train_error", "test_loss", "test_error", *FLATNESS)
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


class Network:
    """A residual network as functions of its parameters.

    A training step computes the statistics of BatchNorm from what it sees; those to
    evaluate with come from a pass over the training images after training.
    """

    def __init__(self, config):
        self.config = config
        key = jax.random.key(0)
        self.graphdef, _, self.statistics = self.split(self.make(key, config.dtype))
        view = nnx.view(self.make(key, "float32"), use_running_average=True)
        self.evaluation_graphdef = self.split(view)[0]

    @functools.partial(nnx.jit, static_argnums=(0, 2))
    def make(self, key, dtype):
        width, blocks = self.config.width, self.config.blocks
        model = resnet.ResNet(width, blocks, jnp.dtype(dtype), nnx.Rngs(key))
        # A forward pass leaves the statistics of its batch.
        model.set_attributes(nnx.BatchNorm, momentum=0.0)
        return model

    @staticmethod
    def split(model):
        return nnx.split(model, nnx.Param, ...)

    def start(self, seed):
        return self.split(self.make(jax.random.key(seed), "float32"))[1]

    def loss_fn(self, params, batch):
        images, targets = batch
        model = nnx.merge(self.graphdef, params, self.statistics, copy=True)
        return loss_of(model, images, targets)

    def evaluation_loss_fn(self, params, batch):
        """The loss with the statistics that each row of the batch repeats."""
        images, targets, rows = batch
        statistics = jax.tree.map(lambda row: row[0], rows)
        model = nnx.merge(self.evaluation_graphdef, params, statistics, copy=True)
        return loss_of(model, images, targets)

    @functools.partial(jax.jit, static_argnums=0)
    def statistics_of(self, params, images):
        model = nnx.merge(self.graphdef, params, self.statistics, copy=True)
        model(normalize(images))
        return self.split(model)[2]

    @functools.partial(jax.jit, static_argnums=0)
    def evaluate(self, params, statistics, images, labels):
        model = nnx.merge(self.evaluation_graphdef, params, statistics, copy=True)
        logits = model(normalize(images))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.stack([losses.sum(), jnp.sum(logits.argmax(axis=1) != labels)])

    def mean_statistics(self, params, images, size=250):
        """Statistics of BatchNorm: the mean of those of batches."""
        starts = range(0, max(1, len(images) - size + 1), size)
        found = [self.statistics_of(params, images[s : s + size]) for s in starts]
        return jax.tree.map(lambda *parts: sum(parts) / len(parts), *found)

    def loss_and_error(self, params, statistics, split, size=250):
        images, labels = split
        total = sum(
            self.evaluate(
                params, statistics, images[s : s + size], labels[s : s + size]
            )
            for s in range(0, len(labels), size)
        )
        return np.asarray(total) / len(labels)


def one_hot(labels, smoothing=0.0):
    return (1 - smoothing) * np.eye(10, dtype=np.float32)[labels] + smoothing / 10


def normalize(images):
    return (images / 255.0 - jnp.array(MEAN)) / jnp.array(STD)


def loss_of(model, images, targets):
    return optax.softmax_cross_entropy(model(normalize(images)), targets).mean()


# Training


def sgd(setting, rate, num_steps, weight_decay, key):
    del setting, num_steps, key
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, 0.9))


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What to train on, and how long.

    An optimizer is ``make(setting, rate, num_steps, weight_decay=, key=)``; all but `sgd`
    take the loss.
    """

    network: Network
    splits: dict
    start: Callable
    batch_size: int
    epochs: int

    @property
    def budget(self):
        """Gradients of single images."""
        return self.epochs * len(self.splits["train"][1])

    def num_steps(self, share):
        return int(share * self.budget / self.batch_size)

    def batches(self, num_steps, seed, smoothing):
        """Batches of (images, targets), epoch after epoch in random order."""
        images, labels = self.splits["train"]
        targets = one_hot(labels, smoothing)
        whole = len(labels) // self.batch_size * self.batch_size
        num_epochs = -(-num_steps * self.batch_size // whole)
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(len(labels))[:whole] for _ in range(num_epochs)]
        places = np.concatenate(orders).reshape(-1, self.batch_size)[:num_steps]
        return ((images[chosen], targets[chosen]) for chosen in places)

    def start_of(self, make, setting, seed, num_steps):
        params = self.start(seed)
        tx = make_optimizer(make, setting, num_steps, jax.random.key(seed))
        return params, tx.init(params)

    def train(self, make, setting, seed, num_steps):
        """The parameters after training once."""
        carry = self.start_of(make, setting, seed, num_steps)
        scales = scales_of(setting)
        for batch in self.batches(num_steps, seed, setting.get("smoothing", 0.0)):
            carry = advance(make, self.network, num_steps, carry, scales, batch)
        return jax.block_until_ready(carry[0])

    def error(self, params, name):
        """Share of the images of a split that are classified wrong."""
        statistics = self.network.mean_statistics(params, self.splits["train"][0])
        return self.network.loss_and_error(params, statistics, self.splits[name])[1]

    def seconds_over_sgd(self, methods, num_steps, rounds=8):
        """Of a step, the median over rounds in which each method has its turn."""
        steps = {}
        for name, method in methods.items():
            setting, count = method.settings[0], num_steps[name]
            carry = self.start_of(method.make, setting, TUNING_SEED, count)
            batch = next(self.batches(1, TUNING_SEED, 0.0))
            arguments = count, carry, scales_of(setting), batch
            steps[name] = functools.partial(
                advance, method.make, self.network, *arguments
            )
            jax.block_until_ready(steps[name]())  # compiles
        seconds = {name: [] for name in methods}
        for _ in range(rounds):
            for name, run in steps.items():
                start = time.perf_counter()
                jax.block_until_ready(run())
                seconds[name].append(time.perf_counter() - start)
        return {n: np.median(np.divide(s, seconds["SGD"])) for n, s in seconds.items()}

    def measure(self, params, num_images, num_probes):
        """Losses and errors, and how flat the loss of some training images is."""
        network, (images, labels) = self.network, self.splits["train"]
        statistics = network.mean_statistics(params, images)
        found = {}
        for name in ("train", "test"):
            loss, error = network.loss_and_error(params, statistics, self.splits[name])
            found |= {f"{name}_loss": loss, f"{name}_error": error}
        if not np.isfinite(found["train_loss"]):
            return found | dict.fromkeys(FLATNESS, np.nan)
        count = min(num_images, len(labels))
        rows = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (count, *x.shape)), statistics
        )
        batch = images[:count], one_hot(labels[:count]), rows
        return found | flatness(network.evaluation_loss_fn, params, batch, num_probes)


def flatness(loss_fn, params, batch, num_probes):
    """Trace, largest eigenvalue and rise of a loss, with their errors."""
    operator = curvature.hessian(loss_fn, params, batch)
    key = jax.random.key(0)
    trace = curvature.trace(operator, key, num_probes, num_deflated=4)
    top = curvature.eigenpairs(operator, key, rtol=0.02)
    rise = sharpness.low_pass(
        loss_fn,
        params,
        key,
        sigma=RISE,
        num_samples=num_probes,
        kernel=FILTERWISE,
        data=batch,
    )
    return {
        "trace": trace.value,
        "trace_error": trace.standard_error,
        "max_eigenvalue": top.values[0],
        "max_eigenvalue_error": top.residuals[0],
        "rise": rise.value,
        "rise_error": rise.standard_error,
    }


def make_optimizer(make, setting, num_steps, key):
    shape = optax.cosine_decay_schedule(1.0, num_steps)
    return make(
        setting,
        lambda count: setting["learning_rate"] * shape(count),
        num_steps,
        weight_decay=setting["weight_decay"],
        key=key,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def advance(make, network, num_steps, carry, setting, batch):
    tx = make_optimizer(make, setting, num_steps, 0)
    return step(tx, network.loss_fn, carry, make is not sgd, batch=batch)


def scales_of(setting):
    return {n: jnp.float32(value) for n, value in setting.items() if n != "smoothing"}


def gradients_of(make, setting, network, size=8):
    """Gradients of a batch a step, as flatopt counts those of single images."""
    tx, params = make_optimizer(make, setting, 100, 0), network.start(0)

    carry = params, tx.init(params)
    batch = jnp.zeros((size, 32, 32, 3)), jnp.zeros((size, 10))

    def take(value_fn, carry, batch):
        return step(tx, value_fn, carry, make is not sgd, batch=batch)

    return gradients_a_step(take, network.loss_fn, carry, batch)
