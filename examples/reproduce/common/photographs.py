"""A residual network on small photographs, and what it keeps when its weights change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from . import after
from .after import optimizer
from .data import digits_as_photographs
from .methods import TUNING_SEED, gradients_a_step, step
from .residual import Network, normalize, one_hot

CALIBRATION = 500  # training images that statistics of a changed network come from


def load(config, read):
    """Splits of (images, labels), images halved to 16 by 16.

    Args:
      config: has ``data_dir``, ``smoke`` and the numbers of images.
      read: ``cifar10_data.load``.
    """
    count = config.train_images + config.validation_images
    if config.smoke and config.data_dir is None:
        images, labels = digits_as_photographs()
        read = (images[:count], labels[:count])
        test = (images[count:], labels[count:])
    else:
        data = read(config.data_dir, count, config.test_images)
        read, test = (
            (data[name]["images"], data[name]["labels"]) for name in ("train", "test")
        )
    return {
        "train": halved(*(part[: config.train_images] for part in read)),
        "validation": halved(*(part[config.train_images :] for part in read)),
        "test": halved(*(part[: config.test_images] for part in test)),
    }


def halved(images, labels):
    """Means of squares of two by two pixels."""
    shape = len(images), 16, 2, 16, 2, 3
    return images.reshape(shape).mean(axis=(2, 4), dtype=np.float32), labels


class Training:
    """Networks trained one after the other, of all settings or seeds.

    XLA's convolutions are slow for weights under vmap, and under a loop with gradients.
    """

    def __init__(self, config, splits, network=Network):
        self.config, self.splits = config, splits
        self.network = network(config)
        size = len(splits["train"][1])
        self.num_steps = config.epochs * size // config.batch_size

    def settings(self, method):
        return method.settings[:: max(1, len(method.settings) // self.config.settings)]

    def cost(self, method, num_steps=20):
        """Gradients of a batch a step, the mean of a short training."""
        run = {"setting": method.settings[0], "seed": 0}
        tx, params = optimizer(method, run, num_steps), self.network.start(0)
        batch = jnp.zeros((8, 16, 16, 3)), jnp.zeros((8, 10))

        def take(value_fn, carry, batch):
            return step(tx, value_fn, carry, method.make is not None, batch=batch)

        carry = params, tx.init(params)
        loss_fn = self.network.loss_fn
        return gradients_a_step(take, loss_fn, carry, batch, num_steps=num_steps)

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def advance(self, method, num_steps, carry, run, batch):
        tx = optimizer(method, run, num_steps)
        takes = method.make is not None
        return step(tx, self.network.loss_fn, carry, takes, batch=batch)

    def batches(self, split, num_steps, seed, size):
        """Batches of (images, targets), epoch after epoch in random order."""
        images, labels = split
        size = min(size, len(labels))
        whole = len(labels) // size * size
        rng = np.random.default_rng(seed)
        orders = [
            rng.permutation(len(labels))[:whole]
            for _ in range(-(-num_steps * size // whole))
        ]
        for chosen in np.concatenate(orders).reshape(-1, size)[:num_steps]:
            yield images[chosen], one_hot(labels[chosen])

    def train(self, method, setting, seed, num_steps):
        """The parameters after training once."""
        numbers = {name: jnp.float32(value) for name, value in setting.items()}
        run = {"setting": numbers, "seed": jnp.int32(seed)}
        params = self.network.start(seed)
        carry = params, optimizer(method, run, num_steps).init(params)
        size = self.config.batch_size
        for batch in self.batches(self.splits["train"], num_steps, seed, size):
            carry = self.advance(method, num_steps, carry, run, batch)
        params, state = jax.block_until_ready(carry)
        return state[-1]["average"] if method.averaged else params

    # What is kept

    def accuracy(self, trained, batch):
        """With the statistics of BatchNorm that come with the parameters."""
        (params, statistics), (images, labels) = trained, batch
        graphdef = self.network.evaluation_graphdef
        model = nnx.merge(graphdef, params, statistics, copy=True)
        return (model(normalize(images)).argmax(axis=1) == labels).mean()

    def updated_accuracy(self, params, batch):
        """With statistics of training images, computed after the weights changed."""
        images = self.splits["train"][0][:CALIBRATION]
        statistics = self.network.mean_statistics(params, images)
        return self.accuracy((params, statistics), batch)

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def kept(self, params, batch, num_draws):
        # Statistics have one axis: no change moves them.
        images = self.splits["train"][0][:CALIBRATION]
        trained = params, self.network.mean_statistics(params, images)
        return after.kept(self.accuracy, trained, batch, num_draws)

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def kept_updated(self, params, batch, num_draws):
        return after.kept(self.updated_accuracy, params, batch, num_draws)

    def tune_kept(self, method, num_steps):
        """What every setting keeps on validation images, a mean over tuning seeds."""
        settings = self.settings(method)
        seeds = range(TUNING_SEED, TUNING_SEED + self.config.tuning_seeds)
        rows = [
            [
                self.kept(
                    self.train(method, setting, seed, num_steps),
                    self.splits["validation"],
                    2,
                )
                for seed in seeds
            ]
            for setting in settings
        ]
        means = [stacked(row, np.mean) for row in rows]
        return {"settings": settings} | stacked(means, np.stack)

    def finish_kept(self, method, num_steps, places):
        """What final runs of some settings keep on test images, by place and seed."""
        seeds, settings = range(1, 1 + self.config.seeds), self.settings(method)
        return {
            place: stacked(
                [self.finish(method, settings[place], s, num_steps) for s in seeds],
                np.stack,
            )
            for place in places
        }

    def finish(self, method, setting, seed, num_steps):
        params = self.train(method, setting, seed, num_steps)
        test, draws = self.splits["test"], self.config.draws
        updated = self.kept_updated(params, test, 1)
        return self.kept(params, test, draws) | {
            "train_accuracy": self.updated_accuracy(params, self.splits["train"]),
            **{f"updated_{name}": x for name, x in updated.items()},
        }


def stacked(rows, function):
    """``function`` of each column of a list of dicts, along its first axis."""
    rows = [{name: np.asarray(x) for name, x in row.items()} for row in rows]
    return {name: function([row[name] for row in rows], axis=0) for name in rows[0]}
