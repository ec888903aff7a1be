"""What does a small ResNet keep of animals when it learns vehicles?

The study of forgetting.py on photographs: the six animals of CIFAR-10, then its four
vehicles, a few images halved to 16 by 16. The network has an output for each of the ten
classes; on each task it is trained and asked for the classes of that task alone, with
statistics of BatchNorm of that task's images, so that what is lost is lost in the weights.
"""

import dataclasses
import functools
import hashlib
import pathlib
import sys

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import frontiers, grid, links, photographs, residual
from common.after import Method, optimizer
from common.data import of_classes
from common.frontiers import Levels
from common.links import FILTERWISE, SGD
from common.residual import normalize, one_hot
from flax import nnx

from flatopt import curvature

sys.path.append(str(common.ROOT / "examples"))
import cifar10_data

# The share by which a phase of SAM at the end of pre-training lowers forgetting in a
# language model of 1B parameters (abstract of arXiv 2605.02105).
PAPER = {"forgetting": 0.31}
LEVELS = Levels(np.linspace(0.35, 0.55, 41), learned=0.45, tolerance=0.01)
CLASSES = {"old": (2, 3, 4, 5, 6, 7), "new": (0, 1, 8, 9)}
OF_TASK = np.array([np.isin(range(10), own) for own in CLASSES.values()], np.float32)
PLAIN = Method(None)
RATES, DECAYS, MANY_DECAYS = (0.1, 0.2), (5e-3,), (5e-4, 5e-3)


def flat_grid(*radii):
    return grid(learning_rate=RATES, weight_decay=DECAYS, radius=radii)


# Four settings each.
METHODS = {
    SGD: Method(None, grid(learning_rate=RATES, weight_decay=MANY_DECAYS)),
    "SGD, larger rate": Method(
        None, grid(learning_rate=(0.4, 0.8), weight_decay=MANY_DECAYS)
    ),
    "average of weights": Method(
        None,
        grid(
            learning_rate=RATES,
            weight_decay=DECAYS,
            radius=(0.98,),
            constant=(0.0, 1.0),
        ),
        averaged=True,
    ),
    "SAM": Method(links.sam, flat_grid(0.02, 0.1)),
    "SAM, last 10 %": Method(links.sam_at_the_end, flat_grid(0.05, 0.2)),
    "NSO": Method(links.nso, flat_grid(0.01, 0.04)),
    "LPF-SGD": Method(links.lpf(FILTERWISE), flat_grid(0.02, 0.05)),
}


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    data_dir: pathlib.Path | None = None
    """Folder of CIFAR-10: binary files, Python pickles or parquet files. Without it,
    tensorflow_datasets or datasets; with --smoke, scikit-learn's digits enlarged."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods of the first training; SGD must come first."""
    settings: int = 4
    """Number of settings that each method chooses from, spread over its grid."""
    seeds: int = 5
    """Number of final runs: start, batches and noise change, the images stay."""
    train_images: int = 2000
    """Training images of all classes; those of animals are the first task's."""
    new_images: int = 120
    """Training images of each class of vehicles."""
    validation_images: int = 800
    """Validation images of all classes."""
    test_images: int = 800
    """Test images of all classes."""
    width: int = 8
    """Channels of the network's first stage."""
    blocks: tuple[int, ...] = (1, 1, 1)
    """Blocks of each stage."""
    dtype: str = "float32"
    """What to train in."""
    batch_size: int = 32
    """Images of a batch; of the second task half of them."""
    epochs: int = 10
    """Passes over the animals of a method of one gradient a step."""
    new_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    """Learning rates of the second task."""
    new_steps: int = 96
    """Steps of plain SGD on the second task."""
    points: int = 3
    """Points along the second task."""


SMOKE = {
    "methods": (SGD,),
    "settings": 1,
    "seeds": 2,
    "train_images": 64,
    "new_images": 8,
    "validation_images": 32,
    "test_images": 32,
    "width": 4,
    "blocks": (),
    "batch_size": 16,
    "epochs": 1,
    "new_rates": (0.1,),
    "new_steps": 2,
    "points": 1,
}


class Network(residual.Network):
    """A residual network that is asked for the classes of an image's own task alone."""

    def loss_fn(self, params, batch):
        images, targets = batch
        model = nnx.merge(self.graphdef, params, self.statistics, copy=True)
        asked = targets @ OF_TASK.T @ OF_TASK > 0
        logits = jnp.where(asked, model(normalize(images)), -1e9)
        return optax.softmax_cross_entropy(logits, targets).mean()


class Training(frontiers.OneByOne, photographs.Training):
    """A network that learns animals, then vehicles."""

    levels = LEVELS

    def __init__(self, config, splits):
        self.tasks = {
            task: {name: of_classes(split, classes) for name, split in splits.items()}
            for task, classes in CLASSES.items()
        }
        train = of_classes(splits["train"], CLASSES["new"], config.new_images)
        self.tasks["new"]["train"] = train
        super().__init__(config, self.tasks["old"], Network)

    def again(self, method, setting, seed, num_steps, split):
        """Accuracies before the second task and along it, and the curvature before it."""
        config = self.config
        params = self.train(method, setting, seed, num_steps)
        curves = [self.learn(params, rate, seed, split) for rate in config.new_rates]
        old, new = np.moveaxis(np.array(curves), -1, 0)
        return {
            "before": self.correct(params, "old", split),
            "sharpness": self.relative_sharpness(params),
            "old": old,
            "new": new,
        }

    def learn(self, params, rate, seed, split):
        """Accuracies on both tasks along plain SGD on the second, a row for each point."""
        steps, found = self.config.new_steps, []
        run = {"setting": {"learning_rate": rate, "weight_decay": 0.0}, "seed": seed}
        run = jax.tree.map(jnp.asarray, run)
        carry = params, optimizer(PLAIN, run, steps).init(params)
        size = self.config.batch_size // 2
        batches = self.batches(self.tasks["new"]["train"], steps, seed, size)
        for index, batch in enumerate(batches, 1):
            carry = self.advance(PLAIN, steps, carry, run, batch)
            if index % (steps // self.config.points) == 0:
                found.append([self.correct(carry[0], t, split) for t in CLASSES])
        return found

    def correct(self, params, task, split):
        return float(self._correct(task, params, self.tasks[task][split]))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _correct(self, task, params, batch):
        """Accuracy among the classes of a task, with statistics of its own images."""
        images, labels = batch
        train = self.tasks[task]["train"][0][: photographs.CALIBRATION]
        statistics = self.network.mean_statistics(params, train)
        graphdef = self.network.evaluation_graphdef
        model = nnx.merge(graphdef, params, statistics, copy=True)
        classes = jnp.array(CLASSES[task])
        found = model(normalize(images))[:, classes].argmax(axis=1)
        return (classes[found] == labels).mean()

    @functools.partial(jax.jit, static_argnums=0)
    def relative_sharpness(self, params):
        """Curvature of the first loss along the gradient of the second."""
        old, new = (
            (images[:250], one_hot(labels[:250]))
            for images, labels in (self.tasks[task]["train"] for task in CLASSES)
        )
        loss_fn = self.network.loss_fn
        grads = jax.grad(loss_fn)(params, new)
        hessian = curvature.hessian(loss_fn, params, old)
        return hessian.quadratic_form(grads) / optax.tree.norm(grads, squared=True)


def compute(config, piece):
    try:
        splits = photographs.load(config, cifar10_data.load)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    training = Training(config, splits)
    methods = {name: METHODS[name] for name in config.methods}
    with common.shown(piece) as piece:
        found = frontiers.study(piece, "ResNet", training, methods, LEVELS)
    return {
        "paper": PAPER,
        "tolerance": LEVELS.tolerance,
        "learned": LEVELS.learned,
        "num_settings": config.settings,
        "sha256": {
            name: hashlib.sha256(images.tobytes()).hexdigest()
            for name, (images, _) in splits.items()
        },
        "images": {
            task: {name: len(labels) for name, (_, labels) in splits.items()}
            for task, splits in training.tasks.items()
        },
        **found,
    }


def draw(report):
    return frontiers.figure(report["results"], LEVELS)


def lines(report):
    return frontiers.lines("ResNet", report["results"])


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)
