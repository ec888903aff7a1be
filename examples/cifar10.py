"""CIFAR-10 with a residual network: SGD, SAM, LPF-SGD and NSO side by side.

Trains on all devices with the batch split over them, saves a checkpoint after every
epoch and goes on from the last one when started again with the same settings. Writes,
for each method, metrics.csv and TensorBoard events; prints a table at the end.

Example: python examples/cifar10.py --data-dir cifar-10-batches-bin --epochs 30
"""

import csv
import dataclasses
import json
import pathlib
import shutil
import time
from typing import Literal

import cifar10_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import resnet
import rich.console
import rich.table
import tensorboardX
import tqdm
import tyro
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import flatopt
import flatopt.flax


@dataclasses.dataclass
class Config:
    """Settings of the comparison."""

    data_dir: pathlib.Path | None = None
    """Folder of CIFAR-10: binary files, Python pickles or parquet files. Without it,
    tensorflow_datasets or datasets."""
    output: pathlib.Path = pathlib.Path("results/cifar10")
    """Folder of results; each method has its own in it."""
    resume: bool = True
    """Go on from the last checkpoint; otherwise start again and delete it."""
    methods: tuple[Literal["sgd", "sam", "lpf_sgd", "nso"], ...] = (
        "sgd",
        "sam",
        "lpf_sgd",
        "nso",
    )
    """Methods to train, one after another."""
    epochs: int = 100
    """Passes over the training images."""
    equal_budget: bool = True
    """Spend the same number of gradients on every method: SAM and NSO, which take two
    a step, get half the epochs."""
    batch_size: int = 128
    """Images a step, over all devices."""
    learning_rate: float = 0.1
    """Learning rate at the start; it falls to zero along half a cosine."""
    momentum: float = 0.9
    """Coefficient of the momentum buffer."""
    weight_decay: float = 5e-4
    """Coefficient of the parameters added to the gradient."""
    rho: float = 0.05
    """Length of SAM's ascent step."""
    gamma: float = 5e-4
    """Noise of LPF-SGD at the start, in units of the filter norm."""
    gamma_growth: float = 15.0
    """By how much that noise grows along training."""
    num_samples: int = 8
    """Chunks of the batch for LPF-SGD, each with its own noise."""
    sigma: float = 0.01
    """Standard deviation of NSO's noise."""
    width: int = 64
    """Channels of the first stage."""
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks of each stage; 2 2 2 2 is ResNet-18, 3 4 6 3 is ResNet-34."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters and their updates stay in float32."""
    augment: bool = True
    """Crop and mirror training images at random."""
    num_train: int = 50_000
    """Number of training images."""
    num_test: int = 10_000
    """Number of test images."""
    seed: int = 0
    """Seed of the start, the order of images, crops and noise."""
    smoke: bool = False
    """A tiny version that only shows that everything runs."""


SMOKE = {"epochs": 4, "batch_size": 16, "num_train": 64, "num_test": 32}
SMOKE |= {"width": 8, "blocks": (1, 1), "num_samples": 2}


# Model


def make_model(config):
    """A new network; jitted, or each parameter would be compiled by itself."""
    dtype = jnp.bfloat16 if config.bfloat16 else jnp.float32
    return nnx.jit(
        lambda: resnet.ResNet(config.width, config.blocks, dtype, nnx.Rngs(config.seed))
    )()


MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


def logits_of(model, images):
    return model((images / 255.0 - jnp.array(MEAN)) / jnp.array(STD))


def loss_fn(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
        logits_of(model, batch["images"]), batch["labels"]
    ).mean()


# Methods

GRADIENTS_A_STEP = {"sgd": 1, "sam": 2, "lpf_sgd": 1, "nso": 2}


def make_transformation(method, config, num_steps):
    """The optimizer of a method: a plain optax transformation."""
    rate = optax.cosine_decay_schedule(config.learning_rate, num_steps)
    sgd = {"momentum": config.momentum, "weight_decay": config.weight_decay}
    match method:
        case "sgd":
            return optax.chain(
                optax.add_decayed_weights(config.weight_decay),
                optax.sgd(rate, config.momentum),
            )
        case "sam":
            return flatopt.sam_sgd(rate, config.rho, **sgd)
        case "lpf_sgd":
            gamma = flatopt.schedules.cosine_growth(
                config.gamma, config.gamma_growth, num_steps
            )
            return flatopt.lpf_sgd(
                rate, gamma, config.num_samples, key=config.seed, **sgd
            )
        case "nso":
            return flatopt.nso_sgd(rate, config.sigma, key=config.seed, **sgd)


@nnx.jit
def plain_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def flat_step(model, optimizer, batch):
    # Gradients at perturbed parameters; running statistics from one clean forward pass.
    return flatopt.flax.update(optimizer, model, loss_fn, batch=batch)


@nnx.jit
def moved_loss(model, key, batch):
    """The loss after filter-wise noise of scale 0.05 has moved the parameters."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_of(params):
        return loss_fn(nnx.merge(graphdef, params, rest), batch)

    return flatopt.smooth(loss_of, 0.05, flatopt.kernels.filterwise())(key, params)


@nnx.jit
def evaluate_batch(model, batch):
    """Sums of losses and of hits; images of label -1 are padding."""
    logits, labels = logits_of(model, batch["images"]), batch["labels"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, abs(labels))
    hits = logits.argmax(axis=-1) == labels
    return jnp.sum(losses * (labels >= 0)), hits.sum()


# Data


def make_mesh():
    """All devices on one axis."""
    return jax.make_mesh(
        (jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )


def put(batch, mesh):
    """Split a batch over the devices."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def training_batches(data, config, epoch):
    """One epoch in random order. It follows from seed and epoch: nothing to save."""
    rng = np.random.default_rng((config.seed, epoch))
    order = rng.permutation(len(data["labels"]))
    for start in range(0, len(order) - config.batch_size + 1, config.batch_size):
        chosen = order[start : start + config.batch_size]
        images = data["images"][chosen]
        if config.augment:
            images = augment(rng, images)
        yield {"images": images, "labels": data["labels"][chosen]}


def augment(rng, images):
    """Crop at random from images padded by 4 pixels and mirror half of them."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    rows, columns = rng.integers(0, 9, (2, len(images), 1)) + np.arange(32)
    crops = padded[
        np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]
    ]
    mirrored = rng.random(len(images)) < 0.5
    crops[mirrored] = crops[mirrored, :, ::-1]
    return crops


def evaluate(model, data, config, mesh):
    """Mean loss and accuracy with running statistics."""
    view = nnx.view(model, use_running_average=True)
    loss = hits = 0.0
    for start in range(0, len(data["labels"]), config.batch_size):
        batch = {k: v[start : start + config.batch_size] for k, v in data.items()}
        missing = config.batch_size - len(batch["labels"])
        batch = {
            "images": np.pad(batch["images"], ((0, missing), *[(0, 0)] * 3)),
            "labels": np.pad(batch["labels"], (0, missing), constant_values=-1),
        }
        batch_loss, batch_hits = evaluate_batch(view, put(batch, mesh))
        loss, hits = loss + float(batch_loss), hits + int(batch_hits)
    return loss / len(data["labels"]), hits / len(data["labels"])


def measure_flatness(model, data, config, mesh):
    """Mean rise of the training loss under noise, with its standard error."""
    view = nnx.view(model, use_running_average=True)
    images = {k: v[: config.batch_size] for k, v in data.items()}
    batch = put(images, mesh)
    keys = jax.random.split(jax.random.key(config.seed), 32)
    rises = np.array([moved_loss(view, key, batch) for key in keys])
    rises -= float(nnx.jit(loss_fn)(view, batch))
    return rises.mean(), rises.std(ddof=1) / len(rises) ** 0.5


# Training


class Run:
    """One method: its model, optimizer, checkpoints and metrics."""

    def __init__(self, method, config, mesh):
        self.method, self.config, self.mesh = method, config, mesh
        cost = GRADIENTS_A_STEP[method] if config.equal_budget else 1
        self.num_epochs = max(1, config.epochs // cost)
        self.steps_an_epoch = config.num_train // config.batch_size
        num_steps = self.num_epochs * self.steps_an_epoch
        self.model = make_model(config)
        self.optimizer = nnx.Optimizer(
            self.model, make_transformation(method, config, num_steps), wrt=nnx.Param
        )
        self._set_state(
            jax.device_put(self._state(), NamedSharding(mesh, PartitionSpec()))
        )
        self.step = plain_step if method == "sgd" else flat_step
        self.folder = open_folder(config, method)
        self.checkpoints = orbax.checkpoint.CheckpointManager(
            (self.folder / "checkpoints").absolute(),
            options=orbax.checkpoint.CheckpointManagerOptions(max_to_keep=2),
        )
        self.epoch = self._restore()

    def _state(self):
        return nnx.state((self.model, self.optimizer))

    def _set_state(self, state):
        nnx.update((self.model, self.optimizer), state)

    def _restore(self):
        """Take the newest checkpoint, if there is one; return the epochs it has seen."""
        epoch = self.checkpoints.latest_step()
        if epoch is None:
            return 0
        like = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, self._state())
        restore = orbax.checkpoint.args.StandardRestore(like)
        self._set_state(self.checkpoints.restore(epoch, args=restore))
        return epoch

    def save(self):
        """Save model and optimizer, with its count of steps and the key of its noise."""
        self.checkpoints.save(
            self.epoch, args=orbax.checkpoint.args.StandardSave(self._state())
        )

    def train_epoch(self, data, progress):
        """Train on every image once; return the mean of the losses."""
        losses = []
        for batch in training_batches(data, self.config, self.epoch):
            loss = self.step(self.model, self.optimizer, put(batch, self.mesh))
            losses.append(loss)
            progress.update()
            if len(losses) % 20 == 0:
                progress.set_postfix(loss=f"{float(loss):.3f}")
        self.epoch += 1
        return float(np.mean(jax.device_get(losses)))

    def train(self, data):
        """Train what is left of the epochs."""
        if self.epoch == self.num_epochs:
            return
        metrics = Metrics(self.folder, self.epoch)
        steps = [epoch * self.steps_an_epoch for epoch in (self.epoch, self.num_epochs)]
        with tqdm.tqdm(desc=self.method, initial=steps[0], total=steps[1]) as progress:
            while self.epoch < self.num_epochs:
                start = time.perf_counter()
                train_loss = self.train_epoch(data["train"], progress)
                seconds = time.perf_counter() - start
                loss, accuracy = evaluate(
                    self.model, data["test"], self.config, self.mesh
                )
                metrics.write(
                    epoch=self.epoch,
                    gradients=self.num_gradients(),
                    train_loss=train_loss,
                    test_loss=loss,
                    test_accuracy=accuracy,
                    seconds=seconds,
                    **link_metrics(self.optimizer),
                )
                self.save()
        metrics.close()
        self.checkpoints.wait_until_finished()

    def num_gradients(self):
        return self.epoch * self.steps_an_epoch * GRADIENTS_A_STEP[self.method]

    def summary(self, data):
        """What the table shows of this method."""
        train_loss, _ = evaluate(self.model, data["train"], self.config, self.mesh)
        _, accuracy = evaluate(self.model, data["test"], self.config, self.mesh)
        rise, error = measure_flatness(
            self.model, data["train"], self.config, self.mesh
        )
        seconds = sum(float(row["seconds"]) for row in read_metrics(self.folder))
        return {
            "epochs": str(self.epoch),
            "gradients": f"{self.num_gradients():,}",
            "train loss": f"{train_loss:.3f}",
            "rise under noise": f"{rise:.3f} ± {error:.3f}",
            "test accuracy %": f"{100 * accuracy:.1f}",
            "seconds": f"{seconds:.0f}",
        }


def link_metrics(optimizer):
    """What the link of flatopt measured in the last step: its loss, its noise or radius."""
    found = flatopt.metrics(optimizer)
    return {f"flatopt/{name}": float(value) for name, value in found.items()}


class Metrics:
    """Rows of metrics.csv and points of TensorBoard, one an epoch."""

    def __init__(self, folder, epoch):
        self.path = folder / "metrics.csv"
        # A run that was killed may have written a row after its last checkpoint.
        self.rows = [row for row in read_metrics(folder) if int(row["epoch"]) <= epoch]
        self.events = tensorboardX.SummaryWriter(
            str(folder / "tensorboard"), purge_step=epoch + 1 if epoch else None
        )

    def write(self, **row):
        self.rows.append(row)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self.path)
        for name, value in row.items():
            self.events.add_scalar(name, value, row["epoch"])

    def close(self):
        self.events.close()


def read_metrics(folder):
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def open_folder(config, method):
    """The folder of a method, empty or made with the same settings."""
    folder = config.output / method
    if not config.resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    path, settings = folder / "settings.json", settings_of(config)
    if path.exists():
        before = json.loads(path.read_text())
        changed = [k for k in settings if before.get(k) != settings[k]]
        if changed:
            raise SystemExit(
                f"{folder} was made with other settings ({', '.join(changed)}): give "
                "--no-resume to delete it, or another --output."
            )
    path.write_text(json.dumps(settings, indent=1))
    return folder


def settings_of(config):
    """The settings that decide the result, as JSON gives them back."""
    settings = dataclasses.asdict(config)
    for name in ("data_dir", "output", "resume", "methods", "smoke"):
        del settings[name]
    return json.loads(json.dumps(settings))


def check(config, mesh):
    if config.batch_size % mesh.size:
        raise SystemExit(
            f"--batch-size {config.batch_size} does not divide over {mesh.size} devices: "
            "give a multiple."
        )
    if config.num_train < config.batch_size:
        raise SystemExit(
            f"--num-train {config.num_train} is less than one batch: give at least "
            f"--batch-size {config.batch_size}."
        )


def print_table(rows, config):
    budget = "equal gradients" if config.equal_budget else "equal epochs"
    title = f"CIFAR-10, {config.num_train:,} images, {budget}, one seed"
    table = rich.table.Table(title=title)
    table.add_column("method")
    for column in next(iter(rows.values())):
        table.add_column(column, justify="right")
    for method, row in rows.items():
        table.add_row(method, *row.values())
    rich.console.Console(width=100).print(table)


def main(config: Config) -> None:
    if config.smoke:
        config = dataclasses.replace(config, **SMOKE)
    mesh = make_mesh()
    check(config, mesh)
    try:
        data = cifar10_data.load(config.data_dir, config.num_train, config.num_test)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    config = dataclasses.replace(config, num_train=len(data["train"]["labels"]))
    rows = {}
    for method in config.methods:
        run = Run(method, config, mesh)
        run.train(data)
        rows[method] = run.summary(data)
    print_table(rows, config)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
